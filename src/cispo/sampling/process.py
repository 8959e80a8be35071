"""`ProcessSampler`: the local sampler in a process of its own, so that rollouts go on while the learner trains.

A process and not a thread, because decoding a small model is mostly Python, and two threads of one interpreter take
turns at that. The child keeps a copy of the weights; a publication copies the learner's into memory that both see, and
sends the version. Left out on purpose: several samplers and other machines (`cluster/`), other engines (`vllm.py`).

The child's loop. Consumes: requests, cancellations and versions from the pipe. Waits for: a message, when it has
nothing to decode. Unblocked by: the parent, or the parent's end (it ends too). Produces: results, or the exception that
ends it.
"""

from __future__ import annotations

import contextlib
import logging
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


@dataclass(frozen=True)
class ProcessOptions:
    """What the child is built from. `sampler`: keyword arguments of `LocalSampler`."""

    path: str | Path
    model: ModelConfig
    sampler: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    drain: bool = False


class ProcessSampler:
    """A `Sampler` whose work is done beside the caller.

    A child that dies (killed, out of memory) is started again, with the newest weights, and what it was sampling is
    submitted again: seeds make the samples the same, and nothing is lost or comes twice. After `max_restarts` deaths,
    or when the child ends with an exception of its own, `poll` raises RunError.
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
            if not self._process.is_alive():
                self._restart()
        for name, weight in weights.items():
            self._shared[name].copy_(weight)
        self.version = version
        self._send("weights", (self._shared, version))

    def close(self) -> None:
        """End the child."""
        with contextlib.suppress(ConnectionError, OSError):
            self._connection.send(("close", None))
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

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
            self._restart()

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._taken = self._context.Semaphore(1)
        self._process = self._context.Process(
            target=_child, args=(theirs, self._taken, self._options), name="cispo-sampler", daemon=True
        )
        self._process.start()
        theirs.close()

    def _send(self, kind: str, value: Any) -> None:
        try:
            self._connection.send((kind, value))
        except (ConnectionError, OSError):
            self._restart()

    def _restart(self) -> None:
        self._process.join(timeout=5)
        status = self._process.exitcode
        if self._restarts_left == 0:
            raise RunError(f"the sampler process died (exit status {status}), and no restart is left")
        self._restarts_left -= 1
        log.warning(
            "the sampler process died (exit status %s) and is started again; %d requests are sampled again",
            status,
            len(self._requests),
        )
        self._connection.close()
        self._start()
        if self._shared is not None and self.version != 0:
            self._taken.acquire()
            self._send("weights", (self._shared, self.version))
        for request in list(self._requests.values()):
            self._send("submit", request)


def _child(connection: Connection, taken: Any, options: ProcessOptions) -> None:
    try:
        _serve(connection, taken, options)
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has ended, or Ctrl-C reached the whole process group and the parent decides
    except BaseException:
        with contextlib.suppress(ConnectionError, OSError):
            connection.send(("error", traceback.format_exc()))
        raise


def _serve(connection: Connection, taken: Any, options: ProcessOptions) -> None:
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
        while connection.poll(0 if sampler.pending else None):
            kind, value = connection.recv()
            if kind == "submit":
                sampler.submit(value)
            elif kind == "cancel":
                sampler.cancel(value)
            elif kind == "weights":
                while options.drain and sampler.pending:  # what was submitted before is finished under the old weights
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
