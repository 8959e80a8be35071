"""`cispo bench rollout`: tokens per second of the local sampler, of `transformers`' generate, and of vLLM.

Contenders take turns within a round, so that a machine's drift meets them all, and each one's ratio is taken to
`generate` of its own round. Every one samples at temperature 1 from the same weights, prompts and limits. In the
workloads of equal length each row writes exactly as many tokens with each contender; in `long-tail` rows end where the
model ends them, and what counts is tokens per second. `generate` gives no log-probs, which a policy-gradient step
needs; `generate+logprobs` keeps its logits and reads them off. Where log-probs are given, some are compared with a
full pass of the model.

The model is a small random Qwen3 whose completions end with probability near 1/64 per token, unless one is named.
Left out on purpose: training, weight updates, several devices, and vLLM's start.

    cispo bench rollout --workloads short long-prompt --rounds 5
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cispo.sampling import LocalSampler
from cispo.types import ConfigError, SampleRequest, SamplingParams

VOCABULARY, EOS, PAD = 64, 1, 0
CHECKED = 24  # completions whose log-probs are compared with a full pass


@dataclass(frozen=True)
class Workload:
    """`prompts` of `prompt_tokens` each, `samples` completions of each, at most `rows` of them at a time. ends: at an
    EOS or after `tokens`; otherwise after exactly `tokens`."""

    prompts: int
    samples: int
    prompt_tokens: int
    tokens: int
    rows: int = 512
    ends: bool = False

    def __str__(self) -> str:
        length = f"up to {self.tokens}" if self.ends else f"exactly {self.tokens}"
        return (
            f"{self.prompts} prompts of {self.prompt_tokens} tokens × {self.samples} samples of {length} tokens, "
            f"{min(self.rows, self.prompts * self.samples)} at a time"
        )


WORKLOADS = {
    "short": Workload(prompts=32, samples=16, prompt_tokens=10, tokens=10),
    "equal": Workload(prompts=8, samples=16, prompt_tokens=64, tokens=64),
    "single": Workload(prompts=64, samples=1, prompt_tokens=16, tokens=64),
    "long-prompt": Workload(prompts=4, samples=16, prompt_tokens=540, tokens=64),
    "long-tail": Workload(prompts=64, samples=8, prompt_tokens=32, tokens=512, rows=128, ends=True),
}


@dataclass(frozen=True)
class RolloutBenchOptions:
    """Tokens per second of rollouts, against generate and, where installed, vLLM."""

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    contenders: tuple[str, ...] = ()
    """Default: all that are installed."""
    model: Path | None = None
    """A model folder to sample from, instead of the small random one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 2
    rounds: int = 5
    clock: Literal["wall", "cpu"] = "wall"
    """cpu counts the process's own seconds; with `--threads 1` it holds on a machine that other work shares."""
    json: Path | None = None
    """Write the figures as JSON."""


@dataclass
class Bench:
    """The weights, as a module and as a folder, and how they are run."""

    model: transformers.PreTrainedModel
    folder: Path
    options: RolloutBenchOptions
    eos: tuple[int, ...]

    def prompts(self, workload: Workload) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        low = 2 if self.options.model is None else 100
        size = (workload.prompts, workload.prompt_tokens)
        return torch.randint(low, self.model.get_input_embeddings().num_embeddings, size, generator=generator).tolist()


@dataclass
class Output:
    """Completions in the order of prompts and samples; log-probs where the contender gives them."""

    tokens: list[list[int]]
    logprobs: list[list[float]] | None = None


Contender = Callable[[Workload], Output]


# --------------------------------------------------------------------------------------------------------- contenders


def _local(bench: Bench) -> Contender:
    samplers: dict[int, LocalSampler] = {}

    def rollout(workload: Workload) -> Output:
        if workload.rows not in samplers:
            samplers[workload.rows] = LocalSampler(bench.model, max_batch_rows=workload.rows, eos_token_ids=bench.eos)
        params = SamplingParams(max_tokens=workload.tokens, stop_token_ids=None if workload.ends else ())
        results = samplers[workload.rows].sample(
            [
                SampleRequest(i, tuple(prompt), workload.samples, params)
                for i, prompt in enumerate(bench.prompts(workload))
            ]
        )
        completions = [completion for result in results for completion in result.completions]
        return Output([list(c.tokens) for c in completions], [list(c.logprobs) for c in completions])

    return rollout


def _generate(bench: Bench, *, logprobs: bool = False) -> Contender:
    def rollout(workload: Workload) -> Output:
        prompts, output = bench.prompts(workload), Output([], [] if logprobs else None)
        at_once = max(1, workload.rows // workload.samples)
        for first in range(0, len(prompts), at_once):
            ids_BS = torch.tensor(prompts[first : first + at_once], device=bench.model.device)
            made = bench.model.generate(
                ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                num_return_sequences=workload.samples,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=workload.tokens,
                eos_token_id=list(bench.eos) if workload.ends else None,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                output_logits=logprobs,
            )
            written_BM = made.sequences[:, ids_BS.shape[1] :]
            lengths = _lengths(written_BM, bench.eos if workload.ends else ())
            output.tokens += [row[:n] for row, n in zip(written_BM.tolist(), lengths, strict=True)]
            if output.logprobs is not None:
                steps = zip(made.logits, written_BM.T, strict=True)
                of_BM = torch.stack(
                    [logits_BV.float().log_softmax(-1).gather(1, ids_B[:, None])[:, 0] for logits_BV, ids_B in steps], 1
                )
                output.logprobs += [row[:n] for row, n in zip(of_BM.tolist(), lengths, strict=True)]
        return output

    return rollout


def _lengths(written_BM: Tensor, eos: tuple[int, ...]) -> list[int]:
    """Tokens up to the first EOS, it included."""
    ended_BM = torch.isin(written_BM, torch.tensor(eos, dtype=written_BM.dtype, device=written_BM.device))
    before_B = (ended_BM.cumsum(1) == 0).sum(1)
    return (before_B + 1).clamp(max=written_BM.shape[1]).tolist()


def _vllm(bench: Bench) -> Contender:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: its time is ours
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, TokensPrompt
    from vllm import SamplingParams as VllmParams

    engine = LLM(
        str(bench.folder),
        skip_tokenizer_init=True,
        dtype=bench.options.dtype,
        enforce_eager=bench.options.device == "cpu",
        max_model_len=2048,
        max_num_seqs=512,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
    )

    def rollout(workload: Workload) -> Output:
        params = VllmParams(
            n=workload.samples,
            temperature=1.0,
            max_tokens=workload.tokens,
            ignore_eos=True,
            stop_token_ids=list(bench.eos) if workload.ends else None,
            logprobs=0,
            detokenize=False,
        )
        engine.reset_prefix_cache()  # prompts are new in every rollout
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in bench.prompts(workload)]
        made = [output for request in engine.generate(prompts, params, use_tqdm=False) for output in request.outputs]
        return Output(
            [list(output.token_ids) for output in made],
            [[at[token].logprob for at, token in zip(o.logprobs, o.token_ids, strict=True)] for o in made],
        )

    return rollout


CONTENDERS: dict[str, Callable[[Bench], Contender]] = {
    "generate": _generate,
    "generate+logprobs": lambda bench: _generate(bench, logprobs=True),
    "cispo": _local,
    "vllm": _vllm,
}


def _available() -> Iterator[str]:
    for name in CONTENDERS:
        if name != "vllm" or find_spec("vllm") is not None:
            yield name


# -------------------------------------------------------------------------------------------------------- measurement


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """Tokens per second over those of `generate` in the same round."""
    logprob_error: float | None = None


def _measure(
    workload: Workload, contenders: dict[str, Contender], bench: Bench, status: Callable[[str], Any]
) -> dict[str, Result]:
    clock = time.process_time if bench.options.clock == "cpu" else time.perf_counter
    results = {name: Result() for name in contenders}
    for i in range(bench.options.rounds + 1):
        for name, rollout in contenders.items():
            with status(f"round {i} of {bench.options.rounds}: {name}"):
                begin = clock()
                output = rollout(workload)
                if bench.options.device == "cuda":
                    torch.cuda.synchronize()
                seconds = clock() - begin
            if i == 0:  # the first round warms up
                results[name].logprob_error = _logprob_error(bench, workload, output)
                continue
            results[name].tokens.append(sum(map(len, output.tokens)))
            results[name].seconds.append(seconds)
        if i:
            rates = {name: result.tokens[-1] / result.seconds[-1] for name, result in results.items()}
            for name, result in results.items():
                result.ratios.append(rates[name] / rates["generate"])
    return results


@torch.no_grad()
def _logprob_error(bench: Bench, workload: Workload, output: Output) -> float | None:
    """Largest difference from a full pass, over completions spread evenly."""
    if output.logprobs is None:
        return None
    prompts, worst = bench.prompts(workload), 0.0
    for i in range(0, len(output.tokens), max(1, len(output.tokens) // CHECKED)):
        prompt, tokens = prompts[i // workload.samples], output.tokens[i]
        ids = torch.tensor([prompt + tokens], device=bench.model.device)
        logprobs = bench.model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
        worst = max(worst, float((expected - torch.tensor(output.logprobs[i])).abs().max()))
    return worst


def small_model() -> transformers.PreTrainedModel:
    """0.4 million parameters: the size of the `think` task's model, with heads of a width that vLLM takes."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return transformers.Qwen3ForCausalLM(config)


def _table(title: str, results: dict[str, Result], clock: str) -> Table:
    table = Table(title=title)
    for column in ("", "tokens", f"ms, median ({clock})", "min", "tokens/s", "× generate", "max |Δ log-prob|"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for name, result in results.items():
        rates = [tokens / seconds for tokens, seconds in zip(result.tokens, result.seconds, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(result.tokens):.0f}",
            f"{1e3 * statistics.median(result.seconds):.1f}",
            f"{1e3 * min(result.seconds):.1f}",
            f"{statistics.median(rates):,.0f}",
            f"{statistics.median(result.ratios):.2f}",
            "" if result.logprob_error is None else f"{result.logprob_error:.1e}",
        )
    return table


def run(options: RolloutBenchOptions) -> int:
    """Measure, print a table per workload, and write what was asked for. Raises ConfigError for unknown names."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no CUDA device here; use 'cpu'")
    if options.rounds < 1:
        raise ConfigError(f"rounds = {options.rounds}: there must be at least 1")
    available = list(_available())
    for name in options.contenders:
        if name not in available:
            raise ConfigError(f"contenders: {name!r} is not available here; choose from {', '.join(available)}")
    for name in options.workloads:
        if name not in WORKLOADS:
            raise ConfigError(f"workloads: {name!r} is unknown; choose from {', '.join(WORKLOADS)}")
    names = ["generate"] + [n for n in available if n != "generate" and n in (options.contenders or available)]
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console, measured = Console(highlight=False), {}
    with tempfile.TemporaryDirectory() as temporary:
        if options.model is None:
            model, folder, eos = small_model(), Path(temporary), (EOS,)
            model.to(getattr(torch, options.dtype)).save_pretrained(folder)
        else:
            folder = options.model
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
            eos = LocalSampler(model, check_model=False).eos_token_ids
        bench = Bench(model.to(options.device).eval(), folder, options, eos)
        contenders = {name: CONTENDERS[name](bench) for name in names}
        for name in options.workloads:
            title = f"{name}: {WORKLOADS[name]}"
            measured[name] = _measure(
                WORKLOADS[name], contenders, bench, lambda what, title=title: console.status(f"{title}: {what}")
            )
            console.print(_table(title, measured[name], options.clock))
    if options.json is not None:
        record = {
            "machine": _machine(options.device),
            "date": time.strftime("%Y-%m-%d"),
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"},
            "workloads": {
                name: asdict(WORKLOADS[name]) | {"results": {k: asdict(v) for k, v in results.items()}}
                for name, results in measured.items()
            },
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _machine(device: str) -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    record: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return record | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})
