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

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cispo.config import (
    AlgorithmConfig,
    CispoObjective,
    DroObjective,
    FunctionObjective,
    GspoObjective,
    ImportanceSamplingObjective,
    KLConfig,
    ObjectiveConfig,
    PpoClipObjective,
    ReinforceObjective,
    SapoObjective,
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


def cispo_by_sign(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    positive_bounds: tuple[float, float],
    negative_bounds: tuple[float, float],
) -> Tensor:
    """CISPO with bounds of their own for A < 0: four thresholds. DISPO (arXiv:2602.00983)."""
    low, high = (
        torch.where(advantages < 0, negative, positive) for negative, positive in zip(negative_bounds, positive_bounds)
    )
    ratio = _log_ratio(logprobs, anchor_logprobs).detach().exp()
    return -torch.clamp(ratio, low, high) * advantages.detach() * _wide(logprobs)


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


def sapo(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    positive_temperature: float = 1.0,
    negative_temperature: float = 1.05,
) -> Tensor:
    """Soft adaptive policy optimization: −4/τ · σ(τ(r − 1)) · A, τ by the sign of A (arXiv:2511.20347 eq. 5–6)."""
    temperature = torch.where(advantages > 0, positive_temperature, negative_temperature)
    ratio = _log_ratio(logprobs, anchor_logprobs).exp()
    return -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages.detach()


# --------------------------------------------------------------------------------------------------- whole sequences


def gspo(
    logprobs: Tensor,
    *,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    rows: Tensor,
    clip_low_threshold: float = 1 - 3e-4,
    clip_high_threshold: float = 1 + 4e-4,
) -> Tensor:
    """Group sequence policy optimization: −min(s·A, clip(s, low, high)·A) with s = exp(mean log r) of the sequence.

    arXiv:2507.18071 eq. 5–7. Each token carries its sequence's loss, so that the `sequence` reduction gives eq. 5.
    rows: integer valued, which sequence a token is of. Sequence-level: needs all of a row's trained tokens at once.
    """
    log_ratio = _log_ratio(logprobs, anchor_logprobs)
    ratio = sequence_mean(log_ratio, rows).exp()
    A = _wide(advantages.detach())
    return -torch.minimum(ratio * A, torch.clamp(ratio, clip_low_threshold, clip_high_threshold) * A)


gspo.sequence_level = True


def sequence_mean(values: Tensor, rows: Tensor) -> Tensor:
    """Each token's value replaced by the mean over its row, differentiable."""
    _, index = torch.unique(rows, return_inverse=True)
    count = torch.bincount(index)
    total = values.new_zeros(len(count)).index_add(0, index, values)
    return (total / count)[index]


def is_sequence_level(objective: Callable[..., Tensor]) -> bool:
    """Whether a token's loss depends on its whole sequence, so that the head takes two passes."""
    inner = objective
    while isinstance(inner, partial):
        inner = inner.func
    return getattr(inner, "sequence_level", False)


# -------------------------------------------------------------------------------------- weights on another objective


def with_weights(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`objective` times one more column, `correction_weights` (see `corrections.py`); 0 drops the token."""

    def weighted(logprobs: Tensor, *, correction_weights: Tensor, **columns: Tensor) -> Tensor:
        return _kept(objective(logprobs, **columns), correction_weights)

    weighted.sequence_level = is_sequence_level(objective)
    return weighted


def with_trust_mask(objective: BoundObjective, *, delta: float) -> Callable[..., Tensor]:
    """`objective` without the tokens with A < 0 whose probability fell by `delta` or more since sampling.

    DPPO's mask (arXiv:2602.04879) on the negative side, by one more column, `sampler_logprobs`. Token-local.
    """

    def masked(logprobs: Tensor, *, sampler_logprobs: Tensor, advantages: Tensor, **columns: Tensor) -> Tensor:
        fallen = sampler_logprobs.exp() - _wide(logprobs.detach()).exp()
        loss = objective(logprobs, sampler_logprobs=sampler_logprobs, advantages=advantages, **columns)
        return torch.where((advantages < 0) & (fallen >= delta), 0.0, loss)

    masked.sequence_level = is_sequence_level(objective)
    return masked


def with_opsm(objective: BoundObjective, *, delta: float) -> Callable[..., Tensor]:
    """`objective` without the tokens with A < 0 of sequences with mean(log μ − log π) above `delta`.

    Off-policy sequence masking of DeepSeek-V3.2 (arXiv:2512.02556 eq. 9), against the current policy at every update,
    as miles and TRL have it. Sequence-level: reads `rows`.
    """

    def masked(
        logprobs: Tensor, *, anchor_logprobs: Tensor, advantages: Tensor, rows: Tensor, **columns: Tensor
    ) -> Tensor:
        kl = sequence_mean(anchor_logprobs - _wide(logprobs.detach()), rows)
        loss = objective(logprobs, anchor_logprobs=anchor_logprobs, advantages=advantages, rows=rows, **columns)
        return torch.where((advantages < 0) & (kl > delta), 0.0, loss)

    masked.sequence_level = True
    return masked


def _kept(loss: Tensor, weights: Tensor) -> Tensor:
    """weights · loss, exactly 0 with a zero gradient where the weight is 0, whatever the loss holds there."""
    weights = weights.detach()
    return torch.where(weights == 0, 0.0, weights * loss)


# ------------------------------------------------------------------------------------------------- KL to a reference


def kl_estimate(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    form: KLForm = "k3",
    *,
    input_clamp: float | None = None,
    output_clamp: float | None = None,
    score_gradient: bool = False,
    ratio: Tensor | None = None,
) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from tokens sampled by π, differentiable in `logprobs`.

    With ℓ = log π_ref − log π: k1 = −ℓ, k2 = ℓ²/2, k3 = exp(ℓ) − 1 − ℓ (Schulman, joschu.net/blog/kl-approx.html).
    `input_clamp` bounds |ℓ| and `output_clamp` the estimate's magnitude; NeMo RL uses 20 and 10. A clamped token has
    no KL gradient. `score_gradient` adds the gradient KL·∇log π of the sampling distribution and no value, before the
    output clamp and not at tokens whose input was clamped, as NeMo RL has it (arXiv:2506.09477). `ratio` multiplies
    the estimate, with its gradient, before the output clamp (DeepSeek-V3.2, arXiv:2512.02556; TRL, miles).

    Raises ConfigError for an unknown form.
    """
    log_ratio = reference_logprobs.detach() - _wide(logprobs)
    score = torch.exp(_wide(logprobs) - _wide(logprobs).detach()) if score_gradient else None
    if input_clamp is not None:
        clamped = log_ratio.clamp(-input_clamp, input_clamp)
        if score is not None:
            score = torch.where(log_ratio == clamped, score, score.detach())
        log_ratio = clamped
    match form:
        case "k1":
            kl = -log_ratio
        case "k2":
            kl = 0.5 * log_ratio.square()
        case "k3":
            kl = torch.expm1(log_ratio) - log_ratio
        case _:
            raise ConfigError(f"form = {form!r}: not a KL estimator; use 'k1', 'k2' or 'k3'")
    if score is not None:
        kl = score * kl
    if ratio is not None:
        kl = ratio * kl
    return kl if output_clamp is None else kl.clamp(-output_clamp, output_clamp)


def with_kl(
    objective: Callable[..., Tensor],
    *,
    coef: float,
    form: KLForm = "k3",
    input_clamp: float | None = None,
    output_clamp: float | None = None,
    score_gradient: bool = False,
    ratio_weighted: bool = False,
) -> Callable[..., Tensor]:
    """`objective` plus coef · `kl_estimate`, reading one more column, `reference_logprobs`. Still token-local.

    ratio_weighted: the estimate times π/`anchor_logprobs`, a column that is then passed on to `objective` too.
    """

    def penalised(logprobs: Tensor, *, reference_logprobs: Tensor, **columns: Tensor) -> Tensor:
        ratio = _log_ratio(logprobs, columns["anchor_logprobs"]).exp() if ratio_weighted else None
        kl = kl_estimate(
            logprobs,
            reference_logprobs,
            form,
            input_clamp=input_clamp,
            output_clamp=output_clamp,
            score_gradient=score_gradient,
            ratio=ratio,
        )
        return objective(logprobs, **columns) + coef * kl

    penalised.sequence_level = is_sequence_level(objective)
    return penalised


def reward_penalty(proximal_logprobs: Tensor, reference_logprobs: Tensor, kl: KLConfig) -> Tensor:
    """coef · KL per token at the proximal policy, to subtract from the advantages (`algorithm.kl.place: reward`)."""
    estimate = kl_estimate(
        proximal_logprobs.detach(),
        reference_logprobs,
        kl.form,
        input_clamp=kl.input_clamp,
        output_clamp=kl.output_clamp,
    )
    return kl.coef * estimate


# ------------------------------------------------------------------------------------------------------ from a config


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its options fixed, and the columns it reads of those it is given.

    sequence_level: a token's loss depends on its row's other tokens, and one of the columns is `rows`.
    """

    loss: Objective
    columns: tuple[str, ...]
    sequence_level: bool = False
    source: AlgorithmConfig | None = None

    def __reduce__(self) -> Any:
        """Another process binds the same config again, because closures cannot travel."""
        return (bind, (self.source,)) if self.source is not None else super().__reduce__()

    def __call__(self, logprobs_T: Tensor, **columns: Tensor) -> Tensor:
        return self.loss(logprobs_T, **{name: columns[name] for name in self.columns})


def bind(algorithm: AlgorithmConfig) -> BoundObjective:
    """The objective that a config asks for, with its masks, correction weights and KL penalty, in that order.

    The order is miles': masks, mismatch weights, then the KL, which they do not touch. Columns besides anchor_logprobs
    and advantages are asked for only where something reads them: `sampler_logprobs` (trust mask), `rows` (whole
    sequences), `correction_weights`, `reference_logprobs`.

    Raises ConfigError where a user's own function does not import.
    """
    bound = _bind_objective(algorithm.objective)
    if algorithm.trust_mask_delta is not None:
        mask = with_trust_mask(bound, delta=algorithm.trust_mask_delta)
        bound = _wrap(mask, bound, "sampler_logprobs", "advantages")
    if algorithm.opsm_delta is not None:
        mask = with_opsm(bound, delta=algorithm.opsm_delta)
        bound = _wrap(mask, bound, "anchor_logprobs", "advantages", "rows")
    if algorithm.correction is not None:
        bound = _wrap(with_weights(bound), bound, "correction_weights")
    if algorithm.kl is not None and algorithm.kl.place == "loss":
        options = algorithm.kl.model_dump(exclude={"place"})
        anchor = ("anchor_logprobs",) if algorithm.kl.ratio_weighted else ()
        bound = _wrap(with_kl(bound, **options), bound, "reference_logprobs", *anchor)
    return replace(bound, source=algorithm)


def _wrap(loss: Objective, inner: BoundObjective, *columns: str) -> BoundObjective:
    return BoundObjective(loss, tuple(dict.fromkeys((*inner.columns, *columns))), is_sequence_level(loss))


def _bind_objective(objective: ObjectiveConfig) -> BoundObjective:
    options = objective.model_dump(exclude={"type"})
    anchored = ("anchor_logprobs", "advantages")
    match objective:
        case CispoObjective(mask_low_threshold=None, mask_high_threshold=None) if objective.negative_bounds != (
            positive := (objective.clip_low_threshold, objective.clip_high_threshold)
        ):
            loss = partial(cispo_by_sign, positive_bounds=positive, negative_bounds=objective.negative_bounds)
            return BoundObjective(loss, anchored)
        case CispoObjective(mask_low_threshold=None, mask_high_threshold=None):
            bounds = {name: options[name] for name in ("clip_low_threshold", "clip_high_threshold")}
            return BoundObjective(partial(cispo, **bounds), anchored)
        case CispoObjective():
            options = objective.model_dump(exclude={"type"}, exclude_none=True)  # None: the mask never fires
            return BoundObjective(partial(unified, **options), anchored)
        case PpoClipObjective():
            return BoundObjective(partial(ppo_clip, **options), anchored)
        case ImportanceSamplingObjective():
            return BoundObjective(importance_sampling, anchored)
        case ReinforceObjective():
            return BoundObjective(reinforce, ("advantages",))
        case GspoObjective():
            return BoundObjective(partial(gspo, **options), (*anchored, "rows"), sequence_level=True)
        case DroObjective():
            return BoundObjective(partial(dro, **options), anchored)
        case SapoObjective():
            return BoundObjective(partial(sapo, **options), anchored)
        case FunctionObjective():
            columns = objective.columns + (("rows",) if objective.sequence_level else ())
            loss = partial(_imported(objective.path), **objective.options)
            return BoundObjective(loss, tuple(dict.fromkeys(columns)), objective.sequence_level)
    raise ConfigError(f"algorithm.objective: {objective!r} is not an objective")


def _imported(path: str) -> Objective:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"algorithm.objective.path: {path!r} does not import: {error}") from error
    if not callable(function):
        raise ConfigError(f"algorithm.objective.path: {path!r} is a {type(function).__name__}, not a function")
    return function
