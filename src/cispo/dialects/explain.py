"""What a config means: the resolved numbers, where each came from, and the band of the importance weight.

`explain` gives text, YAML (the recipe) or JSON; `show` prints the text to a terminal with colours. Left out on purpose:
deciding anything (`draft.py` and the dialects do).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cispo import config as c
from cispo.dialects.draft import OURS, Translation, band_of, cautions
from cispo.dialects.trees import leaves

Format = Literal["text", "yaml", "json"]


def explain(translation: Translation, format: Format = "text") -> str:
    """The translation for a person, as our YAML recipe, or as JSON."""
    match format:
        case "yaml":
            return recipe_yaml(translation)
        case "json":
            return json.dumps(_as_json(translation), indent=2, ensure_ascii=False) + "\n"
    return _text(_document(translation), colour=False)


def recipe_yaml(translation: Translation) -> str:
    """What was set, in the order of our sections: a recipe that loads to the same config. What is ours is left out."""
    order = [field.alias or name for name, field in c.Config.model_fields.items()]
    raw = {key: translation.raw[key] for key in order if key in translation.raw}
    return yaml.safe_dump(_lists(raw), sort_keys=False, allow_unicode=True) if raw else "{}\n"


def _lists(value: Any) -> Any:
    """Tuples as lists, which YAML knows."""
    if isinstance(value, Mapping):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def _words(value: Any) -> Any:
    """Infinities as "inf", which JSON can hold and a config reads back."""
    if isinstance(value, Mapping):
        return {key: _words(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_words(inner) for inner in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def explain_config(config: c.Config, raw: Mapping[str, Any] | None = None, format: Format = "text") -> str:
    """The same for a recipe of our own: `raw` is what its file and overrides set."""
    return explain(of_config(config, raw), format)


def of_config(config: c.Config, raw: Mapping[str, Any] | None = None) -> Translation:
    """A recipe of our own as a Translation."""
    sources = {key: (value, "recipe") for key, value in leaves(dict(raw or {}))}
    found = [*c.warnings(config), *cautions(config)]
    return Translation("cispo", config, dict(raw or {}), sources, [], {}, found, band_of(config))


def show(translation: Translation, console: Console | None = None) -> None:
    """Print the text form to a terminal."""
    console = console or Console()
    console.print(_text(_document(translation), colour=True, width=console.width), end="")


def band_sentence(config: c.Config) -> str:
    """The band in words, with what multiplies it and whether it can bind."""
    low, high = band_of(config)
    algorithm = config.algorithm
    objective = algorithm.objective
    shown = f"[{low:g}, {high:g}]"
    anchor = {"sampler": "the sampler", "proximal": "the trainer's own log-probs before the first update"}[
        algorithm.anchor
    ]
    match objective:
        case c.CispoObjective() if objective.negative_bounds != (
            objective.clip_low_threshold,
            objective.clip_high_threshold,
        ):
            below, above = objective.negative_bounds
            text = (
                f"importance weight in [{objective.clip_low_threshold:g}, {objective.clip_high_threshold:g}] "
                "for A ≥ 0 and "
                f"[{below:g}, {above:g}] for A < 0, detached, on A·log π"
            )
        case c.CispoObjective():
            text = f"importance weight in {shown}, detached, on A·log π; no token loses its gradient"
        case c.PpoClipObjective():
            text = f"ratio clipped to {shown}; tokens outside it on the far side lose their gradient"
        case c.GspoObjective():
            text = f"sequence ratio clipped to {shown}; sequences outside it on the far side lose their gradient"
        case c.ReinforceObjective():
            return "no importance weight: A·log π"
        case _:
            text = f"importance weight in {shown}"
    updates = algorithm.updates_per_rollout * algorithm.epochs_per_rollout
    text += f"; anchored on {anchor}"
    if algorithm.anchor == "proximal" and updates == 1:
        text += ", so that with one update per rollout it is always 1"
    if algorithm.correction is not None:
        section = algorithm.correction
        bounds = f" in [{section.low:g}, {section.high:g}]" if hasattr(section, "low") else ""
        text += f"; times the {section.type} correction{bounds} for sampler/trainer mismatch"
    return text


def _document(t: Translation) -> dict[str, Any]:
    return {
        "title": f"--like {t.system}" if t.system != "cispo" else "config",
        "band": band_sentence(t.config),
        "rows": list(_rows(t)),
        "understood": t.understood,
        "ignored": t.ignored,
        "warnings": t.warnings,
    }


def _rows(t: Translation) -> Iterator[tuple[str, str, str]]:
    """(key, value, origin) of every resolved number; where nothing set it, it is ours."""
    for key, value in leaves(t.config.model_dump(mode="json", by_alias=True)):
        yield key, _plain(value), _origin(key, t.sources)


def _origin(key: str, sources: Mapping[str, tuple[Any, str]]) -> str:
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        found = sources.get(".".join(parts[:n]))
        if found is not None:
            return found[1]
    return OURS


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _text(document: Mapping[str, Any], *, colour: bool, width: int = 120) -> Any:
    console = Console(
        width=width, no_color=not colour, force_terminal=colour, color_system="standard" if colour else None
    )
    with console.capture() as capture:
        console.print(Text(document["title"], style="bold"))
        console.print(Text(f"  {document['band']}", style="green"))
        table = RichTable(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
        for column in ("setting", "value", "from"):
            table.add_column(column, overflow="fold")
        for key, value, origin in document["rows"]:
            table.add_row(Text(key), Text(value), Text(origin, style="dim" if origin == OURS else ""))
        console.print(table)
        if document["understood"]:
            console.print(Text("\nunderstood: " + ", ".join(document["understood"])))
        if document["ignored"]:
            console.print(Text("\nno meaning here:", style="bold"))
            for name, why in document["ignored"].items():
                console.print(Text(f"  {name}: {why}"))
        if document["warnings"]:
            console.print(Text("\nwarnings:", style="bold yellow"))
            for warning in document["warnings"]:
                console.print(Text(f"  - {warning}", style="yellow"))
    return Text.from_ansi(capture.get()) if colour else capture.get()


def _as_json(t: Translation) -> dict[str, Any]:
    return {
        "system": t.system,
        "band": _words(t.band),
        "meaning": band_sentence(t.config),
        "config": _words(t.config.model_dump(mode="json", by_alias=True)),
        "sources": {key: {"value": _words(value), "from": origin} for key, (value, origin) in t.sources.items()},
        "understood": t.understood,
        "ignored": t.ignored,
        "warnings": t.warnings,
    }
