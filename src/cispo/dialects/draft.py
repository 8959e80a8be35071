"""What every dialect is made of: a table of another system's settings, the values given, and a draft of our config.

A `Setting` has that system's name, type and default. `Table.read` turns flags into `Given`, which answers what a
setting's value is and where it came from. A `Draft` collects our keys with their origins, what was ignored and why,
warnings, and *all* problems; `Draft.finish` validates and returns the `Translation`, or raises them together.
Left out on purpose: what any setting means (one module for each system), and printing (`explain.py`).
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from cispo import config as c
from cispo.types import ConfigError

OURS = "ours"


@dataclass(frozen=True)
class Translation:
    """Another system's settings in our words.

    config: resolved. raw: the nested mapping of what was set, which `config.validate` reads. sources: dotted key →
    (value, origin). understood: their settings that decided something. ignored: theirs that have no meaning here → why.
    band: bounds of the objective's importance weight.
    """

    system: str
    config: c.Config
    raw: dict[str, Any]
    sources: dict[str, tuple[Any, str]]
    understood: list[str]
    ignored: dict[str, str]
    warnings: list[str]
    band: tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """One of another system's settings: kind is float, int, bool, str, list or json.

    nullable: none is a value of its own (it is, in any case, where it is the default).
    """

    name: str
    kind: str
    default: Any = None
    aliases: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    nullable: bool = False


class Given:
    """The settings that were given, over a system's defaults."""

    def __init__(self, table: Table, values: Mapping[str, tuple[Any, str]]) -> None:
        self.table = table
        self.values = dict(values)
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self.values[name][0] if name in self.values else self.table.settings[name].default

    def origin(self, *names: str) -> str:
        """Where a value that depends on these settings came from."""
        given = [self.values[name][1] for name in names if name in self.values]
        return ", ".join(given) if given else f"{self.table.defaults_of}'s default"


@dataclass(frozen=True)
class Table:
    """A system's settings.

    ignored: reason → fnmatch patterns of settings without a meaning here. unsupported: setting → (the value at which it
    changes nothing, why any other is refused).
    """

    system: str
    title: str
    settings: Mapping[str, Setting]
    ignored: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unsupported: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    dash: str = "--"
    defaults_from: str | None = None

    @property
    def defaults_of(self) -> str:
        return self.defaults_from or self.title

    @property
    def spelled(self) -> dict[str, str]:
        """Every spelling of a setting with a meaning → its name."""
        return {s: setting.name for setting in self.settings.values() for s in (setting.name, *setting.aliases)}

    def why_ignored(self, name: str) -> str | None:
        for reason, patterns in self.ignored.items():
            for pattern in patterns:
                if fnmatch.fnmatchcase(name, pattern):
                    looks_like = difflib.get_close_matches(name, self._meaningful(), 1, cutoff=0.9)
                    return reason if pattern == name or not looks_like else None
        return None

    def nearest(self, name: str) -> str:
        exact = [p for patterns in self.ignored.values() for p in patterns if "*" not in p]
        known = [*self._meaningful(), *exact]
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        if not near:  # a tree's key is best found by its last part
            last = {key.rsplit(".", 1)[-1]: key for key in known}
            near = [last[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1, cutoff=0.6)]
        return f"; did you mean {self.dash}{near[0]}?" if near else ""

    def _meaningful(self) -> list[str]:
        return [*self.spelled, *self.unsupported]

    def accept(self, values: Sequence[tuple[str, Any, str]], draft: Draft) -> Given:
        """Sort (name, raw value, how it was spelled) into settings, ignored, refused and unknown."""
        given: dict[str, tuple[Any, str]] = {}
        spelled = self.spelled
        for name, raw, shown in values:
            if name in spelled:
                setting = self.settings[spelled[name]]
                try:
                    value = coerce(raw, setting)
                except ValueError as error:
                    draft.problem(f"{shown}: {error}")
                    continue
                before = given.get(setting.name)
                if before is not None and before[0] != value:
                    draft.problem(f"{before[1]} = {before[0]} and {shown} = {value} contradict each other; keep one")
                given[setting.name] = (value, shown)
            elif name in self.unsupported:
                harmless, why = self.unsupported[name]
                if _plain(raw) != harmless and str(raw).lower() != str(harmless).lower():
                    draft.problem(f"{shown} = {_show(raw)}: {why}; remove it, or set {_show(harmless)}")
                else:
                    draft.ignore(shown, f"{_show(harmless)} changes nothing")
            elif (reason := self.why_ignored(name)) is not None:
                draft.ignore(shown, reason)
            else:
                draft.problem(f"{shown}: unknown to {self.title}{self.nearest(name)}")
        return Given(self, given)


def coerce(raw: Any, setting: Setting) -> Any:
    """A flag's words or a YAML value as the setting's type. Raises ValueError with a readable reason."""
    words = raw if isinstance(raw, list) else [raw]
    if setting.kind == "list":
        value: Any = [str(w) for word in words for w in (word if isinstance(word, list | tuple) else [word])]
    elif setting.kind == "json":
        value = _json(words)
    elif setting.kind == "bool" and not words:
        value = True
    elif len(words) != 1:
        raise ValueError(f"takes one value, not {len(words)}")
    elif words[0] is None or str(words[0]).lower() in ("none", "null", "~"):
        if setting.default is not None and not setting.nullable:
            raise ValueError(f"none is not a value here; leave it out for the default, {setting.default}")
        return None
    else:
        value = _scalar(words[0], setting.kind)
    if setting.choices and value not in setting.choices:
        choices = ", ".join(repr(choice) for choice in setting.choices)
        near = difflib.get_close_matches(str(value), [str(choice) for choice in setting.choices], 1)
        raise ValueError(
            f"invalid choice: {value!r} (choose from {choices})" + (f"; did you mean {near[0]}?" if near else "")
        )
    return value


def _scalar(word: Any, kind: str) -> Any:
    text = str(word).strip()
    if kind == "str":
        if isinstance(word, dict | list):
            raise ValueError(f"{_show(word)} is not a single value")
        return text
    if kind == "bool":
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise ValueError(f"{text!r} is not true or false")
    if isinstance(word, bool | dict | list):
        raise ValueError(f"{_show(word)} is not a number")
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if math.isnan(number):
        raise ValueError("nan is not a value")
    if kind == "int":
        if not math.isfinite(number) or number != int(number):
            raise ValueError(f"{text} is not a whole number")
        return int(number)
    return number


def _json(words: list[Any]) -> Any:
    if len(words) == 1 and isinstance(words[0], dict | list):
        return words[0]
    text = " ".join(map(str, words))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not JSON: {error}") from None


def _plain(raw: Any) -> Any:
    """A flag's words as YAML would read them."""
    if isinstance(raw, list):
        if not raw:
            return True
        if len(raw) > 1:
            return raw
        raw = raw[0]
    if isinstance(raw, str):
        try:
            return yaml.safe_load(raw)
        except yaml.YAMLError:
            return raw
    return raw


def _show(value: Any) -> str:
    plain = _plain(value)
    return json.dumps(plain) if isinstance(plain, bool | type(None)) else str(plain)


class Draft:
    """Our config in the making."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.raw: dict[str, Any] = {}
        self.sources: dict[str, tuple[Any, str]] = {}
        self.ignored: dict[str, str] = {}
        self.warnings: list[str] = []
        self.problems: list[str] = []

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set a dotted key; a new `type` empties its section. Keys of a `tuple` field are set whole."""
        *sections, last = key.split(".")
        here = self.raw
        for section in sections:
            inner = here.get(section)
            here[section] = here = inner if isinstance(inner, dict) else {}
        prefix = ".".join([*sections, ""])
        if last == "type" and here.get("type", value) != value:
            here.clear()
            self.sources = {k: v for k, v in self.sources.items() if not k.startswith(prefix)}
        here[last] = value
        self.sources[key] = (value, origin)

    def take(self, key: str, given: Given, name: str, value: Any = None) -> None:
        """Set our key from one of their settings (its value, unless another is given)."""
        self.set(key, given[name] if value is None else value, given.origin(name))

    def ignore(self, shown: str, why: str) -> None:
        self.ignored[shown] = why

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def objective(self, given: Given, origin: str, **fields: Any) -> None:
        for name, value in fields.items():
            self.set(f"algorithm.objective.{name}", value, origin)

    def correction(self, origin: str, **fields: Any) -> None:
        for name, value in fields.items():
            self.set(f"algorithm.correction.{name}", value, origin)

    def override(self, arguments: Sequence[str]) -> None:
        """Our own `--section.field value`, on top of everything."""
        try:
            for keys, value in c.parse_overrides(arguments):
                self.set(".".join(keys), value, "override")
        except ConfigError as error:
            self.problem(str(error))

    def finish(self, given: Given) -> Translation:
        """Validate. Raises ConfigError with every problem of the translation and of its result."""
        config = None
        try:
            config = c.validate(self.raw, source=f"--like {self.table.system}")
        except ConfigError as error:
            for line in str(error).splitlines()[1:]:
                self.problem(self._in_their_words(line.strip()))
        if self.problems or config is None:
            lines = "\n".join(f"  {line}" for line in self.problems)
            raise ConfigError(f"--like {self.table.system}: {len(self.problems)} problem(s)\n{lines}")
        for text in c.warnings(config):
            self.warn(text)
        for text in cautions(config):
            self.warn(text)
        understood = [shown for name, (_, shown) in given.values.items() if name in given.read]
        for name, (_, shown) in given.values.items():
            if name not in given.read:
                self.ignore(shown, "decides nothing with the other settings")
        return Translation(
            self.table.system,
            config,
            self.raw,
            self.sources,
            understood,
            self.ignored,
            self.warnings,
            band_of(config),
        )

    def _in_their_words(self, line: str) -> str:
        """A problem of our config, with the settings of theirs that it came from."""
        origins = [
            origin for key, (_, origin) in self.sources.items() if key in line and origin not in (OURS, "override")
        ]
        return f"{line} [from {', '.join(dict.fromkeys(origins))}]" if origins else line


def band_of(config: c.Config) -> tuple[float, float]:
    """Bounds of the objective's importance weight."""
    objective = config.algorithm.objective
    if isinstance(objective, c.CispoObjective):
        low, high = objective.negative_bounds
        return min(low, objective.clip_low_threshold), max(high, objective.clip_high_threshold)
    if isinstance(objective, c.PpoClipObjective | c.GspoObjective):
        return objective.clip_low_threshold, objective.clip_high_threshold
    return (1.0, 1.0) if isinstance(objective, c.ReinforceObjective) else (0.0, math.inf)


def cautions(config: c.Config) -> list[str]:
    """What `config.warnings` leaves to a reader of another system's recipe."""
    found = []
    algorithm, asynchrony = config.algorithm, config.asynchrony
    if asynchrony.max_staleness and algorithm.correction is None and algorithm.anchor == "proximal":
        found.append(
            f"async.max_staleness: {asynchrony.max_staleness} without a correction: the ratio does not see the "
            "sampler's lag; set algorithm.correction, or anchor: sampler"
        )
    if isinstance(algorithm.correction, c.ImportanceCorrection):
        found.append(
            "algorithm.correction.type: importance is unbounded: one token's mismatch weight can dominate a batch; "
            "tis with a cap of 2 is usual"
        )
    return found


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(theirs, ours): `--section.field value` of ours, and --steps, --run_dir, --threads, go to the config."""
    sections = {f.alias or name for name, f in c.Config.model_fields.items()}
    theirs: list[str] = []
    ours: list[str] = []
    target = theirs
    for word in arguments:
        if word.startswith("--"):
            key = word[2:].partition("=")[0]
            section = key.partition(".")[0].replace("-", "_")
            own = section in sections if "." in key else section in ("steps", "run_dir", "threads")
            target = ours if own else theirs
        elif target is ours and "=" in word and "." in word.partition("=")[0]:
            target = theirs
        target.append(word)
    return theirs, ours


def read_flags(words: Sequence[str], draft: Draft, *, switches: frozenset[str] = frozenset()) -> list[tuple]:
    """`--name value …`, `--name=value`, `--name` as (name, words, shown); dashes and underscores are the same.

    switches: flags that take no value, as argparse's store_true.
    """
    found: list[tuple] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            draft.problem(f"unexpected argument {word!r}; {draft.table.title} takes {draft.table.dash}name value")
            continue
        key, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        name = key.replace("-", "_")
        if name in switches and not equals:
            found.append((name, [], f"--{key}"))
            continue
        while not equals and rest and not _is_flag(rest[0]):
            values.append(rest.pop(0))
        found.append((name, values, f"--{key}"))
    return found


def _is_flag(word: str) -> bool:
    if not word.startswith("-") or word == "-":
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False
