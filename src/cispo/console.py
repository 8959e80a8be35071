"""What a person sees in the terminal while a run goes, and at its end: a live table, a bar, a summary.

On a terminal the table is redrawn in place; into a file or a pipe each step is one line. Left out on purpose: the page
(`report/`) and all measuring (`metrics.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cispo.trainer import Transcript

COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("step", lambda m: f"{m['step']}"),
    ("reward", lambda m: _number(m, "reward/mean", ".3f")),
    ("think", lambda m: _number(m, "task/think_rate", ".3f")),
    ("entropy", lambda m: _number(m, "policy/entropy", ".3f")),
    ("ratio mean", lambda m: _number(m, "ratio/mean", ".2f")),
    ("ratio max", lambda m: _number(m, "ratio/max", ".1f")),
    ("clipped", lambda m: _number(m, "clip/above", ".2%")),
    ("tokens/s", lambda m: _rate(m)),
    ("s", lambda m: _number(m, "time/step_s", ".2f")),
    ("held-out", lambda m: _number(m, "eval/accuracy", ".3f")),
)


def _number(metrics: Mapping[str, Any], name: str, form: str) -> str:
    value = metrics.get(name)
    return "" if value is None else format(value, form)


def _rate(metrics: Mapping[str, Any]) -> str:
    """Sampled tokens per second of the whole step."""
    if not metrics.get("time/step_s"):
        return ""
    return f"{metrics['tokens/sampled'] / metrics['time/step_s']:,.0f}"


class Screen:
    """An `Observer` that draws. `rows` steps are shown at most, the newest."""

    def __init__(self, console: Console, *, steps: int, thinks: bool, rows: int = 30) -> None:
        self._console = console
        self._steps = steps
        self._columns = [c for c in COLUMNS if thinks or c[0] != "think"]
        self._rows = rows
        self._shown: list[Mapping[str, Any]] = []
        self._status = ""
        self._live: Live | None = None

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        if not self._console.is_terminal:
            self._line(name for name, _ in self._columns)
            yield
            return
        with Live(self, console=self._console, refresh_per_second=8) as self._live:
            yield
            self._status = ""

    def status(self, text: str) -> None:
        self._status = text

    def step(self, metrics: Mapping[str, Any]) -> None:
        self._shown = [*self._shown, metrics][-self._rows :]
        if self._live is None:
            self._line(show(metrics) for _, show in self._columns)

    def _line(self, cells: Iterable[str]) -> None:
        self._console.print(" ".join(f"{cell:>10}" for cell in cells), soft_wrap=True, highlight=False)

    def __rich__(self) -> Group:
        table = Table(box=None, header_style="bold", padding=(0, 1))
        for name, _ in self._columns:
            table.add_column(name, justify="right")
        for metrics in self._shown:
            table.add_row(*[show(metrics) for _, show in self._columns])
        if not self._status:
            return Group(table)
        done = self._shown[-1]["step"] if self._shown else 0
        return Group(
            table, Spinner("dots", Text(f" step {min(done + 1, self._steps)} of {self._steps}: {self._status}"))
        )


def base_progress(console: Console) -> tuple[Progress, Callable[[int, int, float], None]]:
    """A bar for making the embedded base model, and the callback (done, total, loss) that moves it."""
    progress = Progress(
        TextColumn("making the base model, once"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )
    task = progress.add_task("base", total=None, loss=float("nan"))
    return progress, lambda done, total, loss: progress.update(task, completed=done, total=total, loss=loss)


def summary(
    console: Console,
    *,
    run_dir: Path,
    before: Sequence[Transcript],
    after: Sequence[Transcript],
    first_eval: Mapping[str, float],
    last_eval: Mapping[str, float],
    next_steps: Sequence[str],
) -> None:
    """How a finished run ends: transcripts, accuracy before and after, the folder, what to try next."""
    if before:
        table = Table(title="Three held-out prompts", title_justify="left", box=None, padding=(0, 2))
        for name in ("prompt", "before", "after"):
            table.add_column(name, overflow="fold")
        for old, new in zip(before, after, strict=True):
            table.add_row(escape(old.prompt), _marked(old), _marked(new))
        console.print(table)
    if first_eval:
        for name, label in (("eval/accuracy", "held-out accuracy"), ("eval/task/think_rate", "think rate")):
            if name in first_eval and name in last_eval:
                console.print(f"{label:<18} {first_eval[name]:.3f} → {last_eval[name]:.3f}")
    console.print(f"{'run folder':<18} {run_dir}", soft_wrap=True)
    for line in next_steps:
        console.print(escape(line), soft_wrap=True)


def _marked(transcript: Transcript) -> str:
    mark = "[green]✓[/]" if transcript.correct else "[red]✗[/]"
    return f"{mark} {escape(transcript.completion)}"
