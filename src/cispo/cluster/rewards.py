"""`ScoredElsewhere`: a task whose completions are scored by Ray actors, so that slow verifiers block nobody.

A worker that dies or hangs is started again and the group is scored by another; after that it ends the run. Left out on
purpose: reward functions, their timeouts and their failures (`tasks/rewards.py`), which work in the actor as at home.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayTaskError

from cispo.types import CispoError, Prompt, RunError, Task

log = logging.getLogger(__name__)

ATTEMPTS = 3


class Scorer:
    """The actor: it has the task, and scores many groups at once."""

    def __init__(self, task: Task) -> None:
        self._task = task

    async def score(self, prompt: Prompt, completions: Sequence[str], ids: Any) -> Sequence[Mapping[str, float | None]]:
        return await self._task.score(prompt, completions, completion_ids=ids)


class ScoredElsewhere:
    """The `Task` it is given, scored by workers. options: Ray's, of each worker's actor."""

    def __init__(self, task: Task, options: Sequence[Mapping[str, Any]], *, timeout_s: float) -> None:
        self._task = task
        self._timeout_s = timeout_s
        self._shared = ray.put(task)
        self._options = list(options)
        self._workers = [self._started(index) for index in range(len(options))]
        self._open = [0] * len(options)

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        return self._task.prompts(split)

    @property
    def weights(self) -> Mapping[str, float]:
        return self._task.weights

    def metrics(self, prompt: Prompt, completions: Sequence[str]) -> Mapping[str, float]:
        return self._task.metrics(prompt, completions)

    async def score(
        self, prompt: Prompt, completions: Sequence[str], *, completion_ids: Sequence[Sequence[int]] | None = None
    ) -> Sequence[Mapping[str, float | None]]:
        for _ in range(ATTEMPTS):
            index = min(range(len(self._workers)), key=self._open.__getitem__)
            worker = self._workers[index]
            self._open[index] += 1
            try:
                call = worker.score.remote(prompt, completions, completion_ids)
                return await asyncio.wait_for(asyncio.wrap_future(call.future()), self._timeout_s)
            except (RayActorError, TimeoutError) as error:
                why = "died" if isinstance(error, RayActorError) else f"hung for {self._timeout_s:g} s"
                log.warning("a reward worker %s; prompt %s is scored again", why, prompt.prompt_id)
                if self._workers[index] is worker:  # another group's failure may have replaced it already
                    ray.kill(worker)
                    self._workers[index] = self._started(index)
            except RayTaskError as error:
                cause = error.cause
                raise (
                    cause if isinstance(cause, CispoError) else RunError(f"a reward worker failed: {error}")
                ) from error
            finally:
                self._open[index] -= 1
        raise RunError(
            f"prompt {prompt.prompt_id}: its completions took {ATTEMPTS} reward workers down, or none answered within "
            f"{self._timeout_s:g} s (cluster.reward_timeout_s)"
        )

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def _started(self, index: int) -> Any:
        return ray.remote(Scorer).options(max_restarts=0, **self._options[index]).remote(self._shared)
