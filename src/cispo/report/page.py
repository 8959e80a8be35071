"""One self-contained HTML file for one run or several: charts, token inspector, configs. Opens offline from disk.

The page is plain ES modules (`assets/*.js`), inlined through an import map of data: URLs, so that there is no build
step and the files here are what the browser runs. Charts are uPlot's (MIT, 51 kB, vendored in `assets/` with its
licence): a page that every run writes must not need an extra package, and plotly's bundle is a hundred times larger.
Everything that a run wrote (prompts, completions, names) reaches the page as JSON with `<` escaped, and the document
through `textContent` only; the page's content security policy forbids every connection.

    cispo report runs/think-20260101-120000 [--out report.html]
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from cispo import metrics as metric_names
from cispo.report.forecast import Forecast
from cispo.report.runs import Run, find_runs, flatten, recipes
from cispo.report.tokens import ForkCounter, choose_steps, encode_step, read_lines
from cispo.tasks.think import EVAL_PROMPTS

MODULES = ("format", "dom", "objectives", "colour", "data", "charts", "forks", "inspector", "curves", "configs", "main")
"""The page's ES modules, imported as `cispo/NAME`."""
TOKEN_BUDGET = 400_000
"""Tokens that a page shows: about 22 bytes each."""
METRIC_BUDGET = 600_000
"""Numbers of metrics.jsonl in a page: about 8 bytes each."""
INSPECTED_STEPS, COUNTED_STEPS = 24, 120
READ_BYTES = 100_000_000
"""Of rollout files read for one page."""


@dataclass(frozen=True)
class ReportOptions:
    """Write the report of one run or several as one HTML file that opens offline."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders of runs. Seeds of one recipe are drawn as a band."""
    out: Path | None = None
    """The file to write. None: report.html in the run's folder, or in the current folder for several runs."""


def report(options: ReportOptions) -> int:
    runs = find_runs(options.runs)
    out = options.out or (runs[0].folder if len(runs) == 1 else Path(".")) / "report.html"
    write_page(out, runs)
    Console().print(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)", highlight=False, soft_wrap=True)
    return 0


def write_page(
    out: Path,
    runs: Sequence[Run],
    *,
    forecasts: Sequence[Forecast] = (),
    compute: str = "tokens",
    metric: str = "eval/accuracy",
    comparison: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Path:
    """The page of `runs`, written whole or not at all. Raises OSError where `out` cannot be written.

    labels: of recipes, by the name of one of their runs; None tells recipes apart by what differs in their configs.
    """
    data = page_data(runs)
    for recipe in data["recipes"]:
        recipe["label"] = (labels or {}).get(runs[recipe["runs"][0]].name, recipe["label"])
    data["forecast"] = {"fits": [asdict(f) for f in forecasts], "compute": compute, "metric": metric}
    data["comparison"] = comparison
    partial = out.with_name(out.name + ".partial")
    partial.write_text(render(data), encoding="utf-8")
    partial.replace(out)
    return out


def page_data(runs: Sequence[Run], *, live: bool = False) -> dict[str, Any]:
    """What the page reads (`assets/data.js` documents the shape). A live page fetches steps as they are looked at."""
    groups = recipes(runs)
    index = {id(run): i for i, run in enumerate(runs)}
    return {
        "generated": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "live": live,
        "names": metric_names.NAMES,
        "recipes": [{"label": label, "runs": [index[id(run)] for run in members]} for label, members in groups],
        "runs": [run_data(run, share=1 / len(runs), live=live) for run in runs],
    }


def run_data(run: Run, *, share: float = 1.0, live: bool = False) -> dict[str, Any]:
    """One run; `share` of the page's budgets is its own."""
    notes = run.notes()
    files = run.rollout_steps()
    data: dict[str, Any] = {
        "name": run.name,
        "seed": run.seed,
        "config": dict(flatten(run.config)),
        "objective": objective(run),
        "held_out": held_out(run),
        "steps": {},
    }
    if live:
        data |= {"lines": run.metrics, "rollouts": sorted(files), "notes": notes, "forks": None}
        return data
    data["lines"], thinned = thin(run.metrics, int(METRIC_BUDGET * share))
    if thinned:
        notes.append(thinned)
    chosen = choose_steps(files, most=COUNTED_STEPS, most_bytes=int(READ_BYTES * share))
    inspected = choose_steps(chosen.steps, most=INSPECTED_STEPS, most_bytes=int(READ_BYTES * share)).steps
    forks = ForkCounter(data["objective"])
    unread, left_out = [], 0
    for step, path in chosen.steps.items():
        try:
            lines = list(read_lines(path))
        except OSError as error:
            unread.append(f"{path.name} ({error.strerror})")
            continue
        forks.add(step, lines)
        if step in inspected and lines:
            encoded = encode_step(lines, data["objective"], token_budget=int(TOKEN_BUDGET * share / len(inspected)))
            left_out += len(encoded["groups"]) < encoded["groups_of"]
            data["steps"][str(step)] = encoded
    if chosen.note:
        notes.append(f"Fork tokens: {chosen.note}")
    if len(inspected) < len(files):
        notes.append(
            f"Inspector: {len(inspected)} of {len(files)} steps are in this page, evenly spaced, the first and the "
            "last among them; `cispo watch` shows every step."
        )
    if left_out:
        notes.append(f"Inspector: at {left_out} step(s) only some groups are in this page, evenly spaced.")
    if unread:
        notes.append("Rollout files that could not be read: " + ", ".join(unread))
    return data | {"rollouts": sorted(int(s) for s in data["steps"]), "notes": notes, "forks": forks.forks()}


def objective(run: Run) -> Mapping[str, Any]:
    """The run's objective section; CISPO's defaults where the config is missing (a note says so)."""
    algorithm = run.config.get("algorithm")
    section = algorithm.get("objective") if isinstance(algorithm, Mapping) else None
    return section if isinstance(section, Mapping) and "type" in section else {"type": "cispo"}


def held_out(run: Run) -> int | None:
    """Completions of one held-out evaluation, where the config says how many; for the band of its accuracy."""
    evaluation, task = run.config.get("eval"), run.config.get("task")
    if not isinstance(evaluation, Mapping) or not isinstance(task, Mapping):
        return None
    prompts = [evaluation.get("max_prompts"), EVAL_PROMPTS if task.get("type") == "think" else None]
    known = [n for n in prompts if isinstance(n, int)]
    return min(known) * int(evaluation.get("samples_per_prompt") or 1) if known else None


def thin(lines: Sequence[Mapping[str, Any]], budget: int) -> tuple[list[dict[str, Any]], str]:
    """Every k-th line of metrics, rounded to 6 digits, with all evaluations kept; and what to say about it."""
    width = max((len(line) for line in lines), default=1)
    every = max(1, math.ceil(len(lines) * width / max(1, budget)))
    kept = [
        {key: _short(value) for key, value in line.items()}
        for i, line in enumerate(lines)
        if i % every == 0 or i == len(lines) - 1 or "eval/accuracy" in line
    ]
    return kept, f"Charts: every {every}th step, and all evaluations." if every > 1 else ""


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# ---------------------------------------------------------------------------------------------------------- the file


def render(data: Mapping[str, Any]) -> str:
    """The HTML of `page_data`."""
    parts = {
        "uplot_css": _asset("uPlot.min.css"),
        "css": _asset("page.css"),
        "uplot": _asset("uPlot.iife.min.js").replace("</script", "<\\/script"),
        "importmap": json.dumps({"imports": {f"cispo/{name}": _data_url(f"{name}.js") for name in MODULES}}),
        "data": embed(data),
        "policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' data:; img-src data:"
        + ("; connect-src 'self'" if data.get("live") else ""),
    }
    page = _asset("page.html")
    head, *holes = page.split("{{")
    whole = [head]
    for hole in holes:  # one pass, so that data that contains a placeholder stays data
        name, _, text = hole.partition("}}")
        whole += [parts[name], text]
    return "".join(whole)


def embed(value: Any) -> str:
    """JSON that cannot leave its script element: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    """NaN and infinities as null, which is all that JSON has for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _asset(name: str) -> str:
    return resources.files("cispo.report").joinpath("assets", name).read_text(encoding="utf-8")


def _data_url(name: str) -> str:
    return "data:text/javascript;base64," + base64.b64encode(_asset(name).encode()).decode()
