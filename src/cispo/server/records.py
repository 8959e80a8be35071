"""What the server knows: sessions, training runs, samplers, checkpoints, and requests with their futures.

Plain records; who may change which: the event loop everything, except that the engine's thread sets a run's `executed`
and resolves requests. Left out on purpose: how they are stored (`store.py`) and when they change (`service.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cispo.server.compute import ScoreRequest
from cispo.server.lora import LoraShape
from cispo.server.losses import TrainWork
from cispo.server.store import BlobRow
from cispo.types import AdamParams, SampleRequest

Status = Literal["accepted", "proto", "json", "failed"]


@dataclass
class Session:
    id: str
    owner: str
    created: float
    seen: float
    body: dict[str, Any]
    finished: dict[str, Any] | None = None


@dataclass
class Run:
    """A training run. done: the last request that its stored snapshot holds; executed: the last that memory holds."""

    id: str
    session: str
    owner: str
    base: str
    shape: LoraShape
    body: dict[str, Any]
    created: float
    seen: float
    blob: BlobRow | None = None
    done: int = 0
    executed: int = 0
    corrupted: str | None = None
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Sampler:
    """What a sampling session samples from: the base where `blob` is None."""

    id: str
    session: str
    owner: str
    base: str
    path: str | None
    model: str | None
    blob: BlobRow | None
    shape: LoraShape | None
    kind: Literal["base", "snapshot", "inflight"]
    created: float
    clients: int = 0
    used: float = field(default_factory=time.time)


@dataclass
class Checkpoint:
    """kind: "weights" (with optimizer state), "sampler_weights" or "external_weights"."""

    path: str
    model: str
    owner: str
    kind: str
    name: str
    blob: BlobRow
    created: float
    expires: float | None
    public: bool
    body: dict[str, Any]

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= time.time()


# --------------------------------------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class CreateWork:
    seed: int


@dataclass(frozen=True)
class LoadWork:
    """Weights into a run, new or existing. With `optimizer`: moments and step count too."""

    path: str
    blob: BlobRow
    optimizer: bool


@dataclass(frozen=True)
class SaveWork:
    """kind as in `Checkpoint`; without a name: a sampling session `sampler` of its own."""

    kind: str
    name: str | None
    sampler: str | None
    inflight: bool
    expires_in: float | None
    metadata: Mapping[str, str] | None


@dataclass(frozen=True)
class SampleWork:
    request: SampleRequest
    score: ScoreRequest | None
    topk_sampled: int


Work = CreateWork | LoadWork | SaveWork | SampleWork | TrainWork | AdamParams


class Request:
    """One accepted request and its future.

    number: its place in the log (0 until the log has it). together: which group it was executed in, of those that ran
    in one pass. replayed: its result is known already and it runs again only for its effect.
    """

    __slots__ = (
        "id", "number", "owner", "kind", "scope", "seq", "digest", "work", "together", "replayed", "status", "result",
        "created", "finished", "delivered", "accepted", "_event", "_loop", "_then",
    )  # fmt: skip

    def __init__(self, id: str, owner: str, kind: str, scope: str, seq: int, digest: bytes, work: Work | None):
        self.id, self.owner, self.kind, self.scope, self.seq, self.digest = id, owner, kind, scope, seq, digest
        self.work = work
        self.number, self.together = 0, None
        self.replayed = False
        self.status: Status = "accepted"
        self.result: bytes | None = None
        self.created = time.time()
        self.finished: float | None = None
        self.delivered: float | None = None
        self.accepted: asyncio.Future | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        self._then: Callable[[Request], None] | None = None

    @property
    def resolved(self) -> bool:
        return self.status != "accepted"

    def attach(self, loop: asyncio.AbstractEventLoop, then: Callable[[Request], None]) -> None:
        """`then` is called in the loop once the request is resolved. Before anyone can resolve it."""
        self._loop, self._then = loop, then

    def resolve(self, status: Status, result: bytes) -> None:
        """From any thread; wakes those who wait. The first result stands."""
        self.work = None
        if self.resolved:
            return
        self.result, self.finished = result, time.time()
        self.status = status
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._woken)

    def _woken(self) -> None:
        if self._then is not None:
            self._then(self)
        if self._event is not None:
            self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Whether it was resolved in time. In the loop only."""
        if self.resolved:
            return True
        if self._event is None:
            self._event = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        return self.resolved


def failure(message: str, category: str = "user") -> bytes:
    return json.dumps({"error": message, "category": category}).encode()
