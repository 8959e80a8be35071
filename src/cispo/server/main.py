"""Starting and stopping: models, state directory, keys, and uvicorn around them. `cispo serve` runs this.

Left out on purpose: TLS (put a proxy in front), and several processes (one engine owns the models).
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn

from cispo.config import ModelConfig
from cispo.server.app import create_app
from cispo.server.compute import ServedModel
from cispo.server.engine import EngineSettings
from cispo.server.metrics import Metrics
from cispo.server.options import GIB, ServeOptions
from cispo.server.service import Service
from cispo.server.store import DiskFull, Store
from cispo.server.tenants import Limits, own_keys, read_keys
from cispo.types import CispoError, ConfigError

log = logging.getLogger("cispo.server")
COLLECT_SECONDS = 30.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and whatever the event brought."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def served_models(options: ServeOptions) -> dict[str, str]:
    """Names and paths. Raises ConfigError for a name that is given twice."""
    if not options.model:
        from cispo.tasks.think import base_model

        path = str(base_model())
        return {"think": path, path: path}
    models: dict[str, str] = {}
    for item in options.model:
        alias, equals, path = item.partition("=")
        name, path = (alias, path) if equals else (item, item)
        if not name or not path:
            raise ConfigError(f"--model {item!r}: expected PATH_OR_ID or ALIAS=PATH")
        if name in models:
            raise ConfigError(f"--model {item!r}: {name} is given twice")
        models[name] = str(Path(path).absolute()) if Path(path).exists() else path
    return models


def load_models(options: ServeOptions) -> dict[str, ServedModel]:
    """Each path once, under all its names."""
    config = ModelConfig(dtype=options.dtype, device="cpu" if not torch.cuda.is_available() else "auto")
    by_path: dict[str, ServedModel] = {}
    out = {}
    for name, path in served_models(options).items():
        if path not in by_path:
            by_path[path] = ServedModel(name, path, config)
        out[name] = by_path[path]
    return out


def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status: 0, or 1 where the engine died.

    Raises CispoError (ConfigError, DataError) for what keeps it from starting.
    """
    _log_to_stderr()
    _keep_memory()
    torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // 2))
    sys.setswitchinterval(0.001)  # the event loop waits for the engine's thread no longer than this
    metrics = Metrics()
    store = Store(options.state_dir.expanduser(), on_commit=metrics.commit)
    try:
        keys, new_key = (read_keys(options.keys), None) if options.keys else own_keys(store.folder)
        models = load_models(options)
        listening = _listen(options.host, options.port)
    except BaseException:
        store.close()
        raise
    settings = EngineSettings(
        micro_batch_tokens=options.micro_batch_tokens,
        max_batch_rows=options.max_batch_rows,
        steps_per_poll=8,
        adapter_bytes=int(options.adapter_memory_gib * GIB),
        cut_every=options.cut_every,
        journal=options.journal,
    )
    limits = Limits(
        body_bytes=options.max_body_mib << 20,
        num_samples=options.max_samples,
        requests=options.max_requests,
        stored_bytes=int(options.max_stored_gib * GIB),
        runs=options.max_runs,
    )
    service = Service(models, store, settings, limits, metrics, hold_seconds=options.hold_seconds)
    url = f"http://{options.host if ':' not in options.host else f'[{options.host}]'}:{listening.getsockname()[1]}"

    server = _Server(
        uvicorn.Config(
            create_app(service, keys),
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
            backlog=4096,
        ),
        service,
        options.drain_seconds,
        lambda: _greet(url, new_key, list(models)),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises them again when it has ended, and the status is ours
    try:
        server.run(sockets=[listening])
    finally:
        service.engine.stop(drain_seconds=0)
        store.close()
        listening.close()
    if service.engine.failure is not None:
        log.error("stopped", extra={"data": {"error": str(service.engine.failure)}})
        return 1
    if not server.started:
        return 1
    log.info("stopped", extra={"data": {"drained": True}})
    return 0


class _Server(uvicorn.Server):
    """uvicorn, which finishes what is under way before it lets go of its connections."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float, greet: Callable[[], None]):
        super().__init__(config)
        self._service, self._drain_seconds, self._greet = service, drain_seconds, greet

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Recover first: nothing is answered from half a state."""
        self._service.recover()
        self._service.engine.start()
        housekeeping = asyncio.create_task(_housekeeping(self._service, self))
        try:
            await super().serve(sockets)
        finally:
            housekeeping.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._greet()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service = self._service
        service.draining = True
        if service.engine.alive:
            await asyncio.to_thread(lambda: service.engine.stop(drain_seconds=self._drain_seconds))
        service.hold_seconds = 0.0
        await super().shutdown(sockets)


async def _housekeeping(service: Service, server: uvicorn.Server) -> None:
    """Consumes time; waits for the clock; unblocked by it, or by the end; produces less to keep, soon after the start
    and then twice a minute."""
    last = -COLLECT_SECONDS
    while True:
        await asyncio.sleep(0.5)
        if service.engine.failure is not None:
            server.should_exit = True  # the exit status says why
            return
        if time.monotonic() - last > COLLECT_SECONDS:
            last = time.monotonic()
            try:
                await service.collect()
            except (CispoError, DiskFull) as error:
                log.warning("housekeeping_failed", extra={"data": {"error": str(error)}})


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the models are used, so that a port that is taken is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); try --port 0"
        ) from None
    sock.set_inheritable(True)
    return sock


def _keep_memory() -> None:
    """Have glibc keep what a pass has freed for the next one: it would give it back to the kernel, whose zeroing of
    fresh pages takes 7 % of a pass of a small model. A no-op where the C library is another."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes: larger blocks are mapped one by one, as always
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def _greet(url: str, new_key: str | None, models: list[str]) -> None:
    """For the person at the terminal; the only place where a key is ever written, and only the first time."""
    log.info("serving", extra={"data": {"url": url, "models": models}})
    lines = [f"cispo serve: {url}  ({', '.join(models)})", f"  export TINKER_BASE_URL={url}"]
    if new_key is not None:
        lines += [
            f"  export TINKER_API_KEY={new_key}",
            "  This key is shown once; the state directory keeps only its hash.",
        ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def status(options: ServeOptions) -> int:
    """Print how the server at this host and port does. Returns 0 where it is well, else 1."""
    url = f"http://{options.host}:{options.port}"
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5) as reply:
            health = json.load(reply)["status"]
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as reply:
            text = reply.read().decode()
    except (urllib.error.URLError, OSError, ValueError) as error:
        sys.stdout.write(f"{url}: no server answers ({error})\n")
        return 1
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    shown = {
        "sessions alive": "cispo_sessions",
        "adapters in memory": "cispo_adapters_resident",
        "requests under way": "cispo_requests_queued",
        "tokens trained": "cispo_trained_tokens_total",
        "tokens sampled": "cispo_sampled_tokens_total",
    }
    sys.stdout.write(f"{url}: {health}\n")
    for name, key in shown.items():
        sys.stdout.write(f"  {name:20s} {float(values.get(key, 0)):,.0f}\n")
    return 0 if health == "ok" else 1
