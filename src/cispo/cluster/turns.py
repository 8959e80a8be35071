"""`LearnerInTurn`: a learner that shares its devices with samplers, which sleep while it works.

The loop knows of no turns: the learner's verbs put the samplers to sleep, and what the pool is asked for next wakes
them (`samplers.py`). Left out on purpose: the learner's own memory between its turns, which it keeps but for what torch
had set aside (`cispo plan` counts it).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cispo.types import AdamParams, Batch, Learner, LossOutput, Objective


class Sleepers(Protocol):
    def sleep(self) -> None:
        """Returns when all have given their memory back."""


class LearnerInTurn:
    """A `Learner`. samplers: to be set before its first verb."""

    samplers: Sleepers

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def forward_backward(self, batch: Batch, objective: Objective, **options: object) -> LossOutput:
        self.samplers.sleep()
        return self._learner.forward_backward(batch, objective, **options)

    def forward(self, batch: Batch, **options: object) -> LossOutput:
        self.samplers.sleep()
        return self._learner.forward(batch, **options)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        self.samplers.sleep()
        return self._learner.optim_step(params)

    # These need no more memory than the learner has at all times.

    def weights(self) -> Mapping[str, Tensor]:
        return self._learner.weights()

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        self._learner.load(folder)

    def export(self, folder: Path) -> None:
        self._learner.export(folder)
