"""Learner ranks that torchrun started: the first runs the trainer, the others follow it.

A verb of the first rank is told to all, with its arguments, over gloo; then every rank runs it. A rank that dies ends
the others' collectives with an error, and torchrun ends (or restarts) the job. Left out on purpose: samplers on other
machines, which need Ray (`samplers.py`) or a vLLM server.

A follower's loop. Consumes: verbs. Waits for: the first rank. Unblocked by: the next verb, or the first rank's end.
Produces: its share of the verb.
"""

from __future__ import annotations

import datetime
import gc
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cispo.cluster.rank import build_rank
from cispo.config import Config
from cispo.sharded import ShardedLearner
from cispo.types import AdamParams, Batch, CispoError, ConfigError, LearnerLost, LossOutput, Objective

log = logging.getLogger(__name__)

IDLE_TIMEOUT = datetime.timedelta(days=7)
"""How long followers wait for a verb: as long as sampling takes. A dead first rank ends the wait at once."""


def rank_of_torchrun(config: Config) -> int:
    """This process's rank. Raises ConfigError where torchrun did not start it."""
    if "RANK" not in os.environ:
        raise ConfigError(
            "cluster.kind: torchrun, but torchrun did not start this process (RANK is not set); "
            "use torchrun --nproc-per-node N -m cispo train ..."
        )
    return int(os.environ["RANK"])


class Conductor:
    """A `Learner`: the first rank, which takes the others along."""

    def __init__(self, learner: ShardedLearner, commands: dist.ProcessGroup) -> None:
        self.loaded = learner.loaded
        self._learner = learner
        self._commands: dist.ProcessGroup | None = commands

    def forward_backward(self, batch: Batch, objective: Objective, **options: Any) -> LossOutput:
        return self._all("forward_backward", batch, objective, **options)

    def forward(self, batch: Batch, **options: Any) -> LossOutput:
        return self._all("forward", batch, **options)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        return self._all("optim_step", params)

    def weights(self) -> Mapping[str, Tensor]:
        return self._all("weights")

    def save(self, folder: Path) -> None:
        self._all("save", folder.absolute())

    def load(self, folder: Path) -> None:
        self._all("load", folder.absolute())

    def export(self, folder: Path) -> None:
        self._all("export", folder.absolute())

    def close(self) -> None:
        """Send the followers home and leave the group."""
        if self._commands is None:
            return
        try:
            _tell(self._commands, None)
        except RuntimeError as error:  # a follower is dead already, and the run ends with what it was ended by
            log.warning("not all ranks could be told to end: %s", error)
        self._commands = None
        del self._learner
        _leave()

    def _all(self, verb: str, *arguments: Any, **options: Any) -> Any:
        try:
            _tell(self._commands, (verb, arguments, options))
            return getattr(self._learner, verb)(*arguments, **options)
        except CispoError:
            raise
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LearnerLost(f"{verb}: a rank of the learner was lost or timed out: {error}") from error


def conduct(config: Config, path: str | Path) -> Conductor:
    learner = build_rank(config, path)
    return Conductor(learner, _commands())


def follow(config: Config, path: str | Path) -> None:
    learner = build_rank(config, path)
    commands = _commands()
    while (command := _tell(commands, None)) is not None:
        verb, arguments, options = command
        try:
            getattr(learner, verb)(*arguments, **options)
        except CispoError as error:  # the first rank has raised the same, and decides what comes of it
            log.info("%s: %s", verb, error)
    del learner
    _leave()


def _commands() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)


def _tell(group: dist.ProcessGroup, command: Any) -> Any:
    """The first rank's command, on every rank."""
    box = [command]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]


def _leave() -> None:
    gc.collect()  # FSDP's states refer to the group; gloo aborts at exit where they outlive it
    dist.destroy_process_group()
