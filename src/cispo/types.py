"""The words that every room shares: what is sampled, what is trained, and who does each.

Nothing here computes. The records are small frozen dataclasses; the protocols are the seam of the whole project
(four verbs: `forward_backward`, `optim_step`, `sample`, `save`/`load`), so that a toy run, a cluster and a remote
service differ only in who implements them. Left out on purpose: configuration (`config.py`) and every formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor  # only named here, so that reading a config does not wait for torch

# ----------------------------------------------------------------------------------------------------------- errors


class CispoError(Exception):
    """Base of the errors a person is meant to read: the command line prints the message without a traceback."""


class ConfigError(CispoError, ValueError):
    """A setting is wrong. The message names the field, the value, why, and the value to use instead."""


class DataError(CispoError, ValueError):
    """An input (dataset, prompt, model folder) is wrong. The message names the place: file and line, or prompt id."""


class NonFiniteError(CispoError, ArithmeticError):
    """A NaN or infinity stands at a token that is trained. The message names the position and the quantity."""


class RunError(CispoError, RuntimeError):
    """A component of a running job failed, and the run ends with it."""


class LearnerLost(RunError):
    """Ranks of the learner died or stopped answering. A new learner can go on from the newest checkpoint."""


# ---------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn.

    `stop_token_ids=None` means the model's own EOS ids; `()` means never stop at a token. `top_k=0` means all tokens.
    `seed` makes the samples of one request a function of (weights, prompt, seed) alone, whatever else is in the batch.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """`num_samples` completions of one prompt. `request_id` is the caller's, and comes back on the result."""

    request_id: int
    prompt: tuple[int, ...]
    num_samples: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens that the policy wrote after a prompt.

    tokens: the sampled ids; a stop token that ended the completion is the last of them, because the policy chose it.
    logprobs: float32 log-probability of each token under the tempered distribution before any truncation.
    versions: the policy version that wrote each token.
    stop_reason: "stop" (EOS, stop token or stop string) or "length" (ran into `max_tokens`: truncated).
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    stop_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What became of one `SampleRequest`: its `num_samples` completions, in order."""

    request_id: int
    completions: tuple[Completion, ...]


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Prompt:
    """One question of a task.

    prompt_id: identity for grouping and curricula; two rows with equal text are still two prompts.
    tokens: the ids that the policy continues.
    text: what a person reads and reward functions get (a string, or chat messages).
    columns: whatever else the data row carries, passed to reward functions by name.
    """

    prompt_id: str
    tokens: tuple[int, ...]
    text: str | list[dict[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """One sequence of tokens, of which the policy wrote some. S tokens; no split into prompt and response.

    tokens: long [S]. action_mask: bool [S], true where the policy wrote the token. sampler_logprobs: float32 [S], the
    log-prob recorded at sampling (μ), 0 elsewhere. versions: long [S], the policy version that wrote the token, -1
    elsewhere. reward: None where no reward function gave one. rewards: by reward function.
    """

    tokens: Tensor
    action_mask: Tensor
    sampler_logprobs: Tensor
    versions: Tensor
    text: str
    reward: float | None
    rewards: Mapping[str, float | None]
    truncated: bool


@dataclass(frozen=True)
class Group:
    """The G trajectories of one prompt. `admission` is its place in the queue; `version` the policy's at admission."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    admission: int
    version: int


@dataclass(frozen=True)
class Batch:
    """B rows of model input and, flat over their T = Σ lengths positions, what the loss reads at each position.

    rows: B long tensors [S_b], the model's input. targets_T: long, the token whose log-prob each position gives
    (for a trajectory: the next one). weights_T: float32, the reduction's weight of each position's loss, 0 where the
    position is not trained. columns: float tensors of length T that the objective names ("anchor_logprobs",
    "advantages", ...); they may hold anything, NaN included, where the weight is 0.
    """

    rows: tuple[Tensor, ...]
    targets_T: Tensor
    weights_T: Tensor
    columns: Mapping[str, Tensor]

    @cached_property
    def lengths(self) -> list[int]:
        return [row.shape[0] for row in self.rows]


@dataclass(frozen=True, slots=True)
class AdamParams:
    """One optimizer step of AdamW. Defaults for RL: MiniMax-M1 §3 (gradients span 1e-18 to 1e-5).

    `grad_clip_norm=0` means no clipping. Weight decay is not applied to norms and biases.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class LossOutput:
    """Of one `forward_backward`, flat over the batch's T positions.

    loss: Σ weights·loss over trained positions. logprobs_T, entropy_T: float32, 0 where the position was not
    evaluated. evaluated_T: bool, true where the model ran (a row whose coefficients are all exactly zero is skipped).
    dropped: trained positions whose non-finite values were dropped, by request.
    """

    loss: float
    logprobs_T: Tensor
    entropy_T: Tensor
    evaluated_T: Tensor
    dropped: int = 0


Objective = Callable[..., "Tensor"]
"""`(logprobs_T, **columns) -> loss_T`, differentiable in `logprobs_T`, each token's loss from that token alone."""


# --------------------------------------------------------------------------------------------------------- protocols


@runtime_checkable
class Learner(Protocol):
    """Who holds the trained weights. Gradients add up over `forward_backward` calls until `optim_step` spends them."""

    def forward_backward(
        self,
        batch: Batch,
        objective: Objective,
        *,
        temperature: float = 1.0,
        nonfinite: str = "raise",
        entropy_bonus: float = 0.0,
    ) -> LossOutput:
        """Add the gradient of Σ weights·(objective − entropy_bonus·entropy) to the accumulated one.

        An objective with `sequence_level` sees all trained tokens of a row at once. Raises NonFiniteError.
        """

    def forward(self, batch: Batch, *, temperature: float = 1.0, reference: bool = False) -> LossOutput:
        """Log-probs and entropies only. `reference`: under the frozen reference model instead of the policy."""

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """Apply the accumulated gradient and clear it. Returns at least `grad_norm` (before clipping)."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer so that `load` continues bit for bit on the same machine."""

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """Write an ordinary `transformers` model folder."""

    def weights(self) -> Mapping[str, Tensor]:
        """The policy's weights under their `transformers` names (LoRA merged), for a sampler to load."""


@runtime_checkable
class Sampler(Protocol):
    """Who writes completions. Requests are queued by `submit`; `poll` hands back what has finished.

    version: of the policy that writes the next token. share_weights: whether the learner's changes reach it by
    themselves, so that `update_weights(None, version)` publishes; otherwise it needs the weights.
    """

    version: int
    share_weights: bool

    def submit(self, request: SampleRequest) -> None: ...

    def poll(self, *, wait: bool = True) -> list[SampleResult]:
        """Advance, and return the requests that finished (possibly none). Never blocks for ever.

        wait: may take the caller's time (decode here, or wait a moment for another process). Without it, only what has
        already finished is handed over, so that a trainer can ask between two optimizer updates.
        """

    def cancel(self, request_id: int) -> None: ...

    def update_weights(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """New policy from here on. `None`: the weights are shared with the learner and have changed in place."""

    @property
    def pending(self) -> int:
        """Requests submitted and not yet returned."""


class Task(Protocol):
    """Where prompts come from and what completions are worth."""

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """All prompts of a split, in a fixed order. The trainer shuffles and keeps the cursor."""

    async def score(
        self, prompt: Prompt, completions: Sequence[str], *, completion_ids: Sequence[Sequence[int]] | None = None
    ) -> Sequence[Mapping[str, float | None]]:
        """One mapping from reward function to reward for each completion of one prompt.

        completion_ids: the sampled tokens of each, the one that ended it included, for those who count tokens.
        The first function decides what counts as correct (at least 0.5). Raises RunError when too many calls fail.
        """

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each reward function in the total."""

    def metrics(self, prompt: Prompt, completions: Sequence[str]) -> Mapping[str, float]:
        """The task's own numbers about one prompt's completions; averaged over prompts under `task/`."""
