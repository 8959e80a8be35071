"""How fast a Tinker-compatible server is, measured with the real SDK from outside.

Any base URL can be measured; without one, a server of ours is started as a process of its own, with its log on disk as
always. Times are medians over warm calls of one client that waits for each result; `first` is the very first call of
its shape. Overhead is what a call takes beside the model's (or optimizer's) own computing, which servers of ours tell
at `/metrics`; of others those rows are left out. Left out on purpose: quality.

    cispo bench server
    cispo bench server --base-url http://localhost:8000 --base-model think
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cispo.types import ConfigError, RunError

VOCABULARY = 14  # ids below this exist in every model


@dataclass(frozen=True)
class ServerBenchOptions:
    """Measure a Tinker-compatible server with the real SDK."""

    base_url: str | None = None
    """None: start `cispo serve` with the embedded base, on a free port and an empty state directory."""
    base_model: str = "think"
    rank: int = 32
    batch: int = 8
    length: int = 64
    max_tokens: int = 32
    repeats: int = 30
    clients: int = 8
    steps: int = 10
    """Of each client, in the comparison of all at once with one after the other."""
    rounds: int = 5
    """How often that comparison is made; the ratio is the median."""
    concurrent_samples: int = 200
    out: Path | None = None
    """Where to write the numbers as JSON."""


def run(options: ServerBenchOptions) -> int:
    """Print and write the numbers. Raises ConfigError without the SDK."""
    try:
        import tinker
    except ModuleNotFoundError:
        raise ConfigError("cispo bench server needs the tinker SDK; run pip install 'cispo[server]'") from None
    warnings.simplefilter("ignore", FutureWarning)
    with contextlib.ExitStack() as stack:
        url = options.base_url
        key = os.environ.get("TINKER_API_KEY", "tml-none")
        if url is None:
            url, key = stack.enter_context(_own_server())
        clock = compute_clock(url or os.environ.get("TINKER_BASE_URL", ""))
        if clock is None:
            sys.stdout.write(f"{url} does not say at /metrics how long it computed: overhead is not measured\n")
        numbers = measure(options, lambda: tinker.ServiceClient(base_url=url, api_key=key), clock)
    for name, value in numbers.items():
        sys.stdout.write(f"{name:44s} {value:10.2f}\n")
    if options.out is not None:
        options.out.write_text(json.dumps(numbers, indent=2) + "\n")
    return 0


def measure(
    options: ServerBenchOptions, connect: Callable[[], Any], clock: Callable[[], float] | None
) -> dict[str, float]:
    """Milliseconds by name; ratios and counts where the name says so. clock: seconds that the server has computed."""
    from tinker import types

    out: dict[str, float] = {}
    adam = types.AdamParams(learning_rate=1e-4)
    service = connect()

    def new_run(client: Any, seed: int) -> Any:
        return client.create_lora_training_client(base_model=options.base_model, rank=options.rank, seed=seed).result()

    run = new_run(service, 0)
    data = _datums(options.batch, options.length, 0)

    def timed(name: str, call: Callable[[], Any], repeats: int = options.repeats) -> None:
        start = time.perf_counter()
        call()
        out[f"{name}, first"] = 1e3 * (time.perf_counter() - start)
        times, beside = [], []
        for _ in range(repeats):
            computed = clock() if clock else 0.0
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            if clock:
                beside.append(times[-1] - (clock() - computed))
        out[f"{name}, median"] = 1e3 * statistics.median(times)
        if clock:
            out[f"{name}, overhead"] = 1e3 * statistics.median(beside)

    timed("forward_backward", lambda: run.forward_backward(data, "cispo").result())
    timed("optim_step", lambda: run.optim_step(adam).result())
    timed("save + sampler", lambda: run.save_weights_and_get_sampling_client().result(), 10)
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([12, 1, 2, 3, 4, 5, 6])
    params = types.SamplingParams(max_tokens=options.max_tokens, stop=[])
    timed("sample", lambda: sampler.sample(prompt, options.batch, params).result())
    tiny = _datums(1, 1, 0)
    timed("forward of 1 token", lambda: run.forward(tiny, "cispo").result())
    timed("sample of 1 token", lambda: sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result())

    def job(client_run: Any) -> None:
        for step in range(options.steps):
            batch = _datums(options.batch, options.length, step)
            backward = client_run.forward_backward(batch, "cispo")
            client_run.optim_step(adam).result()
            backward.result()

    runs = [new_run(connect(), seed) for seed in range(options.clients)]
    for client_run in runs:
        client_run.forward_backward(data, "cispo").result()
    ratios, alones, togethers = [], [], []
    cpu = 0.0
    for _ in range(options.rounds):
        start = time.perf_counter()
        for client_run in runs:
            job(client_run)
        alones.append(time.perf_counter() - start)
        start, cpu_before = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(options.clients) as pool:
            list(pool.map(job, runs))
        togethers.append(time.perf_counter() - start)
        cpu += time.process_time() - cpu_before
        ratios.append(togethers[-1] / alones[-1])
    out[f"{options.clients} clients one after the other"] = 1e3 * statistics.median(alones)
    out[f"{options.clients} clients at once"] = 1e3 * statistics.median(togethers)
    out["at once / one after the other (ratio)"] = statistics.median(ratios)
    out["least of the ratios"], out["greatest of the ratios"] = min(ratios), max(ratios)
    out["CPU of the SDK in one step of a client"] = 1e3 * cpu / (options.rounds * options.clients * options.steps)
    start = time.perf_counter()
    futures = [sampler.sample(prompt, 1, params) for _ in range(options.concurrent_samples)]
    for future in futures:
        future.result()
    out[f"{options.concurrent_samples} samples at once"] = 1e3 * (time.perf_counter() - start)
    return out


def compute_clock(url: str) -> Callable[[], float] | None:
    """Reads how many seconds the server has computed in its models, all requests together; None where it does not say.

    Read before and after a call while nobody else asks, it tells what of that call was computing.
    """

    def read() -> float | None:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=30) as reply:
            found = re.findall(r"^cispo_compute_seconds_total(?:{.*})? (\S+)$", reply.read().decode(), re.MULTILINE)
        return sum(map(float, found)) if found else None

    try:
        return None if read() is None else read
    except (OSError, ValueError):  # another server, which has no such page, or no such server: the SDK will tell
        return None


def _datums(count: int, length: int, seed: int) -> list[Any]:
    from tinker import types

    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (length + 1,), generator=g)
        fields = {
            "target_tokens": types.TensorData.from_torch(ids[1:]),
            "logprobs": types.TensorData.from_torch(torch.full((length,), -2.5)),
            "advantages": types.TensorData.from_torch(torch.randn(length, generator=g)),
        }
        out.append(types.Datum(model_input=types.ModelInput.from_ints(ids[:-1].tolist()), loss_fn_inputs=fields))
    return out


@contextlib.contextmanager
def _own_server() -> Iterator[tuple[str, str]]:
    """`cispo serve` in a process of its own: URL and key."""
    with tempfile.TemporaryDirectory(prefix="cispo-bench-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "cispo", "serve", "--state-dir", folder, "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            found: dict[str, str] = {}
            for line in process.stdout:
                name, equals, value = line.strip().removeprefix("export ").partition("=")
                if equals:
                    found[name] = value
                if len(found) == 2:
                    break
            else:
                raise RunError(f"cispo serve ended with status {process.wait()} before it could be measured")
            yield found["TINKER_BASE_URL"], found["TINKER_API_KEY"]
        finally:
            process.terminate()
            process.wait()
