"""Runs what README.md registers, part by part, and writes results/*.md and results/*.json.

python experiments/run.py [--only a|b|c|d|control] [--work runs/experiments] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from cispo.report.compare import CompareOptions, compare
from cispo.report.runs import find_runs, read_run
from cispo.report.tokens import pusher, read_lines, silenced

HERE = Path(__file__).parent
ARMS = ("cispo", "grpo", "clip-higher")
STEPS = {1: 40, 4: 20, 16: 12}
RATES = ("1e-4", "3e-4", "1e-3")
SEEDS = 8


def recipe(name: str) -> str:
    return str(HERE / "recipes" / f"{name}.yaml")


def fork_tokens(work: Path, jobs: int | None) -> None:
    chosen: dict[str, str] = {}
    for updates, steps in STEPS.items():
        fixed = (f"algorithm.updates_per_rollout={updates}", f"steps={steps}")
        search = work / f"a-search-{updates}"
        rates = (f"optimizer.learning_rate={','.join(RATES)}",)
        options = CompareOptions(
            recipes=tuple(map(recipe, ARMS)), vary=rates, set=fixed, seeds=2, first_seed=100, out=search, jobs=jobs
        )
        compare(options)
        found = {r["label"]: r for r in json.loads((search / "comparison.json").read_text())}
        for arm in ARMS:
            rows = {rate: found[f"{arm}, learning_rate {rate}"] for rate in RATES}
            best = min(rows, key=lambda rate: (rows[rate]["mean_steps"]["value"], -rows[rate]["auc"]["value"]))
            chosen[f"{arm}/{updates}"] = best
        keep(search, f"a-search-{updates}")
    (HERE / "results" / "a-rates.json").write_text(json.dumps(chosen, indent=1) + "\n")
    for updates in reversed(STEPS):
        measure(updates, work, jobs)


def control(work: Path, jobs: int | None) -> None:
    """(a) at 1 update per rollout, with the learning rates that its search has chosen."""
    measure(1, work, jobs)


def measure(updates: int, work: Path, jobs: int | None) -> None:
    """The eight paired seeds of (a) at one number of updates per rollout."""
    chosen = _rates()
    folder = work / f"a-{updates}"
    folder.mkdir(parents=True, exist_ok=True)
    recipes = []
    for arm in ARMS:  # an arm's own learning rate makes it a recipe of its own
        path = folder / f"{arm}.yaml"
        rate = f"optimizer: {{learning_rate: {chosen[f'{arm}/{updates}']}}}\n"
        path.write_text(Path(recipe(arm)).read_text() + rate)
        recipes.append(str(path))
    fixed = (f"algorithm.updates_per_rollout={updates}", f"steps={STEPS[updates]}")
    compare(CompareOptions(recipes=tuple(recipes), set=fixed, seeds=SEEDS, out=folder, jobs=jobs))
    keep(folder, f"a-{updates}")


def _rates() -> dict[str, str]:
    return json.loads((HERE / "results" / "a-rates.json").read_text())


def _rate() -> str:
    return _rates()["cispo/16"]


def caps(work: Path, jobs: int | None) -> None:
    folder = work / "b"
    compare(
        CompareOptions(
            recipes=(recipe("cispo"),), vary=("algorithm.objective.clip_high_threshold=4,5,8",),
            set=("steps=12", f"optimizer.learning_rate={_rate()}"), seeds=SEEDS, out=folder, jobs=jobs,
        )
    )  # fmt: skip
    runs = [read_run(folder / "runs" / f"cispo-clip_high_threshold-4-s{s}") for s in range(SEEDS)]
    peaks = [max(line.get("clip/above") or 0.0 for line in run.metrics) for run in runs]
    words = f"\nP(r > 4), largest of any step, by seed at cap 4: {' '.join(f'{p:.2%}' for p in peaks)}\n"
    keep(folder, "b", words + differences(folder))


def floors(work: Path, jobs: int | None) -> None:
    for lag in (0, 4):
        folder = work / f"c-lag{lag}"
        compare(
            CompareOptions(
                recipes=(recipe("cispo"),), vary=("algorithm.objective.clip_low_threshold=0,0.5,0.9",),
                set=("steps=16", f"optimizer.learning_rate={_rate()}", f"async.max_staleness={lag}"),
                seeds=SEEDS, out=folder, jobs=jobs,
            )
        )  # fmt: skip
        runs = find_runs([folder / "runs"])
        stale = [line["staleness/steps_mean"] for run in runs for line in run.metrics if "staleness/steps_mean" in line]
        words = f"\nMean staleness over all steps: {np.mean(stale):.2f} RL steps\n"
        keep(folder, f"c-lag{lag}", words + differences(folder))


def differences(folder: Path) -> str:
    """Paired differences of the area under the curve against the first arm, as `compare` wrote them."""
    rows = json.loads((folder / "comparison.json").read_text())[1:]
    lines = ["", "| arm | difference in area under the curve |", "| --- | --- |"]
    for r in rows:
        d = r["auc_difference"]
        lines.append(f"| {r['label']} | {d['value']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f}) |")
    return "\n".join(lines) + "\n"


def deciles(work: Path, jobs: int | None) -> None:
    run = read_run(work / "a-16" / "runs" / "cispo-s0")
    step = max(run.metrics, key=lambda line: line.get("clip/ppo_silenced") or 0.0)["step"]
    lines = [line for line in read_lines(run.rollout_steps()[step]) if line.head["trained"]]
    sampler, logprobs, w = (np.concatenate([getattr(x, n) for x in lines]) for n in ("sampler", "logprobs", "weights"))
    A = np.concatenate([np.full(len(x.ids), x.advantage) for x in lines])
    rows = np.repeat(np.arange(len(lines)), [len(x.ids) for x in lines])
    unclipped = np.abs(np.exp(logprobs - sampler) * A * w)
    order = np.argsort(sampler, kind="stable")
    objectives = {
        "CISPO 0/4": {"type": "cispo"},
        "GRPO 0.8/1.2": {"type": "ppo_clip"},
        "clip-higher 0.8/1.28": {"type": "ppo_clip", "clip_low_threshold": 0.8, "clip_high_threshold": 1.28},
    }
    kept = {name: np.abs(pusher(o)(sampler, logprobs, A, w, rows)) for name, o in objectives.items()}
    table = ["## Share of the unclipped gradient left, by decile of sampling probability", ""]
    table += [f"Step {step} of CISPO at 16 updates, seed 0: {len(order)} trained tokens.", ""]
    head = ["decile", "probability", "share of Σ\\|r·A·w\\|", "silenced by 0.8/1.2", *kept]
    table += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    cut = silenced(np.exp(logprobs - sampler), A)
    for i, part in enumerate(np.array_split(order, 10)):
        p = np.exp(sampler[part])
        left = [f"{kept[name][part].sum() / unclipped[part].sum():.1%}" for name in kept]
        cells = [str(i + 1), f"{p.min():.3g} – {p.max():.3g}", f"{unclipped[part].sum() / unclipped.sum():.1%}"]
        table.append("| " + " | ".join([*cells, f"{cut[part].mean():.1%}", *left]) + " |")
    shares = [f"{k.sum() / unclipped.sum():.1%}" for k in kept.values()]
    table.append(f"| all | | 100 % | {cut.mean():.1%} | " + " | ".join(shares) + " |")
    (HERE / "results" / "d.md").write_text("\n".join(table) + "\n")


def keep(folder: Path, name: str, more: str = "") -> None:
    """Copies a comparison's table and numbers to results/."""
    target = HERE / "results"
    target.mkdir(exist_ok=True)
    (target / f"{name}.md").write_text((folder / "comparison.md").read_text() + more)
    shutil.copy(folder / "comparison.json", target / f"{name}.json")


PARTS = {"a": fork_tokens, "d": deciles, "b": caps, "c": floors}
AGAIN = {"control": control}  # pieces of a part that can be run alone

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*PARTS, *AGAIN])
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args()
    for part in [arguments.only] if arguments.only else PARTS:
        (PARTS | AGAIN)[part](arguments.work, arguments.jobs)
