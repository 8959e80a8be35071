"""The one thread that owns the models: it runs training, optimizer steps, saves and sampling, a micro-batch at a time.

    consumes  requests that the log has accepted: a queue for each training run, and sample requests
    waits for a request, when there is none
    unblocked by `enqueue`, `stop`, a finished disk write
    produces  results (`Request.resolve`), and now and then a cut: snapshots of all runs that changed

Recovery is not a mode of its own. What a run's snapshot does not hold is put into its queue again, in the order of the
log, and runs as it ran before; requests that shared a pass share it again, because rounding may depend on the company.
So weights after a SIGKILL are those of a run that was never killed, bit for bit, on the same machine and threads.

A cut is taken between passes and holds every run that changed, so that no group lies on both sides of it.
Left out on purpose: HTTP (`app.py`), validation (`service.py`), and pre-emption within a micro-batch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from cispo.server import compute, wire
from cispo.server.compute import ServedModel, TrainPart
from cispo.server.external import export_adapter
from cispo.server.journal import Journal
from cispo.server.lora import Adapter, FrozenAdapter, LoraShape, SampleRoute
from cispo.server.losses import TrainWork
from cispo.server.metrics import Metrics
from cispo.server.records import CreateWork, LoadWork, Request, Run, SampleWork, SaveWork, failure
from cispo.server.sampling import AdapterSampler
from cispo.server.store import BlobRow, Corrupted, DiskFull, Store
from cispo.types import AdamParams, CispoError, NonFiniteError, SampleRequest, SampleResult, SamplingParams

log = logging.getLogger("cispo.server")

GROUP_TOKENS = 4096
"""Requests of several runs share a pass until it has this many tokens: beyond, company costs more than it saves."""
IN_STEP_SECONDS, GATHER_GAP, GATHER_MOST = 0.1, 0.015, 0.1
"""A run whose last pass ended so recently is about to send its next: the first of several waits for the others' while
they come with no larger gaps, and at most so long in all. Else it would run alone, and the rest in a second pass."""
CURVE_POINTS = 512
QUIET_SECONDS = 0.05
"""Without work for so long, the engine lets the journal write."""


@dataclass
class EngineSettings:
    micro_batch_tokens: int
    max_batch_rows: int
    steps_per_poll: int
    adapter_bytes: int
    cut_every: int
    journal: bool


@dataclass
class Saved:
    """A finished save: what the service records of it."""

    request: Request
    run: Run
    work: SaveWork
    blob: BlobRow


class Engine:
    """Constructed and fed by the service. `on_saved(saved)` is called from a disk thread once the file is written, and
    resolves the request when its row is committed."""

    def __init__(
        self,
        served: dict[str, ServedModel],
        runs: dict[str, Run],
        store: Store,
        settings: EngineSettings,
        metrics: Metrics,
        on_saved: Callable[[Saved], None],
    ):
        self.served, self.runs, self.store, self.settings, self.metrics = served, runs, store, settings, metrics
        self._on_saved = on_saved
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._frozen: OrderedDict[str, FrozenAdapter] = OrderedDict()
        self._samplers = {name: self._new_sampler(name) for name in served}
        self._queues: dict[str, deque[Request]] = {}
        self._ready: OrderedDict[str, None] = OrderedDict()
        self._trained_at: dict[str, float] = {}
        self._sampling: dict[str, tuple[str, Request]] = {}
        self._incoming: deque[tuple[str, Request, BlobRow | None, LoraShape | None]] = deque()
        self._scores: deque[tuple[str, Request, FrozenAdapter | None, SampleResult | None]] = deque()
        self._cancelled: deque[Request] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._pass: Iterator | None = None
        self._since_cut = 0
        self._cut: Future | None = None
        self._saves: list[Future] = []
        self._cut_wanted = False
        self._retry_cut_at = 0.0
        self._disk = ThreadPoolExecutor(2, thread_name_prefix="disk")
        self._helper = ThreadPoolExecutor(
            1,
            thread_name_prefix="engine-helper",
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )
        self._journal = Journal(store, served, self._disk) if settings.journal else None
        self._together = int((store.read("SELECT max(together) FROM requests")[0][0]) or 0)
        self._numbers = 0
        self._by_number: dict[int, tuple[str, Request]] = {}
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------------------------------- from other threads

    def _new_sampler(self, base: str) -> AdapterSampler:
        return AdapterSampler(
            self.served[base],
            max_batch_rows=self.settings.max_batch_rows,
            steps_per_poll=self.settings.steps_per_poll,
        )

    def start(self) -> None:
        for name, served in {id(model): (name, model) for name, model in self.served.items()}.values():
            compute.warm(served)
            prompt = SampleRequest(0, (0,), 2, SamplingParams(max_tokens=4, stop_token_ids=()))
            self._samplers[name].sample([prompt])
        self._thread.start()

    def enqueue(self, request: Request) -> None:
        """A training request that the log has, in the order of the log."""
        with self._wake:
            self._queues.setdefault(request.scope, deque()).append(request)
            self._ready[request.scope] = None
            self._wake.notify()

    def sample(self, base: str, request: Request, blob: BlobRow | None, shape: LoraShape | None) -> None:
        with self._wake:
            self._incoming.append((base, request, blob, shape))
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        with self._wake:
            self._cancelled.append(request)
            self._wake.notify()

    def stop(self, *, drain_seconds: float) -> None:
        """Finish what is queued within the time, take a cut, and end."""
        deadline = time.monotonic() + drain_seconds
        while self._thread.is_alive() and self.busy and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        if self._journal is not None:
            self._journal.flush()
        self._disk.shutdown(wait=True)
        self._helper.shutdown(wait=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        with self._wake:
            return bool(self._ready or self._incoming or self._scores or self._sampling or self._pass)

    @property
    def queued(self) -> int:
        with self._wake:
            return sum(map(len, self._queues.values())) + len(self._incoming) + len(self._sampling) + len(self._scores)

    @property
    def resident(self) -> int:
        return len(self._adapters)

    # ------------------------------------------------------------------------------------------------------ the loop

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._stopping or self._has_work()):
                        late = self._journal is not None and self._journal.waiting
                        if not self._wake.wait(timeout=QUIET_SECONDS if late else 1.0) and late:
                            self._journal.write()
                    if self._stopping:
                        break
                self._train_some()
                self._sample_some()
                if self._pass is None and self._cut_due():
                    self._start_cut()
            if self._pass is not None:
                for _ in self._pass:
                    pass
                self._pass = None
            self._start_cut()
            if self._cut is not None:
                self._cut.exception()
        except BaseException as error:
            log.exception("engine_died", extra={"data": {"error": str(error)}})
            self.failure = error

    def _has_work(self) -> bool:
        return (
            bool(self._pass or self._ready or self._incoming or self._sampling or self._scores or self._cancelled)
            or self._cut_due()
        )

    # ------------------------------------------------------------------------------------------------------- training

    def _train_some(self) -> None:
        """One micro-batch, or one small request."""
        if self._pass is None:
            self._gather()
            group = self._next_group()
            if not group:
                return
            self._pass = self._execute(group)
        start = time.perf_counter()
        try:
            next(self._pass)
        except StopIteration:
            self._pass = None
        self.metrics.engine_seconds.labels("train").inc(time.perf_counter() - start)

    def _gather(self) -> None:
        """Wait for the requests of runs that train in step with those that are ready, while nothing else is to do."""
        start = came = time.monotonic()
        with self._wake:
            self._trained_at = {run: at for run, at in self._trained_at.items() if at > start - IN_STEP_SECONDS}
            ready = len(self._ready)
            while self._ready and not self._trained_at.keys() <= self._ready.keys():
                heads = [self._queues[scope][0] for scope in self._ready]
                shared = all(isinstance(r.work, TrainWork) and not r.replayed and r.together is None for r in heads)
                if not shared or self._stopping or self._incoming or self._sampling or self._scores or self._cancelled:
                    return
                left = min(came + GATHER_GAP, start + GATHER_MOST) - time.monotonic()
                if left <= 0 or sum(request.work.tokens for request in heads) >= GROUP_TOKENS:
                    return
                self._wake.wait(left)
                if len(self._ready) > ready:
                    ready, came = len(self._ready), time.monotonic()

    def _next_group(self) -> list[Request]:
        """The next request in turn of the runs, and those of other runs that may share its pass."""
        with self._wake:
            for _ in range(len(self._ready)):
                scope, _ = self._ready.popitem(last=False)
                head = self._queues[scope][0]
                if head.together is not None:
                    group = self._recorded_group(head)
                    if group is None:  # a member has requests to run first
                        self._ready[scope] = None
                        continue
                else:
                    group = [head, *self._company(head)]
                for request in group:
                    queue = self._queues[request.scope]
                    queue.popleft()
                    self._ready.pop(request.scope, None)
                    if queue:
                        self._ready[request.scope] = None
                    else:
                        del self._queues[request.scope]
                return sorted(group, key=lambda request: request.number)
        return []

    def _recorded_group(self, head: Request) -> list[Request] | None:
        heads = [queue[0] for queue in self._queues.values() if queue]
        everyone = [r for queue in self._queues.values() for r in queue if r.together == head.together]
        group = [request for request in heads if request.together == head.together]
        return group if len(group) == len(everyone) else None

    def _company(self, head: Request) -> list[Request]:
        """Heads of other runs' queues that run in the same pass: same base, same kind of work, few tokens."""
        if not isinstance(head.work, TrainWork):
            return []
        base, tokens, group = self.runs[head.scope].base, head.work.tokens, []
        most = min(GROUP_TOKENS, self.settings.micro_batch_tokens)  # halves give sampling no turn in between
        for scope in self._ready:
            other = self._queues[scope][0]
            if (
                isinstance(other.work, TrainWork)
                and other.together is None
                and not other.replayed
                and not head.replayed
                and other.work.forward_only == head.work.forward_only
                and self.runs[scope].base == base
                and tokens + other.work.tokens <= most
            ):
                group.append(other)
                tokens += other.work.tokens
        return group

    def _execute(self, group: list[Request]) -> Iterator[None]:
        """Run a group; yields between micro-batches. Every request of it is resolved at the end."""
        if isinstance(group[0].work, TrainWork):
            yield from self._forward_backward(group)
        else:
            (request,) = group
            try:
                self._single(request)
            except Exception as error:
                self._fail(request, error)
        for request in group:
            self.runs[request.scope].executed = request.number
        self._since_cut += len(group)

    def _forward_backward(self, group: list[Request]) -> Iterator[None]:
        written = None
        if len(group) > 1 and group[0].together is None:
            # Written while the pass runs: a group that is lost with a crash had no results to lose.
            self._together += 1
            for request in group:
                request.together = self._together
            numbers = [(self._together, request.number) for request in group]
            written = self.store.write(
                lambda db: db.executemany("UPDATE requests SET together=? WHERE number=?", numbers).rowcount
            )
        ready, parts = [], []
        for request in group:
            try:
                parts.append(TrainPart(self._adapter(self.runs[request.scope]), request.work))
                ready.append(request)
            except Exception as error:
                self._fail(request, error)
        if not ready:
            return
        served = self.served[self.runs[ready[0].scope].base]
        results = None
        try:
            if compute.can_be_halved(parts):
                with self._computing("forward_backward"):
                    results = compute.train_halves(
                        served, parts, micro_batch_tokens=self.settings.micro_batch_tokens, helper=self._helper
                    )
            else:
                for results in self._steps(served, parts):
                    if not results:
                        yield
        except Exception as error:
            if len(ready) == 1:
                self._fail(ready[0], error)
                return
            # One of them is at fault: each alone, so that the others do not pay.
            for request in ready:
                yield from self._alone(request)
            return
        if written is not None and written.exception() is not None:
            log.warning("group_not_recorded", extra={"data": {"error": str(written.exception())}})
        for request, result in zip(ready, results, strict=True):
            if isinstance(result, Exception):
                yield from self._alone(request)
            else:
                self._trained(request, result)

    def _alone(self, request: Request) -> Iterator[None]:
        run = self.runs[request.scope]
        part = TrainPart(self._adapter(run), request.work)
        try:
            for results in self._steps(self.served[run.base], [part]):
                if not results:
                    yield
            self._trained(request, results[0])
        except Exception as error:
            self._fail(request, error)

    def _steps(self, served: ServedModel, parts: Sequence[TrainPart]) -> Iterator[list[compute.TrainResult]]:
        """`compute.train`, its time taken."""
        steps = compute.train(served, parts, micro_batch_tokens=self.settings.micro_batch_tokens)
        while True:
            with self._computing("forward_backward"):
                results = next(steps, None)
            if results is None:
                return
            yield results

    @contextlib.contextmanager
    def _computing(self, kind: str) -> Iterator[None]:
        """What a request of this kind takes of the model, or an optimizer, beside which all else is overhead."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.metrics.compute_seconds.labels(kind).inc(time.perf_counter() - start)

    def _trained(self, request: Request, result: compute.TrainResult) -> None:
        run = self.runs[request.scope]
        if not request.work.forward_only:
            run.curve.append({"seq": request.seq, "time": time.time(), **result.metrics})
            del run.curve[:-CURVE_POINTS]
            if self._journal is not None:
                self._journal.trained(run, request.work, result)
        if not request.replayed:
            self._trained_at[run.id] = time.monotonic()
        self.metrics.trained_tokens.inc(request.work.tokens)
        self._finish(request, "proto", wire.encode_train_output(result.logprobs, result.metrics))

    def _single(self, request: Request) -> None:
        run, work = self.runs[request.scope], request.work
        match work:
            case CreateWork():
                served = self.served[run.base]
                self._keep(run, Adapter(served.host, run.shape, served.host.initial(run.shape, work.seed)))
                self._finish_json(request, {"type": "create_model", "model_id": run.id})
            case LoadWork():
                state = self.store.read_blob(work.blob)
                adapter = self._adapters.get(run.id)
                if adapter is None:
                    adapter = Adapter(self.served[run.base].host, run.shape, torch.zeros_like(state["flat"]))
                adapter.restore(state, optimizer=work.optimizer)
                if self._journal is not None:
                    self._journal.take(run)
                self._keep(run, adapter)
                self._finish_json(request, {"type": "load_weights", "path": work.path, "model_id": run.id})
            case AdamParams():
                held = None if self._journal is None else self._journal.take(run)
                adapter = self._adapter(run)
                with self._computing("optim_step"):
                    metrics = adapter.optim_step(work)
                if held is not None:
                    self._journal.stepped(run, request, work, metrics, held)
                if run.curve:
                    run.curve[-1].update({k: v for k, v in metrics.items() if k not in run.curve[-1]})
                self._finish_json(request, {"metrics": metrics})
            case SaveWork():
                if not request.replayed:
                    self._save(request, run, work)
            case _:
                raise AssertionError(work)

    def _save(self, request: Request, run: Run, work: SaveWork) -> None:
        adapter = self._adapter(run)
        if work.kind == "weights":
            tensors = {name: tensor for name, tensor in adapter.state().items() if name != "grad"}
        else:
            tensors = {"flat": adapter.flat.clone()}
        served = self.served[run.base]

        def write() -> None:
            try:
                if work.kind == "external_weights":
                    blob = self.store.write_bytes(export_adapter(served, run.shape, tensors["flat"]))
                else:
                    blob = self.store.write_blob(tensors, {"run": run.id, "kind": work.kind})
                self._frozen_put(blob.id, FrozenAdapter(served.host, run.shape, tensors["flat"]))
                self._on_saved(Saved(request, run, work, blob))
            except Exception as error:
                self._fail(request, error)

        self._saves = [save for save in self._saves if not save.done()]
        self._saves.append(self._disk.submit(write))

    # ----------------------------------------------------------------------------------------------- adapters in memory

    def _adapter(self, run: Run) -> Adapter:
        adapter = self._adapters.get(run.id)
        if adapter is None:
            if run.corrupted:
                raise Corrupted(f"training run {run.id} cannot go on: {run.corrupted}")
            if run.blob is None:
                raise Corrupted(f"training run {run.id} has no weights")
            state = self.store.read_blob(run.blob)
            adapter = Adapter(self.served[run.base].host, run.shape, torch.zeros_like(state["flat"]))
            adapter.restore(state)
            self.metrics.adapter_loads.inc()
        self._keep(run, adapter)
        return adapter

    def _keep(self, run: Run, adapter: Adapter) -> None:
        """Most recently used last; over the limit, those that a snapshot holds are let go, and a cut makes more so."""
        self._adapters[run.id] = adapter
        self._adapters.move_to_end(run.id)
        total = sum(a.nbytes for a in self._adapters.values())
        for name in list(self._adapters)[:-1]:
            if total <= self.settings.adapter_bytes:
                return
            other = self.runs[name]
            if other.executed == other.done:
                total -= self._adapters.pop(name).nbytes
                self.metrics.adapter_evictions.inc()
        self._cut_wanted |= total > self.settings.adapter_bytes and len(self._adapters) > 1

    def drop(self, run: Run) -> None:
        """Forget a run's weights in memory (the snapshot stays)."""
        self._adapters.pop(run.id, None)

    def _frozen_put(self, name: str, adapter: FrozenAdapter) -> None:
        with self._wake:
            self._frozen[name] = adapter
            self._frozen.move_to_end(name)
            total = sum(a.nbytes for a in self._frozen.values())
            while total > self.settings.adapter_bytes and len(self._frozen) > 1:
                total -= self._frozen.popitem(last=False)[1].nbytes

    def _frozen_of(self, base: str, blob: BlobRow | None, shape: LoraShape | None) -> FrozenAdapter | None:
        if blob is None:
            return None
        with self._wake:
            adapter = self._frozen.get(blob.id)
            if adapter is not None:
                self._frozen.move_to_end(blob.id)
                return adapter
        adapter = FrozenAdapter(self.served[base].host, shape, self.store.read_blob(blob)["flat"])
        self._frozen_put(blob.id, adapter)
        return adapter

    # ------------------------------------------------------------------------------------------------------------ cuts

    def _cut_due(self) -> bool:
        wanted = self._cut_wanted or self._since_cut >= self.settings.cut_every
        free = self._cut is None or self._cut.done()
        return wanted and free and time.monotonic() >= self._retry_cut_at

    def _start_cut(self) -> None:
        """Snapshot every run that changed since its last snapshot, as all stand now.

        Saves that are being written are waited for: a snapshot says that what came before it need not run again.
        """
        for save in self._saves:
            save.exception()
        if self._cut is not None:
            self._cut.exception()
            self._cut = None
        self._since_cut, self._cut_wanted = 0, False
        states = []
        for run in self.runs.values():
            adapter = self._adapters.get(run.id)
            if adapter is not None and run.executed > run.done:
                states.append((run, run.executed, adapter.state()))
        if states:
            self._cut = self._disk.submit(self._write_cut, states)

    def _write_cut(self, states: list[tuple[Run, int, dict]]) -> None:
        start = time.perf_counter()
        try:
            if self._journal is not None:
                self._journal.flush()  # steps that this cut holds will not run again
            rows = [
                (run, number, self.store.write_blob(state, {"run": run.id, "done": number}))
                for run, number, state in states
            ]

            def commit(db) -> list[str]:
                for run, number, blob in rows:
                    db.execute("INSERT INTO blobs VALUES (?,?,?,?)", (blob.id, run.owner, blob.size, blob.sha256))
                    db.execute("UPDATE models SET blob=?, done=? WHERE id=?", (blob.id, number, run.id))
                    db.execute(
                        "UPDATE requests SET payload=NULL, blob=NULL WHERE scope=? AND number<=?", (run.id, number)
                    )
                return orphans(db)

            garbage = self.store.write(commit).result()
            for run, number, blob in rows:
                run.blob, run.done = blob, number
            self.store.delete_blobs(garbage)
            self.metrics.cut_seconds.observe(time.perf_counter() - start)
            with self._wake:
                self._wake.notify()
        except DiskFull as error:
            # The log still holds everything; the next cut tries again.
            self._retry_cut_at = time.monotonic() + 30
            self._cut_wanted = True
            log.error("cut_failed", extra={"data": {"error": str(error)}})

    # -------------------------------------------------------------------------------------------------------- sampling

    def _sample_some(self) -> None:
        start = time.perf_counter()
        worked = False
        with self._wake:
            cancelled, self._cancelled = list(self._cancelled), deque()
            incoming, self._incoming = list(self._incoming), deque()
        for base, request, blob, shape in incoming:
            if not request.resolved:
                self._submit(base, request, blob, shape)
                worked = True
        for request in cancelled:
            self._cancel(request)
        for base, sampler in list(self._samplers.items()):
            if sampler.pending:
                worked = True
                self._poll(base, sampler)
        if self._scores:
            worked = True
            self._score_batch()
        if worked:
            self.metrics.engine_seconds.labels("sample").inc(time.perf_counter() - start)

    def _submit(self, base: str, request: Request, blob: BlobRow | None, shape: LoraShape | None) -> None:
        try:
            adapter = self._frozen_of(base, blob, shape)
            self._numbers += 1
            number = self._numbers
            work: SampleWork = request.work
            self._samplers[base].submit_with(replace(work.request, request_id=number), adapter)
        except Exception as error:
            self._fail(request, error)
            return
        self._by_number[number] = (base, request)
        self._sampling[request.id] = (number, adapter)

    def _cancel(self, request: Request) -> None:
        entry = self._sampling.pop(request.id, None)
        if entry is not None:
            base, _ = self._by_number.pop(entry[0])
            self._samplers[base].cancel(entry[0])
            self._samplers[base].forget(entry[0])
        self._finish(request, "failed", failure("the request was cancelled"))

    def _poll(self, base: str, sampler: AdapterSampler) -> None:
        try:
            with self._computing("asample"):
                results = sampler.poll()
        except Exception as error:
            mine = [number for number, (b, _) in self._by_number.items() if b == base]
            lost = mine
            if isinstance(error, NonFiniteError):  # the sampler has dropped the request at fault, and goes on
                lost = [number for number in mine if not sampler.knows(number)]
            else:  # what it holds is of no more use
                self._samplers[base] = self._new_sampler(base)
            for number in lost:
                request = self._by_number.pop(number)[1]
                self._sampling.pop(request.id, None)
                sampler.forget(number)
                self._fail(request, error)
            return
        for result in results:
            _, request = self._by_number.pop(result.request_id)
            _, adapter = self._sampling.pop(request.id)
            sampler.forget(result.request_id)
            self.metrics.sampled_tokens.inc(sum(len(c.tokens) for c in result.completions))
            work: SampleWork = request.work
            if work.score is None and not work.topk_sampled:
                self._finish(request, "proto", wire.encode_sample_output(_sequences(result)))
            else:
                self._scores.append((base, request, adapter, result))

    def _score_batch(self) -> None:
        """Up to 32 prompts of one base model in one pass."""
        base = self._scores[0][0]
        batch = []
        while self._scores and self._scores[0][0] == base and len(batch) < 32:
            batch.append(self._scores.popleft())
        served = self.served[base]
        adapters = list({id(a): a for _, _, a, _ in batch if a is not None}.values())
        try:
            route = SampleRoute(served.host, adapters) if adapters else None
            index = {id(a): i for i, a in enumerate(adapters)}
            asked = [(entry, entry[1].work.score) for entry in batch if entry[1].work.score is not None]
            which = torch.tensor([index.get(id(entry[2]), -1) for entry, _ in asked])
            with self._computing("asample"):
                scores = compute.score(served, [s for _, s in asked], route, which if route else None) if asked else []
            by_request = {entry[1].id: result for (entry, _), result in zip(asked, scores, strict=True)}
            for _, request, adapter, result in batch:
                output = _sequences(result)
                if (found := by_request.get(request.id)) is not None:
                    output.prompt_logprobs, output.topk_prompt = found.logprobs, found.topk
                    output.target_prompt, output.alternatives = found.target, found.alternatives
                if request.work.topk_sampled:
                    with self._computing("asample"):
                        self._top_sampled(served, request.work, adapter, output)
                self._finish(request, "proto", wire.encode_sample_output(output))
        except Exception as error:
            for _, request, _, _ in batch:
                self._fail(request, error)

    @staticmethod
    def _top_sampled(
        served: ServedModel, work: SampleWork, adapter: FrozenAdapter | None, output: wire.SampleOutput
    ) -> None:
        prompt = work.request.prompt
        route = None if adapter is None else SampleRoute(served.host, [adapter])
        for sequence in output.sequences:
            request = compute.ScoreRequest(
                (*prompt, *sequence.tokens),
                topk=work.topk_sampled,
                last_n=len(sequence.tokens),
                temperature=work.request.params.temperature,
            )
            (result,) = compute.score(served, [request], route, None)
            ids, logprobs = result.topk
            sequence.topk = ids[len(prompt) :], logprobs[len(prompt) :]

    # --------------------------------------------------------------------------------------------------------- results

    def _finish_json(self, request: Request, body: dict) -> None:
        self._finish(request, "json", json.dumps(body).encode())

    def _finish(self, request: Request, status: str, result: bytes) -> None:
        """Resolve, and write the result down. Nobody waits for that: after a crash the request runs again."""
        if request.resolved:  # it ran again only for its effect
            request.work = None
            return
        request.resolve(status, result)
        self.metrics.observe(request)
        self.store.write(save_result(request))

    def _fail(self, request: Request, error: Exception) -> None:
        if isinstance(error, CispoError):
            category = "server" if isinstance(error, Corrupted | DiskFull) else "user"
            self._finish(request, "failed", failure(str(error), category))
            return
        log.error("request_failed", exc_info=error, extra={"data": {"request": request.id, "kind": request.kind}})
        self._finish(
            request, "failed", failure(f"internal error ({type(error).__name__}); the server's log has it", "server")
        )


def save_result(request: Request) -> Callable:
    """The write that stores a result; a finished sample's prompt is of no more use."""
    values = (request.status, request.result, request.finished, request.kind == "asample", request.id)

    def write(db) -> None:
        db.execute(
            "UPDATE requests SET status=?, result=?, finished=?, payload=CASE WHEN ? THEN NULL ELSE payload END "
            "WHERE id=? AND status='accepted'",
            values,
        )

    return write


def orphans(db) -> list[str]:
    """Forget the tensor files that nothing names any more. Returns their names, to be deleted after the commit."""
    rows = db.execute(
        "SELECT id FROM blobs WHERE id NOT IN (SELECT blob FROM models WHERE blob IS NOT NULL "
        "UNION SELECT blob FROM samplers WHERE blob IS NOT NULL UNION SELECT blob FROM checkpoints "
        "UNION SELECT blob FROM requests WHERE blob IS NOT NULL)"
    ).fetchall()
    names = [row[0] for row in rows]
    db.executemany("DELETE FROM blobs WHERE id=?", [(name,) for name in names])
    return names


def _sequences(result: SampleResult) -> wire.SampleOutput:
    return wire.SampleOutput([wire.SampledSequence(c.tokens, c.logprobs, c.stop_reason) for c in result.completions])
