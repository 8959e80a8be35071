"""`RaySamplerPool`: samplers as Ray actors that take prompts by load, and one object that is a `Sampler`.

The pool keeps every request until its result is there. A sampler that dies, or gives no sign of life, is started again
with the newest weights, and its requests are submitted again with their ids and seeds; a result counts once, whoever
brings it. Where weights go by broadcast, the learner must take part in every delivery: a sampler that missed one gets
nothing to sample until the next. That comes at once while the learner still has the weights that were published, and
otherwise when it publishes again. After the first updates, and every so often, each sampler is probed: it samples a few
short completions, and their log-probs are compared with the learner's (`sampling/probe.py`).

Where samplers share devices with the learner (`turns.py`), the pool puts them to sleep when all that was asked of them
is done, and wakes them when something is asked. One that dies asleep is started again when the pool wakes.
Left out on purpose: how tokens are sampled.

The actor's loop. Consumes: commands, in the order in which the pool numbered them. Waits for: a command, when it has
nothing to sample. Unblocked by: the pool. Produces: results, or the exception that ended it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from torch import Tensor

from cispo import model as models
from cispo.cluster.weights import LiveWeights, StoredWeights, pack, put, unpack
from cispo.config import Config
from cispo.sampling.probe import LearnerLogprobs, Parity, Recent, accepted, compare, due
from cispo.transfer import Incoming, Meeting, Receivers, TransferLost, WeightsGone, give_up
from cispo.types import CispoError, Completion, RunError, Sampler, SampleRequest, SampleResult

log = logging.getLogger(__name__)

WAIT_S = 0.05
"""How long `poll` may wait for a result before it lets its caller look around."""
MAX_LOSSES = 3
"""Broadcasts that fail in a row are no accident."""
GRACE_S = 15.0
"""After a broadcast was lost, how long it may take to learn which sampler died."""
TAKE_S = 1.0
"""How long an actor holds the question for results while there are none. Its answer is also its sign of life."""
CLOSE_S = 30.0
"""How long the engines of a pool may take to end by themselves."""
LOADING, AWAKE, ASLEEP, GONE = "loading", "awake", "asleep", "gone"
"""GONE: it died asleep, and its place is taken again when the pool wakes."""
State = tuple[str, int]
"""Of a sampler: one of these, and which of its pool's turns brought it there."""
PROBES = -(1 << 62)
"""Request ids from here on are probes'; the trainer's are far above."""


class Worker:
    """The actor: a sampler in a thread of its own, because decoding goes on whatever the pool asks."""

    def __init__(self, config: Config, path: str, devices: Sequence[str] = ()) -> None:
        if devices:  # other actors have them too, and Ray shows them to those only; CUDA has not been started yet
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self._config, self._path = config, path
        self._commands: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._early: dict[int, tuple[str, Any]] = {}
        self._next = 0
        self._results: list[SampleResult] = []
        self._news = threading.Condition()
        self._error: BaseException | None = None
        self._state: State = (LOADING, 0)
        self._receivers = Receivers()
        self._sampler: Sampler | None = None
        self._beat = time.monotonic()
        threading.Thread(target=self._run, name="sampler", daemon=True).start()

    def tell(self, number: int, kind: str, value: Any) -> None:
        """A command; Ray may deliver them out of order."""
        with self._news:
            self._early[number] = (kind, value)
            while self._next in self._early:
                self._commands.put(self._early.pop(self._next))
                self._next += 1

    def take(self, known: State) -> tuple[list[SampleResult], float, State]:
        """Results since the last call, seconds since the loop's last turn, and the state, which was `known`."""
        with self._news:
            self._news.wait_for(
                lambda: self._results or self._error is not None or self._state != known, timeout=TAKE_S
            )
            if self._error is not None:
                raise self._error
            results, self._results = self._results, []
        return results, time.monotonic() - self._beat, self._state

    def close(self) -> None:
        """End what a killed process would leave behind: an engine's processes and its files."""
        if hasattr(self._sampler, "close"):
            self._sampler.close()

    def process(self) -> int:
        """The operating system's number of this process."""
        return os.getpid()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # handed to the pool, which ends the run with it
            with self._news:
                self._error = error
                self._news.notify_all()

    def _serve(self) -> None:
        sampler = self._sampler = build_sampler(self._config, self._path, self._live)
        drain = not self._config.asynchrony.in_flight_weight_updates
        self._enter(AWAKE, 0)
        while True:
            self._live()
            try:
                kind, value = self._commands.get(timeout=None if sampler.pending else TAKE_S, block=not sampler.pending)
            except queue.Empty:
                self._advance(sampler)
                continue
            if kind == "submit":
                sampler.submit(value)
            elif kind == "cancel":
                sampler.cancel(value)
            elif kind == "sleep":
                sampler.sleep()
                self._enter(ASLEEP, value)
            elif kind == "wake":
                sampler.wake()
                self._enter(AWAKE, value)
            else:
                source, version = value
                while drain and sampler.pending:  # what was submitted before is finished under the old weights
                    self._advance(sampler)
                    self._live()
                if kind == "stored":
                    sampler.update_weights(unpack(ray.get(source[0])), version)
                elif kind == "broadcast":
                    self._receive(sampler, *source, version)

    def _receive(self, sampler: Sampler, meeting: Meeting, door: int, version: int) -> None:
        try:
            self._receivers.arrive(meeting, door, self._live)
        except TransferLost as error:  # nothing has changed here, and the pool says what is next
            log.warning("%s", error)
            return
        device = torch.device("cuda" if meeting.backend == "nccl" else "cpu")
        sampler.update_weights(Incoming(self._receivers, meeting, door, device, alive=self._live), version)

    def _enter(self, name: str, turn: int) -> None:
        with self._news:
            self._state = (name, turn)
            self._news.notify_all()

    def _live(self) -> None:
        self._beat = time.monotonic()

    def _advance(self, sampler: Sampler) -> None:
        results = sampler.poll() if sampler.pending else []
        if results:
            with self._news:
                self._results += results
                self._news.notify_all()


def build_sampler(config: Config, path: str, alive: Callable[[], None]) -> Sampler:
    """The engine of one actor, with weights of its own. alive: to be called while a call takes long."""
    torch.set_num_threads(config.asynchrony.sampler_threads)
    asynchrony = config.asynchrony
    if asynchrony.sampler == "vllm":
        from cispo.sampling.vllm import VllmSampler

        return VllmSampler(
            path,
            config.vllm,
            dtype=None if config.model.dtype == "auto" else getattr(torch, config.model.dtype),
            tokenizer=models.load_tokenizer(path),
            in_flight=asynchrony.in_flight_weight_updates,
            recompute_kv=asynchrony.recompute_kv,
            threads=asynchrony.sampler_threads,
            seed=config.seed,
            alive=alive,
            sleeps=config.cluster.colocate,
        )
    from cispo.sampling.local import LocalSampler

    loaded = models.load(config.model.model_copy(update={"lora": None}), path, trainable=False)
    return LocalSampler(
        loaded.model,
        loaded.tokenizer,
        max_batch_rows=config.rollout.max_batch_rows,
        eos_token_ids=models.eos_token_ids(loaded.model, loaded.tokenizer),
        share_weights=False,
        recompute_kv_on_update=asynchrony.recompute_kv,
    )


class _Seat:
    """One place in the pool: the actor that sits there now, and what it has been given."""

    def __init__(self, options: Mapping[str, Any], devices: Sequence[str] = ()) -> None:
        self.options, self.devices = options, devices
        self.requests: dict[int, SampleRequest] = {}
        self.sit(None)

    def sit(self, actor: Any) -> None:
        self.actor = actor
        self.told = 0
        self.waits = False  # for weights that it missed, before it is told anything else
        self.untold: list[SampleRequest] = []  # what it is told then
        self.question: Any = None
        self.heard = time.monotonic()
        self.state: State = (LOADING, 0)

    @property
    def ready(self) -> bool:
        return self.state[0] in (AWAKE, ASLEEP)

    @property
    def load(self) -> int:
        return sum(request.num_samples for request in self.requests.values())


class RaySamplerPool:
    """A `Sampler`. options: Ray's, of each sampler's actor. reference: the learner's log-probs
    (`probe.learner_logprobs`), asked while the learner is idle, that is during `update_weights`; None: no probes.
    devices: of each sampler, the GPUs that it shares with learner ranks.
    """

    share_weights = False

    def __init__(
        self,
        config: Config,
        path: str | Path,
        options: Sequence[Mapping[str, Any]],
        reference: LearnerLogprobs | None = None,
        *,
        devices: Sequence[Sequence[str]] = (),
    ) -> None:
        self.version = 0
        self.parity: Parity | None = None
        """What the newest probe found."""
        self.restarts = 0
        self.before_waking: Callable[[], None] = lambda: None
        """For whoever used the devices meanwhile."""
        self._sleeping, self._turn = False, 0
        self._starts = 0
        self._config, self._path = config, str(path)
        # Enough waits at each sampler that it never runs dry; the rest waits here, for whoever is first.
        rows = config.vllm.max_sequences if config.asynchrony.sampler == "vllm" else config.rollout.max_batch_rows
        self._capacity = 2 * rows
        # The engine of a vLLM sampler has a process for each device, and each receives.
        self._members = config.vllm.tensor_parallel if config.asynchrony.sampler == "vllm" else 1
        self._weights: StoredWeights | LiveWeights | None = None
        self._meeting: Meeting | None = None
        self._met: list[Any] = []  # the actors behind its doors
        self._sending = False
        self._losses = 0  # of broadcasts, since the last that went well
        self._updates = 0
        self._queue: deque[SampleRequest] = deque()
        self._kept: list[SampleResult] = []
        self._reference = reference
        model = models.load_config(self._path).get_text_config()
        self._recent = Recent(model.vocab_size)
        self._context_length = config.vllm.context_length or getattr(model, "max_position_embeddings", None)
        kinds = [config.vllm.dtype if config.asynchrony.sampler == "vllm" else "auto", config.model.dtype]
        kind = next((kind for kind in kinds if kind != "auto"), None)
        dtype = getattr(torch, kind) if kind else getattr(model, "dtype", None) or torch.float32
        self._tolerance = accepted(config.vllm, dtype)
        self._actor = ray.remote(concurrency_groups={"commands": 1, "results": 1})(Worker)
        self._seats = [_Seat(chosen, *devices[i : i + 1]) for i, chosen in enumerate(options)]
        for seat in self._seats:
            self._start(seat)

    # ------------------------------------------------------------------------------------------------------- verbs

    @property
    def pending(self) -> int:
        return len(self._queue) + len(self._kept) + sum(len(seat.requests) for seat in self._seats)

    def submit(self, request: SampleRequest) -> None:
        self._recent.note(request)
        self._queue.append(request)
        self._hand_out()

    def cancel(self, request_id: int) -> None:
        self._queue = deque(request for request in self._queue if request.request_id != request_id)
        self._kept = [result for result in self._kept if result.request_id != request_id]
        for seat in self._seats:
            if seat.requests.pop(request_id, None) is not None:
                self._tell(seat, "cancel", request_id)

    def poll(self, *, wait: bool = True) -> list[SampleResult]:
        """What has finished; `wait` allows up to WAIT_S for the first of it. Raises what ended a sampler for good."""
        results, self._kept = self._kept, []
        results += self._look(WAIT_S if wait and self.pending and not results else 0)
        if isinstance(self._weights, LiveWeights) and self._weights.current:
            self._deliver([seat for seat in self._seats if seat.waits and seat.ready])
        self._hand_out()
        return results

    def _look(self, timeout_s: float) -> list[SampleResult]:
        """What has come; a sampler that died, or gives no sign of life, is started again."""
        results = []
        questions = {seat.question: seat for seat in self._seats if seat.state[0] != GONE}
        if not questions:
            return results
        # An answer that is there counts, though it must still be fetched from another machine.
        ray.wait(list(questions), num_returns=1, timeout=timeout_s, fetch_local=False)
        answered, _ = ray.wait(list(questions), num_returns=len(questions), timeout=0, fetch_local=False)
        for question in answered:
            results += self._answer(questions[question])
        for seat in questions.values():
            if seat.state[0] == GONE:
                continue
            limit = self._config.cluster.sampler_timeout_s if seat.ready else self._config.cluster.start_timeout_s
            if time.monotonic() - seat.heard > limit:
                self._restart(seat, f"gave no sign of life for {limit:g} s")
        return results

    def update_weights(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """Publish: a request submitted from now on is sampled under these weights.

        Returns at once, or after the broadcast and the probe where there is one; raises RunError where a sampler fails
        the probe, or a broadcast fails for another reason than a sampler's death.
        """
        if weights is None:
            raise RunError("samplers on a cluster have weights of their own: pass learner.weights()")
        self._wake()
        known = isinstance(weights, StoredWeights | LiveWeights)
        self._weights = weights if known else StoredWeights(put(pack(weights)))
        self.version = version
        self._deliver(self._seats)
        self._updates += 1
        if self._reference is not None and due(self._updates, self._config.vllm):
            self.probe()

    def sleep(self) -> None:
        """Give the devices' memory back, after all that was asked for is done. Returns when every sampler has.

        What is asked for next wakes them. Raises RunError where there were too many deaths.
        """
        if self._sleeping:
            return
        while self._queue or any(seat.requests for seat in self._seats):
            self._kept += self._look(WAIT_S)
            self._hand_out()
        self._sleeping, self._turn = True, self._turn + 1
        for seat in self._seats:
            self._tell(seat, "sleep", self._turn)
        while any(seat.state not in ((ASLEEP, self._turn), (GONE, self._turn)) for seat in self._seats):
            self._kept += self._look(WAIT_S)

    def probe(self) -> Parity:
        """Let each sampler sample beginnings of recent prompts, and compare its log-probs with the learner's.

        The probes go through the samplers' doors like all requests, so that one which dies meanwhile answers after its
        restart; other results that come meanwhile are kept for `poll`. Raises RunError where a sampler differs by more
        than the tolerance, or has not answered within async.watchdog_s.
        """
        asked: dict[int, tuple[int, SampleRequest]] = {}
        for number, seat in enumerate(self._seats):
            for request in self._recent.requests(
                PROBES + len(asked), seed=self._updates, context_length=self._context_length
            ):
                asked[request.request_id] = (number, request)
                self._give(seat, request)
        completions: dict[int, Completion] = {}
        kept, limit = [], self._config.asynchrony.watchdog_s
        until = time.monotonic() + limit
        while len(completions) < len(asked):
            for result in self.poll():
                if result.request_id in asked:
                    completions[result.request_id] = result.completions[0]
                else:
                    kept.append(result)
            if time.monotonic() > until:
                late = sorted({number for id_, (number, _) in asked.items() if id_ not in completions})
                raise RunError(
                    f"sampler {', '.join(map(str, late))}: has not answered a probe within {limit:g} s "
                    "(async.watchdog_s)"
                )
        self._kept += kept
        self.parity = compare(
            [request.prompt for _, request in asked.values()],
            [completions[request_id] for request_id in asked],
            self._reference,
            temperature=self._recent.temperature,
            tolerance=self._tolerance,
            version=self.version,
            names=[f"sampler {number}" for number, _ in asked.values()],
        )
        return self.parity

    def wait_until_ready(self) -> None:
        """Until every sampler is loaded and can be asked. Raises what kept one from it."""
        while not all(seat.ready for seat in self._seats):
            ray.wait([seat.question for seat in self._seats if not seat.ready], num_returns=1, timeout=TAKE_S)
            found = self.poll(wait=False)
            self._kept += found

    def close(self) -> None:
        if self._config.asynchrony.sampler == "vllm":
            ray.wait([seat.actor.close.remote() for seat in self._seats], num_returns=len(self._seats), timeout=CLOSE_S)
        for seat in self._seats:
            ray.kill(seat.actor)

    def processes(self) -> list[int]:
        """The process of each sampler, by place."""
        return ray.get([seat.actor.process.remote() for seat in self._seats], timeout=60)

    # ----------------------------------------------------------------------------------------------------- weights

    def _deliver(self, seats: Sequence[_Seat]) -> None:
        """The newest weights to these seats, and then what waited for them. A seat that is not loaded yet waits on."""
        if isinstance(self._weights, StoredWeights):
            for seat in seats:
                self._tell(seat, "stored", ((self._weights.reference,), self.version))
            return
        for seat in seats:
            seat.waits = True
        while present := [seat for seat in seats if seat.waits and seat.ready]:
            actors, restarts, starts = [seat.actor for seat in present], self.restarts, self._starts
            try:
                self._sending = True
                self._broadcast(present)
            except TransferLost as error:
                self._lost(error, present, actors, restarts, starts)
                continue
            finally:
                self._sending = False
            self._losses = 0
            for seat, actor in zip(present, actors, strict=True):
                if seat.actor is not actor:  # died meanwhile: what sits there now has nothing yet
                    if self.restarts == restarts:
                        self._count("died at the end of a broadcast")
                    continue
                untold, seat.untold, seat.waits = seat.untold, [], False
                for request in untold:
                    if request.request_id in seat.requests:  # not cancelled
                        self._tell(seat, "submit", request)

    def _lost(
        self, error: TransferLost, seats: Sequence[_Seat], actors: Sequence[Any], restarts: int, starts: int
    ) -> None:
        """After a broadcast that failed: start those again that cannot go on. RunError where that is in vain."""
        until = time.monotonic() + GRACE_S
        while not error.begun and self._starts == starts and time.monotonic() < until:
            self._kept += self._look(WAIT_S)
        self._losses += 1
        if self._losses == MAX_LOSSES or (not error.begun and self._starts == starts):
            raise RunError(
                f"{error}; that was broadcast {self._losses} in a row to fail. If the devices cannot reach each other, "
                "use cluster.weight_transfer: object_store"
            ) from error
        if error.begun:  # who is still in it waits for somebody who is gone, and may have got half of the weights
            for seat, actor in zip(seats, actors, strict=True):
                if seat.actor is actor:
                    self._restart(seat, f"was in a broadcast that broke off ({error})", counted=False)
        if self.restarts == restarts:
            self._count(f"was lost in a broadcast ({error})")

    def _broadcast(self, seats: Sequence[_Seat]) -> None:
        """Raises TransferLost, after which none of these seats can be said to have the weights."""
        live, actors = self._weights, [seat.actor for seat in seats]
        if self._met != actors:
            self._met, self._meeting = actors, live.learner.meet([self._members] * len(seats))
        else:
            self._meeting = self._meeting.again()
        for seat, door in zip(seats, self._meeting.doors, strict=True):
            self._tell(seat, "broadcast", ((self._meeting, door), self.version))

        def meanwhile() -> None:
            self._kept += self._look(0)
            if [seat.actor for seat in seats] != actors and self._met:
                self._met = []
                give_up(self._meeting, "a sampler died")

        try:
            live.learner.send(self._meeting, meanwhile=meanwhile)
        except TransferLost:
            self._met = []
            raise

    # ------------------------------------------------------------------------------------------------------ inside

    def _start(self, seat: _Seat) -> None:
        self._starts += 1
        seat.sit(self._actor.options(max_restarts=0, **seat.options).remote(self._config, self._path, seat.devices))
        self._ask(seat)

    def _ask(self, seat: _Seat) -> None:
        seat.question = seat.actor.take.options(concurrency_group="results").remote(seat.state)

    def _tell(self, seat: _Seat, kind: str, value: Any) -> None:
        seat.actor.tell.options(concurrency_group="commands").remote(seat.told, kind, value)
        seat.told += 1

    def _hand_out(self) -> None:
        while self._queue:
            seat = min(self._seats, key=lambda seat: seat.load)
            if seat.load >= self._capacity:
                return
            self._give(seat, self._queue.popleft())

    def _wake(self) -> None:
        if not self._sleeping:
            return
        self.before_waking()
        self._sleeping = False
        for seat in self._seats:
            if seat.state[0] == GONE:
                self._start_with_weights(seat)
            else:
                self._tell(seat, "wake", self._turn)

    def _give(self, seat: _Seat, request: SampleRequest) -> None:
        self._wake()
        seat.requests[request.request_id] = request
        if seat.waits:
            seat.untold.append(request)
        else:
            self._tell(seat, "submit", request)

    def _answer(self, seat: _Seat) -> list[SampleResult]:
        try:
            results, silent_s, seat.state = ray.get(seat.question)
        except RayActorError as error:
            self._restart(seat, f"died ({str(error).splitlines()[0]})")
            return []
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TransferLost):  # counted by `_deliver`, once for all who were in it
                self._restart(seat, f"lost a broadcast ({cause})", counted=not self._sending)
                return []
            if isinstance(cause, WeightsGone):
                self._restart(seat, f"lost its engine ({cause})")
                return []
            raise cause if isinstance(cause, CispoError) else RunError(f"a sampler failed: {error}") from error
        except RayError as error:  # results that are lost, or that the object store had no room for
            raise RunError(f"a sampler's results did not arrive: {error}") from error
        seat.heard = time.monotonic() - silent_s
        self._ask(seat)
        return [result for result in results if seat.requests.pop(result.request_id, None) is not None]

    def _restart(self, seat: _Seat, why: str, *, counted: bool = True) -> None:
        if counted:
            self._count(why)
        ray.kill(seat.actor)
        if self._sleeping:  # another would take the memory that was given back
            log.warning("a sampler %s while it slept; another is started when it is needed", why)
            seat.state = (GONE, self._turn)
            return
        log.warning("a sampler %s and is started again; %d requests are sampled again", why, len(seat.requests))
        self._start_with_weights(seat)

    def _start_with_weights(self, seat: _Seat) -> None:
        self._start(seat)
        if isinstance(self._weights, LiveWeights):
            seat.waits, seat.untold = True, list(seat.requests.values())
            return
        if self._weights is not None:
            self._deliver([seat])
        for request in seat.requests.values():
            self._tell(seat, "submit", request)

    def _count(self, why: str) -> None:
        self.restarts += 1
        if self.restarts > self._config.cluster.max_sampler_restarts:
            raise RunError(f"a sampler {why}, after {self.restarts - 1} restarts (cluster.max_sampler_restarts)")
