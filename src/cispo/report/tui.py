"""The dashboard of `cispo watch --tui`: a run's numbers as sparklines, its newest tokens underneath. For people on ssh.

Reads what is new once a second, and leaves the last picture when the run is finished or at Ctrl-C. Where the output is
not a terminal it draws once. Left out on purpose: keys and scrolling; the page has them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cispo.report.runs import Run
from cispo.report.tokens import Line, read_lines, silenced

ROWS = (
    ("held-out accuracy", "eval/accuracy", "{:.3f}"),
    ("reward", "reward/mean", "{:.3f}"),
    ("entropy", "policy/entropy", "{:.3f}"),
    ("ratio p99", "ratio/p99", "{:.2f}"),
    ("ratio max", "ratio/max", "{:.1f}"),
    ("above the cap, A > 0", "clip/above_positive", "{:.2%}"),
    ("PPO would silence", "clip/ppo_silenced", "{:.2%}"),
    ("effective samples", "ess", "{:.3f}"),
    ("sampler KL (k3)", "kl/sampler_k3", "{:.1e}"),
    ("gradient norm", "optim/grad_norm", "{:.3f}"),
    ("length", "rollout/length_mean", "{:.1f}"),
    ("zero-variance groups", "rollout/zero_variance", "{:.1%}"),
    ("staleness", "staleness/steps_mean", "{:.2f}"),
    ("sampled tokens/s", "tokens/sample_per_s", "{:,.0f}"),
    ("seconds a step", "time/step_s", "{:.2f}"),
)
BLOCKS = "▁▂▃▄▅▆▇█"


def draw(
    runs: Sequence[Run],
    *,
    every: float = 1.0,
    console: Console | None = None,
    begun: Callable[[Sequence[Run]], Sequence[Run]] = lambda known: (),
) -> int:
    """Draw until all runs are finished, or Ctrl-C. begun: from the known runs to those that have begun since."""
    runs = list(runs)
    console = console or Console()
    if not console.is_terminal:
        console.print(picture(runs))
        return 0
    try:
        with Live(picture(runs), console=console, refresh_per_second=4) as live:
            while not all(_finished(run) for run in runs):
                time.sleep(every)
                news = [run.refresh() for run in runs]
                more = begun(runs)
                runs += more
                if any(news) or more:
                    live.update(picture(runs))
    except KeyboardInterrupt:
        return 0
    return 0


def _finished(run: Run) -> bool:
    steps = run.config.get("steps")
    return isinstance(steps, int) and run.last_step >= steps


def picture(runs: Sequence[Run]) -> Group:
    """What is drawn: a panel a run."""
    return Group(*(_panel(run, tokens=len(runs) == 1) for run in runs))


def _panel(run: Run, *, tokens: bool) -> Panel:
    steps = run.config.get("steps")
    done = Table.grid(padding=(0, 2))
    if isinstance(steps, int):
        seconds = [line["time/step_s"] for line in run.metrics if line.get("time/step_s")]
        left = (steps - run.last_step) * float(np.mean(seconds[-20:])) if seconds else math.nan
        eta = "" if math.isnan(left) or left <= 0 else f"about {left:.0f} s left"
        done.add_row(f"step {run.last_step} of {steps}", ProgressBar(steps, run.last_step, width=30), eta)
    else:
        done.add_row(f"step {run.last_step}")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="dim")
    for label, name, form in ROWS:
        values = [line[name] for line in run.metrics if isinstance(line.get(name), int | float)]
        if values:
            span = f"{form.format(min(values))} to {form.format(max(values))}"
            table.add_row(label, form.format(values[-1]), sparkline(values), span)
    parts: list = [done, table]
    if tokens:
        parts += _newest(run)
    parts += [Text(f"note: {note}", style="yellow") for note in run.notes() if "stands at step" not in note]
    return Panel(Group(*parts), title=run.name, title_align="left")


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """The last `width` of the values (pooled by mean where there are more) as blocks, from least to most."""
    pooled = [float(np.mean(part)) for part in np.array_split(np.asarray(values, float), min(width, len(values)))]
    low, high = min(pooled), max(pooled)
    if not math.isfinite(high - low) or high == low:
        return BLOCKS[0] * len(pooled)
    return "".join(BLOCKS[min(7, int(8 * (v - low) / (high - low)))] for v in pooled)


def _newest(run: Run) -> list[Text]:
    """The newest group's best and worst completion; tokens that PPO's clip would have silenced are underlined."""
    files = {step: path for step, path in run.rollout_steps().items() if step <= run.last_step}
    if not files:
        return []
    step = max(files)
    group: list[Line] = []
    for line in read_lines(files[step]):
        if group and line.head.get("admission") != group[0].head.get("admission"):
            break
        group.append(line)
    if not group:
        return []
    ranked = sorted(group, key=_worth)
    shown = [Text(f"\nstep {step}, newest prompt: {_one_line(str(group[0].head.get('prompt')))}", style="dim")]
    for line in dict.fromkeys((len(ranked) - 1, 0)):
        shown.append(_tokens(ranked[line]))
    return shown


def _worth(line: Line) -> tuple[float, float]:
    """By reward; where none is known, by advantage."""
    reward = line.head.get("reward")
    return (-math.inf if reward is None else reward, -math.inf if math.isnan(line.advantage) else line.advantage)


def _tokens(line: Line, most: int = 200) -> Text:
    reward = line.head.get("reward")
    text = Text(f"advantage {line.advantage:+.3g}  " if reward is None else f"reward {reward}  ", style="dim")
    with np.errstate(invalid="ignore"):
        ratio = np.exp(line.logprobs - line.sampler)
        cut = silenced(ratio, np.full(len(ratio), line.advantage))
    for piece, r, lost in list(zip(line.pieces, ratio, cut))[:most]:
        colour = "" if not math.isfinite(r) or abs(math.log(r or 1)) < 0.1 else "blue" if r > 1 else "dark_orange"
        text.append(_one_line(piece), style=f"not dim {colour}{' underline bold' if lost else ''}".strip())
    return text


def _one_line(text: str) -> str:
    """Without control characters: what a model writes must not move a terminal's cursor."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)
