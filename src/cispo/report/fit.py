"""ScaleRL's sigmoid of reward over compute, the power law beside it, and their ranges: numpy and nothing else.

R(C) = R_0 + (A − R_0) / (1 + (C_mid/C)^B), arXiv:2510.13786 eq. 1: A is the asymptote, C_mid the compute at which half
of the gain is reached, B the steepness. R_0 is the reward before training. The paper's procedure: skip the beginning,
grid over A and C_mid, B by least squares at each pair, keep the least sum of squares; here the grid is then refined,
because none of the paper's own C_mid lies on it. The model is linear in A, so A needs no grid: it is solved in closed
form at each (C_mid, B). Left out on purpose: runs and what may be concluded (`forecast.py`).

    python -m pytest tests/test_fit.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cispo.types import ConfigError, DataError

Array = np.ndarray

# ---------------------------------------------------------------------------------------------------------- formulas


def gain(C: Array, C_mid: Array | float, B: Array | float) -> Array:
    """1 / (1 + (C_mid/C)^B): the share of the whole gain reached at compute C; 0 at C = 0. Broadcasts."""
    with np.errstate(divide="ignore"):
        return 1 / (1 + np.exp(np.clip(B * (np.log(C_mid) - np.log(C)), -700, 700)))


@dataclass(frozen=True)
class Sigmoid:
    """R(C) = R_0 + (A − R_0) / (1 + (C_mid/C)^B), and the sum of squares of its fit."""

    A: float
    B: float
    C_mid: float
    R_0: float
    sse: float = 0.0

    def __call__(self, C: Array | float) -> Array:
        return self.R_0 + (self.A - self.R_0) * gain(np.asarray(C, float), self.C_mid, self.B)


@dataclass(frozen=True)
class PowerLaw:
    """R(C) = A − D / C^b, and the sum of squares of its fit."""

    A: float
    D: float
    b: float
    sse: float = 0.0

    def __call__(self, C: Array | float) -> Array:
        return self.A - self.D / np.asarray(C, float) ** self.b


# -------------------------------------------------------------------------------------------------------------- fits


def fit_sigmoid(
    C: Array,
    R: Array,
    *,
    R_0: float,
    A: float | None = None,
    A_max: float = 1.0,
    weights: Array | None = None,
    start: Sigmoid | None = None,
) -> Sigmoid:
    """Least squares of the sigmoid to rewards R at computes C > 0 (P points each).

    A: fixed where given (the paper compares B at A fixed), else at most `A_max` and at least R_0. weights: of each
    point, default 1. start: a fit of nearly the same data, in place of the coarse grid (a bootstrap's resamples).
    Raises DataError for fewer than 3 points.
    """
    C, R = np.asarray(C, float), np.asarray(R, float)
    W = np.ones_like(R) if weights is None else np.asarray(weights, float)
    if len(C) < 3:
        raise DataError(f"{len(C)} points cannot determine a sigmoid's three parameters; at least 3 are needed")
    if A is None and A_max <= R_0:
        raise ConfigError(f"a_max: {A_max:g} is not above the reward before training, {R_0:g}; give a larger --a-max")
    # The paper's grid over C_mid has 100 values; B is searched over all useful steepnesses (Table 1: 1.56 to 2.44).
    log_mid = np.log(C.min()) - 2, np.log(C.max()) + 4
    log_B = math.log(0.1), math.log(12.0)
    if start is None:
        mids, Bs = np.linspace(*log_mid, 100), np.linspace(*log_B, 60)
        u, v, best = _least(C, R, W, R_0, A, A_max, mids, Bs)
        du, dv = 2 * (mids[1] - mids[0]), 2 * (Bs[1] - Bs[0])
    else:
        u, v, best = math.log(start.C_mid), math.log(start.B), (math.inf, start.A)
        du, dv = 0.5, 0.3
    for _ in range(40):  # refine: the box follows the minimum and shrinks only where the minimum is inside it
        mids = np.clip(np.linspace(u - du, u + du, 9), *log_mid)
        Bs = np.clip(np.linspace(v - dv, v + dv, 9), *log_B)
        new_u, new_v, new = _least(C, R, W, R_0, A, A_max, mids, Bs)
        moved = abs(new_u - u) > 0.7 * du or abs(new_v - v) > 0.7 * dv
        if new[0] <= best[0]:
            u, v, best = new_u, new_v, new
        if not moved:
            du, dv = 0.5 * du, 0.5 * dv
    return Sigmoid(float(best[1]), math.exp(v), math.exp(u), R_0, float(best[0]))


def _least(
    C: Array, R: Array, W: Array, R_0: float, A: float | None, A_max: float, mids: Array, Bs: Array
) -> tuple[float, float, tuple[float, float]]:
    """The best (log C_mid, log B, (sum of squares, A)) of a grid, with A in closed form: the model is linear in it."""
    s = gain(C, np.exp(mids)[:, None, None], np.exp(Bs)[None, :, None])  # [mids, Bs, P]
    y = R - R_0
    sy, ss = (s * (W * y)).sum(-1), (s * s * W).sum(-1)
    height = np.full_like(ss, A - R_0) if A is not None else np.clip(sy / np.maximum(ss, 1e-300), 0, A_max - R_0)
    sse = (W * (y - height[..., None] * s) ** 2).sum(-1)  # not expanded: it would cancel where the fit is exact
    i, j = np.unravel_index(np.argmin(sse), sse.shape)
    return float(mids[i]), float(Bs[j]), (float(sse[i, j]), float(R_0 + height[i, j]))


def fit_power_law(C: Array, R: Array, *, A_max: float = 1.0) -> PowerLaw:
    """Least squares of A − D/C^b with A ≤ `A_max`: A and D in closed form, b by a grid that is refined."""
    C, R = np.asarray(C, float), np.asarray(R, float)
    if len(C) < 3:
        raise DataError(f"{len(C)} points cannot determine a power law's three parameters; at least 3 are needed")
    scale = C.min()  # D is then of the size of R, whatever the unit of compute

    def solve(b: float) -> PowerLaw:
        x = (C / scale) ** -b
        centred = x - x.mean()
        D = -(centred @ R) / max(centred @ centred, 1e-300)
        A = R.mean() + D * x.mean()
        if A_max < A:
            A, D = A_max, ((A_max - R) @ x) / (x @ x)
        return PowerLaw(float(A), float(D * scale**b), b, float(((R - A + D * x) ** 2).sum()))

    center, width, best = math.log(0.3), math.log(100.0), None
    for _ in range(40):
        grid = [solve(math.exp(t)) for t in np.linspace(center - width, center + width, 41)]
        best = min(grid if best is None else [best, *grid], key=lambda fit: fit.sse)
        center, width = math.log(best.b), width * 0.5
    return best


def profile_A(C: Array, R: Array, best: Sigmoid, *, A_max: float = 1.0) -> tuple[float, float, list[Sigmoid]]:
    """The range of A that fits about as well (95 %: the sum of squares rises by less than 3.84 residual variances).

    Returns (lowest A, highest A, the fits of that range), refitting B and C_mid at each A.
    """
    degrees = max(1, len(C) - 3)
    limit = best.sse + 3.84 * max(best.sse / degrees, 1e-12)
    accepted = [best]
    for end in (best.R_0, A_max):
        if end == best.A:
            continue
        outside = fit_sigmoid(C, R, R_0=best.R_0, A=end)
        if outside.sse <= limit:
            accepted.append(outside)
            inner = [best.A + (end - best.A) * share for share in (0.25, 0.5, 0.75)]
        else:
            near, far, inner = best.A, end, []
            for _ in range(10):  # bisection for the edge of the range
                middle = 0.5 * (near + far)
                if fit_sigmoid(C, R, R_0=best.R_0, A=middle).sse <= limit:
                    near = middle
                    inner.append(middle)
                else:
                    far = middle
        accepted += [fit_sigmoid(C, R, R_0=best.R_0, A=A) for A in inner]
    values = [fit.A for fit in accepted]
    return min(values), max(values), accepted


def bootstrap_seeds(
    curves: Sequence[tuple[Array, Array]], best: Sigmoid, *, A: float | None = None, A_max: float = 1.0,
    resamples: int = 200, seed: int = 0,
) -> list[Sigmoid]:  # fmt: skip
    """Fits to `resamples` draws with replacement of whole seeds (one curve each). Fewer than two seeds give none."""
    if len(curves) < 2:
        return []
    rng = np.random.default_rng(seed)
    C, R = np.concatenate([c for c, _ in curves]), np.concatenate([r for _, r in curves])
    owner = np.repeat(np.arange(len(curves)), [len(c) for c, _ in curves])
    fits = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(len(curves), size=len(curves)), minlength=len(curves))
        fits.append(fit_sigmoid(C, R, R_0=best.R_0, A=A, A_max=A_max, weights=times[owner], start=best))
    return fits
