"""What a run is told: frozen pydantic models that refuse unknown keys and, by tagged unions, illegal mixes.

`load(path, overrides)` merges a YAML file and `--section.field value` overrides, and validates the whole once, so that
all mistakes are reported together, each with the field, the value, why, and what to use instead. Left out on purpose:
building anything (that is `cli.py`'s) and other systems' spellings (`dialects/`). See `cispo train --help`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from cispo.types import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Threshold = Annotated[float, Field(ge=0)]


def _listed(value: Any) -> Any:
    """One word where a list of words may stand."""
    return (value,) if isinstance(value, str) else value


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=True)


# -------------------------------------------------------------------------------------------------------- objectives


class _Clipped(Section):
    clip_low_threshold: Threshold
    clip_high_threshold: Threshold

    @model_validator(mode="after")
    def _ordered(self) -> _Clipped:
        if self.clip_low_threshold > self.clip_high_threshold:
            raise ValueError(
                f"clip_low_threshold {self.clip_low_threshold:g} is above clip_high_threshold "
                f"{self.clip_high_threshold:g}; both are absolute bounds on the importance ratio, low ≤ high"
            )
        return self


class CispoObjective(_Clipped):
    """CISPO: the clipped, detached importance ratio times A·log π (MiniMax-M1 eq. 4)."""

    type: Literal["cispo"] = "cispo"
    clip_low_threshold: Threshold = 0.0
    """Absolute lower bound of the ratio. A positive one off-policy can run away (tinker-cookbook #763)."""
    clip_high_threshold: Threshold = 4.0
    """Absolute cap of the ratio. ScaleRL: 4, 5 and 8 do not differ."""
    mask_low_threshold: Threshold | None = None
    """Token mask M of MiniMax-M1 eq. 6-7: silence A < 0 below this ratio. None: never."""
    mask_high_threshold: Threshold | None = None
    """Token mask M of MiniMax-M1 eq. 6-7: silence A > 0 above this ratio. None: never."""
    negative_clip_low_threshold: Threshold | None = None
    """Bounds of their own for tokens with A < 0 (DISPO, arXiv:2602.00983). None: the same bounds for both signs."""
    negative_clip_high_threshold: Threshold | None = None

    @model_validator(mode="after")
    def _negative_ordered(self) -> CispoObjective:
        low, high = self.negative_bounds
        if low > high:
            raise ValueError(
                f"negative_clip_low_threshold {low:g} is above negative_clip_high_threshold {high:g} (where one is not "
                "set, the bound of both signs holds); both are absolute bounds on the importance ratio, low ≤ high"
            )
        return self

    @property
    def negative_bounds(self) -> tuple[float, float]:
        """The bounds of the ratio at tokens with A < 0."""
        low, high = self.negative_clip_low_threshold, self.negative_clip_high_threshold
        return (
            self.clip_low_threshold if low is None else low,
            self.clip_high_threshold if high is None else high,
        )


class PpoClipObjective(_Clipped):
    """PPO's clipped objective, as GRPO uses it (0.8/1.2) and DAPO's clip-higher (0.8/1.28)."""

    type: Literal["ppo_clip"] = "ppo_clip"
    clip_low_threshold: Threshold = 0.8
    clip_high_threshold: Threshold = 1.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: bounds the loss of tokens with A < 0 at dual_clip·|A|."""


class ImportanceSamplingObjective(Section):
    """−r·A with the gradient through r."""

    type: Literal["importance_sampling"] = "importance_sampling"


class ReinforceObjective(Section):
    """−A·log π."""

    type: Literal["reinforce"] = "reinforce"


class GspoObjective(_Clipped):
    """GSPO (arXiv:2507.18071): PPO's clip on the sequence's ratio exp(mean log r)."""

    type: Literal["gspo"] = "gspo"
    clip_low_threshold: Threshold = 1 - 3e-4
    clip_high_threshold: Threshold = 1 + 4e-4


class DroObjective(Section):
    """−(A·log π − β/2·(log π − log μ)²), Tinker's `dro`."""

    type: Literal["dro"] = "dro"
    beta: Positive = 0.05


class SapoObjective(Section):
    """SAPO (arXiv:2511.20347): a sigmoid gate on the ratio instead of a clip, with a temperature for each sign of A."""

    type: Literal["sapo"] = "sapo"
    positive_temperature: Positive = 1.0
    negative_temperature: Positive = 1.05


class FunctionObjective(Section):
    """Your own: `package.module:function`, called as f(logprobs_T, *, advantages, anchor_logprobs, ..., **options)."""

    type: Literal["function"] = "function"
    path: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    options: dict[str, Any] = {}
    columns: tuple[
        Literal["anchor_logprobs", "advantages", "sampler_logprobs", "proximal_logprobs", "reference_logprobs", "rows"],
        ...,
    ] = ("anchor_logprobs", "advantages")
    """What the function reads of: anchor_logprobs, advantages, sampler_logprobs, proximal_logprobs,
    reference_logprobs, rows (the row of each token)."""
    sequence_level: bool = False
    """A token's loss depends on its whole sequence: evaluated on whole rows, in two passes."""


ObjectiveConfig = Annotated[
    CispoObjective
    | PpoClipObjective
    | ImportanceSamplingObjective
    | ReinforceObjective
    | GspoObjective
    | DroObjective
    | SapoObjective
    | FunctionObjective,
    Field(discriminator="type"),
]


# ------------------------------------------------------------------------------------------------------- corrections


class _Bounded(Section):
    low: Threshold
    high: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _ordered(self) -> _Bounded:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}; both are bounds on a ratio, low ≤ high")
        return self


class ImportanceCorrection(Section):
    """w = exp(proximal − sampler log-prob), unbounded."""

    type: Literal["importance"] = "importance"


class TisCorrection(_Bounded):
    """Truncated importance sampling: clamp(w, low, high)."""

    type: Literal["tis"] = "tis"
    low: Threshold = 0.0
    high: Annotated[float, Field(gt=0)] = 2.0


class IcePopCorrection(_Bounded):
    """w inside [low, high], 0 outside."""

    type: Literal["icepop"] = "icepop"
    low: Threshold = 0.5
    high: Annotated[float, Field(gt=0)] = 5.0


class SeqMaskTisCorrection(_Bounded):
    """w, and 0 for a sequence whose exp(mean log w) is outside [low, high] (NeMo RL's seq-mask-tis)."""

    type: Literal["seq_mask_tis"] = "seq_mask_tis"
    low: Threshold = 0.999
    high: Annotated[float, Field(gt=0)] = 1.002


class SequenceTruncateCorrection(_Bounded):
    """One weight for a sequence: its ratio, clamped to [low, high]."""

    type: Literal["sequence_truncate"] = "sequence_truncate"
    low: Threshold = 0.0
    high: Annotated[float, Field(gt=0)] = 2.0
    ratio: Literal["product", "geometric"] = "product"
    """exp(Σ log w) as TRL has it, or exp(mean log w) as ms-swift has it."""


class SequenceMaskCorrection(_Bounded):
    """0 for a sequence whose ratio is outside [low, high]; inside, `weight`."""

    type: Literal["sequence_mask"] = "sequence_mask"
    low: Threshold = 0.0
    high: Annotated[float, Field(gt=0)] = 3.0
    ratio: Literal["product", "geometric"] = "product"
    weight: Literal["sequence", "token", "one"] = "sequence"
    """The sequence's ratio (TRL), each token's w (ms-swift), or 1 (SkyRL)."""


CorrectionConfig = Annotated[
    ImportanceCorrection
    | TisCorrection
    | IcePopCorrection
    | SeqMaskTisCorrection
    | SequenceTruncateCorrection
    | SequenceMaskCorrection,
    Field(discriminator="type"),
]


# ------------------------------------------------------------------------------------------------------------- model


class LoraConfig(Section):
    """Low-rank adapters (extra `lora`); the reference model of a KL term is then the model without its adapter."""

    rank: PositiveInt = 16
    alpha: Positive = 32.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class ModelConfig(Section):
    path: str | None = None
    """A `transformers` model folder or hub id. None: the embedded base of the `think` task."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: what the model folder says."""
    head_dtype: Literal["float32"] | None = None
    """`float32` runs the language-model head in float32 (MiniMax-M1 §3, ScaleRL); None: in the model's dtype."""
    device: str = "auto"
    """`auto`: cuda where there is one, else cpu."""
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None


class LearnerConfig(Section):
    """How a batch is laid out, which cannot change the result, or another machine that trains.

    On the command line `--learner tinker://HOST:PORT` is `--learner.endpoint tinker://HOST:PORT`.
    """

    endpoint: str | None = None
    """A Tinker-compatible service (`cispo serve`, or Tinker's own) that trains and samples. None: this process."""
    endpoint_model: str | None = None
    """The service's name of the base model. None: model.path, or `think`."""

    micro_batch_tokens: PositiveInt = 16384
    """Padded tokens in one forward and backward."""
    max_padding_share: Share = 0.5
    """Rows are sorted by length and a micro-batch is cut before its padding exceeds this share."""
    head_backend: Literal["auto", "reference", "chunked", "triton"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"endpoint": value} if isinstance(value, str) else value


# -------------------------------------------------------------------------------------------------------------- task


class _Reward(Section):
    weight: float = 1.0
    timeout_s: Positive = 30.0


class ExactReward(_Reward):
    """1 where the completion, stripped, equals the column."""

    type: Literal["exact"] = "exact"
    column: str = "answer"


class MathReward(_Reward):
    """1 where math-verify finds the column's expression in the completion (extra `math`)."""

    type: Literal["math"] = "math"
    column: str = "answer"


class FormatReward(_Reward):
    """1 where the regular expression matches."""

    type: Literal["format"] = "format"
    pattern: str
    mode: Literal["fullmatch", "search"] = "fullmatch"


class LengthReward(_Reward):
    """DAPO's soft overlong penalty (arXiv:2503.14476 eq. 13): 0 down to −1 over the last `cache_tokens`."""

    type: Literal["length"] = "length"
    max_tokens: PositiveInt
    cache_tokens: PositiveInt


class FunctionReward(_Reward):
    """Your own: `package.module:function`, called as f(prompts, completions, **columns) -> list[float | None]."""

    type: Literal["function"] = "function"
    path: str


RewardConfig = Annotated[
    ExactReward | MathReward | FormatReward | LengthReward | FunctionReward, Field(discriminator="type")
]


class ThinkTask(Section):
    """The embedded task: the sum of six digits mod 10, by a model that has almost forgotten how to think."""

    type: Literal["think"] = "think"
    train_prompts: PositiveInt = 8192


class _Dataset(Section):
    prompt_column: str = "prompt"
    """A string, or chat messages for the model's chat template."""
    chat_template: bool = False
    """Wrap string prompts as a user message of the chat template."""
    system: str | None = None
    max_prompt_tokens: PositiveInt | None = None
    overlong_prompts: Literal["error", "drop"] = "error"
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    """The first decides what counts as correct (≥ 0.5) in accuracy, pass@k and length by correctness."""
    max_failure_share: Share = 0.5
    """The run stops when more than this share of recent calls of a reward function failed."""
    eval_fraction: Share = 0.0
    """Held out of the training file where there is no evaluation set."""


class JsonlTask(_Dataset):
    """Rows of a JSONL file."""

    type: Literal["jsonl"] = "jsonl"
    path: str
    eval_path: str | None = None


class HubTask(_Dataset):
    """A dataset of the Hugging Face hub (extra `datasets`)."""

    type: Literal["hub"] = "hub"
    name: str
    config_name: str | None = None
    split: str = "train"
    eval_split: str | None = None


TaskConfig = Annotated[ThinkTask | JsonlTask | HubTask, Field(discriminator="type")]


# ------------------------------------------------------------------------------------------------- rollout, algorithm


class RolloutConfig(Section):
    groups_per_step: PositiveInt = 32
    """Prompts of one RL step."""
    group_size: PositiveInt = 16
    """Completions of one prompt."""
    max_tokens: PositiveInt = 10
    temperature: Positive = 1.0
    """Part of the policy: the trainer divides logits by it too."""
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Share = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    """None: the model's EOS ids. (): never stop at a token."""
    max_batch_rows: PositiveInt = 512
    """Rows that the local sampler decodes at once."""
    truncated: Literal["keep", "mask", "penalize"] = "keep"
    """Completions that ran into max_tokens: train on them, mask their tokens, or replace their reward."""
    truncated_reward: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """The reward of a truncated completion under `truncated: penalize`."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose rewards are all equal: keep them in the averages (they cost no compute either way), drop them
    (ScaleRL), or sample further prompts until the step is full of others (DAPO dynamic sampling)."""
    max_resample_rounds: PositiveInt = 4
    """`resample` gives up after this many times groups_per_step prompts and trains on the valid groups it has."""
    pass_rate_ceiling: Share | None = None
    """Prompts with at least this share of correct completions leave later epochs (ScaleRL: 0.9)."""
    write_groups: NonNegativeInt | None = None
    """How many of a step's groups are written to rollouts/. None: all."""


class KLConfig(Section):
    """A penalty towards the reference model (the one the run started from)."""

    coef: Positive
    form: Literal["k1", "k2", "k3"] = "k3"
    place: Literal["loss", "reward"] = "loss"
    """`reward`: subtracted from each token's advantage (estimated at the proximal policy), without a gradient."""
    input_clamp: Positive | None = None
    """Bounds |log π_ref − log π|; NeMo RL: 20."""
    output_clamp: Positive | None = None
    """Bounds the estimate; NeMo RL: 10."""
    score_gradient: bool = False
    """Add the score-function gradient KL·∇log π, as NeMo RL does (arXiv:2506.09477)."""
    ratio_weighted: bool = False
    """Multiply the estimate by the ratio r, with r's gradient (DeepSeek-V3.2, arXiv:2512.02556; TRL's default)."""

    @model_validator(mode="after")
    def _one_gradient(self) -> KLConfig:
        if self.score_gradient and self.ratio_weighted:
            raise ValueError("score_gradient and ratio_weighted both carry the sampling gradient; keep one")
        if self.place == "reward" and (self.score_gradient or self.ratio_weighted):
            raise ValueError("score_gradient and ratio_weighted are of a KL in the loss; use place: loss")
        return self


class DistillationConfig(Section):
    """On-policy distillation on top of any advantage: A − coef·(log π − log π_teacher) (miles' OPD)."""

    teacher: str
    """A model folder or hub id with the same vocabulary."""
    coef: Positive = 1.0


class AlgorithmConfig(Section):
    objective: ObjectiveConfig = CispoObjective()
    anchor: Literal["sampler", "proximal"] = "sampler"
    """The denominator of the ratio: log-probs of the sampler, or recomputed before the first update on a batch."""
    correction: CorrectionConfig | None = None
    """For sampler/trainer mismatch: weights from proximal and sampler log-probs, multiplied onto the loss."""
    opsm_delta: NonNegative | None = None
    """Off-policy sequence masking: drop tokens with A < 0 of sequences with mean(log anchor − log π) above this."""
    trust_mask_delta: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop tokens with A < 0 whose probability has fallen by this much since sampling (DPPO, arXiv:2602.04879: 0.5)."""
    entropy_bonus: NonNegative = 0.0
    """Weight of the mean token entropy that is subtracted from the loss."""
    advantage: Literal[
        "group",
        "group_mean",
        "leave_one_out",
        "leave_one_out_std",
        "batch_std",
        "batch_reward_std",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "none",
    ] = "group"
    """GRPO, Dr. GRPO, RLOO, NeMo RL, ScaleRL, TRL's `batch`, REINFORCE++ (and with baseline), plain reward."""
    advantage_eps: NonNegative = 1e-6
    """Added to the standard deviation: miles and NeMo RL 1e-6, TRL and ms-swift 1e-4."""
    reduction: Literal["token", "prompt", "sequence", "constant", "sum"] = "prompt"
    """Mean over tokens, over prompts' token means (MiniMax-M1 eq. 4, ScaleRL), over sequences' token means (GRPO),
    division by a constant (Dr. GRPO), or none (Tinker)."""
    constant: Positive | None = None
    """Per-sequence divisor of `reduction: constant`; None: rollout.max_tokens."""
    updates_per_rollout: PositiveInt = 16
    epochs_per_rollout: PositiveInt = 1
    """Passes over a rollout; each makes updates_per_rollout updates."""
    kl: KLConfig | None = None
    distillation: DistillationConfig | None = None
    nonfinite: Literal["raise", "drop"] = "raise"
    """A NaN or infinity at a trained token: stop with its position, or drop the token and count it."""


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: Positive = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-15
    """MiniMax-M1 §3: gradients span 1e-18 to 1e-5."""
    weight_decay: NonNegative = 0.0
    grad_clip_norm: NonNegative = 1.0
    """0: no clipping."""
    warmup_updates: NonNegativeInt = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    min_learning_rate_share: Share = 0.0
    """Where the cosine ends, as a share of learning_rate."""


class AsyncConfig(Section):
    max_staleness: NonNegativeInt = 0
    """How many RL steps the policy that wrote a token may be behind the one that trains on it. 0: synchronous."""
    sampler: Literal["inline", "process", "vllm"] | None = None
    """Who samples, and where. The local sampler in turn with the learner, on its weights; or beside it, in a process of
    its own with a copy of them; or vLLM (section `vllm`). None: inline when synchronous, process when not."""
    sampler_threads: PositiveInt = 1
    """CPU threads of the sampler's own process."""
    sampler_timeout_s: Positive = 300.0
    """A sampler process that has work and has given no sign of life for this long is started again."""
    in_flight_weight_updates: bool = True
    """A completion in flight goes on under the new weights (its tokens know which wrote them). False: it is finished
    first (drain)."""
    recompute_kv: bool = False
    """With in-flight updates: compute the keys and values of what is in flight again, instead of keeping stale ones."""
    straggler_timeout_s: Positive | None = None
    """A group that is still being sampled after this long is dropped, its slot given back, counted and logged."""
    watchdog_s: Positive = 1800.0
    """The run ends with an error when what it waits for makes no progress for this long."""

    @property
    def place(self) -> Literal["inline", "process", "vllm"]:
        """`sampler`, chosen."""
        return self.sampler or ("process" if self.max_staleness else "inline")


class VllmConfig(Section):
    """vLLM as the sampler (extra `vllm`; chosen by async.sampler: vllm)."""

    url: str | None = None
    """A running vLLM server, such as http://host:8000. None: an engine of this run's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: the learner's."""
    tensor_parallel: PositiveInt = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """The share of each GPU's memory that the engine may take, weights included."""
    kv_cache_gib: Positive | None = None
    """The key/value memory. None: what gpu_memory_utilization leaves; without a GPU, 1 GiB."""
    max_sequences: PositiveInt = 256
    """Completions that are decoded at once; others wait."""
    context_length: PositiveInt | None = None
    """Tokens of a prompt and its completion. None: the model's own."""
    eager: bool | None = None
    """Without CUDA graphs and compilation. None: eager without a GPU, compiled with one."""
    weight_transfer: Literal["file", "broadcast", "ipc"] = "file"
    """How weights reach the engine: through a safetensors file in memory; by broadcast to devices of its own (NCCL
    between GPUs, gloo between CPUs); or by CUDA IPC on the learner's device."""
    transfer_dir: str | None = None
    """Where the file goes; a server must see the folder too. None: /dev/shm where it has the room, else the temporary
    folder."""
    max_restarts: NonNegativeInt = 3
    """How often in an hour an engine that died is started again, with its requests. Once more, and the run ends."""
    timeout_s: Positive = 300.0
    """An engine that has answered nothing for this long counts as dead."""
    start_timeout_s: Positive = 900.0
    """How long an engine may take to start, or a server to come back."""
    probe_updates: NonNegativeInt = 3
    """After each of the first weight updates, the engine's log-probs are compared with the learner's. The probe
    settings hold for every sampler of a Ray pool, vLLM or not."""
    probe_every: NonNegativeInt = 20
    """And after every so many. 0: after the first ones only."""
    probe_tolerance: Positive | None = None
    """The largest |difference| in nats that a probe accepts. None: 1e-3 in float32, 0.3 in bfloat16."""


class ClusterConfig(Section):
    """Where the learner and the samplers run. On the command line `--cluster ray` is `--cluster.kind ray`."""

    kind: Literal["none", "torchrun", "ray"] = "none"
    """This process; the ranks that torchrun started; or a Ray cluster (extra `ray`)."""
    address: str | None = None
    """Ray: `auto` joins the running cluster, or host:port. None: one on this machine, for this run."""
    learner_ranks: PositiveInt = 1
    """Ray: ranks that the learner's weights are sharded over."""
    learner_cpus: NonNegative = 1.0
    learner_gpus: NonNegative | None = None
    """Of each rank. None: one where model.device says cuda, or says auto and the cluster has GPUs for all."""
    samplers: PositiveInt = 1
    """Ray: sampler actors, local or vLLM as async.sampler says."""
    sampler_cpus: NonNegative = 1.0
    sampler_gpus: NonNegative | None = None
    """Of each sampler. None: as learner_gpus; with vLLM vllm.tensor_parallel of them."""
    reward_workers: NonNegativeInt = 0
    """Ray: processes that score completions. 0: scored in the trainer's process."""
    colocate: bool = False
    """Ray: learner ranks and samplers share GPUs and take turns: samplers sleep while the learner works. Each sampler
    shares those of learner_ranks / samplers ranks. Synchronous only."""
    weight_transfer: Literal["object_store", "broadcast"] | None = None
    """How the learner's weights reach the samplers: through Ray's object store; or by broadcast from its first rank to
    their devices (NCCL between GPUs, gloo between CPUs). None: broadcast where all of them have GPUs of their own."""
    transfer_timeout_s: Positive = 120.0
    """How long one part of a broadcast, at most 256 MiB or one tensor, may take before its members count as lost."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's strategy for putting ranks and samplers onto nodes."""
    head_gather_gib: Positive = 2.0
    """An untied head up to this size is gathered for a micro-batch; a larger one is used where it is sharded."""
    start_timeout_s: Positive = 900.0
    """How long resources, actors and their models may take to be there."""
    learner_timeout_s: Positive = 3600.0
    """How long one call of the learner may take before its ranks count as lost."""
    sampler_timeout_s: Positive = 300.0
    """A sampler that has given no sign of life for this long is started again."""
    reward_timeout_s: Positive = 300.0
    """A reward worker that has not scored a group for this long is started again, and the group scored elsewhere. The
    reward functions' own timeouts should be shorter."""
    max_sampler_restarts: NonNegativeInt = 10
    max_learner_restarts: NonNegativeInt = 3
    """How often lost ranks are started again from the newest checkpoint. Once more, and the run ends."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class EvalConfig(Section):
    every: NonNegativeInt = 4
    """RL steps between held-out evaluations; the first is before training, one more at the end. 0: never."""
    samples_per_prompt: PositiveInt = 1
    """k of mean@k and pass@k."""
    temperature: NonNegative | None = None
    """None: as in rollouts. 0: greedy."""
    max_tokens: PositiveInt | None = None
    """None: as in rollouts."""
    max_prompts: PositiveInt | None = None


class CheckpointConfig(Section):
    every: NonNegativeInt = 10
    """RL steps between checkpoints; one more at the end. 0: only at the end."""
    keep: PositiveInt = 2
    """How many of the newest are kept."""


class Config(Section):
    """Everything a run is told. A run's `config.yaml` is this, resolved."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    run_dir: str | None = None
    """The run's folder. None: runs/<task>-<date>-<time>."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: PositiveInt = 12
    """RL steps (rollouts)."""
    threads: PositiveInt | None = None
    """CPU threads of torch. None: torch's own choice, less async.sampler_threads beside a sampler process."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = ThinkTask()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    asynchrony: Annotated[AsyncConfig, tyro.conf.arg(name="async")] = Field(default=AsyncConfig(), alias="async")
    vllm: VllmConfig = VllmConfig()
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(_listed)] = ()
    """Trackers besides metrics.jsonl, where installed: one, or a list."""

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _contradictions(config: Config) -> Iterator[str]:
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.group_size == 1 and algorithm.advantage != "none":
        yield (
            f"rollout.group_size: 1 with algorithm.advantage: {algorithm.advantage} makes every advantage 0; "
            "use a group_size of at least 2, or algorithm.advantage: none"
        )
    if rollout.groups_per_step % algorithm.updates_per_rollout:
        divisors = [n for n in range(1, rollout.groups_per_step + 1) if rollout.groups_per_step % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - algorithm.updates_per_rollout))
        yield (
            f"algorithm.updates_per_rollout: {algorithm.updates_per_rollout} does not divide "
            f"rollout.groups_per_step: {rollout.groups_per_step}; use updates_per_rollout: {nearest}"
        )
    if config.asynchrony.max_staleness and algorithm.anchor == "proximal" and algorithm.correction is None:
        yield (
            f"async.max_staleness: {config.asynchrony.max_staleness} with algorithm.anchor: proximal leaves the "
            "sampler's staleness uncorrected; use algorithm.anchor: sampler, or set an algorithm.correction"
        )
    truncated = [name for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)) if getattr(rollout, name) != off]
    if config.asynchrony.sampler == "vllm" and truncated:
        yield (
            f"rollout.{truncated[0]}: {getattr(rollout, truncated[0]):g} with async.sampler: vllm, whose log-probs are "
            "of the truncated distribution, not of the policy; remove the truncation, or use async.sampler: process"
        )
    yield from _placement(config)
    if config.cluster.colocate:
        yield from _colocation(config)
    if config.cluster.kind == "ray" and config.asynchrony.sampler == "vllm":
        if config.vllm.weight_transfer != "file":
            yield (
                f"vllm.weight_transfer: {config.vllm.weight_transfer} with cluster.kind: ray, whose samplers get their "
                "weights as cluster.weight_transfer says; remove it, or use cluster.weight_transfer: broadcast"
            )
        if config.vllm.url is not None and config.cluster.samplers > 1:
            yield (
                f"vllm.url: {config.vllm.url} with cluster.samplers: {config.cluster.samplers}, which would all change "
                "the weights of one server; use samplers: 1, or remove the url so that each has an engine of its own"
            )
    sequence_level = isinstance(algorithm.objective, GspoObjective) or (
        isinstance(algorithm.objective, FunctionObjective) and algorithm.objective.sequence_level
    )
    if isinstance(algorithm.objective, GspoObjective) and algorithm.reduction != "sequence":
        yield (
            f"algorithm.reduction: {algorithm.reduction} with algorithm.objective.type: gspo, whose ratio and clip are "
            "of whole sequences; use reduction: sequence"
        )
    if isinstance(algorithm.objective, SapoObjective | GspoObjective) and isinstance(
        algorithm.correction, SequenceTruncateCorrection
    ):
        yield (
            f"algorithm.correction.type: sequence_truncate does not go with algorithm.objective.type: "
            f"{algorithm.objective.type}, which weighs {'sequences' if sequence_level else 'tokens'} itself; use tis"
        )
    anchored = not isinstance(algorithm.objective, ReinforceObjective)
    if algorithm.correction is not None and algorithm.anchor == "sampler" and anchored:
        yield (
            f"algorithm.correction.type: {algorithm.correction.type} with algorithm.anchor: sampler corrects the "
            "sampler/trainer mismatch twice; use anchor: proximal, or remove the correction"
        )
    cispo = algorithm.objective if isinstance(algorithm.objective, CispoObjective) else None
    masked = cispo is not None and (cispo.mask_low_threshold, cispo.mask_high_threshold) != (None, None)
    if masked and cispo.negative_bounds != (cispo.clip_low_threshold, cispo.clip_high_threshold):
        yield (
            "algorithm.objective: mask_*_threshold together with negative_clip_*_threshold mixes MiniMax-M1's token "
            "mask with DISPO's bounds by sign; keep one of the two"
        )
    if algorithm.entropy_bonus and (sequence_level or algorithm.opsm_delta is not None):
        yield (
            f"algorithm.entropy_bonus: {algorithm.entropy_bonus:g} does not go with whole-sequence objectives (gspo, "
            "opsm_delta, sequence_level), whose head gives no entropy gradient; use entropy_bonus: 0"
        )
    if algorithm.opsm_delta is not None and not anchored:
        yield (
            f"algorithm.opsm_delta: {algorithm.opsm_delta:g} with algorithm.objective.type: reinforce, which has no "
            "anchor to have drifted from; use objective.type: cispo or importance_sampling, or remove opsm_delta"
        )
    if algorithm.opsm_delta is not None and sequence_level and isinstance(algorithm.objective, FunctionObjective):
        yield (
            f"algorithm.opsm_delta: {algorithm.opsm_delta:g} does not go with a sequence-level function; mask in the "
            "function itself (its column `rows` says which row a token is of)"
        )
    if algorithm.constant is not None and algorithm.reduction != "constant":
        yield (
            f"algorithm.constant: {algorithm.constant:g} has no meaning with algorithm.reduction: "
            f"{algorithm.reduction}; remove it or use reduction: constant"
        )
    chosen = algorithm.objective
    if isinstance(chosen, FunctionObjective) and "reference_logprobs" in chosen.columns and algorithm.kl is None:
        yield "algorithm.objective.columns: reference_logprobs needs a reference model; set algorithm.kl"
    asynchrony = config.asynchrony
    inline = asynchrony.sampler == "inline" and asynchrony.max_staleness > 0
    if inline and not asynchrony.in_flight_weight_updates:
        yield (
            "async.in_flight_weight_updates: false has no meaning with async.sampler: inline, which samples on the "
            "learner's own weights; use async.sampler: process"
        )
    if config.model.path is None and config.task.type != "think":
        yield "model.path: missing; name a model folder or hub id (only the `think` task brings its own model)"
    if rollout.zero_variance == "resample" and rollout.group_size == 1:
        yield "rollout.zero_variance: resample needs a group_size of at least 2; with 1 every group has zero variance"
    if config.task.type != "think" and config.eval.every and not _has_eval_set(config.task):
        yield (
            f"eval.every: {config.eval.every} without held-out data; give the task an evaluation set "
            "(eval_path, eval_split or eval_fraction), or set eval.every: 0"
        )


def _placement(config: Config) -> Iterator[str]:
    """Parts of the cluster that somebody else has, or nobody."""
    cluster = config.cluster
    if cluster.kind != "none" and config.learner.endpoint is not None:
        yield (
            f"cluster.kind: {cluster.kind} with learner.endpoint: {config.learner.endpoint}, which has the learner and "
            "the samplers already; remove one of the two"
        )
    if cluster.kind == "ray" and config.asynchrony.sampler == "inline":
        yield (
            "async.sampler: inline with cluster.kind: ray, whose samplers are processes of their own; remove it, or "
            "use async.sampler: vllm"
        )
    if cluster.weight_transfer == "broadcast" and cluster.kind != "ray":
        yield (
            f"cluster.weight_transfer: broadcast with cluster.kind: {cluster.kind}, which has no pool of samplers; use "
            "cluster.kind: ray, or for a vLLM engine of this process vllm.weight_transfer: broadcast"
        )
    if cluster.weight_transfer == "broadcast" and config.vllm.url is not None:
        yield (
            "cluster.weight_transfer: broadcast with vllm.url, whose server has workers that are not the pool's; use "
            "weight_transfer: object_store"
        )


def _colocation(config: Config) -> Iterator[str]:
    """Why learner and samplers could not take turns on the same devices."""
    cluster = config.cluster
    if cluster.kind != "ray":
        yield f"cluster.colocate: true with cluster.kind: {cluster.kind}, which places nothing; use cluster.kind: ray"
    if config.asynchrony.max_staleness:
        yield (
            f"cluster.colocate: true with async.max_staleness: {config.asynchrony.max_staleness}, for which sampling "
            "goes on while the learner trains; use max_staleness: 0, or give the samplers GPUs of their own"
        )
    if cluster.learner_ranks % cluster.samplers:
        yield (
            f"cluster.samplers: {cluster.samplers} do not share {cluster.learner_ranks} learner ranks' GPUs evenly; "
            "use a divisor of cluster.learner_ranks"
        )
    if cluster.weight_transfer == "broadcast":
        yield (
            "cluster.weight_transfer: broadcast with cluster.colocate: true, and NCCL has no two members on one GPU; "
            "use weight_transfer: object_store"
        )
    if cluster.learner_gpus not in (None, 0, 1):
        yield f"cluster.learner_gpus: {cluster.learner_gpus:g} with cluster.colocate: true; a rank has one GPU or none"
    if cluster.sampler_gpus is not None:
        yield "cluster.sampler_gpus: with cluster.colocate: true a sampler has those of its ranks; remove it"
    if config.asynchrony.sampler == "vllm":
        shared = cluster.learner_ranks // cluster.samplers
        if config.vllm.tensor_parallel > shared:
            yield (
                f"vllm.tensor_parallel: {config.vllm.tensor_parallel} with cluster.colocate: true, and a sampler "
                f"shares the GPUs of {shared} learner ranks; use fewer samplers, or tensor_parallel: {shared}"
            )
        if config.vllm.url is not None:
            yield "vllm.url: a server cannot be put to sleep from here; remove it, or cluster.colocate"


def _has_eval_set(task: JsonlTask | HubTask) -> bool:
    own = task.eval_path if isinstance(task, JsonlTask) else task.eval_split
    return own is not None or task.eval_fraction > 0


def warnings(config: Config) -> list[str]:
    """What is legal and probably not meant, one sentence each."""
    found = []
    algorithm, rollout = config.algorithm, config.rollout
    updates = algorithm.updates_per_rollout * algorithm.epochs_per_rollout
    clipped = isinstance(algorithm.objective, CispoObjective | PpoClipObjective)
    off_policy = updates > 1 or config.asynchrony.max_staleness > 0
    if algorithm.anchor == "proximal" and updates == 1:
        found.append(
            "algorithm.anchor: proximal with one update per rollout makes the ratio identically 1 and the clip inert "
            "(SkyRL #1859); use anchor: sampler or more updates_per_rollout"
        )
    if clipped and algorithm.objective.clip_high_threshold < 1:
        found.append(
            f"algorithm.objective.clip_high_threshold: {algorithm.objective.clip_high_threshold:g} is below 1, so "
            "every on-policy token is scaled down; thresholds are absolute bounds on the ratio (4.0 or 5.0 are usual)"
        )
    if isinstance(algorithm.objective, CispoObjective) and algorithm.objective.clip_low_threshold > 0 and off_policy:
        found.append(
            f"algorithm.objective.clip_low_threshold: {algorithm.objective.clip_low_threshold:g} keeps a full update "
            "on tokens that the policy has left, and can run away off-policy (tinker-cookbook #763); use 0"
        )
    cluster = config.cluster
    share = cluster.learner_ranks // cluster.samplers
    if cluster.colocate and config.asynchrony.sampler == "vllm" and config.vllm.tensor_parallel < share:
        found.append(
            f"vllm.tensor_parallel: {config.vllm.tensor_parallel} with cluster.colocate and {share} learner ranks to a "
            f"sampler leaves GPUs idle while it samples; use tensor_parallel: {share} or more cluster.samplers"
        )
    if rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0:
        found.append(
            "rollout.top_p, top_k or min_p truncate the sampled distribution, while sampler_logprobs and the ratio are "
            "of the untruncated one; the importance weights are then biased"
        )
    return found


# ----------------------------------------------------------------------------------------------------------- loading


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file (or the embedded default) with overrides `--a.b value` or `--a.b=value` on top.

    Raises ConfigError with every mistake at once.
    """
    return validate(merge(path, overrides), source=str(path) if path else "the command line")


def merge(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What a file and overrides say together, not yet validated."""
    raw = read_yaml(path) if path is not None else {}
    for keys, value in parse_overrides(overrides):
        _put(raw, ["cluster", "kind"] if keys == ["cluster"] else keys, value)
    return raw


def override(config: Config, overrides: Sequence[str]) -> Config:
    """The config with overrides on top. Raises ConfigError with every mistake at once."""
    raw = config.model_dump(mode="json", by_alias=True)
    for keys, value in parse_overrides(overrides):
        _put(raw, keys, value)
    return validate(raw, source="the command line")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError naming file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [str(p) for p in Path(path).parent.glob("*.yaml")], 1)
        raise ConfigError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, not a mapping of sections such as `task:`")
    return raw


def validate(raw: Mapping[str, Any], *, source: str = "config") -> Config:
    """`raw` as a Config. Raises ConfigError with every mistake at once."""
    try:
        return Config.model_validate(_with_default_tags(raw, Config))
    except ValidationError as error:
        details = error.errors()
        inner = [detail["loc"] for detail in details]
        lines = [
            _explain(detail)
            for detail in details  # a list is not also "too short" because one of its members is wrong
            if not (
                detail["type"] == "too_short"
                and any(loc[: len(detail["loc"])] == detail["loc"] for loc in inner if loc != detail["loc"])
            )
        ]
        raise ConfigError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines)) from None


def _with_default_tags(raw: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`raw` with `type` filled in where a union section leaves it out and the field's default has one."""
    filled = dict(raw)
    for name, field in model.model_fields.items():
        key = field.alias or name
        section, default = filled.get(key), field.default
        if not isinstance(section, Mapping):
            continue
        if isinstance(default, BaseModel) and "type" in type(default).model_fields and "type" not in section:
            section = {"type": default.type, **section}
        inner = _models_in(field.annotation)
        filled[key] = _with_default_tags(section, inner[0]) if len(inner) == 1 else dict(section)
    return filled


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaf values."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def parse_overrides(arguments: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`--a.b value`, `--a.b=value` and bare `--a.b` (true) as (path, value) pairs; values are read as YAML.

    Several words after one key make a list. Raises ConfigError for a word that belongs to no key.
    """
    found: list[tuple[list[str], Any]] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument {word!r}; overrides read --section.field value")
        key, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        parsed = [_scalar(key, v) for v in values]
        found.append(
            (key.replace("-", "_").split("."), True if not parsed else parsed[0] if len(parsed) == 1 else parsed)
        )
    return found


def _scalar(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key} {text}: not a valid value: {error}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set raw[k0][k1]...: a new `type` empties its section, since the other variant's fields do not carry over."""
    here: Any = raw
    for position, key in enumerate(keys[:-1]):
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                raise ConfigError(f"--{'.'.join(keys)}: {key!r} is not an index of a list of {len(here)}")
            here = here[int(key)]
        else:
            if not isinstance(here.get(key), dict | list):
                here[key] = {}
            here = here[key]
        if not isinstance(here, dict | list):
            raise ConfigError(f"--{'.'.join(keys)}: {'.'.join(keys[: position + 1])} is not a section")
    if isinstance(here, list):
        if not keys[-1].isdigit() or int(keys[-1]) >= len(here):
            raise ConfigError(f"--{'.'.join(keys)}: {keys[-1]!r} is not an index of a list of {len(here)}")
        here[int(keys[-1])] = value
        return
    if keys[-1] == "type" and here.get("type", value) != value:
        here.clear()
    here[keys[-1]] = value


# ---------------------------------------------------------------------------------------------------- error messages


def _explain(detail: ErrorDetails) -> str:
    """One mistake: field, value, why, and what to use instead."""
    path = [str(part) for part in detail["loc"]]
    shown = ".".join(part for part in path if not _is_tag(part, path))
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return f"{shown}: unknown key{_nearest(path)}"
    if kind == "missing":
        return f"{shown}: missing"
    if kind == "union_tag_not_found":
        tags = [str(m.model_fields["type"].default) for m in _walk(path) if "type" in m.model_fields]
        return f"{shown}: has no `type`; choose one of {', '.join(tags)}"
    if kind == "union_tag_invalid":
        tag = detail["ctx"]["tag"]
        expected = detail["ctx"]["expected_tags"].replace("'", "")
        near = difflib.get_close_matches(str(tag), expected.split(", "), 1)
        return f"{shown}.type: {tag!r} is unknown; choose from {expected}" + (f" (nearest: {near[0]})" if near else "")
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), re.findall("'([^']*)'", detail["ctx"]["expected"]), 1)
        return f"{shown}: {value!r} is not one of {detail['ctx']['expected']}" + (
            f" (nearest: {near[0]})" if near else ""
        )
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return "\n  ".join(f"{shown + ': ' if shown else ''}{line}" for line in message.splitlines())
    return f"{shown}: {value!r}: {message[0].lower()}{message[1:]}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models an annotation admits, through Annotated, Optional, unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, tuple):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _walk(path: Sequence[str]) -> list[type[BaseModel]]:
    """The models that stand at `path` (several before a tag has chosen one)."""
    models: list[type[BaseModel]] = [Config]
    for part in path:
        tagged = [m for m in models if "type" in m.model_fields and m.model_fields["type"].default == part]
        if tagged:
            models = tagged
            continue
        if part.isdigit():
            continue
        fields = [f for m in models for name, f in m.model_fields.items() if part in (name, f.alias)]
        models = [model for f in fields for model in _models_in(f.annotation)]
    return models


def _is_tag(part: str, path: Sequence[str]) -> bool:
    """Whether a part of pydantic's location is the name of a chosen union variant and not a key."""
    before = _walk(path[: path.index(part)])
    keys = {name for m in before for field_name, f in m.model_fields.items() for name in (field_name, f.alias)}
    return part not in keys and any("type" in m.model_fields and m.model_fields["type"].default == part for m in before)


def _nearest(path: Sequence[str]) -> str:
    """The nearest real key, in the same section first, then anywhere."""
    siblings = [f.alias or name for m in _walk(path[:-1]) for name, f in m.model_fields.items()]
    near = difflib.get_close_matches(path[-1], siblings, 1)
    if near:
        return f"; did you mean {near[0]}?"
    everywhere = {full.partition(" ")[0].rsplit(".", 1)[-1]: full for full in _all_keys(Config)}
    near = difflib.get_close_matches(path[-1], everywhere, 1, cutoff=0.8)
    if near:
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; the keys here are {', '.join(dict.fromkeys(siblings))}" if siblings else ""


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key; behind a key of a union's variant, the `type` that it needs."""
    tag = model.model_fields["type"].default if "type" in model.model_fields else None
    for name, f in model.model_fields.items():
        full = prefix + (f.alias or name)
        yield f"{full} (with type: {tag})" if tag else full
        for inner in _models_in(f.annotation):
            yield from _all_keys(inner, full + ".")
