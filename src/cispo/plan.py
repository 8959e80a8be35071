"""`cispo plan`: does a recipe fit onto so many GPUs, and what will a step take? Arithmetic only; nothing is loaded.

Memory per learner rank and per engine, bytes of a weight update, and the time of sampling and of training with the
balance that follows from them. Every assumption is printed and is an option. A plan that does not fit is refused, with
the one change that would make it fit. Left out on purpose: measuring anything (a run's `metrics.jsonl` has the real
times), expert and pipeline parallelism, which the learner does not have, and prices.

    cispo plan recipes/async-lag1-qwen3-30ba3b.yaml --gpus 24 --gpu_memory 80
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from cispo import config as configs
from cispo.config import Config
from cispo.types import ConfigError

GIB = 2**30
CONTEXT = 1.5 * GIB
"""What CUDA and NCCL take of a GPU for each process, whatever the process does."""
HEAD_WORKSPACE = 0.25 * GIB
"""What a call of the fused head may use (its `memory_budget`)."""


@dataclass(frozen=True)
class PlanOptions:
    """What a recipe needs, and how long its steps take. Bandwidths in GB/s, memory in GiB."""

    recipe: tyro.conf.Positional[str]
    """The recipe (YAML)."""
    gpus: int
    """GPUs in all. With cluster.kind: ray, cluster.learner_ranks and cluster.samplers say who gets how many of them;
    otherwise they are divided so that neither side waits long."""
    gpu_memory: float
    """GiB of each."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """An override `section.field=value`; may be given several times."""
    shape: str | None = None
    """A transformers config.json to plan for, instead of model.path."""
    mean_tokens: float | None = None
    """Mean length of a completion. None: half of rollout.max_tokens."""
    prompt_tokens: float = 512
    """Mean length of a prompt."""
    gpus_per_node: int = 8
    tflops: float = 989.0
    """Dense bf16 peak of a GPU (H100, H200: 989; B200: 2250; A100: 312)."""
    train_share: float = 0.35
    """Of the peak, that forward and backward reach."""
    memory_bandwidth: float = 3350.0
    """Of a GPU (H100: 3350, H200: 4800)."""
    decode_share: float = 0.6
    """Of the memory bandwidth, that decoding reaches."""
    node_bandwidth: float = 50.0
    """Between nodes, per GPU (400 Gb/s: 50)."""
    link_bandwidth: float = 300.0
    """Within a node, per GPU."""
    host_bandwidth: float = 20.0
    """From a GPU to its host, and from host to host."""


# ----------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Shape:
    """A decoder, as its `config.json` describes it. D width, V vocabulary."""

    layers: int
    D: int
    V: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int  # of the dense block, or of one expert
    experts: int = 0
    experts_per_token: int = 0
    tied: bool = False

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return self.D * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def layer(self) -> int:
        return self.attention + 3 * self.D * self.mlp * max(1, self.experts) + self.D * self.experts + 2 * self.D

    @property
    def active_layer(self) -> int:
        """Weights of a layer that a token meets."""
        return self.attention + 3 * self.D * self.mlp * max(1, self.experts_per_token) + self.D * self.experts

    @property
    def head(self) -> int:
        return self.V * self.D

    @property
    def weights(self) -> int:
        return self.layers * self.layer + self.head * (1 if self.tied else 2) + self.D

    @property
    def active(self) -> int:
        """Weights in a token's matrix products: the embedding is none, the head is one."""
        return self.layers * self.active_layer + self.head

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values, in bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def activation_values(self) -> int:
        """Values that one layer keeps of a token for its backward: norms, q, k, v, attention's output, the MLP's."""
        return (
            4 * self.D
            + self.head_dim * (2 * self.heads + 2 * self.kv_heads)
            + 3 * self.mlp * max(1, self.experts_per_token)
        )


KNOWN = {
    "Qwen/Qwen3-0.6B": Shape(28, 1024, 151936, 16, 8, 128, 3072, tied=True),
    "Qwen/Qwen3-8B": Shape(36, 4096, 151936, 32, 8, 128, 12288),
    "Qwen/Qwen3-30B-A3B": Shape(48, 2048, 151936, 32, 4, 128, 768, 128, 8),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(32, 4096, 128256, 32, 8, 128, 14336),
}
"""Shapes of the recipes' models, so that a plan needs no network."""


def shape_of(config: Config, file: str | None) -> Shape:
    """The model's shape: from `file`, the table, or model.path's own configuration. Raises ConfigError, DataError."""
    if file is None and config.model.path in KNOWN:
        return KNOWN[config.model.path]
    if file is None and config.model.path is None:
        raise ConfigError("model.path: the embedded model needs no plan; name a model, or give --shape CONFIG.json")
    from cispo import model as models

    own = models.load_config(Path(file).parent if file and Path(file).is_file() else file or config.model.path)
    own = own.get_text_config()
    heads = own.num_attention_heads
    experts = getattr(own, "num_experts", None) or getattr(own, "num_local_experts", None) or 0
    return Shape(
        layers=own.num_hidden_layers,
        D=own.hidden_size,
        V=own.vocab_size,
        heads=heads,
        kv_heads=getattr(own, "num_key_value_heads", None) or heads,
        head_dim=getattr(own, "head_dim", None) or own.hidden_size // heads,
        mlp=(getattr(own, "moe_intermediate_size", None) if experts else None) or own.intermediate_size,
        experts=experts,
        experts_per_token=getattr(own, "num_experts_per_tok", None) or 0 if experts else 0,
        tied=bool(own.tie_word_embeddings),
    )


# -------------------------------------------------------------------------------------------------------------- memory


def learner_memory(config: Config, shape: Shape, ranks: int) -> dict[str, float]:
    """Bytes on each of `ranks` GPUs, by purpose, at the moment of the largest micro-batch."""
    size = 4 if config.model.dtype == "float32" else 2
    lora = config.model.lora
    if lora is None:
        trained, frozen = shape.weights, 0
    else:
        per_layer = lora.rank * (7 * shape.D + 3 * shape.mlp + 2 * shape.head_dim * (shape.heads + shape.kv_heads))
        trained, frozen = shape.layers * per_layer, shape.weights
    tokens = micro_batch_tokens(config)
    head_whole = shape.tied or shape.head * size <= config.cluster.head_gather_gib * GIB
    head = shape.head * (size + 4 + 4) if head_whole and lora is None else shape.head * size * head_whole
    kept = shape.activation_values * size
    if config.model.gradient_checkpointing:
        activations = tokens * (shape.layers * shape.D * size + kept)
    else:
        activations = tokens * shape.layers * kept
    reference = shape.weights * 2 / ranks if config.algorithm.kl is not None and lora is None else 0
    memory = {
        "weights (float32 masters)": (4 * trained + size * frozen) / ranks,
        "gradients (float32)": 4 * trained / ranks,
        "optimizer (two moments)": 8 * trained / ranks,
        "gathered: two layers, embedding": shape.layer * size * 2 + shape.head * size,
        "gradient of a layer, unsharded": shape.layer * (size + 4) if lora is None else 0.0,
        "head, gathered, with gradient" if head_whole else "head, used where it is sharded": head,
        "head's workspace": HEAD_WORKSPACE,
        f"activations of {tokens} tokens": float(activations),
        "reference model": reference,
    }
    memory = {name: bytes_ for name, bytes_ in memory.items() if bytes_}
    memory["CUDA, NCCL, fragments"] = 3 * GIB + 0.05 * sum(memory.values())
    return memory


def micro_batch_tokens(config: Config) -> int:
    """Of the largest micro-batch: a row longer than the budget stands alone."""
    return max(config.learner.micro_batch_tokens, longest(config))


def longest(config: Config) -> int:
    prompt = getattr(config.task, "max_prompt_tokens", None) or 1024
    return prompt + config.rollout.max_tokens


def engine_memory(config: Config, shape: Shape, gpu_memory: float, mean_tokens: float) -> tuple[float, float]:
    """Bytes of weights on each GPU of an engine, and how many sequences of mean length its key/value memory holds."""
    parallel = config.vllm.tensor_parallel
    weights = 2 * shape.weights / parallel
    room = config.vllm.gpu_memory_utilization * gpu_memory * GIB - weights - 2 * GIB
    return weights, room / (shape.kv_bytes / parallel * mean_tokens)


# ---------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds of one RL step."""

    shape: Shape
    ranks: int
    engines: int
    learner: dict[str, float]
    engine_weights: float
    sequences: float  # that one engine decodes at once
    sample_s: float
    tail_s: float
    train_s: float
    exchange_s: float  # of train_s: what FSDP's exchange would take alone
    rounds: int
    weight_bytes: float
    transfer_s: float
    turns_s: float  # to sleep and to wake, where learner and engines share GPUs
    step_s: float


def by_broadcast(config: Config) -> bool:
    """As the cluster chooses where all have GPUs."""
    return config.cluster.weight_transfer != "object_store" and not config.cluster.colocate


def mean_tokens(config: Config, options: PlanOptions) -> float:
    return options.mean_tokens or config.rollout.max_tokens / 2


def estimate(config: Config, shape: Shape, options: PlanOptions, ranks: int, engines: int) -> Plan:
    """One division of the GPUs. See `assumptions` for what is taken for granted."""
    rollout, algorithm, parallel = config.rollout, config.algorithm, config.vllm.tensor_parallel
    completion = mean_tokens(config, options)
    samples = rollout.groups_per_step * rollout.group_size
    length = options.prompt_tokens + completion
    tokens = samples * length

    # Training: 6 operations per weight and token, 8 with recomputation; 2 for each forward before.
    attention = 2 * shape.layers * shape.heads * shape.head_dim * length  # causal: half of the square, two products
    operations = 2 * shape.active + attention
    passes = (4 if config.model.gradient_checkpointing else 3) * algorithm.epochs_per_rollout
    passes += algorithm.anchor == "proximal" or algorithm.correction is not None
    passes += algorithm.kl is not None
    compute_s = tokens * operations * passes / (ranks * options.tflops * 1e12 * options.train_share)
    windows = algorithm.updates_per_rollout * algorithm.epochs_per_rollout
    rounds = windows * math.ceil(tokens / algorithm.updates_per_rollout / (ranks * micro_batch_tokens(config)))
    per_round = shape.weights * (2 + 2 + 4)  # gather forward and backward in bf16, reduce in float32
    bandwidth = (options.link_bandwidth if ranks <= options.gpus_per_node else options.node_bandwidth) * 1e9
    exchange_s = 0.0 if ranks == 1 else rounds * per_round / bandwidth
    train_s = max(compute_s, exchange_s)  # FSDP overlaps the two

    # Sampling: a decode step reads the weights once and every sequence's keys and values.
    weights, sequences = engine_memory(config, shape, options.gpu_memory, length)
    batch = max(1.0, min(sequences, config.vllm.max_sequences, samples / engines))
    bandwidth = options.memory_bandwidth * 1e9 * options.decode_share
    per_token = 2 * shape.active / (parallel * options.tflops * 1e12 * 0.5)

    def decode_step(rows: float) -> float:
        # A small batch does not meet every expert.
        met = 1 - (1 - shape.experts_per_token / shape.experts) ** rows if shape.experts else 1.0
        bytes_ = weights * met + rows * (options.prompt_tokens + completion / 2) * shape.kv_bytes / parallel
        return max(bytes_ / bandwidth, rows * per_token) + 0.002  # launching, scheduling, drawing

    sample_s = samples * completion / engines / batch * decode_step(batch)
    tail_s = rollout.max_tokens * decode_step(1)

    weight_bytes = 2.0 * shape.weights
    nodes = math.ceil(engines * parallel / options.gpus_per_node)
    if by_broadcast(config):  # gathered on one rank, then a pipeline through all engines, a node's network at a time
        between = options.link_bandwidth if options.gpus <= options.gpus_per_node else options.node_bandwidth
        transfer_s = weight_bytes * (1 / options.link_bandwidth + 1 / between) / 1e9
    else:
        transfer_s = weight_bytes / (options.host_bandwidth * 1e9) * (2 + nodes) + weight_bytes / (
            options.link_bandwidth * 1e9
        )
    if config.asynchrony.max_staleness:
        step_s = max(sample_s, train_s) + (0 if config.asynchrony.in_flight_weight_updates else transfer_s)
    else:
        step_s = max(sample_s, tail_s) + train_s + transfer_s
    turns_s = 2 * weights / (options.host_bandwidth * 1e9) if config.cluster.colocate else 0.0
    step_s += turns_s
    return Plan(
        shape=shape,
        ranks=ranks,
        engines=engines,
        learner=learner_memory(config, shape, ranks),
        engine_weights=weights,
        sequences=sequences,
        sample_s=sample_s,
        tail_s=tail_s,
        train_s=train_s,
        exchange_s=exchange_s,
        rounds=rounds,
        weight_bytes=weight_bytes,
        transfer_s=transfer_s,
        turns_s=turns_s,
        step_s=step_s,
    )


def divisions(config: Config, options: PlanOptions) -> Iterator[tuple[int, int]]:
    """(learner ranks, engines) that use all GPUs."""
    parallel = config.vllm.tensor_parallel
    for ranks in range(1, options.gpus):
        if (options.gpus - ranks) % parallel == 0:
            yield ranks, (options.gpus - ranks) // parallel


def make_plan(config: Config, options: PlanOptions) -> Plan:
    """The config's own division, or the quickest that fits. Raises ConfigError, with a remedy, where none fits."""
    shape = shape_of(config, options.shape)
    parallel = config.vllm.tensor_parallel
    if config.cluster.kind == "ray":
        ranks, engines = config.cluster.learner_ranks, config.cluster.samplers
        if config.cluster.colocate:
            if ranks > options.gpus:
                raise ConfigError(
                    f"cluster.learner_ranks: {ranks}, each on a GPU, and --gpus is {options.gpus}; lower learner_ranks"
                )
        elif ranks + engines * parallel > options.gpus:
            raise ConfigError(
                f"cluster: {ranks} learner ranks and {engines} samplers of {parallel} GPUs need "
                f"{ranks + engines * parallel} GPUs, and --gpus is {options.gpus}; lower cluster.learner_ranks or "
                "cluster.samplers"
            )
        plan = estimate(config, shape, options, ranks, engines)
        check_fits(config, shape, options, plan)
        return plan
    if options.gpus < 1 + parallel:
        raise ConfigError(f"--gpus: {options.gpus} are too few for a learner and an engine of {parallel}")
    plans = [estimate(config, shape, options, *division) for division in divisions(config, options)]
    fitting = [plan for plan in plans if not problems(config, shape, options, plan)]
    if not fitting:
        check_fits(config, shape, options, plans[-1])
    return min(fitting, key=lambda plan: plan.step_s)


def resident(memory: dict[str, float]) -> float:
    """Bytes that a rank of `learner_memory` keeps while it does nothing: weights, optimizer, and what CUDA takes."""
    kept = ("weights", "optimizer", "reference")
    return sum(size for name, size in memory.items() if name.startswith(kept)) + CONTEXT


def problems(config: Config, shape: Shape, options: PlanOptions, plan: Plan) -> list[str]:
    """What does not fit, each with what would make it fit."""
    found = []
    limit = options.gpu_memory * GIB
    total = sum(plan.learner.values())
    if config.cluster.colocate:
        total += CONTEXT  # of the engine that sleeps there
        free = 1 - resident(plan.learner) / limit
        if config.vllm.gpu_memory_utilization > free:
            taken = f"vllm.gpu_memory_utilization: {config.vllm.gpu_memory_utilization:g}"
            found.append(
                f"a learner rank keeps {resident(plan.learner) / GIB:.1f} GiB of {options.gpu_memory:g} while the "
                f"engine beside it samples, and {taken} leaves it less; "
                f"{colocation_remedy(config, shape, options, plan, free)}"
            )
    if total > limit:
        largest = max(plan.learner, key=plan.learner.__getitem__)
        found.append(
            f"a learner rank needs {total / GIB:.1f} GiB of {options.gpu_memory:g}, most of it for {largest} "
            f"({plan.learner[largest] / GIB:.1f} GiB); {learner_remedy(config, shape, plan.ranks, limit)}"
        )
    if plan.sequences < 1:
        found.append(
            f"an engine's weights take {plan.engine_weights / GIB:.1f} GiB on each GPU and leave no key/value memory "
            f"in {config.vllm.gpu_memory_utilization:g} of {options.gpu_memory:g} GiB; "
            f"{engine_remedy(config, shape, options)}"
        )
    return found


def check_fits(config: Config, shape: Shape, options: PlanOptions, plan: Plan) -> None:
    found = problems(config, shape, options, plan)
    if found:
        raise ConfigError("does not fit: " + "\n".join(found))


def learner_remedy(config: Config, shape: Shape, ranks: int, limit: float) -> str:
    """The mildest single change that fits, else the fewest ranks with all of them."""

    def fits(changed: Config, ranks: int = ranks) -> bool:
        return sum(learner_memory(changed, shape, ranks).values()) <= limit

    recomputing = configs_with(config, model={"gradient_checkpointing": True})
    if fits(recomputing):
        return "model.gradient_checkpointing: true makes it fit"
    for tokens in (8192, 4096, 2048, 1024):
        useful = longest(config) <= tokens < config.learner.micro_batch_tokens
        if useful and fits(configs_with(config, learner={"micro_batch_tokens": tokens})):
            return f"learner.micro_batch_tokens: {tokens} makes it fit"
    for factor in range(2, 4097):
        for changed, words in ((config, ""), (recomputing, " with model.gradient_checkpointing: true")):
            if fits(changed, ranks * factor):
                return f"{ranks * factor} learner ranks (cluster.learner_ranks){words} make it fit"
    adapter = configs_with(recomputing, model={"lora": {}})
    if fits(adapter):
        return "no number of ranks does: a single layer or sequence is too large; model.lora makes it fit"
    return (
        "no number of ranks does: a single layer or sequence is too large; lower rollout.max_tokens or use larger GPUs"
    )


def colocation_remedy(config: Config, shape: Shape, options: PlanOptions, plan: Plan, free: float) -> str:
    lower = math.floor(100 * free) / 100
    if lower > 0:
        changed = configs_with(config, vllm={"gpu_memory_utilization": lower})
        length = options.prompt_tokens + mean_tokens(config, options)
        if engine_memory(changed, shape, options.gpu_memory, length)[1] >= 1:
            return f"vllm.gpu_memory_utilization: {lower:g} makes both fit"
    return f"more learner ranks than {plan.ranks} (cluster.learner_ranks), or cluster.colocate: false"


def engine_remedy(config: Config, shape: Shape, options: PlanOptions) -> str:
    for parallel in (2, 4, 8, 16, 32):
        if parallel <= config.vllm.tensor_parallel:
            continue
        changed = configs_with(config, vllm={"tensor_parallel": parallel})
        if engine_memory(changed, shape, options.gpu_memory, mean_tokens(config, options))[1] >= 1:
            return f"vllm.tensor_parallel: {parallel} makes it fit"
    return "use larger GPUs"


def configs_with(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with some fields of some sections changed."""
    raw = config.model_dump(mode="python", by_alias=True)
    for name, changes in sections.items():
        raw[name] = {**raw[name], **changes}
    return configs.validate(raw)


# ------------------------------------------------------------------------------------------------------------- the page


def assumptions(config: Config, options: PlanOptions) -> list[str]:
    return [
        f"{mean_tokens(config, options):g} tokens in the mean completion, {options.prompt_tokens:g} in the prompt",
        f"training reaches {options.train_share:.0%} of {options.tflops:g} TFLOP/s; decoding {options.decode_share:.0%}"
        f" of {options.memory_bandwidth:g} GB/s, 2 ms a step of its own, weights and keys/values in bf16",
        f"{options.gpus_per_node} GPUs in a node; {options.link_bandwidth:g} GB/s within it, "
        f"{options.node_bandwidth:g} between nodes (both per GPU), {options.host_bandwidth:g} to and between hosts",
        "FSDP gathers all weights twice a micro-batch and reduces in float32 once, beside the computation",
        "rewards take no longer than sampling; weights travel "
        + ("by broadcast" if by_broadcast(config) else "over the hosts (object store), one node after another"),
    ]


def lines(config: Config, options: PlanOptions, plan: Plan) -> Iterator[str]:
    shape = plan.shape
    yield (
        f"model       {shape.weights / 1e9:.2f} B weights, {shape.active / 1e9:.2f} B of them in a token's products; "
        f"head {shape.V} × {shape.D}{', tied' if shape.tied else ''}"
    )
    shared = ", in turns on the same GPUs" if config.cluster.colocate else ""
    yield f"GPUs        {plan.ranks} learner ranks, {plan.engines} engines of {config.vllm.tensor_parallel}{shared}"
    used = plan.ranks + (0 if config.cluster.colocate else plan.engines * config.vllm.tensor_parallel)
    if used < options.gpus:
        yield f"            {options.gpus - used} of {options.gpus} GPUs are not used"
    yield f"\nlearner, GiB on each of {plan.ranks} ranks"
    for name, bytes_ in plan.learner.items():
        yield f"  {bytes_ / GIB:8.2f}  {name}"
    if config.cluster.colocate:
        yield f"  {CONTEXT / GIB:8.2f}  the engine that sleeps there"
    total = sum(plan.learner.values()) + (CONTEXT if config.cluster.colocate else 0)
    yield f"  {total / GIB:8.2f}  of {options.gpu_memory:g}"
    if config.cluster.colocate:
        yield f"  {resident(plan.learner) / GIB:8.2f}  of that while the engine samples"
    yield "\nengine, GiB on each GPU"
    yield f"  {plan.engine_weights / GIB:8.2f}  weights"
    yield f"  {config.vllm.gpu_memory_utilization * options.gpu_memory:8.2f}  taken (vllm.gpu_memory_utilization)"
    yield f"            room for {plan.sequences:.0f} sequences (vllm.max_sequences: {config.vllm.max_sequences})"
    yield "\none step"
    yield f"  {plan.sample_s:8.1f}  s to sample (the longest completion alone: {plan.tail_s:.1f} s)"
    bound = "the exchange of weights" if plan.exchange_s >= plan.train_s else "computation"
    yield (
        f"  {plan.train_s:8.1f}  s to train, bound by {bound} ({plan.rounds} micro-batches a rank, whose exchange "
        f"alone takes {plan.exchange_s:.1f} s)"
    )
    yield f"  {plan.transfer_s:8.1f}  s for {plan.weight_bytes / GIB:.1f} GiB of weights to reach all engines"
    if plan.turns_s:
        yield f"  {plan.turns_s:8.1f}  s for the engines to sleep and to wake (their weights go to the host and back)"
    how = f"at most {config.asynchrony.max_staleness} stale" if config.asynchrony.max_staleness else "synchronous"
    yield f"  {plan.step_s:8.1f}  s in all ({how})"
    late, early = ("sampling", "training") if plan.sample_s > plan.train_s else ("training", "sampling")
    ratio = max(plan.sample_s, plan.train_s) / max(1e-9, min(plan.sample_s, plan.train_s))
    if config.asynchrony.max_staleness:
        yield f"            {late} takes {ratio:.1f} × as long as {early}"
        best = best_division(config, options)
        if best is not None and best.step_s < 0.9 * plan.step_s:
            yield (
                f"            cluster.learner_ranks: {best.ranks} and cluster.samplers: {best.engines} would take "
                f"{best.step_s:.1f} s"
            )
    yield "\nassumed"
    yield from (f"  {line}" for line in assumptions(config, options))


def best_division(config: Config, options: PlanOptions) -> Plan | None:
    shape = shape_of(config, options.shape)
    plans = [estimate(config, shape, options, *division) for division in divisions(config, options)]
    return min(
        (p for p in plans if not problems(config, shape, options, p)), key=lambda plan: plan.step_s, default=None
    )


def plan(options: PlanOptions) -> int:
    """The command."""
    for name in ("gpus", "gpu_memory", "tflops", "train_share", "memory_bandwidth", "decode_share", "node_bandwidth"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name}: {getattr(options, name):g} must be above 0")
    overrides = [f"--{override}" for override in options.set]
    config = configs.load(options.recipe, overrides)
    console = Console(soft_wrap=True)
    for line in lines(config, options, make_plan(config, options)):
        console.print(escape(line), highlight=False)
    return 0
