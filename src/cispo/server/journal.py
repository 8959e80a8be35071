"""Run folders of the training that clients drive: `STATE_DIR/runs/<run>/`, which `cispo report` and `watch` read.

A step is what `forward_backward` requests accumulated until an `optim_step`. It becomes a line of `metrics.jsonl` and,
for losses with advantages, a file of `rollouts/`, in the format of `cispo train`; `config.yaml` says base model, LoRA,
objective and optimizer as they were at the run's first step.

    consumes  `trained`, `take` and `stepped` calls of the engine's thread
    waits for the engine to have nothing to do, or for WAITING_STEPS steps: writing takes time from a busy engine
    unblocked by `write`, by `stepped`, or by `flush`, which returns when all steps so far are written
    produces  files, on a thread of the engine's disk pool

A convenience, not a promise: what cannot be written is said once in the log, and left out. A step that runs again after
a crash is known by its request's number and not written twice. Prompts and completions are the tenant's: folders are
0700 and files 0600. Left out on purpose: rewards, which the server never sees, and rows held for a step that a restart
fell into: its line has the optimizer's numbers and those of the requests that ran since.

    cispo serve --state-dir DIR & cispo watch DIR
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from torch import Tensor

from cispo.metrics import dump_line, ratio_metrics, sampler_kl_metrics
from cispo.server.compute import ServedModel, TrainResult
from cispo.server.losses import LOSSES, Row, TrainWork
from cispo.server.records import Request, Run
from cispo.server.store import Store
from cispo.types import AdamParams

log = logging.getLogger("cispo.server")

HELD_TOKENS = 1 << 20
"""Of rows held for steps to come, of all runs together; beyond, those of the run that waited longest are let go."""
WAITING_STEPS, MOST_STEPS = 8, 32
"""How many steps wait for a quiet moment, and how many for the disk; further ones are written without their rows."""
ROLLOUT_ROWS, ROLLOUT_TOKENS = 128, 1 << 15
"""Most that one step's rollout file has."""
OBJECTIVES = {"ppo": "ppo_clip"}
"""Objectives of `algorithm.objective`, by their names on the wire where those differ."""


@dataclass
class Held:
    """What a run accumulated since its last step. calls: with their rows; the other fields count all of them."""

    calls: list[tuple[TrainWork, TrainResult]] = field(default_factory=list)
    tokens: int = 0
    loss: float = 0.0
    requests: int = 0


@dataclass(frozen=True)
class Step:
    run: Run
    seq: int
    number: int
    params: AdamParams
    metrics: Mapping[str, float]
    held: Held
    time: float


@dataclass
class _Last:
    """The last whole line of a run's metrics."""

    step: int = 0
    number: int = 0


class Journal:
    """`pool` runs the writing, one task at a time."""

    def __init__(self, store: Store, served: Mapping[str, ServedModel], pool: Executor):
        self._store, self._served, self._pool = store, served, pool
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._tokens = 0
        self._last: dict[str, _Last] = {}
        self._piece = functools.lru_cache(1 << 18)(lambda base, token: served[base].tokenizer.decode([token]))
        self._changed = threading.Condition()
        self._queue: deque[Step] = deque()
        self._writing = False
        self._put = self._done = 0
        self._said = False

    # ------------------------------------------------------------------------------------------ the engine's thread

    def trained(self, run: Run, work: TrainWork, result: TrainResult) -> None:
        """A `forward_backward` was added to the run's gradient."""
        held = self._held.setdefault(run.id, Held())
        self._held.move_to_end(run.id)
        held.loss += result.metrics["loss:sum"]
        held.requests += 1
        if self._tokens + work.tokens > HELD_TOKENS:
            for other in list(self._held.values())[:-1]:
                self._tokens -= other.tokens
                other.calls, other.tokens = [], 0
                if self._tokens + work.tokens <= HELD_TOKENS:
                    break
            else:
                return
        held.calls.append((work, result))
        held.tokens += work.tokens
        self._tokens += work.tokens

    def take(self, run: Run) -> Held:
        """What the run accumulated, which is forgotten: its gradient is about to be used, or thrown away."""
        held = self._held.pop(run.id, None) or Held()
        self._tokens -= held.tokens
        return held

    def stepped(self, run: Run, request: Request, params: AdamParams, metrics: Mapping[str, float], held: Held) -> None:
        """The run's weights have changed by what `take` gave."""
        with self._changed:
            if len(self._queue) >= MOST_STEPS:
                held.calls = []
            self._queue.append(Step(run, request.seq, request.number, params, metrics, held, time.time()))
            self._put += 1
            full = len(self._queue) >= WAITING_STEPS
        if full:
            self.write()

    @property
    def waiting(self) -> bool:
        """Whether there are steps that nobody writes."""
        return bool(self._queue) and not self._writing

    def write(self) -> None:
        """Have the steps so far written."""
        if self._begin():
            self._pool.submit(self._drain)

    # ------------------------------------------------------------------------------------------- the disk's threads

    def flush(self) -> None:
        """Wait until all steps so far are written, or failed to be. Not in the engine's thread."""
        if self._begin():
            self._drain()
        with self._changed:
            wanted = self._put
            self._changed.wait_for(lambda: self._done >= wanted)

    def _begin(self) -> bool:
        """Whether the caller is now the one who writes."""
        with self._changed:
            if self._writing or not self._queue:
                return False
            self._writing = True
            return True

    def _drain(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._writing = False
                    self._changed.notify_all()
                    return
                step = self._queue.popleft()
            try:
                self._write(step)
            except Exception as error:
                if not self._said:
                    self._said = True
                    log.error(
                        "journal_failed",
                        exc_info=None if isinstance(error, OSError) else error,
                        extra={"data": {"run": step.run.id, "error": str(error)}},
                    )
            with self._changed:
                self._done += 1
                self._changed.notify_all()

    def _write(self, step: Step) -> None:
        run = step.run
        runs = self._store.folder / "runs"
        folder = runs / folder_name(run.id)
        last = self._last.get(run.id)
        if last is None:
            last = self._last[run.id] = _last_line(folder / "metrics.jsonl")
        if step.number <= last.number:  # it runs again
            return
        last.step, last.number = last.step + 1, step.number
        self._store.check_space()
        for path in (runs, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        if step.held.calls and not (folder / "config.yaml").exists():
            with _private(folder / "config.yaml", "wb") as file:
                file.write(yaml.safe_dump(config_of(step), sort_keys=False, allow_unicode=True).encode())
        lines = list(self._rollout_lines(step, last.step))
        if lines:  # before the step's metrics, which say that it is whole
            (folder / "rollouts").mkdir(mode=0o700, exist_ok=True)
            with _private(folder / "rollouts" / f"step-{last.step:06d}.jsonl", "wb") as file:
                file.writelines(map(dump_line, lines))
        with _private(folder / "metrics.jsonl", "a+b") as file:
            _cut_torn_line(file)
            file.write(dump_line(metrics_line(step, last.step)))

    def _rollout_lines(self, step: Step, number: int) -> Iterator[dict[str, Any]]:
        """A line for each datum that has a completion; neighbours with the same prompt are a group."""
        tokenizer, base = self._served[step.run.base].tokenizer, step.run.base
        prompt, admission, sample, tokens = None, -1, 0, 0
        rows = (
            (call, *row)
            for call, (work, result) in enumerate(step.held.calls)
            if LOSSES[work.loss_fn].policy
            for row in zip(work.rows, result.logprobs, result.entropy, strict=True)
        )
        for count, (call, row, logprobs, entropy) in enumerate(rows):
            mask = completion_mask(row)
            first = int(mask.int().argmax())
            before = row.tokens[: first + 1].tolist() if bool(mask.any()) else None
            if before is None:
                continue
            tokens += int(mask.sum())
            if count >= ROLLOUT_ROWS or tokens > ROLLOUT_TOKENS:
                return
            if before != prompt:
                prompt, admission, sample = before, admission + 1, -1
                text = tokenizer.decode(prompt)
                prompt_id = hashlib.blake2b(repr(prompt).encode(), digest_size=4).hexdigest()
            sample += 1
            used = mask & (row.weights != 0)
            advantages = row.columns["advantages"][used]
            trained = bool((advantages != 0).any())
            ids = row.targets[mask].tolist()
            yield {
                "step": number,
                "admission": admission,
                "sample": sample,
                "prompt_id": prompt_id,
                "prompt": text,
                "completion": tokenizer.decode(ids),
                "reward": None,
                "rewards": {},
                "correct": None,
                "advantage": float(advantages.mean()) if len(advantages) else 0.0,
                "truncated": None,
                "trained": trained,
                "version": None,
                "tokens": ids,
                "pieces": [self._piece(base, token) for token in ids],
                "sampler_logprobs": _rounded(row.columns["anchor_logprobs"][mask]),
                "versions": None,
                "update": 0 if trained else None,
                "logprobs": _rounded(logprobs[mask]) if trained else None,
                "entropy": _rounded(entropy[mask]) if trained else None,
                "weights": _rounded(row.weights[mask]) if trained else None,
                "request": call,
            }


def folder_name(run: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", run)


def config_of(step: Step) -> dict[str, Any]:
    """The sections of a config of `cispo train` that a server knows. With the run's name, because nobody said that runs
    which agree in all this are seeds of one recipe."""
    work = step.held.calls[0][0]
    objective: dict[str, Any] = {"type": OBJECTIVES.get(work.loss_fn, work.loss_fn)}
    columns = work.rows[0].columns
    if LOSSES[work.loss_fn].thresholds:  # each token has its own; the band that holds the first datum's
        objective["clip_low_threshold"] = round(float(columns["clip_low_threshold"].min()), 6)
        objective["clip_high_threshold"] = round(float(columns["clip_high_threshold"].max()), 6)
    if isinstance(work.objective, functools.partial):
        objective |= work.objective.keywords
    return {
        "run": step.run.id,
        "seed": step.run.body.get("seed"),
        "model": {"path": step.run.base, "lora": asdict(step.run.shape)},
        "algorithm": {"objective": objective, "reduction": "sum"},
        "optimizer": asdict(step.params),
    }


def metrics_line(step: Step, number: int) -> dict[str, Any]:
    """A line of `metrics.jsonl`: the optimizer's numbers, and those of all tokens that have a gradient."""
    line: dict[str, Any] = {
        "step": number,
        "updates": number,
        "seq": step.seq,
        "number": step.number,
        "time": round(step.time, 3),
        "requests": step.held.requests,
        "optim/grad_norm": step.metrics["grad_norm"],
        "optim/learning_rate": step.params.learning_rate,
    }
    if step.held.requests:
        line["policy/loss"] = step.held.loss
    if missing := step.held.requests - len(step.held.calls):
        line["requests_left_out"] = missing  # of what follows
    if not step.held.calls:
        return line
    parts = [_columns(work, result) for work, result in step.held.calls]
    entropy = torch.cat([part["entropy"] for part in parts])
    line["tokens/trained"] = len(entropy)
    if len(entropy):
        line["policy/entropy"] = float(entropy.mean())
    policy = [part for part in parts if "advantages" in part]
    if policy:
        column = {name: torch.cat([part[name] for part in policy]) for name in policy[0]}
        ratio = (column["logprobs"] - column["sampler"]).exp()
        line |= ratio_metrics(ratio, column["advantages"], column["low"], column["high"])
        line |= sampler_kl_metrics(column["logprobs"], column["sampler"])
    return line


def _columns(work: TrainWork, result: TrainResult) -> dict[str, Tensor]:
    """Of the tokens of a request that have a gradient, in float64. low, high: the bounds of each token's ratio."""
    rows = work.rows
    used = torch.cat([row.weights for row in rows]) != 0
    entropy = torch.cat(result.entropy).double()
    if not LOSSES[work.loss_fn].policy:
        return {"entropy": entropy[used]}

    def column(name: str) -> Tensor:
        return torch.cat([row.columns[name] for row in rows]).double()

    advantages = column("advantages")
    used &= advantages != 0
    out = {
        "entropy": entropy,
        "advantages": advantages,
        "logprobs": torch.cat(result.logprobs).double(),
        "sampler": column("anchor_logprobs"),
    }
    if work.loss_fn in ("cispo", "ppo"):  # GSPO's bound another ratio, the sequence's
        out |= {"low": column("clip_low_threshold"), "high": column("clip_high_threshold")}
    else:
        out |= {"low": torch.zeros(len(used)).double(), "high": torch.full((len(used),), math.inf).double()}
    return {name: values[used] for name, values in out.items()}


def completion_mask(row: Row) -> Tensor:
    """Which targets were sampled, as far as a datum says: those with an advantage, or, where every advantage is 0,
    those that came with a log-prob."""
    weighted = row.weights != 0
    mask = weighted & (row.columns["advantages"] != 0)
    return mask if bool(mask.any()) else weighted & (row.columns["anchor_logprobs"] != 0)


def _rounded(values: Tensor) -> list[float]:
    return values.double().round(decimals=6).tolist()


# --------------------------------------------------------------------------------------------------------------- files


def _private(path: Path, mode: str) -> BinaryIO:
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115 - the caller closes


def _last_line(path: Path) -> _Last:
    try:
        lines: Sequence[bytes] = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return _Last()
    for line in reversed(lines):
        try:
            found = json.loads(line)
            return _Last(int(found["step"]), int(found["number"]))
        except (ValueError, KeyError, TypeError):
            continue
    return _Last()


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut what follows the last newline: a line that a kill or a full disk left incomplete."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
