"""Advantages: how much better each completion of a prompt was than its group.

Rewards come as a list of groups, one per prompt, and a group is its place in that list: two prompts with equal text are
two groups. A reward of `None` (no reward function gave one) is left out of every statistic and gets advantage 0.
A group whose rewards are all equal gets exactly 0: rounding of its mean must not become a signal.

Left out on purpose: which groups to keep (the trainer drops or resamples zero-variance groups before it comes here),
and per-token shaping. Plain float64 Python: a batch has thousands of rewards, not millions.

    python -m pytest tests/test_advantages.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Literal, get_args

from torch import Tensor

from cispo.types import ConfigError, DataError

AdvantageKind = Literal[
    "group",
    "group_mean",
    "leave_one_out",
    "leave_one_out_std",
    "batch_std",
    "batch_reward_std",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "none",
]
Rewards = Sequence[Sequence[float | None]]

STD_EPS = 1e-6
"""Added to every standard deviation, as miles and NeMo RL do; TRL and ms-swift add 1e-4."""


def _valid(group: Sequence[float | None]) -> list[float]:
    return [reward for reward in group if reward is not None]


def _std(values: Sequence[float]) -> float:
    """Unbiased standard deviation (n − 1), 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = fmean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _per_group(rewards: Rewards, advantages_of: Callable[[list[float]], list[float]]) -> list[list[float]]:
    """Apply a formula to each group's valid rewards, and put 0 where there was none or nothing to compare."""
    out = []
    for group in rewards:
        valid = _valid(group)
        informative = len(valid) > 1 and min(valid) != max(valid)
        values = iter(advantages_of(valid) if informative else [0.0] * len(valid))
        out.append([0.0 if reward is None else next(values) for reward in group])
    return out


def group(rewards: Rewards, *, std_eps: float = STD_EPS) -> list[list[float]]:
    """GRPO: (r − mean) / (std + eps) over the prompt's group, unbiased std. DeepSeekMath (arXiv:2402.03300) §4.1."""

    def advantages_of(valid: list[float]) -> list[float]:
        mean, scale = fmean(valid), _std(valid) + std_eps
        return [(r - mean) / scale for r in valid]

    return _per_group(rewards, advantages_of)


def group_mean(rewards: Rewards) -> list[list[float]]:
    """Dr. GRPO: r − mean of the group (arXiv:2503.20783)."""

    def advantages_of(valid: list[float]) -> list[float]:
        mean = fmean(valid)
        return [r - mean for r in valid]

    return _per_group(rewards, advantages_of)


def leave_one_out(rewards: Rewards) -> list[list[float]]:
    """RLOO: r − mean of the group's other rewards = (r − mean)·n/(n − 1) (arXiv:2402.14740)."""

    def advantages_of(valid: list[float]) -> list[float]:
        mean, n = fmean(valid), len(valid)
        return [(r - mean) * n / (n - 1) for r in valid]

    return _per_group(rewards, advantages_of)


def batch_std(rewards: Rewards, *, std_eps: float = STD_EPS) -> list[list[float]]:
    """ScaleRL: (r − mean of the group) / (std + eps), the std of these centred rewards over the whole batch.

    ScaleRL (arXiv:2510.13786) drops zero-variance groups first; groups that are passed here count in the std.
    """
    centred = group_mean(rewards)
    scale = _std([a for row, g in zip(centred, rewards) for a, r in zip(row, g) if r is not None]) + std_eps
    return [[a / scale for a in row] for row in centred]


def leave_one_out_std(rewards: Rewards, *, std_eps: float = STD_EPS) -> list[list[float]]:
    """NeMo RL: (r − mean) / (std + eps), mean and std of the group's *other* rewards; undivided where that std is 0."""

    def advantages_of(valid: list[float]) -> list[float]:
        out = []
        for i, r in enumerate(valid):
            others = valid[:i] + valid[i + 1 :]
            scale = _std(others) if min(others) != max(others) else 0.0
            out.append((r - fmean(others)) / (scale + std_eps if scale > 0 else 1.0))
        return out

    return _per_group(rewards, advantages_of)


def batch_reward_std(rewards: Rewards, *, std_eps: float = STD_EPS) -> list[list[float]]:
    """TRL and ms-swift `scale_rewards: batch`: (r − mean of the group) / (std + eps), std of all raw rewards."""
    scale = _std([r for g in rewards for r in _valid(g)]) + std_eps
    return [[a / scale for a in row] for row in group_mean(rewards)]


def reinforce_plus_plus(
    rewards: Rewards, *, lengths: Sequence[Sequence[int]] | None = None, baseline: bool = False
) -> list[list[float]]:
    """REINFORCE++ (arXiv:2501.03262): rewards normalised over the whole batch's tokens; variance biased, at least 1e-8.

    A completion counts as often as it has trained tokens (`lengths`, in the shape of `rewards`; None: once each).
    `baseline` subtracts the group mean first (REINFORCE++-baseline).
    """
    centred = group_mean(rewards) if baseline else none(rewards)
    counted = [
        (a, 1 if lengths is None else lengths[g][i])
        for g, row in enumerate(centred)
        for i, a in enumerate(row)
        if rewards[g][i] is not None
    ]
    total = sum(n for _, n in counted)
    if not total:
        return centred
    mean = math.fsum(a * n for a, n in counted) / total
    scale = math.sqrt(max(math.fsum(n * (a - mean) ** 2 for a, n in counted) / total, 1e-8))
    return [[0.0 if r is None else (a - mean) / scale for a, r in zip(row, g)] for row, g in zip(centred, rewards)]


def distilled(advantages_T: Tensor, student_logprobs_T: Tensor, teacher_logprobs_T: Tensor, *, coef: float) -> Tensor:
    """On-policy distillation on top of any estimator (miles' OPD): A − coef · (log π_student − log π_teacher)."""
    return advantages_T - coef * (student_logprobs_T - teacher_logprobs_T).detach()


def none(rewards: Rewards) -> list[list[float]]:
    """A = r: no baseline."""
    return [[0.0 if reward is None else float(reward) for reward in g] for g in rewards]


def compute(
    kind: AdvantageKind,
    rewards: Rewards,
    *,
    std_eps: float = STD_EPS,
    lengths: Sequence[Sequence[int]] | None = None,
) -> list[list[float]]:
    """Advantages of `kind` for the rewards of each group, in the same shape.

    std_eps is added to the standard deviation of the kinds that divide by one. lengths: trained tokens of each
    completion, which REINFORCE++ weights by.

    Raises ConfigError for an unknown kind and DataError for a NaN or infinite reward, naming group and completion.
    """
    kinds = {
        "group": partial(group, std_eps=std_eps),
        "group_mean": group_mean,
        "leave_one_out": leave_one_out,
        "leave_one_out_std": partial(leave_one_out_std, std_eps=std_eps),
        "batch_std": partial(batch_std, std_eps=std_eps),
        "batch_reward_std": partial(batch_reward_std, std_eps=std_eps),
        "reinforce_plus_plus": partial(reinforce_plus_plus, lengths=lengths),
        "reinforce_plus_plus_baseline": partial(reinforce_plus_plus, lengths=lengths, baseline=True),
        "none": none,
    }
    if kind not in kinds:
        raise ConfigError(f"advantage kind = {kind!r}: unknown; use one of {', '.join(get_args(AdvantageKind))}")
    for g, rewards_G in enumerate(rewards):
        for i, reward in enumerate(rewards_G):
            if reward is not None and not math.isfinite(reward):
                raise DataError(
                    f"reward {reward} of completion {i} in group {g} is not finite: use None where there is none"
                )
    return kinds[kind](rewards)
