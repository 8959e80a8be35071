"""The rows in flight: one slot each, the live ones packed at the front, on the device and on the host.

The device holds what a decode step reads and writes; the host mirrors lengths and limits, so that a step asks the
device one question only (which rows drew a stop token). Left out on purpose: which row gets a slot, and when, which is
local.py's to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from cispo.sampling.cache import Sharing, SlotCache, resized
from cispo.sampling.draw import row_seeds
from cispo.types import Completion, SampleRequest

CUR, COLUMN, POSITION, COUNT, SEED = range(5)  # columns of `Slots.ints`; a draw adds 1 to the middle three
TEMPERATURE, TOP_K, TOP_P, MIN_P = range(4)  # columns of `Slots.params`


@dataclass(slots=True, eq=False)
class Job:
    """One request under way: the completions that exist so far, by sample, and how many do not."""

    request: SampleRequest
    seed: int
    stop_token_ids: tuple[int, ...]
    completions: list[Completion | None] = field(default_factory=list)
    left: int = 0


@dataclass(slots=True, eq=False)
class Prefix:
    """A sequence in the prefix store. rows: how many in flight continue it. held: rows that wait will continue it."""

    tokens: tuple[int, ...]
    rows: int = 0
    held: bool = False


@dataclass(slots=True, eq=False)
class Row:
    """One sample under way. tokens, logprobs: what it drew before it last lost its slot. spans: (tokens drawn before,
    version from there on). order: its place in the order of admission. sequence: prompt and `tokens`, once it has a
    slot. prefix: where their keys stand, None for the row's own slot."""

    job: Job
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    order: int = 0
    sequence: tuple[int, ...] = ()
    prefix: Prefix | None = None


class Slots:
    """n slots of the rows in flight, and the prefixes that some of these continue.

    ints: int64 [R, 5], by slot: the newest token, its column, its position in the whole sequence, the tokens drawn so
    far, the row's seed. stops: int64 [R, E], the ids that end the row, filled up with -1. ids, logprobs: what it drew
    since it got its slot, each token at the column where its key will stand.
    Host: rows; start (columns of its slot that its sequence took); used (and the tokens drawn since); limit (of
    `used`); group (place of its prefix, or -1); params; watched (has stop strings); live (false once finished, until
    the slot is given away).
    """

    def __init__(self, layers: int, device: torch.device):
        self.device = device
        self.cache = SlotCache(layers)
        self.n = 0
        self.dead = 0
        self.rows: list[Row | None] = []
        self.prefixes: list[Prefix] = []
        self.ints = torch.zeros(0, 5, dtype=torch.int64, device=device)
        self.stops = torch.full((0, 1), -1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(0, 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(0, 1, dtype=torch.float32, device=device)
        self.start, self.used, self.limit, self.group = (np.zeros(0, dtype=np.int64) for _ in range(4))
        self.params = np.zeros((0, 4))
        self.watched, self.live = (np.zeros(0, dtype=bool) for _ in range(2))
        self._sharing: Sharing | None = None

    @property
    def _host(self) -> tuple[np.ndarray, ...]:
        return (self.start, self.used, self.limit, self.group, self.params, self.watched, self.live)

    @property
    def sharing(self) -> Sharing | None:
        """Which prefix each of the n rows continues; None where every row has all its tokens in its slot."""
        if self._sharing is None and (self.group[: self.n] >= 0).any():
            lengths_N = np.array([len(prefix.tokens) for prefix in self.prefixes])
            self._sharing = Sharing(self.group[: self.n], lengths_N, self.device)
        return self._sharing

    def reshape(self, prefix_sides: tuple[int, int], row_sides: tuple[int, int]) -> None:
        """Give the stores other sides; what is in flight stays."""
        self.cache.reshape(prefix_sides, row_sides, len(self.prefixes), self.n)
        R, columns = row_sides
        self.ids = resized(self.ids, R, columns + 1, self.n, dim=1)
        self.logprobs = resized(self.logprobs, R, columns + 1, self.n, dim=1)
        if len(self.rows) != R:
            self.ints = resized(self.ints, R, 5, self.n, dim=1)
            self.stops = resized(self.stops, R, self.stops.shape[1], self.n, dim=1)
            self.rows = (self.rows + [None] * R)[:R]
            (self.start, self.used, self.limit, self.group, self.params, self.watched, self.live) = (
                np.concatenate([x[: self.n], np.zeros((R - self.n, *x.shape[1:]), x.dtype)]) for x in self._host
            )

    def fill(self, rows: list[Row], prefixes: list[int]) -> slice:
        """Give the next slots to `rows`, which continue the prefixes at these places (-1: a sequence in the row's own
        slot). Nothing is drawn yet."""
        new = slice(self.n, self.n + len(rows))
        for row, place in zip(rows, prefixes, strict=True):
            row.prefix = None if place < 0 else self.prefixes[place]
            if row.prefix is not None:
                row.prefix.rows += 1
        requests = [row.job.request for row in rows]
        length = np.array([len(row.sequence) for row in rows])
        start = np.where(np.array(prefixes) < 0, length, 0)
        ints = np.empty((len(rows), 5), dtype=np.int64)
        ints[:, CUR], ints[:, COLUMN], ints[:, POSITION] = 0, start - 1, length - 1
        ints[:, COUNT] = [len(row.tokens) for row in rows]
        ints[:, SEED] = row_seeds([row.job.seed for row in rows], [row.sample for row in rows]).numpy()
        self.ints[new] = torch.from_numpy(ints).to(self.device)
        most = max(len(row.job.stop_token_ids) for row in rows)
        if most > self.stops.shape[1]:
            wider = torch.full((len(self.rows), most), -1, dtype=torch.int64, device=self.device)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        E = self.stops.shape[1]
        padded = {row.job: (*row.job.stop_token_ids, *[-1] * (E - len(row.job.stop_token_ids))) for row in rows}
        self.stops[new] = torch.tensor([padded[row.job] for row in rows], dtype=torch.int64).to(self.device)
        self.start[new] = self.used[new] = start
        self.limit[new] = start + [request.params.max_tokens for request in requests] - ints[:, COUNT]
        self.group[new] = prefixes
        self.params[new] = [(p.temperature, p.top_k, p.top_p, p.min_p) for p in (r.params for r in requests)]
        self.watched[new] = [bool(request.params.stop) for request in requests]
        self.live[new] = True
        self.rows[new] = rows
        self.n += len(rows)
        self._sharing = None
        return new

    def tail(self, slot: int, size: int) -> list[int]:
        """The last `size` tokens that the row has drawn, or all of them."""
        here = self.ids[slot, max(self.start[slot], self.used[slot] - size) : self.used[slot]].tolist()
        before = self.rows[slot].tokens
        return before[max(0, len(before) - size + len(here)) :] + here

    def drop(self, slots: np.ndarray) -> None:
        """Mark rows as finished. A dead row goes on from column 0, which keeps it inside its store, until `compact`
        gives its slot away."""
        self.live[slots] = False
        self.used[slots] = 1
        self.limit[slots] = np.iinfo(np.int64).max
        self.watched[slots] = False
        self.dead += len(slots)
        for slot in slots:
            if self.rows[slot].prefix is not None:
                self.rows[slot].prefix.rows -= 1
            self.rows[slot] = None
        at = torch.from_numpy(np.asarray(slots)).to(self.device)
        self.ints[at, COLUMN] = 0
        self.ints[at, POSITION] = 0

    def compact(self) -> bool:
        """Move the last live rows into the slots of dead ones, and the last prefixes into those that nobody continues.
        True when the rows in flight stand elsewhere now."""
        if self.dead:
            n = self.n - self.dead
            target, source = _holes(self.live[: self.n], n)
            if len(target):
                to, of = (torch.from_numpy(x).to(self.device) for x in (target, source))
                columns = int(self.used[source].max())
                self.cache.move_rows(of, to, columns)
                self.ints[to], self.stops[to] = self.ints[of], self.stops[of]
                self.ids[to, :columns] = self.ids[of, :columns]
                self.logprobs[to, :columns] = self.logprobs[of, :columns]
                for x in self._host:
                    x[target] = x[source]
                for a, b in zip(target, source, strict=True):
                    self.rows[a] = self.rows[b]
            self.live[n : self.n] = False
            self.rows[n : self.n] = [None] * (self.n - n)
        moved = self.dead > 0
        self.n, self.dead = self.n - self.dead, 0
        wanted = np.array([prefix.rows > 0 or prefix.held for prefix in self.prefixes], dtype=bool)
        if not wanted.all():
            target, source = _holes(wanted, int(wanted.sum()))
            if len(target):
                self.cache.move_prefixes(*(torch.from_numpy(x).to(self.device) for x in (source, target)))
            places = np.arange(len(wanted))
            places[source] = target
            group = self.group[: self.n]
            self.group[: self.n] = np.where(group < 0, -1, places[group])
            for a, b in zip(target, source, strict=True):
                self.prefixes[a] = self.prefixes[b]
            del self.prefixes[int(wanted.sum()) :]
            moved = True
        if moved:
            self._sharing = None
        return moved


def _holes(wanted: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The unwanted places below n, and as many wanted ones from n on."""
    return np.flatnonzero(~wanted[:n]), n + np.flatnonzero(wanted[n:])
