"""Reading run folders: metrics as they grow, the config, and which runs are seeds of one recipe.

A run that is still being written, or was killed in the middle of a line, is read as far as it goes; `notes` says what
is missing. Configs are read as plain mappings and not validated, so that runs of other versions still show. Left out
on purpose: rollout files (`tokens.py`) and every picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cispo.types import DataError

NOT_RECIPE = ("seed", "run_dir", "threads", "track", "checkpoint", "learner")
"""Config sections in which seeds of one recipe may differ: none can change what is learned, but for the seed itself."""


class Tail:
    """The whole lines appended to a JSONL file since the last `poll`; reads each byte once.

    `torn` is true while the file ends in an incomplete line (still being written, or killed in the middle of it);
    `restarted` is true after a poll that found the file shorter than before (a resume cut it): its lines begin anew.
    `bad` counts complete lines that are not JSON objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn = False
        self.restarted = False
        self.bad = 0
        self._offset = 0

    def poll(self) -> list[dict[str, Any]]:
        self.restarted = False
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return []
        if size < self._offset:
            self._offset, self.restarted, self.bad = 0, True, 0
        if size == self._offset:
            self.torn = False
            return []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            whole, newline, rest = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        self.torn = bool(rest)
        records = []
        for line in whole.split(b"\n") if newline else ():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                self.bad += 1
        return records


@dataclass
class Run:
    """One run folder. `metrics` holds its lines so far; `refresh` appends the new ones and returns them."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tail = Tail(self.folder / "metrics.jsonl")

    def refresh(self) -> list[dict[str, Any]]:
        new = self._tail.poll()
        if self._tail.restarted:
            self.metrics.clear()
        self.metrics.extend(new)
        return new

    @property
    def restarted(self) -> bool:
        """Whether the last `refresh` found that the run was resumed from before what had been read."""
        return self._tail.restarted

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def last_step(self) -> int:
        return max((int(line.get("step", 0)) for line in self.metrics), default=0)

    def rollout_steps(self) -> dict[int, Path]:
        """The rollout files there are, by step."""
        found = {}
        for path in sorted((self.folder / "rollouts").glob("step-*.jsonl")):
            digits = path.stem.removeprefix("step-")
            if digits.isdigit():
                found[int(digits)] = path
        return found

    def notes(self) -> list[str]:
        """What is missing or broken, one sentence each."""
        found = []
        if not self.config:
            found.append("config.yaml is missing or unreadable: the objective and the recipe are not known.")
        if not self._tail.path.exists():
            found.append("metrics.jsonl is missing: there is nothing to chart.")
        elif not self.metrics:
            found.append("metrics.jsonl has no whole line yet.")
        if self._tail.torn:
            found.append(
                "The last line of metrics.jsonl is incomplete (still being written, or killed in the middle of it) "
                "and was left out."
            )
        if self._tail.bad:
            found.append(f"{self._tail.bad} line(s) of metrics.jsonl are not JSON objects and were left out.")
        steps = self.config.get("steps")
        if self.metrics and isinstance(steps, int) and self.last_step < steps:
            found.append(f"The run stands at step {self.last_step} of {steps}: it is going on, or was interrupted.")
        if not self.rollout_steps():
            found.append("There are no rollout files: the token inspector is empty.")
        return found


def read_run(folder: Path) -> Run:
    """A run folder as far as it has been written. Raises DataError for a folder that is not a run."""
    if not is_run(folder):
        what = (
            "no such folder"
            if not folder.exists()
            else "not a run folder: it has neither metrics.jsonl nor config.yaml"
        )
        raise DataError(f"{folder}: {what}; give the folder that `cispo train` printed (runs/<task>-<date>-<time>)")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        config = None  # said by notes()
    run = Run(folder, folder.resolve().name, config if isinstance(config, dict) else {})
    run.refresh()
    return run


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs at `paths`; a folder of runs, or one with `runs/` in it (a comparison, a server), stands for them.

    Raises DataError for anything else, or none.
    """
    if not paths:
        raise DataError("no run is named; give the folder that `cispo train` printed, or a folder of runs")
    return new_runs(paths, [])


def new_runs(paths: Sequence[Path], known: Sequence[Run]) -> list[Run]:
    """Those at `paths` that are not among the known ones, as by `find_runs`: runs that began since."""
    folders = {run.folder for run in known}
    found = []
    for path in paths:
        inner = [] if is_run(path) else _inside(path) or _inside(path / "runs")
        found += [read_run(p) for p in inner or [path] if p not in folders]
    names = [run.name for run in (*known, *found)]
    for run in found:  # two runs of one name are told apart by their parents
        if names.count(run.name) > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"
    return found


def _inside(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if is_run(p)) if folder.is_dir() else []


# ------------------------------------------------------------------------------------------------------------ recipes


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat config without what may differ between seeds of one recipe."""
    return {key: value for key, value in flatten(config) if key.split(".")[0] not in NOT_RECIPE}


def recipes(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The runs grouped into seeds of one recipe, each group with a label that tells it from the others."""
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        own = recipe(run.config)
        for known, members in groups:
            if known == own and own:
                members.append(run)
                break
        else:
            groups.append((own, [run]))
    keys = sorted({key for own, _ in groups for key in own if any(own.get(key) != o.get(key) for o, _ in groups)})
    labels = []
    for own, members in groups:
        parts = [_short(key, own[key]) for key in keys if own.get(key) is not None and not key.startswith(OBJECTIVE)]
        if any(key.startswith(OBJECTIVE) for key in keys):
            parts.insert(0, _objective(own))
        label = ", ".join(parts) if len(groups) > 1 and parts and len(parts) <= 5 else members[0].name
        labels.append(label)
    return [
        (label if labels.count(label) == 1 else f"{label} ({members[0].name})", members)
        for label, (_, members) in zip(labels, groups)
    ]


OBJECTIVE = "algorithm.objective."


def _objective(own: Mapping[str, Any]) -> str:
    """`cispo 0/4`: the type and its bounds; other options that are set follow."""
    options = {key.removeprefix(OBJECTIVE): v for key, v in own.items() if key.startswith(OBJECTIVE) and v is not None}
    name, low, high = (options.pop(key, None) for key in ("type", "clip_low_threshold", "clip_high_threshold"))
    bounds = f" {_number(low)}/{_number(high)}" if low is not None and high is not None else ""
    return f"{name}{bounds}" + "".join(f" {_short(key, value)}" for key, value in options.items())


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _short(key: str, value: Any) -> str:
    leaf = {"learning_rate": "lr", "updates_per_rollout": "updates"}.get(leaf := key.rsplit(".", 1)[-1], leaf)
    return str(value) if leaf == "type" else f"{leaf.removesuffix('_threshold')} {_number(value)}"
