"""`RayLearnerGroup`: the sharded learner's ranks as Ray actors, and one object with the verbs.

Every call goes to all ranks, its batch through the object store once. An error that the ranks have agreed upon is
raised as it is; a rank that died, or a call past its time, ends the group with LearnerLost. Whoever composed the run
then composes it again and resumes from the newest checkpoint, as after a restart of the whole job: nothing is kept of a
state that may be half a step old. Left out on purpose: the verbs themselves (`sharded.py`).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from torch import Tensor

from cispo.cluster.weights import LiveWeights, StoredWeights, pack, put
from cispo.config import Config
from cispo.transfer import Meeting
from cispo.types import AdamParams, Batch, CispoError, LearnerLost, LossOutput, Objective, RunError

log = logging.getLogger(__name__)

LOOK_S = 0.02
"""How often a call that others must take part in lets its caller look after them."""
GRACE_S = 15.0
"""After a first failure, how long the other ranks' outcomes are waited for, to tell a cause from its consequences."""


class Rank:
    """The actor. Its learner is made by `start`, so that a rank that cannot load says so like any other call."""

    def meeting_place(self) -> str:
        """Where the ranks can meet: a free port on this machine."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def devices(self) -> list[str]:
        """The GPUs that Ray gave this actor, by their names for CUDA_VISIBLE_DEVICES."""
        return list(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))

    def start(self, config: Config, path: str, rank: int, meeting_place: str) -> None:
        from cispo.cluster.rank import build_rank

        self._rank = rank
        ranks = config.cluster.learner_ranks
        self._learner = build_rank(config, path, rank=rank, world_size=ranks, init_method=meeting_place)
        self._sender = None
        if rank == 0 and config.cluster.weight_transfer == "broadcast":
            self._sender = self._learner.sender(
                ray.util.get_node_ip_address(),
                # Who waits at a door in vain should not be taken for a rank that hangs.
                patience_s=min(config.asynchrony.watchdog_s, config.cluster.learner_timeout_s / 2),
                timeout_s=config.cluster.transfer_timeout_s,
            )

    def call(self, verb: str, *arguments: Any, **options: Any) -> Any:
        result = getattr(self._learner, verb)(*arguments, **options)
        return result if self._rank == 0 else None

    def meet(self, behind: Sequence[int]) -> Meeting:
        """Of the first rank, which sends."""
        return self._sender.meet(behind)

    def send(self, meeting: Meeting) -> None:
        self._learner.send_weights(meeting, self._sender)

    def publish(self) -> tuple[bool, Any]:
        """Whole weights, packed, from the first rank."""
        weights = self._learner.weights()
        return True, pack(weights) if self._rank == 0 else None


class RayLearnerGroup:
    """A `Learner`. options: Ray's, of each rank's actor."""

    def __init__(self, config: Config, path: str | Path, options: Sequence[Mapping[str, Any]]) -> None:
        self.changes = 0
        self._broadcasts = config.cluster.weight_transfer == "broadcast"
        self._timeout_s = config.cluster.learner_timeout_s
        self._start_timeout_s = config.cluster.start_timeout_s
        actor = ray.remote(Rank)
        self.ranks = [actor.options(max_restarts=0, **chosen).remote() for chosen in options]
        meeting_place = self._wait("start", [self.ranks[0].meeting_place.remote()], self._start_timeout_s)[0]
        self._devices = [rank.devices.remote() for rank in self.ranks]
        self._starting = [
            rank.start.remote(config, str(path), number, meeting_place) for number, rank in enumerate(self.ranks)
        ]

    def wait_until_ready(self) -> None:
        """Until all ranks have loaded their model. Raises what kept one from it."""
        self._wait("start", self._starting, self._start_timeout_s)

    def devices(self) -> list[list[str]]:
        """Each rank's GPUs. Does not wait for their models."""
        return self._wait("start", self._devices, self._start_timeout_s)

    def rest(self) -> None:
        """Give back what the ranks hold and do not use, because others are about to need it."""
        self._all("rest")

    # ------------------------------------------------------------------------------------------------------- verbs

    def forward_backward(self, batch: Batch, objective: Objective, **options: Any) -> LossOutput:
        return self._all("forward_backward", put(batch), objective, **options)

    def forward(self, batch: Batch, **options: Any) -> LossOutput:
        return self._all("forward", put(batch), **options)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        self.changes += 1
        return self._all("optim_step", params)

    def weights(self) -> Mapping[str, Tensor]:
        """Where they are until somebody looks: on the ranks, or in the object store of the first rank's machine."""
        return LiveWeights(self) if self._broadcasts else self.stored()

    def stored(self) -> StoredWeights:
        results = [rank.publish.options(num_returns=2).remote() for rank in self.ranks]
        self._wait("weights", [done for done, _ in results], self._timeout_s)
        return StoredWeights(results[0][1])

    def meet(self, behind: Sequence[int]) -> Meeting:
        return self._wait("meet", [self.ranks[0].meet.remote(behind)], self._timeout_s)[0]

    def send(self, meeting: Meeting, *, meanwhile: Callable[[], None]) -> None:
        calls = [rank.send.remote(meeting) for rank in self.ranks]
        self._wait("send", calls, self._timeout_s, meanwhile=meanwhile)

    def save(self, folder: Path) -> None:
        """All ranks must see the folder's file system."""
        self._all("save", folder.absolute())

    def load(self, folder: Path) -> None:
        self.changes += 1
        self._all("load", folder.absolute())

    def export(self, folder: Path) -> None:
        self._all("export", folder.absolute())

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    # ------------------------------------------------------------------------------------------------------ inside

    def _all(self, verb: str, *arguments: Any, **options: Any) -> Any:
        if not self.ranks:
            raise LearnerLost(f"{verb}: the learner's ranks were lost and have not been started again")
        calls = [rank.call.remote(verb, *arguments, **options) for rank in self.ranks]
        return self._wait(verb, calls, self._timeout_s)[0]

    def _wait(
        self, verb: str, calls: Sequence[Any], timeout_s: float, *, meanwhile: Callable[[], None] | None = None
    ) -> list[Any]:
        """The results, in order. One failure is enough to stop waiting for long. meanwhile: called every LOOK_S."""
        deadline = time.monotonic() + timeout_s
        results: dict[Any, Any] = {}
        failures: dict[int, BaseException] = {}
        waiting = list(calls)
        while waiting and (left := deadline - time.monotonic()) > 0:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=min(left, LOOK_S) if meanwhile else left)
            if meanwhile is not None:
                meanwhile()
            for call in done:
                try:
                    results[call] = ray.get(call, timeout=60)
                except RayError as error:
                    if not failures:
                        deadline = min(deadline, time.monotonic() + GRACE_S)
                    failures[calls.index(call)] = error
        if failures or waiting:
            raise self._failure(verb, failures, [calls.index(call) for call in waiting], timeout_s)
        return [results[call] for call in calls]

    def _failure(
        self, verb: str, failures: Mapping[int, BaseException], late: Sequence[int], timeout_s: float
    ) -> Exception:
        """What to raise; unless it is the ranks' own, agreed upon, nothing of a half-done verb may be used again."""
        causes = {number: getattr(error, "cause", None) or error for number, error in failures.items()}
        agreed = next((cause for cause in causes.values() if isinstance(cause, CispoError)), None)
        dead = sorted(number for number, error in failures.items() if isinstance(error, RayActorError))
        if agreed is not None and not dead:
            return agreed
        self.close()
        if dead or (late and not failures):
            what = f"rank {', '.join(map(str, dead))} died" if dead else f"rank {', '.join(map(str, late))} hung"
            limit = "" if dead else f" for {timeout_s:g} s (cluster.learner_timeout_s or start_timeout_s)"
            log.warning("%s: %s%s", verb, what, limit)
            return LearnerLost(f"learner, {verb}: {what}{limit}")
        number, error = next(iter(failures.items()))
        return RunError(f"learner, {verb}: rank {number} failed: {error}")
