"""`ProcessSampler`: the local sampler in a process of its own, so that rollouts go on while the learner trains.

A process and not a thread, because decoding a small model is mostly Python, and two threads of one interpreter take
turns at that. The child keeps a copy of the weights; a publication copies the learner's into memory that both see, and
sends the version. A child that dies, or shows no sign of life while it has something to do, is started again. Left out
on purpose: several samplers and other machines (`cluster/`), other engines (`vllm.py`).

The child's loop. Consumes: requests, cancellations and versions from the pipe. Waits for: a message, when it has
nothing to decode. Unblocked by: the parent, or the parent's end (it ends too). Produces: results, signs of life, or
the exception that ends it.
The parent's writer, a thread. Consumes: messages to the child. Waits for: a message, and room in the pipe, which a
child that hangs does not make. Unblocked by: the next message, the child's end. Produces: what the child reads.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from cispo import model as models
from cispo.config import ModelConfig
from cispo.sampling.local import LocalSampler
from cispo.types import RunError, SampleRequest, SampleResult

log = logging.getLogger(__name__)

WAIT_S = 0.05
"""How long `poll` may wait for a result before it lets its caller look around."""
START_TIMEOUT_S = 900.0
"""How long a child may take to import torch and load its model."""


@dataclass(frozen=True)
class ProcessOptions:
    """What the child is built from. `sampler`: keyword arguments of `LocalSampler`.

    timeout_s: a child that has had work and shown no sign of life for so long counts as dead.
    """

    path: str | Path
    model: ModelConfig
    sampler: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    drain: bool = False
    timeout_s: float = 300.0


class ProcessSampler:
    """A `Sampler` whose work is done beside the caller.

    A child that dies (killed, out of memory) or hangs is started again, with the newest weights, and what it was
    sampling is submitted again: seeds make the samples the same, and nothing is lost or comes twice. After
    `max_restarts` deaths, or when the child ends with an exception of its own, `poll` raises RunError.
    """

    share_weights = False

    def __init__(self, options: ProcessOptions, *, max_restarts: int = 3) -> None:
        self.version = 0
        self._options = options
        self._restarts_left = max_restarts
        self._requests: dict[int, SampleRequest] = {}
        self._ready: list[SampleResult] = []
        self._shared: dict[str, Tensor] | None = None
        self._context = multiprocessing.get_context("spawn")
        self._start()

    # ------------------------------------------------------------------------------------------------------- verbs

    def submit(self, request: SampleRequest) -> None:
        self._wake()
        self._requests[request.request_id] = request
        self._send("submit", request)

    def cancel(self, request_id: int) -> None:
        if self._requests.pop(request_id, None) is not None:
            self._send("cancel", request_id)

    @property
    def pending(self) -> int:
        return len(self._requests) + len(self._ready)

    def poll(self, *, wait: bool = True) -> list[SampleResult]:
        """What has finished; `wait` allows up to WAIT_S for the first of it. Raises RunError where the child failed."""
        self._receive(WAIT_S if wait and self._requests and not self._ready else 0)
        if self._requests and not self._ready:
            self._check_alive()
        ready, self._ready = self._ready, []
        return ready

    def update_weights(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """Publish: copy into shared memory and tell the child. Blocks until the child has taken the ones before."""
        if weights is None:
            raise RunError("the sampler process has weights of its own: pass learner.weights()")
        if self._shared is None:
            self._shared = {name: torch.empty_like(w, device="cpu").share_memory_() for name, w in weights.items()}
        while not self._taken.acquire(timeout=WAIT_S):
            self._receive(0)  # a child that drains hands over results, and must not be stuck behind a full pipe
            self._check_alive()
        self._wake()
        for name, weight in weights.items():
            self._shared[name].copy_(weight)
        self.version = version
        self._send("weights", (self._shared, version))

    def close(self) -> None:
        """End the child."""
        self._send("close", None)
        self._process.join(timeout=5)
        self._end()

    # ------------------------------------------------------------------------------------------------------ inside

    def _receive(self, timeout: float) -> None:
        """Take what the child has sent, waiting up to `timeout` for the first of it."""
        try:
            while self._connection.poll(timeout):
                timeout = 0
                kind, value = self._connection.recv()
                if kind == "error":
                    raise RunError(f"the sampler process failed:\n{value}")
                # A result of a cancelled request, or of one that a dead child also had, is not ours.
                self._ready += [r for r in value if self._requests.pop(r.request_id, None) is not None]
        except (EOFError, ConnectionError):
            self._process.join(timeout=5)
            self._restart(f"died (exit status {self._process.exitcode})")

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._taken = self._context.Semaphore(1)
        self._beat = self._context.Value("d", 0.0, lock=False)
        self._woken = time.monotonic()
        self._process = self._context.Process(
            target=_child, args=(theirs, self._taken, self._beat, self._options), name="cispo-sampler", daemon=True
        )
        self._process.start()
        theirs.close()
        self._messages: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(
            target=_write, args=(self._messages, self._connection), name="to-sampler", daemon=True
        )
        self._writer.start()

    def _send(self, kind: str, value: Any) -> None:
        self._messages.put((kind, value))

    def _wake(self) -> None:
        """Something is about to be asked of the child. One that had nothing to do owes a sign of life from now on."""
        if not self._requests:
            self._woken = time.monotonic()

    def _check_alive(self) -> None:
        """Start a child again that has died, or has been silent for too long."""
        if not self._process.is_alive():
            self._restart(f"died (exit status {self._process.exitcode})")
            return
        limit = self._options.timeout_s if self._beat.value else max(START_TIMEOUT_S, self._options.timeout_s)
        if time.monotonic() - max(self._beat.value, self._woken) > limit:
            self._restart(f"gave no sign of life for {limit:g} s")

    def _end(self) -> None:
        """Nothing of the child is left after this."""
        self._process.kill()
        self._process.join()
        self._messages.put(None)
        self._writer.join()  # the pipe has no reader any more, so the writer is not held up
        self._connection.close()

    def _restart(self, why: str) -> None:
        if self._restarts_left == 0:
            raise RunError(f"the sampler process {why}, and no restart is left")
        self._restarts_left -= 1
        log.warning(
            "the sampler process %s and is started again; %d requests are sampled again", why, len(self._requests)
        )
        self._end()
        self._start()
        if self._shared is not None and self.version != 0:
            self._taken.acquire()
            self._send("weights", (self._shared, self.version))
        for request in list(self._requests.values()):
            self._send("submit", request)


def _write(messages: queue.SimpleQueue[tuple[str, Any] | None], connection: Connection) -> None:
    while (message := messages.get()) is not None:
        # Who reads the pipe notices the child's end, and starts another.
        with contextlib.suppress(ConnectionError, OSError):
            connection.send(message)


def _child(connection: Connection, taken: Any, beat: Any, options: ProcessOptions) -> None:
    try:
        _serve(connection, taken, beat, options)
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has ended, or Ctrl-C reached the whole process group and the parent decides
    except BaseException:
        with contextlib.suppress(ConnectionError, OSError):
            connection.send(("error", traceback.format_exc()))
        raise


def _serve(connection: Connection, taken: Any, beat: Any, options: ProcessOptions) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent finishes its step first and then closes us
    torch.set_num_threads(options.threads)
    loaded = models.load(options.model.model_copy(update={"lora": None}), options.path, trainable=False)
    sampler = LocalSampler(
        loaded.model,
        loaded.tokenizer,
        eos_token_ids=models.eos_token_ids(loaded.model, loaded.tokenizer),
        **options.sampler,
    )
    while True:
        beat.value = time.monotonic()  # one clock for all processes of a machine
        while connection.poll(0 if sampler.pending else None):
            beat.value = time.monotonic()
            kind, value = connection.recv()
            if kind == "submit":
                sampler.submit(value)
            elif kind == "cancel":
                sampler.cancel(value)
            elif kind == "weights":
                while options.drain and sampler.pending:  # what was submitted before is finished under the old weights
                    beat.value = time.monotonic()
                    _hand_over(connection, sampler)
                weights, version = value
                loaded.model.load_state_dict(weights)
                taken.release()
                sampler.update_weights(None, version)
            elif kind == "close":
                return
        if sampler.pending:
            _hand_over(connection, sampler)


def _hand_over(connection: Connection, sampler: LocalSampler) -> None:
    results = sampler.poll()
    if results:
        connection.send(("results", results))
