"""Weights on their way from the learner to the samplers, through the object store or by broadcast.

In the object store they are packed into one buffer: readers on one machine map it instead of copying it, and between
machines it travels once. A broadcast goes from device to device (`transfer.py`), while the learner has the weights that
are to be sent. Either way the driver hands on a promise, and sees the bytes only if somebody asks it for them. Left out
on purpose: what samplers do with the weights.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from cispo.transfer import Meeting
from cispo.types import RunError

Packed = tuple[list[tuple[str, str, tuple[int, ...], int]], np.ndarray]
"""(name, dtype, shape, offset in bytes) of each tensor, and the bytes."""

_ALIGNMENT = 64


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
    index, offset = [], 0
    for name, tensor in weights.items():
        index.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = np.empty(offset, dtype=np.uint8)
    for (_, _, _, start), tensor in zip(index, weights.values(), strict=True):
        flat = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
        buffer[start : start + len(flat)] = flat.numpy()
    return index, buffer


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Tensors over the packed bytes, to be read only."""
    index, buffer = packed
    weights = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it written to
        for name, kind, shape, start in index:
            dtype, count = getattr(torch, kind), math.prod(shape)
            whole = torch.frombuffer(buffer, dtype=dtype, count=count, offset=start) if count else torch.empty(0)
            weights[name] = whole.to(dtype).view(shape)
    return weights


class _Elsewhere(Mapping[str, Tensor]):
    """Weights that are fetched when one is looked at."""

    _here: dict[str, Tensor] | None = None

    @abstractmethod
    def _fetch(self) -> dict[str, Tensor]: ...

    def _fetched(self) -> dict[str, Tensor]:
        if self._here is None:
            self._here = self._fetch()
        return self._here

    def __getitem__(self, name: str) -> Tensor:
        return self._fetched()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetched())

    def __len__(self) -> int:
        return len(self._fetched())


class StoredWeights(_Elsewhere):
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


class LiveWeights(_Elsewhere):
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
