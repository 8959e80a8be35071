"""Weights by broadcast: from the learner's first rank to every sampler's device, over a process group of their own.

A `Meeting` says where the members of a transfer meet. The sender is member 0 and hosts the store; it waits until every
receiver is at its door, says what comes, and broadcasts the bytes in buckets (NCCL between GPUs, gloo between CPUs). A
receiver that never comes, or anybody's word that it will not (`give_up`), ends the waiting before a byte has moved; one
that dies in the middle ends it within `timeout_s`. Both are TransferLost, after which the meeting is over and the next
transfer needs a new one. A meeting that went well serves again. Left out on purpose: whose weights these are and what
receivers do with them, and what becomes of members that were lost (`cluster/samplers.py`).

The sender. Consumes: tensors. Waits for: all receivers at their doors, then each bucket's collective.
    Unblocked by: those, `give_up`, `patience_s`, `timeout_s`. Produces: buckets.
A receiver. Consumes: buckets. Waits for: the sender's word, then each bucket.
    Unblocked by: the same. Produces: tensors.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import os
import re
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cispo.types import RunError

BUCKET_BYTES = 256 << 20
"""Tensors are sent together up to this size; a larger one goes alone."""
CONNECT_S = 30.0
"""How long the sender's store may take to answer; it is there before anybody hears of a meeting."""
BY_BROADCAST = "weights by broadcast:"
"""How what TransferLost says begins, for those who get it as a text from another process."""
_ALIGNMENT = 64
_LOOK_S = 0.005


class TransferLost(RunError):
    """A transfer did not come about, or broke off.

    begun: bytes had moved, so that receivers may hold some of the new weights; use none of them.
    """

    begun = False


class WeightsGone(RunError):
    """What died held weights that only their sender can give again."""


@dataclass(frozen=True)
class Meeting:
    """Where `size` members meet. doors: the member numbers that arrive before anything is sent; each has the members up
    to the next door behind it. patience_s: of waiting at the doors; timeout_s: of one bucket.
    """

    host: str
    port: int
    number: int
    size: int
    doors: tuple[int, ...]
    backend: Literal["gloo", "nccl"]
    patience_s: float
    timeout_s: float
    transfer: int = 0

    def again(self) -> Meeting:
        """The same members' next transfer."""
        return replace(self, transfer=self.transfer + 1)


# ------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Entry:
    """A tensor among packed bytes. offset: in bytes, in its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """What is sent, bucket by bucket, and which names are other names of tensors that are sent (tied weights)."""

    buckets: tuple[tuple[Entry, ...], ...]
    aliases: Mapping[str, str]

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None, limit: float = BUCKET_BYTES
    ) -> Layout:
        """The layout of `weights` in their order. dtypes: in which they are sent, where it is not their own.

        limit: bytes of a bucket that has more than one tensor.
        """
        seen: dict[tuple[int, tuple[int, ...]], str] = {}
        aliases: dict[str, str] = {}
        buckets: list[tuple[Entry, ...]] = []
        bucket: list[Entry] = []
        offset = 0
        for name, tensor in weights.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.numel() and seen.setdefault((local.data_ptr(), tuple(tensor.shape)), name) != name:
                aliases[name] = seen[local.data_ptr(), tuple(tensor.shape)]
                continue
            dtype = (dtypes or {}).get(name, tensor.dtype)
            entry = Entry(name, str(dtype).removeprefix("torch."), tuple(tensor.shape), offset)
            if bucket and offset + entry.nbytes > limit:
                buckets.append(tuple(bucket))
                entry, bucket = Entry(name, entry.dtype, entry.shape, 0), []
            bucket.append(entry)
            offset = _end(entry)
        return cls((*buckets, tuple(bucket)) if bucket else tuple(buckets), aliases)

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in itertools.chain.from_iterable(self.buckets)]

    def read(self, buffers: Iterable[Tensor], *, aliases: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the buckets' buffers, which they share; tied ones under each of their names, or (without
        `aliases`) once. One buffer at a time is asked for."""
        others: dict[str, list[str]] = {}
        for alias, name in self.aliases.items() if aliases else ():
            others.setdefault(name, []).append(alias)
        for bucket, buffer in zip(self.buckets, buffers, strict=True):
            for entry in bucket:
                tensor = read(buffer, entry)
                for name in (entry.name, *others.get(entry.name, ())):
                    yield name, tensor

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        raw = json.loads(text)
        buckets = (
            tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in bucket) for bucket in raw["buckets"]
        )
        return cls(tuple(buckets), raw["aliases"])


def size_of(bucket: Iterable[Entry]) -> int:
    """Bytes of a bucket."""
    return max((_end(entry) for entry in bucket), default=0)


def write(buffer: Tensor, entry: Entry, tensor: Tensor) -> None:
    """A tensor into its place in the buffer (uint8)."""
    flat = buffer[entry.offset : entry.offset + entry.nbytes].view(getattr(torch, entry.dtype))
    flat.copy_(tensor.detach().reshape(-1))


def read(buffer: Tensor, entry: Entry) -> Tensor:
    """A tensor in its place in the buffer, which it shares."""
    flat = buffer[entry.offset : entry.offset + entry.nbytes]
    return flat.view(getattr(torch, entry.dtype)).view(entry.shape)


def _end(entry: Entry) -> int:
    return entry.offset + -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT


# ------------------------------------------------------------------------------------------------------------- members


class _Group:
    """The process group of a meeting's members, made when the first bucket goes."""

    def __init__(self, meeting: Meeting, rank: int, store: dist.Store) -> None:
        self.number, self.rank = meeting.number, rank
        self.store = dist.PrefixStore(str(meeting.number), store)
        self._meeting = meeting
        self._group: Any = None

    def broadcast(self, buffer: Tensor) -> None:
        """Member 0's bytes into everybody's buffer. Raises TransferLost."""
        with _translated("a member"):
            if self._group is None:
                self._group = self._connect()
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            self._group.broadcast([buffer], options).wait()

    def _connect(self) -> Any:
        # Not `init_process_group`: that makes the one group of a process's own, the learner's among its ranks.
        meeting, store = self._meeting, dist.PrefixStore("group", self.store)
        timeout = datetime.timedelta(seconds=meeting.timeout_s)
        if meeting.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout, options.group_name = timeout, f"weights-{meeting.number}"
            # A member that is gone then raises an error in `wait`. By default `wait` only queues, and torch ends the
            # whole process after the timeout. Not run by our tests, which have no GPU.
            with environment({"TORCH_NCCL_BLOCKING_WAIT": "1"}):
                return dist.ProcessGroupNCCL(store, self.rank, meeting.size, options)
        return dist.ProcessGroupGloo(store, self.rank, meeting.size, timeout)


@contextlib.contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process's environment, for what reads them meanwhile."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Sender:
    """The learner's first rank. One for its lifetime; it hosts the store of all its meetings.

    host: this machine's address, as the receivers reach it. device: whose collectives are used, and on which buckets
    are packed.
    """

    def __init__(self, host: str, device: torch.device, *, patience_s: float, timeout_s: float) -> None:
        self._host, self._device = host, device
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._number = 0
        self._group: _Group | None = None

    def meet(self, behind: Sequence[int]) -> Meeting:
        """A new meeting; the one before is over. behind: how many members each door has. Nothing is waited for."""
        if self._group is not None:
            self._group.store.set("lost", "another meeting was called")
        self._number += 1
        meeting = Meeting(
            host=self._host,
            port=self._store.port,
            number=self._number,
            size=1 + sum(behind),
            doors=tuple(1 + sum(behind[:i]) for i in range(len(behind))),
            backend="nccl" if self._device.type == "cuda" else "gloo",
            patience_s=self._patience_s,
            timeout_s=self._timeout_s,
        )
        self._group = _Group(meeting, 0, self._store)
        return meeting

    def open(self, meeting: Meeting, layout: Layout, *, doors: bool = True) -> None:
        """Wait for all receivers at their doors, then tell everybody what comes. Raises TransferLost.

        doors: False where nobody will `arrive`, because members and sender are called together.
        """
        if self._group is None or self._group.number != meeting.number:
            raise TransferLost(f"{BY_BROADCAST} meeting {meeting.number} is over")
        store, word = self._group.store, meeting.transfer
        if doors:
            _await(store, meeting, {f"{word}/arrived/{door}": f"receiver {door}" for door in meeting.doors})
        with _translated("the store"):
            store.set(f"{word}/layout", layout.to_json())
            for key in (f"{word - 1}/layout", *(f"{word - 1}/arrived/{door}" for door in meeting.doors)):
                store.delete_key(key)  # whoever is at a door again has read what was said at it before

    def send(self, layout: Layout, tensors: Iterable[Tensor]) -> None:
        """The tensors of the layout, in its order; each is asked for when its bucket is packed. Raises TransferLost."""
        group, ordered = self._group, iter(tensors)
        assert group is not None
        try:
            for bucket in layout.buckets:
                buffer = torch.empty(size_of(bucket), dtype=torch.uint8, device=self._device)
                for entry in bucket:
                    write(buffer, entry, next(ordered))
                group.broadcast(buffer)
        except TransferLost as error:
            error.begun = True
            raise


class Receivers:
    """What a process is a member of: one meeting at a time, kept for the transfers to come."""

    def __init__(self) -> None:
        self._group: _Group | None = None

    def arrive(self, meeting: Meeting, door: int, alive: Callable[[], None] = lambda: None) -> None:
        """Wait at a door until the sender says what comes. Raises TransferLost, before anything was received.

        alive: called while waiting, for whoever watches the caller.
        """
        store, word = self._joined(meeting, door).store, meeting.transfer
        with _translated("the sender's store"):
            store.set(f"{word}/arrived/{door}", "1")
        _await(store, meeting, {f"{word}/layout": "the sender's word"}, alive)

    def receive(
        self,
        meeting: Meeting,
        rank: int,
        device: torch.device,
        *,
        aliases: bool = True,
        alive: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The transfer's tensors, on `device`, one bucket's in memory at a time. Raises TransferLost.

        device: a CUDA device where the meeting's backend is NCCL. aliases: tied weights under each of their names, or
        once, as in a model folder. alive: called after each bucket, for whoever watches the caller.
        """
        group = self._joined(meeting, rank)
        key = f"{meeting.transfer}/layout"
        _await(group.store, meeting, {key: "the sender's word"})
        with _translated("the sender's store"):
            layout = Layout.from_json(group.store.get(key).decode())

        def buffers() -> Iterator[Tensor]:
            for bucket in layout.buckets:
                buffer = torch.empty(size_of(bucket), dtype=torch.uint8, device=device)
                group.broadcast(buffer)
                alive()
                yield buffer

        yield from layout.read(buffers(), aliases=aliases)

    def _joined(self, meeting: Meeting, rank: int) -> _Group:
        if self._group is None or (self._group.number, self._group.rank) != (meeting.number, rank):
            self._group = None  # what was the last meeting's ends first
            self._group = _Group(meeting, rank, _store_of(meeting))
        return self._group


class Elsewhere(Mapping[str, Tensor]):
    """Weights that lie elsewhere, and are fetched once, when one is looked at."""

    _here: Mapping[str, Tensor] | None = None

    @abstractmethod
    def _fetch(self) -> Mapping[str, Tensor]: ...

    def _fetched(self) -> Mapping[str, Tensor]:
        if self._here is None:
            self._here = self._fetch()
        return self._here

    def __getitem__(self, name: str) -> Tensor:
        return self._fetched()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetched())

    def __len__(self) -> int:
        return len(self._fetched())


class Incoming(Elsewhere):
    """Weights that a transfer brings, to be received on `device`. Looking at them raises TransferLost.

    A sampler whose engine has processes of its own lets those join `meeting` instead, as the members from `door` on.
    """

    def __init__(
        self,
        receivers: Receivers,
        meeting: Meeting,
        door: int,
        device: torch.device,
        *,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.meeting, self.door = meeting, door
        self._receivers, self._device, self._alive = receivers, device, alive

    def _fetch(self) -> Mapping[str, Tensor]:
        return dict(self._receivers.receive(self.meeting, self.door, self._device, alive=self._alive))


def give_up(meeting: Meeting, why: str) -> None:
    """Tell the members who wait that somebody will not come. For whoever watches them; no member need call it.

    Does not wait until it is told: a store whose process is stopped takes the call and never answers, timeout or not.
    """

    def tell() -> None:
        with contextlib.suppress(TransferLost), _translated("the sender's store"):
            dist.PrefixStore(str(meeting.number), _store_of(meeting)).set("lost", why)

    threading.Thread(target=tell, name="give-up", daemon=True).start()


def _await(
    store: dist.Store, meeting: Meeting, keys: Mapping[str, str], alive: Callable[[], None] = lambda: None
) -> None:
    """Until all keys are there; what each means is for the error. Raises TransferLost."""
    until, missing = time.monotonic() + meeting.patience_s, list(keys)
    while True:
        with _translated("the sender's store"):
            missing = [key for key in missing if not store.check([key])]
            if not missing:
                return
            if store.check(["lost"]):
                raise TransferLost(f"{BY_BROADCAST} {store.get('lost').decode()}")
        if time.monotonic() > until:
            names = ", ".join(keys[key] for key in missing)
            raise TransferLost(f"{BY_BROADCAST} {names} did not come within {meeting.patience_s:g} s")
        alive()
        time.sleep(_LOOK_S)


def _store_of(meeting: Meeting) -> dist.Store:
    timeout = datetime.timedelta(seconds=min(meeting.timeout_s, CONNECT_S))
    with _translated("the sender's store"):
        return dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Collectives and stores fail with RuntimeErrors whose texts say where, and never who."""
    try:
        yield
    except TransferLost:
        raise
    except RuntimeError as error:
        # "[.../pair.cc:553] Connection closed by peer [10.0.0.7]:4711. This is typically ...", and a C++ stack.
        reason = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise TransferLost(f"{BY_BROADCAST} {what} was lost ({reason})") from error
