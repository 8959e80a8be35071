"""From prompts to scored groups: the prompt cursor, sampling, rewards, and held-out evaluation.

`Rollouts.advance` is one turn of the one loop's first half. Synchronous training calls it until a step's groups are
ready; asynchronous training lets it run on. Everything random is a function of (run seed, admission number), so a group
that is lost can be sampled again. Left out on purpose: what is done with the groups (`trainer.py`).

Consumes: prompts of the task, slots of the buffer. Waits for: the sampler, reward functions. Unblocked by: a new
policy version (slots), finished completions and rewards. Produces: groups in the buffer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import statistics
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cispo.buffer import Buffer
from cispo.config import AsyncConfig, RolloutConfig
from cispo.types import (
    Completion,
    DataError,
    Group,
    Prompt,
    RunError,
    Sampler,
    SampleRequest,
    SampleResult,
    SamplingParams,
    Task,
    Trajectory,
)

log = logging.getLogger(__name__)

REWARD_WAIT_S = 0.05
"""How long one turn may sleep where only rewards are outstanding."""

CLOSE_S = 5.0
"""How long reward functions that are given up on may take to end."""

CORRECT = 0.5
"""A completion whose first reward function gives at least this much counts as correct."""


def is_correct(rewards: Mapping[str, float | None]) -> bool:
    first = next(iter(rewards.values()), None)
    return first is not None and first >= CORRECT


def sampling_params(config: RolloutConfig) -> SamplingParams:
    return SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop=config.stop,
        stop_token_ids=config.stop_token_ids,
    )


# ------------------------------------------------------------------------------------------------------------ cursor


@dataclass
class PromptCursor:
    """Goes through the training prompts in a shuffled order, another one each epoch, skipping retired prompts.

    A prompt is retired from later epochs when its last pass rate reached `pass_rate_ceiling` (ScaleRL §3).
    """

    prompts: Sequence[Prompt]
    seed: int
    pass_rate_ceiling: float | None = None
    epoch: int = 0
    position: int = 0
    pass_rates: dict[str, float] = field(default_factory=dict)
    _order: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("the task has no training prompts")
        self._shuffle()

    def _shuffle(self) -> None:
        generator = torch.Generator().manual_seed(request_seed(self.seed, self.epoch) >> 1)
        self._order = torch.randperm(len(self.prompts), generator=generator).tolist()

    @property
    def retired(self) -> int:
        ceiling = self.pass_rate_ceiling
        return 0 if ceiling is None else sum(rate >= ceiling for rate in self.pass_rates.values())

    def next(self) -> Prompt:
        """Raises RunError where every prompt has been retired."""
        for _ in range(2 * len(self.prompts) + 1):
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._shuffle()
            prompt = self.prompts[self._order[self.position]]
            self.position += 1
            ceiling = self.pass_rate_ceiling
            if self.epoch == 0 or ceiling is None or self.pass_rates.get(prompt.prompt_id, 0.0) < ceiling:
                return prompt
        raise RunError(
            f"every training prompt has a pass rate of at least {self.pass_rate_ceiling} and was retired; "
            "the task is solved, or rollout.pass_rate_ceiling is too low"
        )

    def restore(self, *, epoch: int, position: int, pass_rates: Mapping[str, float]) -> None:
        self.epoch, self.position, self.pass_rates = epoch, position, dict(pass_rates)
        self._shuffle()


def request_seed(run_seed: int, number: int) -> int:
    """63 bits that look random, the same on every machine."""
    digest = hashlib.blake2b(f"{run_seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ----------------------------------------------------------------------------------------------------------- scoring


class ScoringLoop:
    """An event loop in a thread of its own, so that slow reward functions do not stop decoding.

    Consumes: coroutines (`submit`). Waits for: reward functions, each with its own timeout. Unblocked by: their end.
    Produces: futures.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what is still being scored (a run that ends early) and end the thread."""

        async def cancel() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        try:
            self.submit(cancel()).result(CLOSE_S)
        except TimeoutError:  # the thread is a daemon, and dies with the process
            log.warning("a reward function keeps its event loop busy or refuses to be cancelled; it is left behind")
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


# ---------------------------------------------------------------------------------------------------------- rollouts


@dataclass
class StepCounts:
    """What happened to groups since the last step was taken."""

    dropped_groups: int = 0
    resampled: int = 0
    stragglers: int = 0
    reward_s: float = 0.0
    sampler_idle_s: float = 0.0


class Rollouts:
    """Samples and scores the groups that the buffer admits."""

    def __init__(
        self,
        *,
        config: RolloutConfig,
        asynchrony: AsyncConfig,
        task: Task,
        sampler: Sampler,
        tokenizer: Any,
        buffer: Buffer,
        cursor: PromptCursor,
        seed: int,
    ) -> None:
        self._config = config
        self._task = task
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._seed = seed
        self.buffer = buffer
        self.cursor = cursor
        self.counts = StepCounts()
        self._idle_since: float | None = None
        self.open: dict[int, tuple[Prompt, int]] = {}
        self._started: dict[int, float] = {}
        self._eager = asynchrony.max_staleness > 0
        self._straggler_timeout_s = asynchrony.straggler_timeout_s
        self._params = sampling_params(config)
        self._scoring: dict[int, Future[Group]] = {}
        self._scorer = ScoringLoop()

    def advance(self, version: int, *, wait: bool = True) -> bool:
        """One turn: admit what may be admitted, let the sampler work, score what finished, keep what was scored.

        wait: without it, only what has already finished is collected. Returns whether completions or rewards came:
        admitting and giving up groups is no progress, since both can go on for ever.
        """
        self._end_idling()
        while self.buffer.admissible(version) > 0:
            prompt = self.cursor.next()
            self.admit(self.buffer.admit(version), prompt, version)
        moved = False
        for result in self._sampler.poll(wait=wait):
            self._score(result)
            moved = True
        for number in self._scored(wait):
            self._keep(self._scoring.pop(number).result())
            moved = True
        self._drop_stragglers()
        # One that decodes in this process does so in `poll` only; another is looked at here, between two updates.
        idle = self._sampler.share_weights or not self._sampler.pending
        self._idle_since = time.monotonic() if idle else None
        if wait and not moved and not self._sampler.pending and self._scoring:
            moved = self._wait_for_rewards()
        return moved

    def _end_idling(self) -> None:
        if self._idle_since is not None:
            self.counts.sampler_idle_s += time.monotonic() - self._idle_since
        self._idle_since = None

    def _scored(self, wait: bool) -> list[int]:
        """Groups whose scores are to be collected now, in order of admission.

        Asynchronous training collects them as they come. Synchronous training collects them together, once everything
        is sampled and scored, so that which groups are sampled again does not depend on timing.
        """
        done = [number for number in sorted(self._scoring) if self._scoring[number].done()]
        together = wait and not self._sampler.pending and len(done) == len(self._scoring)
        return done if self._eager or together else []

    def _wait_for_rewards(self) -> bool:
        """For a moment. Returns whether one came."""
        waiting = [future for future in self._scoring.values() if not future.done()]
        start = time.monotonic()
        concurrent.futures.wait(waiting, REWARD_WAIT_S, concurrent.futures.FIRST_COMPLETED)
        self.counts.reward_s += time.monotonic() - start
        return any(future.done() for future in waiting)

    def _drop_stragglers(self) -> None:
        """Give up groups that have been sampled for too long; none is starved in silence."""
        if self._straggler_timeout_s is None:
            return
        late = time.monotonic() - self._straggler_timeout_s
        stragglers = [n for n, start in self._started.items() if start < late and n not in self._scoring]
        for number in stragglers:
            prompt, _ = self.open.pop(number)
            del self._started[number]
            self._sampler.cancel(number)
            self.buffer.drop(number)
            self.counts.dropped_groups += 1
            self.counts.stragglers += 1
            log.warning(
                "prompt %s was still being sampled after %g s (async.straggler_timeout_s) and its group was dropped",
                prompt.prompt_id,
                self._straggler_timeout_s,
            )

    def admit(self, number: int, prompt: Prompt, version: int) -> None:
        """Start sampling an admitted group."""
        self.open[number] = (prompt, version)
        self._started[number] = time.monotonic()
        params = replace(self._params, seed=request_seed(self._seed, number))
        self._sampler.submit(SampleRequest(number, prompt.tokens, self._config.group_size, params))

    def _score(self, result: SampleResult) -> None:
        if result.request_id not in self.open:
            return  # a straggler that was dropped and finished all the same
        prompt, version = self.open[result.request_id]
        self._scoring[result.request_id] = self._scorer.submit(self._group(result, prompt, version))

    async def _group(self, result: SampleResult, prompt: Prompt, version: int) -> Group:
        texts = self.texts(result.completions)
        ids = [completion.tokens for completion in result.completions]
        scores = await self._task.score(prompt, texts, completion_ids=ids)
        return Group(
            prompt=prompt,
            trajectories=tuple(
                self._trajectory(prompt, completion, text, rewards)
                for completion, text, rewards in zip(result.completions, texts, scores, strict=True)
            ),
            admission=result.request_id,
            version=version,
        )

    def texts(self, completions: Sequence[Completion]) -> list[str]:
        """What a person and a reward function read: special tokens such as EOS are left out."""
        return self._tokenizer.batch_decode([list(c.tokens) for c in completions], skip_special_tokens=True)

    def _trajectory(
        self, prompt: Prompt, completion: Completion, text: str, rewards: Mapping[str, float | None]
    ) -> Trajectory:
        given = [self._task.weights.get(name, 1.0) * value for name, value in rewards.items() if value is not None]
        reward = sum(given) if given else None
        truncated = completion.stop_reason == "length"
        if truncated and self._config.truncated == "penalize":
            reward = self._config.truncated_reward
        before, after = len(prompt.tokens), len(completion.tokens)
        return Trajectory(
            tokens=torch.tensor((*prompt.tokens, *completion.tokens)),
            action_mask=torch.arange(before + after) >= before,
            sampler_logprobs=torch.tensor((*([0.0] * before), *completion.logprobs)),
            versions=torch.tensor((*([-1] * before), *completion.versions)),
            text=text,
            reward=reward,
            rewards=dict(rewards),
            truncated=truncated,
        )

    def _keep(self, group: Group) -> None:
        del self.open[group.admission]
        del self._started[group.admission]
        self.cursor.pass_rates[group.prompt.prompt_id] = statistics.fmean(
            is_correct(t.rewards) for t in group.trajectories
        )
        room = self.counts.resampled < (self._config.max_resample_rounds - 1) * self._config.groups_per_step
        if self._config.zero_variance == "resample" and zero_variance(group) and room:
            self.buffer.drop(group.admission)
            self.counts.resampled += 1
            self.counts.dropped_groups += 1
        else:
            self.buffer.put(group)

    def whereabouts(self, number: int) -> str:
        """What an admitted group is waiting for, in words, and since when."""
        since = time.monotonic() - self._started[number]
        return f"{'being scored' if number in self._scoring else 'being sampled'} for {since:.0f} s"

    def take(self) -> tuple[list[Group], StepCounts]:
        """A step's groups, and what happened while they were collected."""
        groups, counts = self.buffer.take(), self.counts
        self.counts = StepCounts()
        return groups, counts

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        samples: int,
        seed: int,
        *,
        watchdog_s: float,
    ) -> Evaluation:
        """`samples` completions of each prompt by the current policy, scored. Training requests in flight go on.

        Raises RunError when the sampler, and then the reward functions, have handed over nothing for `watchdog_s`.
        """
        self._end_idling()
        first = -len(prompts)  # negative ids are evaluation's, so that they cannot meet admission numbers
        for i, prompt in enumerate(prompts):
            request = SampleRequest(first + i, prompt.tokens, samples, replace(params, seed=request_seed(seed, i)))
            self._sampler.submit(request)
        results: dict[int, SampleResult] = {}
        progress = time.monotonic()
        while len(results) < len(prompts):
            if time.monotonic() - progress > watchdog_s:
                raise RunError(
                    f"evaluation: the sampler has finished nothing for {watchdog_s:g} s (async.watchdog_s); "
                    f"{len(prompts) - len(results)} of {len(prompts)} prompts are missing"
                )
            for result in self._sampler.poll():
                progress = time.monotonic()
                if result.request_id < 0:
                    results[result.request_id - first] = result
                else:
                    self._score(result)
        futures = [self._scorer.submit(self._group(results[i], prompt, -1)) for i, prompt in enumerate(prompts)]
        waiting = set(futures)
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, watchdog_s, concurrent.futures.FIRST_COMPLETED)
            if not done:
                raise RunError(
                    f"evaluation: no completion has been scored for {watchdog_s:g} s (async.watchdog_s); "
                    f"{len(waiting)} of {len(prompts)} prompts are missing"
                )
        return Evaluation(self._task, [future.result() for future in futures])

    def close(self) -> None:
        self._scorer.close()


def zero_variance(group: Group) -> bool:
    """Whether the group's rewards (those that exist) are all equal."""
    return len({t.reward for t in group.trajectories if t.reward is not None}) <= 1


@dataclass(frozen=True)
class Evaluation:
    """Scored completions of held-out prompts."""

    task: Task
    groups: Sequence[Group]

    def metrics(self) -> dict[str, float]:
        """mean@k as `eval/accuracy`, pass@k, reward, length, truncation, and the task's own metrics."""
        trajectories = [t for group in self.groups for t in group.trajectories]
        correct = [[is_correct(t.rewards) for t in group.trajectories] for group in self.groups]
        samples = len(correct[0])
        rewards = [t.reward for t in trajectories if t.reward is not None]
        metrics = {
            "eval/accuracy": statistics.fmean(c for group in correct for c in group),
            "eval/length_mean": statistics.fmean(int(t.action_mask.sum()) for t in trajectories),
            "eval/truncated": statistics.fmean(t.truncated for t in trajectories),
        }
        if rewards:
            metrics["eval/reward"] = statistics.fmean(rewards)
        if samples > 1:
            metrics[f"eval/pass@{samples}"] = statistics.fmean(any(group) for group in correct)
        return metrics | {f"eval/{name}": value for name, value in task_metrics(self.task, self.groups).items()}


def task_metrics(task: Task, groups: Sequence[Group]) -> dict[str, float]:
    """`task/NAME`, averaged over the groups that report it."""
    seen: dict[str, list[float]] = {}
    for group in groups:
        for name, value in task.metrics(group.prompt, [t.text for t in group.trajectories]).items():
            seen.setdefault(f"task/{name}", []).append(value)
    return {name: statistics.fmean(values) for name, values in seen.items()}
