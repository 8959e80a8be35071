"""The rows in flight: one slot each, the live ones packed at the front, on the device and on the host.

The device holds what a decode step reads and writes; the host mirrors lengths and limits, so that a step asks the
device one question only (which rows drew a stop token). Left out on purpose: which row gets a slot, and when, which is
local.py's to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cispo.sampling.cache import SlotCache, resized
from cispo.sampling.draw import row_seed
from cispo.types import Completion, SampleRequest

CUR, POS, COUNT, SEED = range(4)  # columns of `Slots.ints`
TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)  # columns of `Slots.params`


@dataclass(slots=True)
class Job:
    """One request under way: the completions that exist so far, by sample, and how many do not."""

    request: SampleRequest
    seed: int
    stop_token_ids: tuple[int, ...]
    completions: list[Completion | None] = field(default_factory=list)
    left: int = 0


@dataclass(slots=True)
class Row:
    """One sample under way. `logprobs` holds what it drew before it last lost its slot; `spans` lists (tokens drawn
    until then, version from there on); `order` is its place in the order of admission."""

    job: Job
    sample: int
    logprobs: list[float]
    spans: list[tuple[int, int]]
    order: int


class Slots:
    """R slots of `columns` key/value tokens. Row r's token p stands at column p of `ids`, its key and value at column p
    of the cache, its log-prob at column p of `logprobs`.

    ints: int64 [R, 4], by slot: the newest token, its position, the tokens drawn so far, the row's seed.
    stops: int64 [R, E], the ids that end the row, filled up with -1.
    Host: rows; length (tokens, the newest one included); limit (length at which the row is truncated); start (length
    when it got its slot); params; watched (has stop strings); live (false once finished, until the slot is given away).
    """

    def __init__(self, layers: int, device: torch.device):
        self.device = device
        self.cache = SlotCache(layers, 0, 0)
        self.n = 0
        self.dead = 0
        self.rows: list[Row | None] = []
        self.ints = torch.zeros(0, 4, dtype=torch.int64, device=device)
        self.stops = torch.full((0, 1), -1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(0, 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(0, 1, dtype=torch.float32, device=device)
        self.length, self.limit, self.start = (np.zeros(0, dtype=np.int64) for _ in range(3))
        self.params = np.zeros((0, 4))
        self.watched, self.live = (np.zeros(0, dtype=bool) for _ in range(2))

    @property
    def _host(self) -> tuple[np.ndarray, ...]:
        return self.length, self.limit, self.start, self.params, self.watched, self.live

    def reshape(self, rows: int, columns: int) -> None:
        """Give the rectangle other sides; rows in flight stay."""
        self.cache.reshape(rows, columns, self.n)
        self.ids = resized(self.ids, rows, columns + 1, self.n, dim=1)
        self.logprobs = resized(self.logprobs, rows, columns + 1, self.n, dim=1)
        if rows != len(self.rows):
            self.ints = resized(self.ints, rows, 4, self.n, dim=1)
            self.stops = resized(self.stops, rows, self.stops.shape[1], self.n, dim=1)
            self.rows = (self.rows + [None] * rows)[:rows]
            self.length, self.limit, self.start, self.params, self.watched, self.live = (
                np.concatenate([x, np.zeros((rows, *x.shape[1:]), x.dtype)])[:rows] for x in self._host
            )

    def fill(self, rows: list[Row], ids_RS: Tensor, lengths: np.ndarray) -> slice:
        """Give the next slots to `rows`, whose sequences so far (prompt, and what they drew before) are `ids_RS` up to
        `lengths`. The newest of these tokens is the last one that has keys and values already."""
        new = slice(self.n, self.n + len(rows))
        requests = [row.job.request for row in rows]
        prompts = np.array([len(request.prompt) for request in requests])
        ints = np.zeros((len(rows), 4), dtype=np.int64)
        ints[:, POS] = lengths - 1
        ints[:, COUNT] = lengths - prompts
        ints[:, SEED] = [row_seed(row.job.seed, row.sample) for row in rows]
        self.ints[new] = torch.from_numpy(ints).to(self.device)
        most = max(len(row.job.stop_token_ids) for row in rows)
        if most > self.stops.shape[1]:
            wider = torch.full((len(self.rows), most), -1, dtype=torch.int64, device=self.device)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        E = self.stops.shape[1]
        stops = [row.job.stop_token_ids + (-1,) * (E - len(row.job.stop_token_ids)) for row in rows]
        self.stops[new] = torch.tensor(stops, dtype=torch.int64).to(self.device)
        self.ids[new, : ids_RS.shape[1]] = ids_RS
        self.length[new] = self.start[new] = lengths
        self.limit[new] = prompts + [request.params.max_tokens for request in requests]
        self.params[new] = [(p.temperature, p.top_k, p.top_p, p.min_p) for p in (r.params for r in requests)]
        self.watched[new] = [bool(request.params.stop) for request in requests]
        self.live[new] = True
        self.rows[new] = rows
        self.n += len(rows)
        return new

    def drop(self, slots: np.ndarray) -> None:
        """Mark rows as finished. A dead row goes on at position 0, which keeps it inside the rectangle, until `compact`
        gives its slot away."""
        self.live[slots] = False
        self.length[slots] = 1
        self.limit[slots] = np.iinfo(np.int64).max
        self.watched[slots] = False
        self.dead += len(slots)
        for slot in slots:
            self.rows[slot] = None
        self.ints[torch.from_numpy(np.asarray(slots)).to(self.device), POS] = 0

    def compact(self) -> bool:
        """Move the last live rows into the slots of dead ones. True when the rows in flight stand elsewhere now."""
        if not self.dead:
            return False
        n = self.n - self.dead
        columns = int(self.length[: self.n].max())
        target = np.flatnonzero(~self.live[:n])
        source = n + np.flatnonzero(self.live[n : self.n])
        if len(target):
            to, of = (torch.from_numpy(x).to(self.device) for x in (target, source))
            self.cache.move(of, to, columns)
            self.ints[to], self.stops[to] = self.ints[of], self.stops[of]
            self.ids[to, :columns] = self.ids[of, :columns]
            self.logprobs[to, :columns] = self.logprobs[of, :columns]
            for x in self._host:
                x[target] = x[source]
            for a, b in zip(target, source, strict=True):
                self.rows[a] = self.rows[b]
        self.live[n : self.n] = False
        self.rows[n : self.n] = [None] * (self.n - n)
        self.n, self.dead = n, 0
        return True
