"""Settings that live in a tree: reading YAML with `defaults`, interpolations, and `a.b=c` overrides.

What NeMo RL (OmegaConf with its own `defaults:`), verl and SkyRL (Hydra-like overrides) share. Left out on purpose:
Hydra's config groups and sweeps, and OmegaConf resolvers other than mul, div, add, sub, max, min and oc.select.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cispo import config as c
from cispo.dialects.draft import Draft
from cispo.types import ConfigError


def load(path: str | Path, *, parents: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over the files its `defaults:` names, depth first; the last parent and then the child win.

    Paths are relative to the file that names them; a section with `_override_: true` replaces the parents' one. Raises
    ConfigError for a missing parent or a cycle, naming the files.
    """
    here = Path(path).resolve()
    if here in parents:
        chain = " → ".join(str(p) for p in (*parents[parents.index(here) :], here))
        raise ConfigError(f"{parents[-1]}: `defaults` go in a circle: {chain}")
    if parents and not here.is_file():
        raise ConfigError(f"{parents[-1]}: `defaults` names {path}, which is no file (looked for {here})")
    own = c.read_yaml(here)
    named = own.pop("defaults", None)
    named = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"{here}: `defaults` must be a path or a list of paths, not {named!r}")
    merged: dict[str, Any] = {}
    for name in named:
        merged = merge(merged, load(here.parent / name, parents=(*parents, here)))
    return merge(merged, own)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict):
            value = dict(value)
            replaces = value.pop("_override_", False)
            below = merged.get(key)
            merged[key] = merge({} if replaces or not isinstance(below, dict) else below, value)
        else:
            merged[key] = value
    return merged


def override(tree: dict[str, Any], words: Sequence[str], draft: Draft) -> set[str]:
    """Apply `a.b=c` (also `+a.b=c`, `++a.b=c`, `--a.b c` and `--a.b=c`) to the tree. Returns the dotted keys."""
    keys: set[str] = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.lstrip("-+~").partition("=")
        if not equals and word.startswith("--") and rest and not rest[0].startswith("--"):
            text, equals = rest.pop(0), "="
        if not equals or not key:
            draft.problem(f"unexpected argument {word!r}; overrides read a.b=value")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            draft.problem(f"{word}: not a valid value: {str(error).splitlines()[0]}")
            continue
        *sections, last = key.split(".")
        here = tree
        for section in sections:
            inner = here.get(section)
            if not isinstance(inner, dict):
                inner = {}
            here[section] = here = inner
        here[last] = value
        keys.add(key)
    return keys


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a non-empty section."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


_INNERMOST = re.compile(r"\$\{([^${}]*)\}")


def resolve(tree: Mapping[str, Any], key: str, value: Any) -> Any:
    """`${a.b}`, `${.sibling}` and `${mul:x,y}` in a string value. Raises ConfigError where one leads nowhere."""
    for _ in range(50):
        if not isinstance(value, str):
            return value
        found = _INNERMOST.search(value)
        if found is None:
            return value
        inner = _lookup(tree, key, found[1].strip())
        value = inner if found[0] == value.strip() else value.replace(found[0], str(inner))
    raise ConfigError(f"{key}: its interpolation goes in a circle")


def _lookup(tree: Mapping[str, Any], key: str, expression: str) -> Any:
    resolver, colon, arguments = expression.partition(":")
    if colon:
        values = [yaml.safe_load(a) for a in arguments.split(",") if a.strip()]
        if resolver == "oc.select" and values:
            try:
                return _lookup(tree, key, str(values[0]))
            except ConfigError:
                return values[1] if len(values) > 1 else None
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) != len(values) or len(numbers) < 2:
            raise ConfigError(f"{key}: cannot compute ${{{expression}}}")
        first, *others = numbers
        for other in others:
            match resolver:
                case "mul":
                    first *= other
                case "div":
                    if not other:
                        raise ConfigError(f"{key}: ${{{expression}}} divides by zero")
                    first = first / other if first % other else first // other
                case "add":
                    first += other
                case "sub":
                    first -= other
                case "max":
                    first = max(first, other)
                case "min":
                    first = min(first, other)
                case _:
                    raise ConfigError(f"{key}: ${{{expression}}}: the resolver {resolver!r} is not known here")
        return first
    parts = expression.split(".")
    if expression.startswith("."):
        ups = len(expression) - len(expression.lstrip("."))
        parts = [*key.split(".")[:-ups], *expression.lstrip(".").split(".")]
    here: Any = tree
    for part in parts:
        if not isinstance(here, Mapping) or part not in here:
            raise ConfigError(f"{key}: ${{{expression}}} names a key that is not there")
        here = here[part]
    return here
