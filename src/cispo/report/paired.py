"""Statistics of paired seeds: steps to a threshold with censoring, area under the curve, paired bootstrap, sign test.

A run that never reaches the threshold is censored at its last step: it took *more* than that. Means over censored runs
are restricted means (of min(steps, budget)), which understate the slower arm; the tables say how many were censored.
Collapsed runs stay in. Left out on purpose: any test that pretends seeds are not paired.

    python -m pytest tests/test_compare.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Steps:
    """Steps until the threshold; `censored` where it was not reached within them."""

    steps: float
    censored: bool


def steps_to(points: Sequence[tuple[int, float]], threshold: float, budget: int) -> Steps:
    """The first of the (step, value) points at or above the threshold; censored at `budget` where there is none."""
    for step, value in points:
        if value >= threshold and step <= budget:
            return Steps(float(step), False)
    return Steps(float(budget), True)


def area(points: Sequence[tuple[int, float]]) -> float:
    """Mean of the value over steps, by the trapezoid rule between the points. NaN for fewer than two."""
    if len(points) < 2:
        return math.nan
    x, y = np.array(points, float).T
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def bootstrap_mean(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean with its percentile bootstrap interval over seeds."""
    drawn = _draws(len(values), resamples, seed)
    x = np.asarray(values, float)
    return _interval(float(x.mean()), x[drawn].mean(1))


def paired_difference(a: Sequence[float], b: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """mean(b − a) over pairs, with its percentile bootstrap interval: pairs are drawn together."""
    d = np.asarray(b, float) - np.asarray(a, float)
    return _interval(float(d.mean()), d[_draws(len(d), resamples, seed)].mean(1))


def paired_ratio(a: Sequence[float], b: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """mean(b) / mean(a) with its paired bootstrap interval."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    drawn = _draws(len(a), resamples, seed)
    return _interval(float(b.mean() / a.mean()), b[drawn].mean(1) / a[drawn].mean(1))


def sign_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided exact p that b − a is as often positive as negative; ties are left out (p = 1 where all tie)."""
    wins = sum(y > x for x, y in zip(a, b, strict=True))
    losses = sum(y < x for x, y in zip(a, b, strict=True))
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def _draws(n: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(resamples, n))


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))
