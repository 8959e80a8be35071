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
from statistics import fmean
from typing import Literal, get_args

from cispo.types import ConfigError, DataError

AdvantageKind = Literal["group", "group_mean", "leave_one_out", "batch_std", "none"]
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


def none(rewards: Rewards) -> list[list[float]]:
    """A = r: no baseline."""
    return [[0.0 if reward is None else float(reward) for reward in g] for g in rewards]


def compute(kind: AdvantageKind, rewards: Rewards) -> list[list[float]]:
    """Advantages of `kind` for the rewards of each group, in the same shape.

    Raises ConfigError for an unknown kind and DataError for a NaN or infinite reward, naming group and completion.
    """
    kinds = {
        "group": group,
        "group_mean": group_mean,
        "leave_one_out": leave_one_out,
        "batch_std": batch_std,
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
