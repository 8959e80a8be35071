"""`cispo bench head`: loss and gradients of the language-model head, ours and other people's, against bare products.

Every contender computes the same token-mean CISPO loss and the gradients of hidden states and head, starting without
gradients. Contenders take turns within a round, so that a machine's drift meets them all, and each one's ratio is taken
to the floor of its own round. The floor is what no implementation avoids: three matrix products with fresh outputs,

    logits = hidden @ headᵀ      dHidden = logits @ head      dHead = logitsᵀ @ hidden,

by torch's default library; on CPU there is a second floor, by the library that `cispo.head.matmul` chooses. Peak memory
is measured in a fresh process per contender, beyond the inputs and one copy of their gradients; error is the larger
relative error of the two gradients against float64, where that fits.

Left out on purpose: the model before the head, and anything that a contender caches between steps of equal inputs.

    cispo bench head --sizes small small-bf16 --rounds 9
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from cispo.head import linear_policy_loss
from cispo.head.matmul import fast_float32_matmul, onednn_is_better
from cispo.objectives import cispo
from cispo.types import ConfigError

CAP, SEQUENCES = 4.0, 4


@dataclass(frozen=True)
class Size:
    """T tokens, D model width, V vocabulary."""

    T: int
    D: int
    V: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} V={self.V} {str(self.dtype).removeprefix('torch.')}"


_F, _B = torch.float32, torch.bfloat16
SIZES = {
    "tiny": Size(4096, 256, 1024, _F),
    "small": Size(512, 512, 32768, _F),
    "small-bf16": Size(512, 512, 32768, _B),
    "long": Size(4096, 512, 32768, _F),
    "long-bf16": Size(4096, 512, 32768, _B),
    "qwen3-0.6b": Size(256, 1024, 151936, _F),
    "qwen3-0.6b-bf16": Size(256, 1024, 151936, _B),
    "qwen3-8b-bf16": Size(256, 4096, 151936, _B),
    "cuda-qwen3-0.6b": Size(16384, 1024, 151936, _B),
    "cuda-qwen3-8b": Size(16384, 4096, 151936, _B),
}
DEFAULT = {
    "cpu": ("tiny", "small", "small-bf16", "qwen3-0.6b", "qwen3-0.6b-bf16"),
    "cuda": ("tiny", "small-bf16", "cuda-qwen3-0.6b", "cuda-qwen3-8b"),
}


@dataclass(frozen=True)
class HeadBenchOptions:
    """Time, memory and error of the head's backends and of other implementations."""

    sizes: tuple[str, ...] = ()
    """Names from the table of sizes; default: those that suit the device."""
    contenders: tuple[str, ...] = ()
    """Default: all that are installed and run on the device."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 2
    rounds: int = 7
    clock: Literal["wall", "cpu"] = "wall"
    """cpu counts the process's own seconds; with `--threads 1` it holds on a machine that other work shares."""
    memory: bool = True
    """Measure peak memory too, in a fresh process per contender."""
    json: Path | None = None
    """Write the figures as JSON."""
    plot: Path | None = None
    """Write a picture (SVG) of the ratios to the floor."""


@dataclass
class Problem:
    """One set of inputs. The sampled tokens come from a policy near the current one, as in training."""

    size: Size
    hidden_TD: torch.Tensor
    head_VD: torch.Tensor
    targets_T: torch.Tensor
    anchor_T: torch.Tensor
    advantages_T: torch.Tensor

    @classmethod
    def make(cls, size: Size, device: str) -> Problem:
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(size.T, size.D, generator=g).to(device, size.dtype)
        head = (torch.randn(size.V, size.D, generator=g) / size.D**0.5).to(device, size.dtype)
        targets = torch.randint(size.V, (size.T,), generator=g).to(device)
        z_target = (hidden.float() * head[targets].float()).sum(-1)
        log_sum = torch.log(torch.tensor(float(size.V))) + 0.5  # of V logits of variance 1
        anchor = z_target - log_sum + 0.3 * torch.randn(size.T, generator=g).to(device)
        advantages = torch.randn(SEQUENCES, generator=g).repeat_interleave(size.T // SEQUENCES).to(device)
        return cls(size, hidden.requires_grad_(), head.requires_grad_(), targets, anchor, advantages)

    def clear(self) -> None:
        self.hidden_TD.grad = self.head_VD.grad = None

    def loss_of(self, logprobs_T: torch.Tensor) -> torch.Tensor:
        columns = {"anchor_logprobs": self.anchor_T, "advantages": self.advantages_T}
        return cispo(logprobs_T, **columns, clip_high_threshold=CAP).mean()


# --------------------------------------------------------------------------------------------------------- contenders


def _products(p: Problem) -> None:
    hidden_TD, head_VD = p.hidden_TD.detach(), p.head_VD.detach()
    logits_TV = hidden_TD @ head_VD.T
    p.hidden_TD.grad = logits_TV @ head_VD
    p.head_VD.grad = logits_TV.T @ hidden_TD


def _fast_products(p: Problem) -> None:
    with fast_float32_matmul():
        _products(p)


def _cispo(p: Problem, backend: str = "chunked", *, half: bool = False) -> None:
    rows = torch.arange(p.size.T, device=p.targets_T.device)
    linear_policy_loss(
        p.hidden_TD,
        p.head_VD,
        p.targets_T,
        objective=cispo,
        columns={"anchor_logprobs": p.anchor_T, "advantages": p.advantages_T},
        weights_T=torch.full_like(p.anchor_T, 1 / p.size.T),
        evaluate_T=rows % 2 == 0 if half else None,
        backend=backend,  # type: ignore[arg-type]
    ).loss.backward()


def _autograd(p: Problem) -> None:
    logits_TV = p.hidden_TD @ p.head_VD.T
    p.loss_of(logits_TV.float().log_softmax(-1).gather(1, p.targets_T[:, None])[:, 0]).backward()


def _trl(p: Problem) -> None:
    """TRL's GRPO path: full logits, then its selective log-softmax."""
    from trl.trainer.utils import selective_log_softmax

    logits_BSV = torch.nn.functional.linear(p.hidden_TD.view(SEQUENCES, -1, p.size.D), p.head_VD)
    p.loss_of(selective_log_softmax(logits_BSV, p.targets_T.view(SEQUENCES, -1)).flatten()).backward()


def _liger(p: Problem) -> None:
    """Liger's fused linear GRPO loss in its CISPO form, one sequence per chunk (its default), not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0, loss_type="cispo", epsilon_high=CAP, compiled=False, use_ref_model=False
    )
    rows = (SEQUENCES, p.size.T // SEQUENCES)
    loss, _ = loss_of(
        p.hidden_TD.view(*rows, p.size.D),
        p.head_VD,
        p.targets_T.view(rows),
        torch.ones(rows, device=p.targets_T.device),
        p.advantages_T.view(rows)[:, 0],
        old_per_token_logps=p.anchor_T.view(rows),
    )
    loss.backward()


Contender = Callable[[Problem], None]
CONTENDERS: dict[str, Contender] = {
    "floor": _products,
    "floor, faster library": _fast_products,
    "cispo chunked": _cispo,
    "cispo chunked, half the rows": lambda p: _cispo(p, half=True),
    "cispo triton": lambda p: _cispo(p, "triton"),
    "full-logits autograd": _autograd,
    "TRL": _trl,
    "Liger": _liger,
}
_NEEDS = {"TRL": "trl", "Liger": "liger_kernel", "cispo triton": "triton"}
_SAME_GRADIENT = ("cispo chunked", "cispo triton", "full-logits autograd", "TRL", "Liger")


def _available(device: str) -> Iterator[str]:
    for name in CONTENDERS:
        if name in _NEEDS and find_spec(_NEEDS[name]) is None:
            continue
        if name == "cispo triton" and device != "cuda":
            continue
        if name == "floor, faster library" and (device != "cpu" or not onednn_is_better()):
            continue
        yield name


# -------------------------------------------------------------------------------------------------------- measurement


def _seconds(step: Contender, problem: Problem, clock: Callable[[], float]) -> float:
    problem.clear()
    if problem.hidden_TD.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    step(problem)
    if problem.hidden_TD.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def _error(step: Contender, p: Problem) -> float | None:
    """Relative error of the gradients against float64, or None where float64 logits and head would not fit."""
    if (p.size.T + 3 * p.size.D) * p.size.V * 8 > 2 << 30:
        return None
    p.clear()
    step(p)
    hidden_TD, head_VD = (x.detach().double().requires_grad_() for x in (p.hidden_TD, p.head_VD))
    logprobs_T = (hidden_TD @ head_VD.T).log_softmax(-1).gather(1, p.targets_T[:, None])[:, 0]
    p.loss_of(logprobs_T).backward()
    pairs = ((p.hidden_TD.grad, hidden_TD.grad), (p.head_VD.grad, head_VD.grad))
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _peak_bytes(name: str, size: Size, device: str, threads: int) -> int:
    """Peak memory of one step beyond inputs and gradients. Runs in a fresh process; Linux, or CUDA's allocator."""
    torch.set_num_threads(threads)
    step, small = CONTENDERS[name], Problem.make(Size(8, 16, 64, size.dtype), device)
    step(small)  # thread pools and libraries
    problem = Problem.make(size, device)
    gradients = sum(x.numel() * x.element_size() for x in (problem.hidden_TD, problem.head_VD))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(problem)
        return torch.cuda.max_memory_allocated() - before - gradients
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    step(problem)
    return _status_bytes("VmHWM") - before - gradients


def _measure_memory(name: str, size: Size, options: HeadBenchOptions) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (name, size, options.device, options.threads))


@dataclass
class Result:
    """Of one contender at one size: seconds of each round, ratios to that round's floor, and what else was measured."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    gradient_error: float | None = None


def _measure(size: Size, names: list[str], options: HeadBenchOptions, console: Console) -> dict[str, Result]:
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    problem, results = Problem.make(size, options.device), {name: Result() for name in names}
    for i in range(options.rounds + 1):
        with console.status(f"{size}: round {i} of {options.rounds}"):
            seconds = {name: _seconds(CONTENDERS[name], problem, clock) for name in names}
        for name in names if i else ():  # the first round warms up
            results[name].seconds.append(seconds[name])
            results[name].ratios.append(seconds[name] / seconds["floor"])
    for name in names:
        if name in _SAME_GRADIENT:
            results[name].gradient_error = _error(CONTENDERS[name], problem)
    del problem
    if options.memory:
        for name in names:
            with console.status(f"{size}: memory of {name}"):
                results[name].peak_bytes = _measure_memory(name, size, options)
    return results


# ------------------------------------------------------------------------------------------------------------- output


def _table(size: Size, results: dict[str, Result], clock: str) -> Table:
    table = Table(title=str(size))
    for column in ("", f"ms, median ({clock})", "min", "max", "× floor", "peak MiB", "gradient error"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for name, result in results.items():
        ms = [1e3 * s for s in result.seconds]
        table.add_row(
            name,
            *(f"{x:.1f}" for x in (statistics.median(ms), min(ms), max(ms))),
            f"{statistics.median(result.ratios):.2f}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}",
            "" if result.gradient_error is None else f"{result.gradient_error:.1e}",
        )
    return table


def _svg(measured: dict[str, dict[str, Result]]) -> str:
    """Bars of the median ratio to the floor, one panel per size."""
    bars, y, unit = [], 20, 110
    for title, results in measured.items():
        bars.append(f'<text x="10" y="{y}" font-weight="bold">{title}</text>')
        for name, result in results.items():
            y += 22
            ratio = statistics.median(result.ratios)
            colour = "#d9480f" if name.startswith("cispo") else "#868e96"
            bars.append(f'<text x="210" y="{y}" text-anchor="end">{name}</text>')
            bars.append(
                f'<rect x="220" y="{y - 12}" width="{min(ratio, 5) * unit:.0f}" height="15" fill="{colour}"/>'
                f'<text x="{226 + min(ratio, 5) * unit:.0f}" y="{y}">{ratio:.2f}</text>'
            )
        y += 40
    line = f'<line x1="{220 + unit}" x2="{220 + unit}" y1="26" y2="{y - 30}" stroke="#000" stroke-dasharray="3 3"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="840" height="{y}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(bars)}{line}</svg>'
    )


def _machine(device: str) -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    packages = {name: version(name) for name in ("torch", "trl", "liger-kernel", "triton") if _has(name)}
    record: dict[str, Any] = {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()} | packages
    return record | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _has(package: str) -> bool:
    return find_spec(package.replace("-", "_")) is not None


def run(options: HeadBenchOptions) -> int:
    """Measure, print a table per size, and write what was asked for. Raises ConfigError for unknown names."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no CUDA device here; use 'cpu'")
    names = list(_available(options.device))
    for name in options.contenders:
        if name not in names:
            raise ConfigError(f"contenders: {name!r} is not available here; choose from {', '.join(names)}")
    if options.contenders:
        names = ["floor"] + [name for name in names if name in options.contenders and name != "floor"]
    sizes = options.sizes or DEFAULT[options.device]
    for name in sizes:
        if name not in SIZES:
            raise ConfigError(f"sizes: {name!r} is unknown; choose from {', '.join(SIZES)}")
    torch.set_num_threads(options.threads)
    console, measured = Console(highlight=False), {}
    for name in sizes:
        measured[str(SIZES[name])] = _measure(SIZES[name], names, options, console)
        console.print(_table(SIZES[name], measured[str(SIZES[name])], options.clock))
    if options.json is not None:
        record = {
            "machine": _machine(options.device),
            "date": time.strftime("%Y-%m-%d"),
            "options": {k: v for k, v in vars(options).items() if k not in ("json", "plot")},
            "sizes": {size: {k: vars(v) for k, v in results.items()} for size, results in measured.items()},
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot is not None:
        options.plot.write_text(_svg(measured))
    return 0
