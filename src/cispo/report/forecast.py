"""`cispo fit`: forecasts of recipes from their runs, with intervals, and an honest word where the data support none.

The formulas and fits are `fit.py`'s. Seeds of one recipe are fitted together; the range of A comes from a bootstrap
over seeds, or from the residuals where there is one seed. Left out on purpose: several metrics at once.

    cispo fit runs/a runs/b [--compute tokens|hours|flops|steps] [--skip-share 0.015] [--out fit.html]
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cispo.report.fit import Array, PowerLaw, Sigmoid, bootstrap_seeds, fit_power_law, fit_sigmoid, profile_A
from cispo.report.runs import Run, find_runs, recipes
from cispo.types import ConfigError, DataError

FEWEST_POINTS = 6
"""Three free parameters need more than three points to say anything about their error."""
WIDEST_A = 0.1
"""A forecast is refused where the 95 % range of A is wider than this share of the possible gain."""

Compute = Literal["tokens", "hours", "flops", "steps"]


@dataclass(frozen=True)
class FitOptions:
    """Forecast held-out reward over compute (ScaleRL's sigmoid), with intervals, for one recipe or several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of runs. Seeds of one recipe are found by their configs."""
    metric: str = "eval/accuracy"
    compute: Compute = "tokens"
    """tokens: sampled so far. hours: wall hours × devices. flops: 2·N per sampled and 6·N per trained token. steps."""
    devices: int = 1
    """Devices that `--compute hours` multiplies by."""
    model_params: float | None = None
    """N of `--compute flops`."""
    skip_share: float = 0.015
    """The beginning that is left out, as a share of the largest compute (the paper: 1.5k of 100k GPU-hours)."""
    skip: float | None = None
    """The same in units of compute."""
    upto: float | None = None
    """Fit only to computes up to this one; what lies beyond tests the forecast."""
    r0: float | None = None
    """Reward before training. None: as measured at step 0."""
    a_max: float = 1.0
    """The largest possible reward."""
    forecast: float = 4.0
    """How far to extrapolate, in multiples of the largest compute."""
    resamples: int = 200
    """Bootstrap draws of seeds."""
    out: Path | None = None
    """Write the report of these runs with the forecast on top (HTML)."""
    json: Path | None = None
    """Write the fits as JSON."""


def curve(run: Run, options: FitOptions) -> tuple[Array, Array]:
    """(C, R) of a run's lines that hold the metric; C in the unit of `options.compute`. May be empty."""
    seconds = flops = 0.0
    N = options.model_params or 0.0
    points = []
    for line in run.metrics:
        seconds += line.get("time/step_s") or 0.0
        flops += N * (2 * (line.get("tokens/sampled") or 0) + 6 * (line.get("tokens/trained") or 0))
        reward = line.get(options.metric)
        if reward is None:
            continue
        match options.compute:
            case "tokens":
                C = line.get("tokens/total") or 0
            case "hours":
                C = seconds / 3600 * options.devices
            case "flops":
                C = flops
            case "steps":
                C = line.get("step") or 0
        points.append((float(C), float(reward)))
    C, R = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    return C, R


@dataclass(frozen=True)
class Forecast:
    """The fit of one recipe. `A_range`: 95 %, by seeds where there are several, else from the residuals (profile)."""

    label: str
    seeds: int
    points: int
    skipped: int
    sigmoid: Sigmoid | None
    power_law: PowerLaw | None
    A_range: tuple[float, float] | None
    B_range: tuple[float, float] | None
    range_from: str
    held_out_error: float | None
    verdict: str
    supported: bool
    curves: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    line: tuple[tuple[float, float, float, float], ...]
    """(C, R, low, high) along the fit and its extrapolation."""


def forecast(label: str, runs: Sequence[Run], options: FitOptions, *, A: float | None = None) -> Forecast:
    """Fit one recipe's seeds together; `A` fixed where given. Raises DataError where no run has the metric."""
    whole = [curve(run, options) for run in runs]
    if not any(len(C) for C, _ in whole):
        raise DataError(f"{label}: metrics.jsonl has no {options.metric}; set eval.every, or choose another --metric")
    if A is not None and options.a_max < A:
        raise ConfigError(f"A fixed at {A:g} is above a_max: {options.a_max:g}; give a larger --a-max")
    last = max(float(C.max()) for C, _ in whole if len(C))
    skip = options.skip if options.skip is not None else options.skip_share * last
    upto = options.upto if options.upto is not None else last
    starts = [float(R[0]) for C, R in whole if len(C) and C[0] == 0]
    R_0 = options.r0 if options.r0 is not None else float(np.mean(starts)) if starts else None
    if R_0 is None:
        raise DataError(f"{label}: no {options.metric} at step 0 to start from; give --r0")
    used = [(C[keep], R[keep]) for C, R in whole for keep in [(C > 0) & (skip <= C) & (upto >= C)]]
    used = [(C, R) for C, R in used if len(C)]
    C = np.concatenate([c for c, _ in used]) if used else np.array([])
    R = np.concatenate([r for _, r in used]) if used else np.array([])
    skipped = sum(int(((c > 0) & (c < skip)).sum()) for c, _ in whole)
    curves = tuple((tuple(map(float, c)), tuple(map(float, r))) for c, r in whole if len(c))

    def refused(verdict: str) -> Forecast:
        return Forecast(label, len(runs), len(C), skipped, None, None, None, None, "", None, verdict, False, curves, ())

    distinct = len(np.unique(C))
    if distinct < FEWEST_POINTS:
        return refused(
            f"Too few points for a forecast: {distinct} distinct computes after the first {skip:g} {options.compute} "
            f"are left out, and three parameters need at least {FEWEST_POINTS}. Evaluate more often (eval.every) or "
            "run longer."
        )
    if R.max() <= R_0:
        return refused(f"No forecast: the reward never rose above where it started, {R_0:.3g}.")
    best = fit_sigmoid(C, R, R_0=R_0, A=A, A_max=options.a_max)
    power = fit_power_law(C, R, A_max=options.a_max)
    low, high, accepted = profile_A(C, R, best, A_max=options.a_max) if A is None else (A, A, [best])
    seeds = bootstrap_seeds(used, best, A=A, A_max=options.a_max, resamples=options.resamples)
    band_fits, range_from = accepted, "residuals (one seed: what another seed would do is not known)"
    if len(seeds):
        band_fits, range_from = seeds, f"bootstrap over {len(used)} seeds"
    A_seeds = np.percentile([f.A for f in seeds], [2.5, 97.5]) if seeds else (low, high)
    A_range = (float(A_seeds[0]), float(A_seeds[1]))
    B_all = [f.B for f in band_fits]
    B_range = (float(np.percentile(B_all, 2.5)), float(np.percentile(B_all, 97.5))) if len(B_all) > 1 else None
    Cs = np.geomspace(C.min(), last * max(1.0, options.forecast), 160)
    values = np.array([f(Cs) for f in band_fits])
    bounds = np.percentile(values, [2.5, 97.5], axis=0) if seeds else (values.min(0), values.max(0))
    line = tuple(zip(*(tuple(map(float, row)) for row in (Cs, best(Cs), bounds[0], bounds[1]))))
    beyond = [(c[c > upto], r[c > upto]) for c, r in whole]
    errors = np.concatenate([best(c) - r for c, r in beyond]) if any(len(c) for c, _ in beyond) else None
    supported, verdict = _verdict(best, low, high, A_range, float(C.max()), options, len(used))
    return Forecast(
        label, len(runs), len(C), skipped, best, power, A_range, B_range, range_from,
        None if errors is None else float(np.abs(errors).mean()), verdict, supported, curves, line,
    )  # fmt: skip


def _verdict(
    best: Sigmoid, low: float, high: float, A_range: tuple[float, float], last: float, options: FitOptions, seeds: int
) -> tuple[bool, str]:
    """Whether the data support the forecast, in one sentence."""
    low, high = min(low, A_range[0]), max(high, A_range[1])
    width = (high - low) / (options.a_max - best.R_0)
    if best.C_mid > last:
        return False, (
            f"No bend yet: the fitted midpoint, {best.C_mid:.4g} {options.compute}, lies beyond the last point, "
            f"{last:.4g}. The asymptote is a guess; run at least to twice the midpoint."
        )
    if width > WIDEST_A:
        return False, (
            f"The bend is not pinned down: every A from {low:.3f} to {high:.3f} fits about as well. "
            "Read the curve, not its end; run longer or evaluate on more prompts."
        )
    if seeds < 3:
        return True, (
            f"A = {best.A:.3f} is supported within this data, but {'one seed' if seeds == 1 else 'two seeds'} cannot "
            "show what another seed would do (the paper: ± 0.02 over three)."
        )
    return True, f"A = {best.A:.3f} is supported: the curve has bent and {seeds} seeds agree."


def compare_at_fixed_A(groups: Sequence[tuple[str, list[Run]]], options: FitOptions) -> list[Forecast]:
    """The recipes refitted with A at their average, so that B alone compares their efficiency (ScaleRL §A.7)."""
    free = [forecast(label, runs, options) for label, runs in groups]
    fitted = [f.sigmoid.A for f in free if f.sigmoid]
    if len(fitted) < 2 or len(fitted) < len(free):
        return []
    A = float(np.mean(fitted))
    return [forecast(label, runs, options, A=A) for label, runs in groups]


def fit(options: FitOptions) -> int:
    """Print the forecasts of the runs' recipes; write them as JSON and HTML where asked."""
    if not 0 <= options.skip_share < 1:
        raise ConfigError(
            f"skip_share: {options.skip_share:g} is not a share; use 0.015, or --skip in units of compute"
        )
    if options.compute == "flops" and not options.model_params:
        raise ConfigError("compute: flops needs the model's size; add --model-params 3e5")
    runs = find_runs(options.runs)
    groups = recipes(runs)
    free = [forecast(label, members, options) for label, members in groups]
    fixed = compare_at_fixed_A(groups, options) if len(groups) > 1 else []
    console = Console()
    console.print(f"{options.metric} over {options.compute}", highlight=False)
    table = Table(box=SIMPLE_HEAD)
    for name in ("recipe", "seeds", "points", "R_0", "A", "A 95 %", "B", "C_mid", "RMSE"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=name != "recipe")
    for f in free:
        table.add_row(*_cells(f))
    console.print(table)
    for f in free:
        console.print(f"[bold]{f.label}[/]: {f.verdict}", highlight=False)
        if f.sigmoid:
            end = f.line[-1]
            power_rmse = math.sqrt(f.power_law.sse / f.points)
            console.print(f"  a power law would say A = {f.power_law.A:.3f} (RMSE {power_rmse:.4f})", highlight=False)
            console.print(
                f"  at {end[0]:.4g} {options.compute}: {end[1]:.3f} ({end[2]:.3f} to {end[3]:.3f}, {f.range_from})",
                highlight=False,
            )
        if f.held_out_error is not None:
            console.print(
                f"  beyond {options.upto:g}, not fitted: mean |error| {f.held_out_error:.4f}", highlight=False
            )
    if fixed:
        console.print(f"Efficiency at A fixed to the average, {fixed[0].sigmoid.A:.3f}", highlight=False)
        table = Table(box=SIMPLE_HEAD)
        for name in ("recipe", "B", "B 95 %", "C_mid"):
            table.add_column(name, justify="left" if name == "recipe" else "right")
        for f in fixed:
            span = "–" if f.B_range is None else f"{f.B_range[0]:.2f} to {f.B_range[1]:.2f}"
            table.add_row(f.label, f"{f.sigmoid.B:.3f}", span, f"{f.sigmoid.C_mid:.4g}")
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(f) for f in free], indent=1), encoding="utf-8")
    if options.out:
        from cispo.report.page import write_page

        write_page(options.out, runs, forecasts=free, compute=options.compute, metric=options.metric)
        console.print(f"written: {options.out}", highlight=False)
    return 0


def _cells(f: Forecast) -> list[str]:
    if not f.sigmoid:
        return [f.label, str(f.seeds), str(f.points), *["–"] * 6]
    s = f.sigmoid
    return [
        f.label, str(f.seeds), str(f.points), f"{s.R_0:.3f}", f"{s.A:.3f}", f"{f.A_range[0]:.3f}–{f.A_range[1]:.3f}",
        f"{s.B:.2f}", f"{s.C_mid:.4g}", f"{math.sqrt(s.sse / f.points):.4f}",
    ]  # fmt: skip
