"""Rollout files as the inspector shows them, and the fork tokens of a run.

A rollout line is one completion with, for each of its tokens, the log-prob at sampling (log μ), the trainer's at the
first update that trained it (log π) and the reduction's weight. From these follows everything the inspector shows: the
importance weight r = π/μ, and the *push* −∂loss/∂log π of each token: how hard the update raises (+) or lowers (−) it.

Sampled out where a run is too large for a page, and said so by `Chosen.note`: whole steps, then whole groups, evenly
spaced and never by what is in them. Left out on purpose: drawing (`assets/inspector.js`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from cispo import objectives
from cispo.config import AlgorithmConfig
from cispo.types import ConfigError

DRAWN = ("cispo", "ppo_clip", "importance_sampling", "reinforce")
"""Objectives that the page computes itself (`assets/objectives.js`); the pushes of others travel with the tokens."""
PPO = {"type": "ppo_clip", "clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
"""PPO's and GRPO's usual clip, what `clip/ppo_silenced` counts too."""
COMPLETION_COST = 16
"""What a completion costs of a token budget besides its tokens: its rewards, advantage and so on."""
START = -1
"""The context of a completion's first token."""

Array = np.ndarray


# ---------------------------------------------------------------------------------------------------------- formulas


def pusher(objective: Mapping[str, Any]) -> Callable[[Array, Array, Array, Array, Array], Array] | None:
    """A function of (log μ, log π, A, w, row), each [N], to the pushes −∂(w·loss)/∂log π [N] under an objective.

    By autograd through the objective itself, so that this cannot disagree with training; float64. None where the
    section is not an objective of this version, or reads columns that rollout files do not have (a reference model).
    """
    try:
        bound = objectives.bind(AlgorithmConfig(objective=objective))
    except (ValidationError, ConfigError):
        return None
    known = {"anchor_logprobs", "advantages", "sampler_logprobs", "rows"}
    if not set(bound.columns) <= known:
        return None

    def push(sampler_N: Array, logprobs_N: Array, advantages_N: Array, weights_N: Array, rows_N: Array) -> Array:
        out = np.zeros(len(sampler_N))
        seen = np.isfinite(sampler_N) & np.isfinite(logprobs_N) & np.isfinite(advantages_N) & np.isfinite(weights_N)
        if not seen.any():
            return out
        sampler = torch.from_numpy(sampler_N[seen])
        logprobs = torch.from_numpy(logprobs_N[seen]).requires_grad_()
        columns = {
            "anchor_logprobs": sampler,
            "sampler_logprobs": sampler,
            "advantages": torch.from_numpy(advantages_N[seen]),
            "rows": torch.from_numpy(np.unique(rows_N[seen], return_inverse=True)[1]),
        }
        loss = bound.loss(logprobs, **{name: columns[name] for name in bound.columns})
        (gradient,) = torch.autograd.grad((loss * torch.from_numpy(weights_N[seen])).sum(), logprobs)
        out[seen] = -gradient.numpy()
        return out

    return push


def silenced(ratio_N: Array, advantages_N: Array, low: float = 0.8, high: float = 1.2) -> Array:
    """Where PPO's clip leaves no gradient: A > 0 above `high`, A < 0 below `low`."""
    return ((advantages_N > 0) & (ratio_N > high)) | ((advantages_N < 0) & (ratio_N < low))


# ---------------------------------------------------------------------------------------------------- rollout files


@dataclass(frozen=True)
class Line:
    """One completion: what a person reads, and its N tokens as arrays (NaN where the file has null or nothing)."""

    head: Mapping[str, Any]
    ids: Array
    pieces: Sequence[str]
    sampler: Array
    logprobs: Array
    entropy: Array
    weights: Array
    versions: Array

    @property
    def advantage(self) -> float:
        value = self.head.get("advantage")
        return float("nan") if value is None else float(value)


def read_lines(path: Path) -> Iterator[Line]:
    """The completions of a rollout file; lines that are torn or not completions are left out."""
    with open(path, "rb") as file:
        for text in file:
            try:
                raw = json.loads(text)
                ids = np.asarray(raw["tokens"], np.int64)
                pieces = [str(piece) for piece in raw["pieces"]]
            except (ValueError, KeyError, TypeError):
                continue
            n = len(ids)
            columns = [_column(raw.get(name), n) for name in ("sampler_logprobs", "logprobs", "entropy", "weights")]
            yield Line(raw, ids, pieces, *columns, _column(raw.get("versions"), n))


def _column(values: Any, n: int) -> Array:
    """float64 [n]; NaN for null, and for a column that does not have one value a token."""
    if not isinstance(values, list) or len(values) != n:
        return np.full(n, np.nan)
    return np.array(values, float)  # None becomes NaN


@dataclass(frozen=True)
class Chosen:
    """The steps of a run that are read, and what a page says about the others."""

    steps: dict[int, Path]
    of: int

    @property
    def note(self) -> str:
        if len(self.steps) == self.of:
            return ""
        return (
            f"{len(self.steps)} of {self.of} rollout files are shown, evenly spaced, the first and the last among them."
        )


def choose_steps(files: Mapping[int, Path], *, most: int, most_bytes: int) -> Chosen:
    """At most `most` steps, and about `most_bytes` to read; the first and the last are always among them."""
    steps = sorted(files)
    if steps:
        typical = max(
            1, int(np.median([files[s].stat().st_size for s in (steps[0], steps[len(steps) // 2], steps[-1])]))
        )
        most = max(2, min(most, most_bytes // typical))
    return Chosen({s: files[s] for s in spread(steps, most)}, len(steps))


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """`most` of the items, evenly spaced from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in sorted({round(k * (len(items) - 1) / max(1, most - 1)) for k in range(most)})]


# ---------------------------------------------------------------------------------------------------------- encoding


def encode_step(lines: Sequence[Line], objective: Mapping[str, Any], *, token_budget: int) -> dict[str, Any]:
    """One step for the page: groups of completions, token columns as base64 of little-endian arrays.

    `pieces` is the step's table of token texts, to which a completion's `t` (uint32) points; `s`, `l`, `e` are float32
    log μ, log π and entropy, null where nothing is known; `w` and `v` are one number where all tokens agree; `g` is the
    push under an objective that the page does not compute.
    Whole groups are left out, evenly spaced, where the step has more than `token_budget` tokens.
    """
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.head.get("admission", line.head.get("prompt_id")), []).append(line)
    per_group = sum(len(line.ids) + COMPLETION_COST for line in lines) / max(1, len(groups))
    kept = spread(list(groups), max(1, int(token_budget // max(1.0, per_group))))
    push = None if objective.get("type") in DRAWN else pusher(objective)
    table: dict[str, int] = {}
    shown = []
    for admission in kept:
        head = groups[admission][0].head
        shown.append(
            {
                "admission": head.get("admission"),
                "prompt_id": head.get("prompt_id"),
                "prompt": head.get("prompt"),
                "completions": [_encode(line, table, push) for line in groups[admission]],
            }
        )
    return {"pieces": list(table), "groups": shown, "groups_of": len(groups)}


def _encode(line: Line, table: dict[str, int], push: Callable[..., Array] | None) -> dict[str, Any]:
    n = len(line.ids)
    given = {"g": _floats(push(*_of(line), np.zeros(n)))} if push and n else {}
    keys = ("sample", "reward", "rewards", "correct", "advantage", "truncated", "trained", "version", "update")
    return (
        {key: line.head.get(key) for key in keys}
        | {
            "t": _base64(np.array([table.setdefault(piece, len(table)) for piece in line.pieces], "<u4")),
            "s": _floats(line.sampler),
            "l": _floats(line.logprobs),
            "e": _floats(line.entropy),
            "w": _constant(line.weights),
            "v": _constant(line.versions),
        }
        | given
    )


def _of(line: Line) -> tuple[Array, Array, Array, Array]:
    return line.sampler, line.logprobs, np.full(len(line.ids), line.advantage), line.weights


def _base64(values: Array) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _floats(values: Array) -> str | None:
    return None if np.isnan(values).all() else _base64(values.astype("<f4"))


def _constant(values: Array) -> float | str | None:
    if len(values) and (values == values[0]).all():
        return float(values[0])
    return _floats(values)


# ------------------------------------------------------------------------------------------------------- fork tokens


class ForkCounter:
    """Counts tokens after their predecessor, step by step, and the push that each got.

    A fork token is a token whose probability *after a given token* rose most. The policy samples from itself, so the
    share of a context's occurrences that continue with a token estimates its probability, without any log-prob of
    tokens that were not sampled.
    """

    def __init__(self, objective: Mapping[str, Any]) -> None:
        self._push = pusher(objective)
        self._ppo = pusher(PPO)
        self._pieces: dict[int, str] = {}
        self._steps: list[dict[str, Any]] = []

    def add(self, step: int, lines: Sequence[Line]) -> None:
        lines = [line for line in lines if len(line.ids)]
        if not lines:
            return
        for line in lines:
            self._pieces.update(zip(line.ids.tolist(), line.pieces))
        ids = np.concatenate([line.ids for line in lines])
        before = np.concatenate([np.concatenate([[START], line.ids[:-1]]) for line in lines])
        sampler, logprobs, A, w = (np.concatenate(column) for column in zip(*(_of(line) for line in lines)))
        rows = np.repeat(np.arange(len(lines)), [len(line.ids) for line in lines])
        r = np.exp(logprobs - sampler)
        trained = np.isfinite(r) & np.isfinite(A) & np.isfinite(w) & (A != 0)
        pairs, at = np.unique(np.stack([before, ids]), axis=1, return_inverse=True)
        at = at.reshape(-1)

        def total(values: Array) -> Array:
            return np.bincount(at, np.where(trained, values, 0.0), minlength=pairs.shape[1])

        got = self._push(sampler, logprobs, A, w, rows) if self._push else np.full(len(ids), np.nan)
        with np.errstate(invalid="ignore"):
            self._steps.append(
                {
                    "step": step,
                    "pairs": [tuple(pair) for pair in pairs.T.tolist()],
                    "count": np.bincount(at, minlength=pairs.shape[1]),
                    "got": total(got),
                    "ppo": total(self._ppo(sampler, logprobs, A, w, rows)),
                    "raised": total(((A > 0) * w != 0).astype(float)),
                    "silenced": total((silenced(r, A) & (w != 0)).astype(float)),
                    "trained": total((w != 0).astype(float)),
                }
            )

    def forks(self, most: int = 12, *, fewest: int = 8) -> dict[str, Any]:
        """The `most` pairs (context, token) whose share rose most, with their share at each step.

        Ranked by what the rise is worth, in nats per sampled token: (last share of all tokens) · log(p_last/p_first).
        p_first and p_last pool steps from either end until the context has occurred 200 times, but never more than
        half of the steps; a context seen fewer than `fewest` times at either end is left out.
        """
        self._steps.sort(key=lambda s: s["step"])
        steps = self._steps
        if len(steps) < 2:
            return {"steps": [s["step"] for s in steps], "forks": []}
        by_step = [dict(zip(s["pairs"], s["count"].tolist())) for s in steps]
        contexts = []
        for counts in by_step:
            context: dict[int, int] = {}
            for (before, _), n in counts.items():
                context[before] = context.get(before, 0) + n
            contexts.append(context)
        half = len(steps) // 2
        # only pairs that are in the last steps can have risen
        late = {pair for counts in by_step[-half:] for pair in counts}
        tokens_late = sum(sum(c.values()) for c in contexts[-half:])
        found = []
        for pair in late:
            first = _pooled(pair, by_step[:half], contexts[:half])
            last = _pooled(pair, by_step[::-1][:half], contexts[::-1][:half])
            if min(first[1], last[1]) < fewest:
                continue
            p_first, p_last = (first[0] + 0.5) / (first[1] + 1), (last[0] + 0.5) / (last[1] + 1)
            if p_last > p_first and last[0] * first[1] > first[0] * last[1]:
                share = sum(c.get(pair, 0) for c in by_step[-half:]) / tokens_late
                found.append((share * float(np.log(p_last / p_first)), pair, first, last))
        found.sort(key=lambda f: (-f[0], f[1]))
        forks = []
        for worth, pair, first, last in found[:most]:
            sums = {"got": 0.0, "ppo": 0.0, "silenced": 0.0, "raised": 0.0, "trained": 0.0}
            for s in steps:
                index = _index(s, pair)
                if index is not None:
                    for key in sums:
                        sums[key] += float(s[key][index])
            series = [c.get(pair, 0) / t[pair[0]] if t.get(pair[0]) else None for c, t in zip(by_step, contexts)]
            forks.append(
                {
                    "before": None if pair[0] == START else self._pieces[pair[0]],
                    "token": self._pieces[pair[1]],
                    "first": first[0] / first[1],
                    "last": last[0] / last[1],
                    "worth": worth,
                    "count": sum(c.get(pair, 0) for c in by_step),
                    "series": [None if p is None else round(p, 5) for p in series],
                    **{key: None if np.isnan(value) else value for key, value in sums.items()},
                }
            )
        return {"steps": [s["step"] for s in steps], "forks": forks}


def _index(step: dict[str, Any], pair: tuple[int, int]) -> int | None:
    where = step.setdefault("where", None)
    if where is None:
        where = step["where"] = {p: i for i, p in enumerate(step["pairs"])}
    return where.get(pair)


def _pooled(pair: tuple[int, int], by_step: Sequence[dict], contexts: Sequence[dict]) -> tuple[int, int]:
    """(occurrences of the pair, of its context) over steps in the given order until the context has 200."""
    n = of = 0
    for counts, context in zip(by_step, contexts):
        n, of = n + counts.get(pair, 0), of + context.get(pair[0], 0)
        if of >= 200:
            break
    return n, of
