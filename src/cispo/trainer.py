"""The one loop: take a step's groups, train on them, publish the new policy.

Synchronous is asynchronous with staleness 0, so there is one loop and one buffer; who samples and who trains stands
behind the verbs of `types.py`. Left out on purpose: building those parts (`cli.py`), how groups come about
(`rollout.py`), and drawing anything on a screen (an `Observer`'s affair).

Consumes: groups from the buffer. Waits for: the oldest admitted groups. Unblocked by: sampling and rewards.
Produces: policy versions, metrics, rollout files, checkpoints.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cispo import advantages, checkpoint, corrections, objectives
from cispo.batching import make_batch, row_index_T, take_rows, with_columns, with_reduction
from cispo.config import Config, RolloutConfig
from cispo.measure import (
    RolloutFiles,
    Step,
    Update,
    reward_metrics,
    staleness_metrics,
    token_metrics,
    update_staleness_metrics,
)
from cispo.metrics import JsonlWriter, Tracker
from cispo.rollout import Evaluation, Rollouts, StepCounts, is_correct, sampling_params, task_metrics, zero_variance
from cispo.types import (
    AdamParams,
    Batch,
    DataError,
    Group,
    Learner,
    Prompt,
    RunError,
    Sampler,
    SamplingParams,
    Task,
    Trajectory,
)

TRACKED_GROUPS = 16
"""Groups of a step whose first completion trackers get as a table."""


class Observer(Protocol):
    """Who shows the run to a person."""

    def status(self, text: str) -> None: ...

    def step(self, metrics: Mapping[str, Any]) -> None: ...


@dataclass
class Timer:
    """Seconds by name, and the rest."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class Transcript:
    """One held-out prompt and what the policy wrote."""

    prompt: str
    completion: str
    correct: bool


class Trainer:
    """Runs `config.steps` RL steps. Construct it with everything it needs; `resume` before `run` to go on."""

    def __init__(
        self,
        *,
        config: Config,
        run_dir: Path,
        learner: Learner,
        sampler: Sampler,
        task: Task,
        rollouts: Rollouts,
        tokenizer: Any,
        observer: Observer,
        trackers: Sequence[Tracker] = (),
        teacher: Learner | None = None,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._learner = learner
        self._sampler = sampler
        self._task = task
        self._rollouts = rollouts
        self._observer = observer
        self._trackers = trackers
        self._teacher = teacher
        self._objective = objectives.bind(config.algorithm)
        self._files = RolloutFiles(run_dir, tokenizer, config.rollout.write_groups)
        self._interrupted = False
        self.step = 0
        self.updates = 0
        self.total_tokens = 0
        self._updates_at_version = {0: 0}
        self._writer: JsonlWriter | None = None
        self.before: list[Transcript] = []
        self.after: list[Transcript] = []
        self.first_eval: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}

    # ---------------------------------------------------------------------------------------------------- the loop

    def run(self) -> bool:
        """Train to the last step. Returns False where Ctrl-C ended it early; a checkpoint is saved either way."""
        if self._writer is None:
            self._writer = JsonlWriter(self._run_dir / "metrics.jsonl")
        every_eval, every_save = self._config.eval.every, self._config.checkpoint.every
        with _interrupts(self):
            if self.step == 0 and every_eval and not self.first_eval:
                self._write({"step": 0, "updates": 0, **self._evaluate()})
            if self.step == 0 and self._config.cluster.kind != "none":
                self.save()  # ranks that are lost before the first checkpoint go on from here
            while self.step < self._config.steps and not self._interrupted:
                metrics = self._one_step()
                if metrics is None:
                    break
                last = self.step == self._config.steps
                if every_eval and (last or self.step % every_eval == 0):
                    metrics |= self._evaluate()
                self._write(metrics)
                if not last and every_save and self.step % every_save == 0:
                    self.save()
            self.save()
        return self.step == self._config.steps

    def interrupt(self) -> None:
        """Ask the run to end after the updates of its current step."""
        self._interrupted = True
        self._observer.status("stopping after this step's updates and saving; Ctrl-C again stops at once")

    def _one_step(self) -> dict[str, Any] | None:
        """One rollout and its updates. None where an interrupt came before the step's groups were complete."""
        timer = Timer()
        self._observer.status("sampling")
        with timer.measure("sample"):
            progress = time.monotonic()
            while not self._rollouts.buffer.ready:
                if self._interrupted:
                    return None
                if self._rollouts.advance(self.step):
                    progress = time.monotonic()
                self._watch(progress)
        groups, counts = self._rollouts.take()
        self._rollouts.advance(self.step, wait=False)  # the slots just freed are sampled while this step trains
        self._observer.status("training")
        step = self._prepare(groups, timer)
        updates = self._train(step, timer)
        self.step += 1
        with timer.measure("optim"):
            self._updates_at_version[self.step] = self.updates
            self._publish()
        metrics = self._metrics(step, counts, updates, timer)
        self._files.write(self.step, step, updates)
        self._track_completions(step)
        oldest = self.step - self._config.asynchrony.max_staleness - 1
        self._updates_at_version = {v: n for v, n in self._updates_at_version.items() if v >= oldest}
        return metrics

    def _publish(self) -> None:
        """The policy of this step to whoever samples."""
        weights = None if self._sampler.share_weights else self._learner.weights()
        self._sampler.update_weights(weights, self.step)

    def _watch(self, progress: float) -> None:
        """Raises RunError, naming what the loop waits for, when nothing has moved for `async.watchdog_s`."""
        limit = self._config.asynchrony.watchdog_s
        if time.monotonic() - progress > limit:
            buffer = self._rollouts.buffer
            waiting = ", ".join(
                f"{self._rollouts.open[n][0].prompt_id} (group {n}, {self._rollouts.whereabouts(n)})"
                for n in buffer.outstanding[:5]
            )
            raise RunError(
                f"step {self.step + 1}: nothing has moved for {limit:g} s (async.watchdog_s). Waiting for "
                f"{len(buffer.outstanding)} groups, the oldest {waiting}"
            )

    # ---------------------------------------------------------------------------------------------------- training

    def _prepare(self, groups: Sequence[Group], timer: Timer) -> Step:
        """The step's rows with advantages and the log-prob columns that the objective reads."""
        algorithm, rollout = self._config.algorithm, self._config.rollout
        kept = [i for i, group in enumerate(groups) if rollout.zero_variance == "keep" or not zero_variance(group)]
        values = advantages.compute(
            algorithm.advantage,
            [[t.reward for t in groups[i].trajectories] for i in kept],
            std_eps=algorithm.advantage_eps,
            lengths=[[_trained_tokens(t, rollout) for t in groups[i].trajectories] for i in kept],
        )
        owners = [(i, g) for i in kept for g in range(len(groups[i].trajectories))]
        row_advantages = [a for group in values for a in group]
        if not owners:
            empty = torch.empty(0)
            return Step(groups, kept, owners, row_advantages, Batch((), empty.long(), empty, {}))
        trajectories = [groups[i].trajectories[g] for i, g in owners]
        batch = make_batch(trajectories, row_advantages, mask_truncated=rollout.truncated == "mask")
        versions = torch.cat([t.versions[1:] for t in trajectories]).float()
        columns, measured = self._columns(batch, timer)
        return Step(groups, kept, owners, row_advantages, with_columns(batch, versions=versions, **columns), measured)

    def _columns(self, batch: Batch, timer: Timer) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the objective reads at each position besides the sampler's log-probs, and what was measured of it.

        Log-probs under other policies are computed once per rollout, before its first update. Order as in miles:
        the correction weighs the loss; a KL in the reward and a teacher change the advantages.
        """
        algorithm, temperature = self._config.algorithm, self._config.rollout.temperature
        sampler_T, advantages_T = batch.columns["sampler_logprobs"], batch.columns["advantages"]
        columns = {"anchor_logprobs": sampler_T}
        measured: dict[str, float] = {}
        in_reward = algorithm.kl is not None and algorithm.kl.place == "reward"
        wanted = (
            in_reward
            or algorithm.correction is not None
            or algorithm.distillation is not None
            or "proximal_logprobs" in self._objective.columns
        )
        with timer.measure("forward"):
            if wanted or algorithm.anchor == "proximal":
                proximal_T = self._learner.forward(batch, temperature=temperature).logprobs_T
                columns["proximal_logprobs"] = proximal_T
            if algorithm.kl is not None:
                reference = self._learner.forward(batch, temperature=temperature, reference=True)
                columns["reference_logprobs"] = reference.logprobs_T
            if algorithm.distillation is not None:
                teacher_T = self._teacher.forward(batch, temperature=temperature).logprobs_T
        if algorithm.anchor == "proximal":
            columns["anchor_logprobs"] = proximal_T
        mask_T = batch.weights_T != 0
        if algorithm.correction is not None:
            correction = corrections.compute(
                algorithm.correction, proximal_T, sampler_T, mask_T, batch.lengths, nonfinite=algorithm.nonfinite
            )
            columns["correction_weights"] = correction.weights_T
            measured |= {f"correction/{name}": value for name, value in correction.statistics.items()}
            measured |= {f"mismatch/{k}": v for k, v in corrections.mismatch(proximal_T, sampler_T, mask_T).items()}
        if in_reward:
            advantages_T = advantages_T - objectives.reward_penalty(
                proximal_T, columns["reference_logprobs"], algorithm.kl
            )
        if algorithm.distillation is not None:
            measured["kl/teacher"] = float((proximal_T - teacher_T)[mask_T].double().mean())
            advantages_T = advantages.distilled(advantages_T, proximal_T, teacher_T, coef=algorithm.distillation.coef)
        columns["advantages"] = advantages_T
        if "rows" in self._objective.columns:
            columns["rows"] = row_index_T(batch.lengths).float()
        return columns, measured

    def _train(self, step: Step, timer: Timer) -> list[Update]:
        algorithm = self._config.algorithm
        done = []
        for _ in range(algorithm.epochs_per_rollout):
            for rows in _windows(step, algorithm.updates_per_rollout):
                window = with_reduction(
                    take_rows(step.batch, rows),
                    algorithm.reduction,
                    [step.owners[r][0] for r in rows],
                    constant=algorithm.constant or self._config.rollout.max_tokens,
                )
                # A row whose advantage is 0 has no gradient: it counts in the weights and costs no compute.
                every = algorithm.kl is not None or algorithm.entropy_bonus > 0 or algorithm.distillation is not None
                trained = [k for k, r in enumerate(rows) if every or step.advantages[r] != 0.0]
                window = take_rows(window, trained)
                with timer.measure("train"):
                    output = self._learner.forward_backward(
                        window,
                        self._objective,
                        temperature=self._config.rollout.temperature,
                        nonfinite=algorithm.nonfinite,
                        entropy_bonus=algorithm.entropy_bonus,
                    )
                with timer.measure("optim"):
                    grad_norm = self._learner.optim_step(self._adam())["grad_norm"]
                versions = window.columns["versions"][output.evaluated_T] if trained else torch.empty(0)
                behind = {
                    self.updates - self._updates_at_version[int(version)]: int(tokens)
                    for version, tokens in zip(*versions.unique(return_counts=True), strict=True)
                }
                self._rollouts.advance(self.step, wait=False)
                done.append(Update(len(done), [rows[k] for k in trained], window, output, grad_norm, behind))
                self.updates += 1
        return done

    def _adam(self) -> AdamParams:
        """The schedule's learning rate at this update: linear warm-up, then constant, linear or cosine to the end."""
        optimizer, algorithm = self._config.optimizer, self._config.algorithm
        rate = optimizer.learning_rate
        if self.updates < optimizer.warmup_updates:
            rate *= (self.updates + 1) / optimizer.warmup_updates
        elif optimizer.schedule != "constant":
            total = self._config.steps * algorithm.updates_per_rollout * algorithm.epochs_per_rollout
            progress = (self.updates - optimizer.warmup_updates) / max(1, total - optimizer.warmup_updates)
            floor = optimizer.min_learning_rate_share
            left = 1 - min(1.0, progress)
            if optimizer.schedule == "cosine":
                left = (1 - math.cos(math.pi * left)) / 2
            rate *= floor + (1 - floor) * left
        return AdamParams(
            learning_rate=rate,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            grad_clip_norm=optimizer.grad_clip_norm,
        )

    # ----------------------------------------------------------------------------------------------------- metrics

    def _metrics(self, step: Step, counts: StepCounts, updates: Sequence[Update], timer: Timer) -> dict[str, Any]:
        sampled = sum(int(t.action_mask.sum()) for group in step.groups for t in group.trajectories)
        self.total_tokens += sampled
        dropped = counts.dropped_groups + len(step.groups) - len(step.kept)
        seconds = timer.seconds
        trained = [u for u in updates if bool(u.output.evaluated_T.any())]
        overlapped = self._config.asynchrony.max_staleness > 0  # then time/sample_s is only what was waited
        metrics: dict[str, Any] = {
            "step": self.step,
            "updates": self.updates,
            **{f"time/{name}_s": seconds.get(name, 0.0) for name in ("sample", "forward", "train", "optim")},
            "time/reward_s": counts.reward_s,
            "time/sampler_idle_s": counts.sampler_idle_s,
            "tokens/sampled": sampled,
            "tokens/trained": sum(int(u.output.evaluated_T.sum()) for u in updates),
            "tokens/total": self.total_tokens,
            "tokens/sample_per_s": sampled / (timer.total if overlapped else seconds["sample"]),
            "tokens/train_per_s": sum(sum(u.batch.lengths) for u in updates) / seconds["train"],
            **reward_metrics(step.groups),
            **task_metrics(self._task, step.groups),
            "rollout/zero_variance": statistics.fmean(zero_variance(group) for group in step.groups),
            "rollout/dropped_groups": dropped,
            "rollout/stragglers": counts.stragglers,
            "rollout/prompts_retired": self._rollouts.cursor.retired,
            "rollout/nonfinite_dropped": sum(u.output.dropped for u in updates),
            **staleness_metrics(step.groups, self.step - 1),
            **update_staleness_metrics(updates),
            "optim/grad_norm": statistics.fmean(u.grad_norm for u in updates),
            "optim/grad_norm_max": max(u.grad_norm for u in updates),
            "optim/learning_rate": self._last_rate(),
            **step.measured,
            **(token_metrics(trained, self._config.algorithm, self._objective) if trained else {}),
        }
        metrics["time/step_s"] = timer.total
        return metrics

    def _last_rate(self) -> float:
        self.updates -= 1
        rate = self._adam().learning_rate
        self.updates += 1
        return rate

    def _evaluate(self) -> dict[str, float]:
        settings = self._config.eval
        self._observer.status("evaluating")
        start = time.perf_counter()
        evaluation = self._rollouts.evaluate(
            self._task.prompts("eval")[: settings.max_prompts],
            eval_params(self._config),
            settings.samples_per_prompt,
            self._config.seed,
            watchdog_s=self._config.asynchrony.watchdog_s,
        )
        self._remember(evaluation)
        metrics = evaluation.metrics() | {"time/eval_s": time.perf_counter() - start}
        self.first_eval = self.first_eval or metrics
        self.last_eval = metrics
        return metrics

    def _remember(self, evaluation: Evaluation) -> None:
        """Three transcripts, the same prompts each time."""
        shown = [
            Transcript(
                _prompt_text(group.prompt), group.trajectories[0].text, is_correct(group.trajectories[0].rewards)
            )
            for group in evaluation.groups[:3]
        ]
        self.before = self.before or shown
        self.after = shown

    def _track_completions(self, step: Step) -> None:
        """The first completion of some groups, for trackers that show tables."""
        if not self._trackers:
            return
        advantage = dict(zip(step.owners, step.advantages, strict=True))
        rows = [
            {
                "prompt": _prompt_text(group.prompt),
                "completion": first.text,
                "reward": first.reward,
                "advantage": advantage.get((i, 0)),
                "correct": is_correct(first.rewards),
                "truncated": first.truncated,
            }
            for i, group in enumerate(step.groups[:TRACKED_GROUPS])
            for first in group.trajectories[:1]
        ]
        for tracker in self._trackers:
            tracker.completions(rows, self.step)

    def _write(self, metrics: Mapping[str, Any]) -> None:
        self._writer.write(metrics)
        for tracker in self._trackers:
            tracker.log(metrics, metrics["step"])
        self._observer.step(metrics)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> Path:
        """A checkpoint of everything that the rest of the run depends on."""
        self._observer.status("saving a checkpoint")
        buffer, cursor = self._rollouts.buffer, self._rollouts.cursor
        state = {
            "step": self.step,
            "updates": self.updates,
            "total_tokens": self.total_tokens,
            "updates_at_version": list(self._updates_at_version.items()),
            "cursor": {"epoch": cursor.epoch, "position": cursor.position, "pass_rates": cursor.pass_rates},
            "buffer": {
                "admitted": buffer.admitted,
                "next_number": buffer.next_number,
                "outstanding": [
                    {
                        "number": n,
                        "prompt_id": self._rollouts.open[n][0].prompt_id,
                        "version": self._rollouts.open[n][1],
                    }
                    for n in buffer.outstanding
                ],
                "finished": [checkpoint.group_to_json(group) for group in buffer.finished],
            },
            "counts": asdict(self._rollouts.counts),
            "metrics_position": self._writer.position,
            "first_eval": self.first_eval,
            "last_eval": self.last_eval,
            "before": [[t.prompt, t.completion, t.correct] for t in self.before],
            "after": [[t.prompt, t.completion, t.correct] for t in self.after],
        }
        return checkpoint.save(self._run_dir, self.step, self._learner, state, keep=self._config.checkpoint.keep)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint: the same losses and rewards as a run that never stopped."""
        state = checkpoint.load_state(folder)
        self._learner.load(folder)
        self.step, self.updates, self.total_tokens = state["step"], state["updates"], state["total_tokens"]
        self._updates_at_version = dict(state["updates_at_version"])
        self.first_eval, self.last_eval = state["first_eval"], state["last_eval"]
        self.before, self.after = ([Transcript(*t) for t in state[name]] for name in ("before", "after"))
        prompts = {prompt.prompt_id: prompt for prompt in self._task.prompts("train")}
        stored, rollouts = state["buffer"], self._rollouts
        rollouts.cursor.restore(**state["cursor"])
        rollouts.counts = StepCounts(**state["counts"])
        rollouts.buffer.restore(
            admitted=stored["admitted"],
            next_number=stored["next_number"],
            outstanding=[entry["number"] for entry in stored["outstanding"]],
            finished=[checkpoint.group_from_json(record, prompts) for record in stored["finished"]],
        )
        self._publish()
        gone = [entry["prompt_id"] for entry in stored["outstanding"] if entry["prompt_id"] not in prompts]
        if gone:
            raise DataError(f"{folder}: prompt {gone[0]} is no longer in the task's data")
        for entry in stored["outstanding"]:
            rollouts.admit(entry["number"], prompts[entry["prompt_id"]], entry["version"])
        self._writer = JsonlWriter(self._run_dir / "metrics.jsonl", position=state["metrics_position"])
        self._files.drop_after(self.step)


# -------------------------------------------------------------------------------------------------------------- parts


def eval_params(config: Config) -> SamplingParams:
    """How held-out completions are sampled: as rollouts are, where `eval` does not say otherwise. No truncation."""
    changes: dict[str, Any] = {}
    if config.eval.temperature is not None:
        changes["temperature"] = config.eval.temperature
    if config.eval.max_tokens is not None:
        changes["max_tokens"] = config.eval.max_tokens
    return sampling_params(RolloutConfig.model_construct(**{**dict(config.rollout), **changes}))


def _windows(step: Step, updates: int) -> list[list[int]]:
    """The step's rows in `updates` windows of whole groups, as even as the kept groups allow; some may be empty."""
    position = {group: k for k, group in enumerate(step.kept)}
    windows: list[list[int]] = [[] for _ in range(updates)]
    for row, (group, _) in enumerate(step.owners):
        windows[position[group] * updates // len(step.kept)].append(row)
    return windows


def _prompt_text(prompt: Prompt) -> str:
    return prompt.text if isinstance(prompt.text, str) else str(prompt.text[-1].get("content", ""))


@contextlib.contextmanager
def _interrupts(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C asks for an orderly end, the second ends at once. Only the main thread may set handlers."""

    def handle(number: int, frame: Any) -> None:
        trainer.interrupt()
        signal.signal(signal.SIGINT, previous)

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: Ctrl-C is somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _trained_tokens(trajectory: Trajectory, rollout: RolloutConfig) -> int:
    """Sampled tokens of a completion that are trained on."""
    masked = rollout.truncated == "mask" and trajectory.truncated
    return 0 if masked else int(trajectory.action_mask.sum())
