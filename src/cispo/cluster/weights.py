"""Weights on their way from the learner to the samplers, through the object store or by broadcast.

In the object store they are packed into one buffer: readers on one machine map it instead of copying it, and between
machines it travels once. A broadcast goes from device to device (`transfer.py`), while the learner has the weights that
are to be sent. Either way the driver hands on a promise, and sees the bytes only if somebody asks it for them. Left out
on purpose: what samplers do with the weights.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from cispo.transfer import Elsewhere, Layout, Meeting, size_of, write
from cispo.types import RunError

Packed = tuple[Layout, np.ndarray]
"""What is where among the bytes (one bucket), and the bytes."""


def put(value: Any) -> Any:
    """A reference to the value in the object store, which spills to disk. Raises RunError where neither has room."""
    try:
        return ray.put(value)
    except RayError as error:
        raise RunError(
            f"cluster: the object store takes no more ({error}); give `ray start` a larger --object-store-memory, or "
            "free the disk that it spills to"
        ) from error


def pack(weights: Mapping[str, Tensor]) -> Packed:
    layout = Layout.of(weights, limit=math.inf)
    buffer = np.empty(sum(map(size_of, layout.buckets)), dtype=np.uint8)
    for entry in itertools.chain.from_iterable(layout.buckets):
        write(torch.from_numpy(buffer), entry, weights[entry.name])
    return layout, buffer


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Tensors over the packed bytes, to be read only."""
    layout, buffer = packed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written to
        return dict(layout.read([torch.from_numpy(buffer)] if layout.buckets else []))


class StoredWeights(Elsewhere):
    """Weights that lie in the object store under `reference`."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def _fetch(self) -> dict[str, Tensor]:
        return unpack(ray.get(self.reference))


class Publisher(Protocol):
    """A learner that sends its weights itself."""

    changes: int
    """How often its weights have changed."""

    def meet(self, behind: Sequence[int]) -> Meeting:
        """As of `transfer.Sender`."""

    def send(self, meeting: Meeting, *, meanwhile: Callable[[], None]) -> None:
        """Its weights to the meeting. meanwhile: called now and then. Raises TransferLost."""

    def stored(self) -> StoredWeights: ...


class LiveWeights(Elsewhere):
    """The weights that the learner has at this moment, and can send as long as they are `current`."""

    def __init__(self, learner: Publisher) -> None:
        self.learner = learner
        self._changes = learner.changes

    @property
    def current(self) -> bool:
        return self.learner.changes == self._changes

    def _fetch(self) -> dict[str, Tensor]:
        if not self.current:
            raise RunError("the learner has other weights by now: look at these before its next optim_step or load")
        return dict(self.learner.stored())
