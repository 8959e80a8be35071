"""`cispo compare`: the experiment that every paper runs, as one command.

Every arm (a recipe, times the values of `--vary`) is trained on the same seeds, hence on the same base, prompts and
number of updates; runs go in parallel processes of one thread each. A comparison that was stopped goes on where it was:
finished runs are kept. It ends in a table (`comparison.md`, `comparison.json`) and a report page. Write the metric and
the verdict down before running. Left out on purpose: choosing the winner.

    cispo compare cispo.yaml grpo.yaml --vary algorithm.updates_per_rollout=1,4,16 --seeds 8 --out runs/fork
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

import cispo
from cispo import config as configs
from cispo.config import Config
from cispo.report.page import write_page
from cispo.report.paired import Interval, area, bootstrap_mean, paired_difference, paired_ratio, sign_test, steps_to
from cispo.report.runs import Run, is_run, read_run
from cispo.types import CispoError, ConfigError, RunError


@dataclass(frozen=True)
class CompareOptions:
    """Train several recipes on paired seeds and compare steps-to-threshold and area under the curve."""

    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Recipe files; none means the embedded default. The first arm is what the others are compared with."""
    vary: tuple[str, ...] = ()
    """path=value,value: one arm for each value; several multiply."""
    set: tuple[str, ...] = ()
    """path=value for all arms."""
    seeds: int = 8
    first_seed: int = 0
    metric: str = "eval/accuracy"
    threshold: float = 0.9
    out: Path = Path("runs/compare")
    """Folder of the comparison; one that was stopped goes on."""
    jobs: int | None = None
    """Parallel processes. None: one a core."""
    resamples: int = 10_000
    """Bootstrap draws."""


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: a config, but for the seed."""

    label: str
    slug: str
    config: Config


@dataclass(frozen=True)
class ArmResult:
    """What an arm's seeds did. Intervals are 95 %, bootstrapped over seeds.

    `difference` and `ratio` are paired, in steps against the first arm (positive, or above 1: this arm is slower);
    there is no ratio where a run of the first arm was at the threshold from the start.
    """

    label: str
    seeds: tuple[int, ...]
    steps: tuple[float, ...]
    censored: int
    mean_steps: Interval
    auc: Interval
    final: Interval
    difference: Interval | None
    ratio: Interval | None
    auc_difference: Interval | None
    sign_p: float | None


def arms(options: CompareOptions) -> list[Arm]:
    """Recipes × varied values. Raises ConfigError for a config that is wrong, and for arms that are equal."""
    axes = [_assignment(text) for text in options.vary]
    fixed = [word for text in options.set for path, values in [_assignment(text)] for word in (f"--{path}", *values)]
    found = []
    for recipe in options.recipes or (None,):
        for choice in itertools.product(*(values for _, values in axes)):
            pairs = [(path, value) for (path, _), value in zip(axes, choice)]
            words = [word for path, value in pairs for word in (f"--{path}", value)]
            config = configs.load(recipe, [*fixed, *words])
            parts = [Path(recipe).stem if recipe else None, *(f"{path.rsplit('.', 1)[-1]} {v}" for path, v in pairs)]
            label = ", ".join(part for part in parts if part) or "default"
            found.append(Arm(label, re.sub(r"[^\w.-]+", "-", label), config))
    for one, other in itertools.combinations(found, 2):
        if one.config == other.config or one.slug == other.slug:
            raise ConfigError(f"arms {one.label!r} and {other.label!r} are the same; give values that differ")
    return found


def _assignment(text: str) -> tuple[str, list[str]]:
    path, equals, values = text.partition("=")
    if not equals or not path or not values:
        raise ConfigError(f"{text!r}: expected path=value,value, such as algorithm.updates_per_rollout=1,4,16")
    return path.removeprefix("--"), values.split(",")


def compare(options: CompareOptions) -> int:
    """Run what is missing of the comparison, then write its tables and its page. Raises RunError where a run fails."""
    if options.seeds < 2:
        raise ConfigError(f"seeds: {options.seeds} cannot show how seeds differ; use at least 2, better 8")
    console = Console()
    chosen = arms(options)
    for arm in chosen:
        if not arm.config.eval.every and options.metric.startswith("eval/"):
            raise ConfigError(f"eval.every: 0 in {arm.label}, so {options.metric} is never measured; use eval.every: 1")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    # seeds go round first, so that a comparison that is stopped has every arm at the seeds it has
    jobs = [(arm, seed) for seed in seeds for arm in chosen]
    _run_all(jobs, options, console)
    runs = {(arm.label, seed): read_run(_folder(options, arm, seed)) for arm in chosen for seed in seeds}
    results = summarize([arm.label for arm in chosen], list(seeds), runs, options)
    budget = max(arm.config.steps for arm in chosen)
    table = comparison_table(results, options, budget)
    (options.out / "comparison.md").write_text(markdown(table), encoding="utf-8")
    (options.out / "comparison.json").write_text(json.dumps([asdict(r) for r in results], indent=1), encoding="utf-8")
    labels = {run.name: label for (label, _), run in runs.items()}
    write_page(options.out / "report.html", list(runs.values()), comparison=table, labels=labels)
    console.print(markdown(table), highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {options.out}/comparison.md, comparison.json, report.html", highlight=False)
    return 0


# --------------------------------------------------------------------------------------------------------- the runs


def _folder(options: CompareOptions, arm: Arm, seed: int) -> Path:
    return options.out / "runs" / f"{arm.slug}-s{seed}"


def _run_all(jobs: Sequence[tuple[Arm, int]], options: CompareOptions, console: Console) -> None:
    """Trains what is not finished, in processes that import torch once. Raises RunError with the first that fails."""
    missing = [(arm, seed) for arm, seed in jobs if not _finished(_folder(options, arm, seed), arm)]
    if len(missing) < len(jobs):
        console.print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished already", highlight=False)
    workers = min(options.jobs or os.cpu_count() or 1, max(1, len(missing)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_train, _folder(options, arm, seed), arm, seed): (arm, seed) for arm, seed in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                arm, seed = futures[future]
                future.result()
                console.print(f"{done}/{len(missing)}  {arm.label}, seed {seed}", highlight=False)
        except (CispoError, BrokenProcessPool) as error:
            raise RunError(f"{arm.label}, seed {seed}: {error}") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(folder: Path, arm: Arm) -> bool:
    return is_run(folder) and read_run(folder).last_step >= arm.config.steps


def _train(folder: Path, arm: Arm, seed: int) -> None:
    """One run, as `cispo train` in this process; what it prints goes to `logs/`."""
    resume = any((folder / "checkpoints").glob("step-*"))
    if folder.exists() and not resume:  # stopped before its first checkpoint: nothing to go on from
        shutil.rmtree(folder)
    logs = folder.parent.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    config = arm.config.model_copy(update={"seed": seed, "run_dir": str(folder), "threads": 1})
    with open(logs / f"{folder.name}.log", "a", encoding="utf-8") as log:
        cispo.train(config, resume=resume, console=Console(file=log))


# ------------------------------------------------------------------------------------------------------- the numbers


def points(run: Run, metric: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line[metric])) for line in run.metrics if line.get(metric) is not None]


def summarize(
    labels: Sequence[str], seeds: Sequence[int], runs: Mapping[tuple[str, int], Run], options: CompareOptions
) -> list[ArmResult]:
    """Every arm's numbers; paired ones against the first arm. Raises RunError where a run lacks the metric."""
    results: list[ArmResult] = []
    base_steps: list[float] = []
    base_auc: list[float] = []
    for label in labels:
        curves = [points(runs[label, seed], options.metric) for seed in seeds]
        for seed, curve in zip(seeds, curves):
            if len(curve) < 2:
                raise RunError(f"{label}, seed {seed}: fewer than two points of {options.metric}; use eval.every: 1")
        reached = [steps_to(curve, options.threshold, curve[-1][0]) for curve in curves]
        steps, auc = [r.steps for r in reached], [area(curve) for curve in curves]
        kwargs: dict[str, Any] = {"resamples": options.resamples}
        first = not results
        if first:
            base_steps, base_auc = steps, auc
        results.append(
            ArmResult(
                label,
                tuple(seeds),
                tuple(steps),
                sum(r.censored for r in reached),
                bootstrap_mean(steps, **kwargs),
                bootstrap_mean(auc, **kwargs),
                bootstrap_mean([curve[-1][1] for curve in curves], **kwargs),
                None if first else paired_difference(base_steps, steps, **kwargs),
                None if first or 0 in base_steps else paired_ratio(base_steps, steps, **kwargs),
                None if first else paired_difference(base_auc, auc, **kwargs),
                None if first else sign_test(base_steps, steps),
            )
        )
    return results


def comparison_table(results: Sequence[ArmResult], options: CompareOptions, budget: int) -> dict[str, Any]:
    """The table that the page and `comparison.md` show."""
    rows = []
    for r in results:
        rows.append(
            [
                r.label,
                " ".join(f"{s:g}" for s in r.steps),
                f"{r.censored}/{len(r.steps)}",
                str(r.mean_steps),
                "–" if r.difference is None else str(r.difference),
                "–" if r.ratio is None else str(r.ratio),
                "–" if r.sign_p is None else f"{r.sign_p:.3g}",
                str(r.auc),
                str(r.final),
            ]
        )
    return {
        "title": f"Steps to {options.metric} ≥ {options.threshold:g}",
        "notes": [
            f"{len(results[0].seeds)} paired seeds ({results[0].seeds[0]} to {results[0].seeds[-1]}), at most {budget} "
            f"steps. Differences and ratios are against “{results[0].label}”, paired by seed, with 95 % bootstrap "
            "intervals; above 0, or above 1, this arm is slower. A run that never got there counts with its last step "
            "(censored), which understates how slow it is. No run is left out."
        ],
        "columns": ["arm", "steps by seed", "censored", "mean steps", "difference", "ratio", "sign test p",
                    "area under the curve", f"final {options.metric}"],
        "rows": rows,
    }  # fmt: skip


def markdown(table: Mapping[str, Any]) -> str:
    lines = [f"## {table['title']}", "", *table["notes"], ""]
    lines += ["| " + " | ".join(table["columns"]) + " |", "|" + " --- |" * len(table["columns"])]
    lines += ["| " + " | ".join(row) + " |" for row in table["rows"]]
    return "\n".join(lines) + "\n"
