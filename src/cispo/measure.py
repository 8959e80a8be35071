"""What a training step is measured by, and the file in which a person can read it token by token.

Left out on purpose: statistics of plain vectors and the names of metrics (`metrics.py`), and when anything is measured
(`trainer.py`).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cispo import objectives
from cispo.config import AlgorithmConfig, CispoObjective, PpoClipObjective
from cispo.metrics import dump_line, ppo_silences, ratio_metrics, sampler_kl_metrics
from cispo.rollout import is_correct
from cispo.types import Batch, Group, LossOutput


@dataclass(frozen=True)
class Step:
    """A step's groups as rows to train on."""

    groups: Sequence[Group]
    kept: Sequence[int]  # indices of the groups that are not dropped
    owners: Sequence[tuple[int, int]]  # of each row: its group's index and its place in it
    advantages: Sequence[float]  # of each row
    batch: Batch
    measured: Mapping[str, float] = field(default_factory=dict)  # of the whole rollout, before its updates


@dataclass(frozen=True)
class Update:
    """What one optimizer update saw, token by token, for metrics and the rollout file."""

    number: int  # within the step
    rows: Sequence[int]  # of the step's batch, in the order of `batch`
    batch: Batch
    output: LossOutput
    grad_norm: float
    staleness: Mapping[int, int]  # how many of the tokens are how many optimizer updates stale

    def column(self, name: str) -> Tensor:
        return self.batch.columns[name][self.output.evaluated_T]


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, by function too, and lengths by correctness, over all of a step's completions."""
    trajectories = [t for group in groups for t in group.trajectories]
    rewards = [t.reward for t in trajectories if t.reward is not None]
    lengths = [int(t.action_mask.sum()) for t in trajectories]
    correct = [is_correct(t.rewards) for t in trajectories]
    metrics = {
        "reward/correct": statistics.fmean(correct),
        "reward/none": 1 - len(rewards) / len(trajectories),
        "rollout/length_mean": statistics.fmean(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated": statistics.fmean(t.truncated for t in trajectories),
    }
    if rewards:
        metrics |= {"reward/mean": statistics.fmean(rewards), "reward/std": statistics.pstdev(rewards)}
    for name in trajectories[0].rewards:
        given = [t.rewards[name] for t in trajectories if t.rewards[name] is not None]
        if given:
            metrics[f"reward/function/{name}"] = statistics.fmean(given)
    for name, wanted in (("correct", True), ("incorrect", False)):
        chosen = [length for length, c in zip(lengths, correct, strict=True) if c is wanted]
        if chosen:
            metrics[f"rollout/length_{name}"] = statistics.fmean(chosen)
    return metrics


def staleness_metrics(groups: Sequence[Group], version: int) -> dict[str, Any]:
    """Staleness of each sampled token in RL steps, trained by the policy of `version`."""
    versions = torch.cat([t.versions[t.action_mask] for group in groups for t in group.trajectories])
    behind = version - versions
    return {
        "staleness/steps_mean": float(behind.double().mean()),
        "staleness/steps_max": int(behind.max()),
        "staleness/histogram": torch.bincount(behind).tolist(),
    }


def update_staleness_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Staleness of each trained token in optimizer updates, at the update that trains it."""
    counts: Counter[int] = Counter()
    for update in updates:
        counts.update(update.staleness)
    tokens = counts.total()
    return {
        "staleness/updates_mean": sum(behind * n for behind, n in counts.items()) / max(1, tokens),
        "staleness/updates_max": max(counts, default=0),
    }


def token_metrics(
    updates: Sequence[Update], algorithm: AlgorithmConfig, objective: objectives.BoundObjective
) -> dict[str, float]:
    """Ratio, clipping, divergence and entropy over the tokens that went through the model in a step's updates."""
    ratios = []
    for update in updates:
        logprobs_N = update.output.logprobs_T[update.output.evaluated_T]
        ratios.append((logprobs_N - update.column("anchor_logprobs")).exp())
    evaluated = torch.cat(ratios)
    signs = torch.cat([u.column("advantages") for u in updates])
    entropy = [u.output.entropy_T[u.output.evaluated_T] for u in updates]
    pushes = push(updates, objective).abs()
    silenced = ppo_silences(evaluated, signs)
    metrics = {
        **ratio_metrics(evaluated, signs, *_bounds(algorithm, signs)),
        "clip/gradient_on_silenced": float(pushes[silenced].sum() / pushes.sum().clamp_min(1e-300)),
        "ratio/last_update_mean": float(ratios[-1].mean()),
        "ratio/last_update_max": float(ratios[-1].max()),
        "policy/entropy": float(torch.cat(entropy).mean()),
        "policy/loss": statistics.fmean(u.output.loss for u in updates),
    }
    first = updates[0]
    if first.number == 0:  # before any step on this rollout, sampler and trainer are the same policy
        logprobs_N = first.output.logprobs_T[first.output.evaluated_T]
        metrics |= sampler_kl_metrics(logprobs_N, first.column("sampler_logprobs"))
        metrics["ratio/first_update_max"] = float(ratios[0].max())
    if algorithm.kl is not None:
        estimates = [
            objectives.kl_estimate(
                u.output.logprobs_T[u.output.evaluated_T],
                u.column("reference_logprobs"),
                algorithm.kl.form,
                input_clamp=algorithm.kl.input_clamp,
                output_clamp=algorithm.kl.output_clamp,
            )
            for u in updates
        ]
        metrics["kl/reference"] = float(torch.cat(estimates).mean())
    return metrics


def push(updates: Sequence[Update], objective: objectives.BoundObjective) -> Tensor:
    """−∂loss/∂log π of each evaluated token, its weight included, by autograd of the objective: float64 [N]."""
    if objective.sequence_level and len(updates) > 1:  # rows of different updates are not one sequence
        return torch.cat([push([update], objective) for update in updates])
    logprobs_N = torch.cat([u.output.logprobs_T[u.output.evaluated_T] for u in updates]).double().requires_grad_()
    weights_N = torch.cat([u.batch.weights_T[u.output.evaluated_T] for u in updates])
    loss_N = objective(logprobs_N, **{name: torch.cat([u.column(name) for u in updates]) for name in objective.columns})
    (gradient_N,) = torch.autograd.grad((weights_N * loss_N).sum(), logprobs_N)
    return -gradient_N


def _bounds(algorithm: AlgorithmConfig, advantages_N: Tensor) -> tuple[Tensor, Tensor]:
    """The band of each token's importance weight; DISPO's depends on the sign of A."""
    objective = algorithm.objective
    low, high = 0.0, math.inf
    if isinstance(objective, CispoObjective | PpoClipObjective):
        low, high = objective.clip_low_threshold, objective.clip_high_threshold
    negative = objective.negative_bounds if isinstance(objective, CispoObjective) else (low, high)
    bands = torch.where((advantages_N < 0)[:, None], torch.tensor(negative), torch.tensor((low, high)))
    return bands[:, 0], bands[:, 1]


class RolloutFiles:
    """`rollouts/step-NNNNNN.jsonl`: one completion a line, with what its first update saw of each token.

    write_groups: how many of a step's groups are written; None: all.
    """

    def __init__(self, run_dir: Path, tokenizer: Any, write_groups: int | None) -> None:
        self._folder = run_dir / "rollouts"
        self._tokenizer = tokenizer
        self._write_groups = write_groups
        self._pieces: dict[int, str] = {}

    def write(self, number: int, step: Step, updates: Sequence[Update]) -> None:
        seen: dict[tuple[int, int], dict[str, Any]] = {}
        for update in reversed(updates):  # the first epoch's update wins
            lengths = update.batch.lengths
            parts = zip(
                update.rows,
                update.output.evaluated_T.split(lengths),
                update.output.logprobs_T.split(lengths),
                update.output.entropy_T.split(lengths),
                update.batch.weights_T.split(lengths),
                strict=True,
            )
            for row, mask, logprobs, entropy, weights in parts:
                seen[step.owners[row]] = {
                    "update": update.number,
                    "logprobs": _rounded(logprobs, mask),
                    "entropy": _rounded(entropy, mask),
                    "weights": _picked(weights, mask),
                }
        advantage = dict(zip(step.owners, step.advantages, strict=True))
        untrained = {"update": None, "logprobs": None, "entropy": None, "weights": None}
        self._folder.mkdir(exist_ok=True)
        with open(self._folder / f"step-{number:06d}.jsonl", "wb") as file:
            for i, group in enumerate(step.groups[: self._write_groups]):
                for g, t in enumerate(group.trajectories):
                    tokens = _picked(t.tokens, t.action_mask)
                    record = {
                        "step": number,
                        "admission": group.admission,
                        "sample": g,
                        "prompt_id": group.prompt.prompt_id,
                        "prompt": group.prompt.text,
                        "completion": t.text,
                        "reward": t.reward,
                        "rewards": t.rewards,
                        "correct": is_correct(t.rewards),
                        "advantage": advantage.get((i, g)),
                        "truncated": t.truncated,
                        "trained": (i, g) in seen,
                        "version": group.version,
                        "tokens": tokens,
                        "pieces": [self._piece(token) for token in tokens],
                        "sampler_logprobs": _rounded(t.sampler_logprobs, t.action_mask),
                        "versions": _picked(t.versions, t.action_mask),
                        **seen.get((i, g), untrained),
                    }
                    file.write(dump_line(record))

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.decode([token])
        return self._pieces[token]

    def drop_after(self, number: int) -> None:
        """Remove the files of later steps: a resumed run writes them again."""
        for path in self._folder.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > number:
                path.unlink()


def _picked(values: Tensor, mask: Tensor) -> list[Any]:
    """The values where the mask is true. Lists, because a step has thousands of rows of a few tokens."""
    return list(compress(values.tolist(), mask.tolist()))


def _rounded(values: Tensor, mask: Tensor) -> list[float]:
    return [round(value, 6) for value in _picked(values, mask)]
