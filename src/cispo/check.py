"""`cispo check`: bounds on a run's metrics, for nightly jobs. It fails when a bound fails, or the run is not there yet.

An expression reads metrics by name and aggregates over steps: `max(ratio/max) < 20`, `last(eval/accuracy) >= 0.95`,
`median(time/step_s) < 300`. It is parsed here and never evaluated as Python. A step that never came, a metric that is
nowhere, and a run without a last line are failures, not passes (NeMo RL's script exits 0 then).

    cispo check runs/think --step 12 'last(eval/accuracy) >= 0.95' 'max(staleness/steps_max) <= 1'
"""

from __future__ import annotations

import operator
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from cispo.config import read_yaml
from cispo.metrics import read_jsonl
from cispo.types import ConfigError, DataError

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "median": statistics.median,
    "sum": sum,
    "count": len,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(
    r"\s*(?P<aggregate>[a-z]+)\(\s*(?P<metric>[A-Za-z0-9_/@.:-]+)\s*\)\s*(?P<compare><=|>=|==|!=|<|>)\s*(?P<bound>\S+)\s*"
)


@dataclass(frozen=True)
class Bound:
    """`aggregate(metric) compare bound`."""

    text: str
    aggregate: str
    metric: str
    compare: str
    bound: float


def parse(text: str) -> Bound:
    """Raises ConfigError for what is not `aggregate(metric) comparison number`."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r}: write aggregate(metric) comparison number, such as 'last(eval/accuracy) >= 0.95'")
    if match["aggregate"] not in AGGREGATES:
        raise ConfigError(f"{text!r}: {match['aggregate']} is unknown; choose from {', '.join(AGGREGATES)}")
    try:
        bound = float(match["bound"])
    except ValueError:
        raise ConfigError(f"{text!r}: {match['bound']!r} is not a number") from None
    return Bound(text, match["aggregate"], match["metric"], match["compare"], bound)


@dataclass(frozen=True)
class Verdict:
    """Whether a bound held, and the value or the reason."""

    bound: Bound
    held: bool
    detail: str


def judge(bound: Bound, records: Sequence[dict[str, Any]]) -> Verdict:
    """A metric that no step has fails."""
    values = [r[bound.metric] for r in records if isinstance(r.get(bound.metric), int | float)]
    if not values:
        return Verdict(bound, False, "no step has this metric")
    value = AGGREGATES[bound.aggregate](values)
    return Verdict(bound, COMPARISONS[bound.compare](value, bound.bound), f"{value:.6g} over {len(values)} steps")


@dataclass(frozen=True)
class CheckOptions:
    """Check bounds on a run's metrics; the exit status is 1 where one fails or the step was not reached."""

    run: Annotated[Path, tyro.conf.Positional]
    bounds: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Such as 'last(eval/accuracy) >= 0.95'. Aggregates: first, last, min, max, mean, median, sum, count."""
    step: int | None = None
    """The step that must have been reached. None: the run's own `steps`."""
    since: int = 0
    """Steps before this one are left out."""


def check(options: CheckOptions) -> int:
    """Raises DataError for a folder that is no run, ConfigError for an expression that cannot be read."""
    bounds = [parse(text) for text in options.bounds]
    path = options.run / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{options.run}: holds no run (there is no metrics.jsonl)")
    records = list(read_jsonl(path))
    wanted = options.step if options.step is not None else read_yaml(options.run / "config.yaml").get("steps", 1)
    reached = max((r["step"] for r in records), default=0)
    console = Console(highlight=False)
    _say(console, reached >= wanted, f"step {wanted} reached", f"the last is {reached}")
    verdicts = [judge(bound, [r for r in records if r["step"] >= options.since]) for bound in bounds]
    for verdict in verdicts:
        _say(console, verdict.held, verdict.bound.text, verdict.detail)
    return 0 if reached >= wanted and all(v.held for v in verdicts) else 1


def _say(console: Console, held: bool, text: str, detail: str) -> None:
    console.print(f"{'[green]ok  [/]' if held else '[red]FAIL[/]'} {escape(text)}   ({escape(detail)})", soft_wrap=True)
