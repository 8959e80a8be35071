"""Policy objectives: formulas from log-probabilities to a loss per token.

Every objective here is `(logprobs, **columns) -> loss`, elementwise, of the shape of `logprobs`, and differentiable in
`logprobs` alone: the columns are data and are detached. So `d loss_t / d logprobs_t` is one number per token, and the
head (`head/`) needs nothing else. Fix the options with `functools.partial`; a column that an objective does not name
is a TypeError, not ignored.

Left out on purpose: reductions over tokens (`batching.py` makes them into weights), masks (the head takes untrained
rows out before any arithmetic), sampler/trainer mismatch weights (`corrections.py`), and advantages
(`advantages.py`). Thresholds are absolute bounds on the ratio, never offsets from 1.

Symbols: log π = `logprobs`, log μ = `anchor_logprobs` (the ratio's denominator: sampler or proximal), A =
`advantages`, r = π/μ, sg = stop-gradient. Arithmetic is in float32, or float64 where `logprobs` is float64.

    python -m pytest tests/test_objectives.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cispo.config import (
    AlgorithmConfig,
    CispoObjective,
    ImportanceSamplingObjective,
    PpoClipObjective,
    ReinforceObjective,
)
from cispo.types import ConfigError, Objective

KLForm = Literal["k1", "k2", "k3"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_ratio(logprobs: Tensor, anchor_logprobs: Tensor) -> Tensor:
    """log r, differentiable in `logprobs` only."""
    return _wide(logprobs) - anchor_logprobs.detach()


def cispo(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: float = 0.0,
    clip_high_threshold: float = 4.0,
) -> Tensor:
    """Clipped importance sampling policy optimization: −sg(clip(r, low, high)) · A · log π.

    The importance weight is clipped and detached; every token keeps the gradient of its log π. Above the cap the
    coefficient is −high·A, not 0, for both signs of A. MiniMax-M1 (arXiv:2506.13585) eq. 4–5; names and defaults of
    Tinker. TRL, ms-swift and ScaleRL have the upper cap only, which is `clip_low_threshold=0`.
    """
    ratio = _log_ratio(logprobs, anchor_logprobs).detach().exp()
    weight = torch.clamp(ratio, clip_low_threshold, clip_high_threshold)
    return -weight * advantages.detach() * _wide(logprobs)


def unified(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: float = 0.0,
    clip_high_threshold: float = math.inf,
    mask_low_threshold: float = 0.0,
    mask_high_threshold: float = math.inf,
) -> Tensor:
    """CISPO with the switchable token mask M: −sg(clip(r, low, high)) · A · log π · M.

    M = 0 where A > 0 and r > `mask_high_threshold`, or A < 0 and r < `mask_low_threshold`; else 1. MiniMax-M1
    (arXiv:2506.13585) eq. 6–7. With M at its defaults it is CISPO; with the weight unclipped and M at PPO's bounds its
    gradient is PPO's.
    """
    ratio = _log_ratio(logprobs, anchor_logprobs).detach().exp()
    masked = torch.where(advantages > 0, ratio > mask_high_threshold, (advantages < 0) & (ratio < mask_low_threshold))
    loss = cispo(
        logprobs,
        anchor_logprobs=anchor_logprobs,
        advantages=advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
    )
    return torch.where(masked, 0.0, loss)


def ppo_clip(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate: −min(r·A, clip(r, low, high)·A).

    Schulman et al. (arXiv:1707.06347) eq. 7, in absolute bounds; GRPO and DAPO's clip-higher are this objective.
    `dual_clip` c > 1 bounds the loss of a token with A < 0 by −c·A (Ye et al., arXiv:1912.09729, eq. 5).

    Raises ConfigError where `dual_clip` is not above 1.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(
            f"dual_clip = {dual_clip}: it bounds the ratio of negative tokens and must be above 1; try 3.0"
        )
    A = _wide(advantages.detach())
    ratio = _log_ratio(logprobs, anchor_logprobs).exp()
    surrogate = torch.minimum(ratio * A, torch.clamp(ratio, clip_low_threshold, clip_high_threshold) * A)
    if dual_clip is not None:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, dual_clip * A), surrogate)
    return -surrogate


def importance_sampling(logprobs: Tensor, *, anchor_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The unclipped off-policy surrogate: −r·A. Its gradient is that of `cispo` with bounds 0 and ∞."""
    return -_log_ratio(logprobs, anchor_logprobs).exp() * advantages.detach()


def reinforce(logprobs: Tensor, *, advantages: Tensor) -> Tensor:
    """The on-policy policy gradient: −A · log π (Williams, 1992)."""
    return -advantages.detach() * _wide(logprobs)


def cross_entropy(logprobs: Tensor) -> Tensor:
    """Supervised learning: −log π. Per-token weights are the head's `weights_T`."""
    return -_wide(logprobs)


def dro(logprobs: Tensor, *, anchor_logprobs: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """Direct reward optimization: −(A·log π − β/2·(log π − log μ)²), as Tinker computes it (cf. arXiv:2405.19107)."""
    penalty = 0.5 * beta * _log_ratio(logprobs, anchor_logprobs).square()
    return penalty - advantages.detach() * _wide(logprobs)


# ------------------------------------------------------------------------------------------------- KL to a reference


def kl_estimate(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    form: KLForm = "k3",
    *,
    input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from tokens sampled by π, differentiable in `logprobs`.

    With ℓ = log π_ref − log π: k1 = −ℓ, k2 = ℓ²/2, k3 = exp(ℓ) − 1 − ℓ (Schulman, joschu.net/blog/kl-approx.html).
    `input_clamp` bounds |ℓ| and `output_clamp` the estimate's magnitude; NeMo RL uses 20 and 10. A clamped token has
    no KL gradient.

    Raises ConfigError for an unknown form.
    """
    log_ratio = reference_logprobs.detach() - _wide(logprobs)
    if input_clamp is not None:
        log_ratio = log_ratio.clamp(-input_clamp, input_clamp)
    match form:
        case "k1":
            kl = -log_ratio
        case "k2":
            kl = 0.5 * log_ratio.square()
        case "k3":
            kl = torch.expm1(log_ratio) - log_ratio
        case _:
            raise ConfigError(f"form = {form!r}: not a KL estimator; use 'k1', 'k2' or 'k3'")
    return kl if output_clamp is None else kl.clamp(-output_clamp, output_clamp)


def with_kl(
    objective: Callable[..., Tensor],
    *,
    coef: float,
    form: KLForm = "k3",
    input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Callable[..., Tensor]:
    """`objective` plus coef · `kl_estimate`, reading one more column, `reference_logprobs`. Still token-local."""

    def penalised(logprobs: Tensor, *, reference_logprobs: Tensor, **columns: Tensor) -> Tensor:
        kl = kl_estimate(logprobs, reference_logprobs, form, input_clamp=input_clamp, output_clamp=output_clamp)
        return objective(logprobs, **columns) + coef * kl

    return penalised


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its options fixed, and the columns it reads."""

    loss: Objective
    columns: tuple[str, ...]

    def __call__(self, logprobs_T: Tensor, **columns: Tensor) -> Tensor:
        return self.loss(logprobs_T, **{name: columns[name] for name in self.columns})


def bind(algorithm: AlgorithmConfig) -> BoundObjective:
    """The objective that a config asks for, its KL penalty included."""
    match algorithm.objective:
        case CispoObjective(mask_low_threshold=None, mask_high_threshold=None) as chosen:
            bounds = (chosen.clip_low_threshold, chosen.clip_high_threshold)
            loss = partial(cispo, clip_low_threshold=bounds[0], clip_high_threshold=bounds[1])
            columns: tuple[str, ...] = ("anchor_logprobs", "advantages")
        case CispoObjective() as chosen:
            loss = partial(
                unified,
                clip_low_threshold=chosen.clip_low_threshold,
                clip_high_threshold=chosen.clip_high_threshold,
                mask_low_threshold=0.0 if chosen.mask_low_threshold is None else chosen.mask_low_threshold,
                mask_high_threshold=math.inf if chosen.mask_high_threshold is None else chosen.mask_high_threshold,
            )
            columns = ("anchor_logprobs", "advantages")
        case PpoClipObjective() as chosen:
            loss = partial(
                ppo_clip,
                clip_low_threshold=chosen.clip_low_threshold,
                clip_high_threshold=chosen.clip_high_threshold,
                dual_clip=chosen.dual_clip,
            )
            columns = ("anchor_logprobs", "advantages")
        case ImportanceSamplingObjective():
            loss, columns = importance_sampling, ("anchor_logprobs", "advantages")
        case ReinforceObjective():
            loss, columns = reinforce, ("advantages",)
    if algorithm.kl is not None:
        loss = with_kl(loss, coef=algorithm.kl.coef, form=algorithm.kl.form)
        columns = (*columns, "reference_logprobs")
    return BoundObjective(loss, columns)
