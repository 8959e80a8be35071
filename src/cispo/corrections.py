"""Corrections for the mismatch between the policy that sampled and the one that trains: per-token weights.

The sampler's log-probs μ (`sampler_logprobs`) and the trainer's own of the same weights π_prox (`proximal_logprobs`)
should agree and do not: other kernels, other precision, stale weights. With `anchor: proximal` a correction's weights
multiply the per-token loss; with `anchor: sampler` the importance ratio already spans the whole way and a correction
would count it twice (config.py refuses that).

Every function is pure: flat log-probs over T positions, a bool `mask_T` of the trained ones and, where sequences
matter, the row `lengths` (summing to T). It returns a `Correction`: weights, 0 outside the mask, and statistics. Masked
positions may hold anything; they are replaced before any arithmetic. w = exp(π_prox − μ) at a token; the sequence ratio
is exp(Σ log w) ("product") or exp(mean log w) ("geometric"), two maths under one name among the peers.

Left out on purpose: the importance ratio of the objective itself (`objectives.py`), and when to recompute (`trainer.py`
computes corrections once per rollout; `opsm` and `negative_trust_mask`, which look at the current policy, per update).

    python -m pytest tests/test_corrections.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cispo import config as c
from cispo.types import ConfigError, NonFiniteError

SequenceRatio = Literal["product", "geometric"]
SequenceWeight = Literal["sequence", "token", "one"]


@dataclass(frozen=True)
class Correction:
    """weights_T: float, 0 at untrained positions.

    statistics, over trained positions: `weight_mean` after the correction (NeMo RL's sampling_importance_ratio),
    `ratio_max` and `ratio_min` before it, `out_of_band` (NeMo RL's is_oob_ratio: a share of tokens, or of sequences
    where a whole sequence is judged), `nonfinite` (a count, of tokens dropped on request).
    """

    weights_T: Tensor
    statistics: dict[str, float]


# ---------------------------------------------------------------------------------------------------------- by token


def importance(proximal_logprobs_T: Tensor, sampler_logprobs_T: Tensor, mask_T: Tensor, *, nonfinite="raise"):
    """w itself, unbounded: NeMo RL's `use_importance_sampling_correction` without truncation."""
    log_w_T, valid_T, dropped = _log_weights(proximal_logprobs_T, sampler_logprobs_T, mask_T, nonfinite)
    return _result(log_w_T.exp(), log_w_T, valid_T, 0.0, dropped)


def tis(
    proximal_logprobs_T: Tensor,
    sampler_logprobs_T: Tensor,
    mask_T: Tensor,
    *,
    low: float = 0.0,
    high: float = 2.0,
    nonfinite: str = "raise",
) -> Correction:
    """Truncated importance sampling: clamp(w, low, high).

    miles and slime (`--use-tis`, bounds 0 and 2), NeMo RL (`tis`), TRL and ms-swift (`token_truncate`).
    """
    _ordered(low, high)
    log_w_T, valid_T, dropped = _log_weights(proximal_logprobs_T, sampler_logprobs_T, mask_T, nonfinite)
    outside_T = (log_w_T < _log(low)) | (log_w_T > _log(high))
    return _result(log_w_T.clamp(_log(low), _log(high)).exp(), log_w_T, valid_T, _share(outside_T, valid_T), dropped)


def icepop(
    proximal_logprobs_T: Tensor,
    sampler_logprobs_T: Tensor,
    mask_T: Tensor,
    *,
    low: float = 0.5,
    high: float = 5.0,
    nonfinite: str = "raise",
) -> Correction:
    """w inside [low, high], 0 outside: IcePop (NeMo RL `icepop`, whose bounds these are; TRL `token_mask`)."""
    _ordered(low, high)
    log_w_T, valid_T, dropped = _log_weights(proximal_logprobs_T, sampler_logprobs_T, mask_T, nonfinite)
    outside_T = (log_w_T < _log(low)) | (log_w_T > _log(high))
    weights_T = log_w_T.exp().masked_fill(outside_T, 0.0)
    return _result(weights_T, log_w_T, valid_T, _share(outside_T, valid_T), dropped)


# ------------------------------------------------------------------------------------------------------- by sequence


def seq_mask_tis(
    proximal_logprobs_T: Tensor,
    sampler_logprobs_T: Tensor,
    mask_T: Tensor,
    lengths: Sequence[int],
    *,
    low: float = 0.999,
    high: float = 1.002,
    nonfinite: str = "raise",
) -> Correction:
    """Token weights w, and 0 for a whole sequence whose exp(mean log w) is outside [low, high]. NeMo RL `seq-mask-tis`.

    ms-swift's `sequence_mask` is the same with low 0. Defaults: NeMo RL's reference bounds.
    """
    return sequence_mask(
        proximal_logprobs_T,
        sampler_logprobs_T,
        mask_T,
        lengths,
        low=low,
        high=high,
        ratio="geometric",
        weight="token",
        nonfinite=nonfinite,
    )


def sequence_truncate(
    proximal_logprobs_T: Tensor,
    sampler_logprobs_T: Tensor,
    mask_T: Tensor,
    lengths: Sequence[int],
    *,
    low: float = 0.0,
    high: float = 2.0,
    ratio: SequenceRatio = "product",
    nonfinite: str = "raise",
) -> Correction:
    """One weight for a whole sequence: its ratio, clamped. TRL `sequence_truncate` (product), ms-swift (geometric)."""
    _ordered(low, high)
    log_w_T, valid_T, dropped = _log_weights(proximal_logprobs_T, sampler_logprobs_T, mask_T, nonfinite)
    rows_T, log_ratio_B, trained_B = _sequence_log_ratio(log_w_T, valid_T, lengths, ratio)
    outside_B = (log_ratio_B < _log(low)) | (log_ratio_B > _log(high))
    weights_T = log_ratio_B.clamp(_log(low), _log(high)).exp()[rows_T]
    return _result(weights_T, log_w_T, valid_T, _share(outside_B, trained_B), dropped)


def sequence_mask(
    proximal_logprobs_T: Tensor,
    sampler_logprobs_T: Tensor,
    mask_T: Tensor,
    lengths: Sequence[int],
    *,
    low: float = 0.0,
    high: float = 3.0,
    ratio: SequenceRatio = "product",
    weight: SequenceWeight = "sequence",
    nonfinite: str = "raise",
) -> Correction:
    """0 for a sequence whose ratio is outside [low, high]; inside, `weight`.

    TRL `sequence_mask`: product, the sequence's ratio. ms-swift `sequence_mask` and NeMo RL `seq-mask-tis`: geometric,
    each token's w. SkyRL `sequence_mask_metric`: either ratio, weight one.
    """
    _ordered(low, high)
    log_w_T, valid_T, dropped = _log_weights(proximal_logprobs_T, sampler_logprobs_T, mask_T, nonfinite)
    rows_T, log_ratio_B, trained_B = _sequence_log_ratio(log_w_T, valid_T, lengths, ratio)
    outside_B = (log_ratio_B < _log(low)) | (log_ratio_B > _log(high))
    inside_T = {"sequence": log_ratio_B[rows_T], "token": log_w_T, "one": torch.zeros_like(log_w_T)}[weight].exp()
    weights_T = inside_T.masked_fill(outside_B[rows_T], 0.0)
    return _result(weights_T, log_w_T, valid_T, _share(outside_B, trained_B), dropped)


# ------------------------------------------------------------------------- masks that look at the current policy too


def opsm(
    logprobs_T: Tensor,
    anchor_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    lengths: Sequence[int],
    *,
    delta: float,
) -> Correction:
    """Off-policy sequence masking: drop a token with A < 0 whose sequence has mean(log μ − log π) > delta.

    DeepSeek-V3.2 (arXiv:2512.02556) eq. 9; miles `--use-opsm`, TRL `off_policy_mask_threshold`, ms-swift
    `off_policy_sequence_mask_delta`. `out_of_band` is the share of sequences with a dropped token.
    """
    log_w_T, valid_T, dropped = _log_weights(logprobs_T.detach(), anchor_logprobs_T, mask_T, "raise")
    rows_T, log_ratio_B, trained_B = _sequence_log_ratio(log_w_T, valid_T, lengths, "geometric")
    advantages_T = advantages_T.masked_fill(~valid_T, 0.0)
    drop_T = (advantages_T < 0) & (-log_ratio_B > delta)[rows_T]
    dropped_B = torch.zeros_like(trained_B).index_put((rows_T[drop_T],), torch.ones_like(drop_T[drop_T]))
    weights_T = (~drop_T).to(log_w_T.dtype)
    return _result(weights_T, log_w_T, valid_T, _share(dropped_B, trained_B), dropped)


def negative_trust_mask(
    logprobs_T: Tensor, sampler_logprobs_T: Tensor, advantages_T: Tensor, mask_T: Tensor, *, delta: float
) -> Correction:
    """Drop a token with A < 0 whose probability has fallen by delta or more: μ − π ≥ delta.

    DPPO's trust region (arXiv:2602.04879, total variation of the sampled token) on the negative side only, with which
    CISPO stayed stable there (delta 0.5).
    """
    log_w_T, valid_T, dropped = _log_weights(logprobs_T.detach(), sampler_logprobs_T, mask_T, "raise")
    fallen_T = _masked(sampler_logprobs_T, mask_T).exp() - _masked(logprobs_T.detach(), mask_T).exp()
    drop_T = (advantages_T.masked_fill(~valid_T, 0.0) < 0) & (fallen_T >= delta)
    return _result((~drop_T).to(log_w_T.dtype), log_w_T, valid_T, _share(drop_T, valid_T), dropped)


# -------------------------------------------------------------------------------------------------- by configuration


def compute(
    correction: c.CorrectionConfig,
    proximal_logprobs_T: Tensor,
    sampler_logprobs_T: Tensor,
    mask_T: Tensor,
    lengths: Sequence[int],
    *,
    nonfinite: str = "raise",
) -> Correction:
    """The correction that a config section describes. Raises NonFiniteError, or drops and counts on request."""
    values = (proximal_logprobs_T, sampler_logprobs_T, mask_T)
    options = {name: value for name, value in correction.model_dump().items() if name != "type"}
    match correction:
        case c.ImportanceCorrection():
            return importance(*values, nonfinite=nonfinite)
        case c.TisCorrection():
            return tis(*values, **options, nonfinite=nonfinite)
        case c.IcePopCorrection():
            return icepop(*values, **options, nonfinite=nonfinite)
        case c.SeqMaskTisCorrection():
            return seq_mask_tis(*values, lengths, **options, nonfinite=nonfinite)
        case c.SequenceTruncateCorrection():
            return sequence_truncate(*values, lengths, **options, nonfinite=nonfinite)
        case c.SequenceMaskCorrection():
            return sequence_mask(*values, lengths, **options, nonfinite=nonfinite)
    raise ConfigError(f"algorithm.correction: {correction!r} is not a correction; see config.CorrectionConfig")


def mismatch(proximal_logprobs_T: Tensor, sampler_logprobs_T: Tensor, mask_T: Tensor) -> dict[str, float]:
    """How far sampler and trainer disagree: means over trained tokens, as NeMo RL's `ClippedPGLossFn` reports them.

    token_mult_prob_error = mean exp|μ − π|; gen_kl_error and policy_kl_error, k3 of KL(μ‖π) and KL(π‖μ);
    js_divergence_error, the Jensen-Shannon divergence by k3 to the mixture. Empty without trained tokens.
    """
    if not mask_T.any():
        return {}
    policy_N, sampler_N = proximal_logprobs_T[mask_T].double(), sampler_logprobs_T[mask_T].double()
    delta_N = policy_N - sampler_N
    mixture_N = torch.logaddexp(policy_N, sampler_N) - math.log(2)

    def k3(log_ratio_N: Tensor) -> Tensor:
        return torch.expm1(log_ratio_N) - log_ratio_N

    means = {
        "token_mult_prob_error": delta_N.abs().exp(),
        "gen_kl_error": k3(delta_N),
        "policy_kl_error": k3(-delta_N),
        "js_divergence_error": 0.5 * (k3(policy_N - mixture_N) + k3(sampler_N - mixture_N)),
    }
    return {name: float(values_N.mean()) for name, values_N in means.items()}


# ----------------------------------------------------------------------------------------------------------- helpers


def _masked(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """float32 (or 64) values with 0 where masked, so that -inf and NaN there reach no arithmetic."""
    wide_T = values_T if values_T.dtype == torch.float64 else values_T.float()
    return wide_T.masked_fill(~mask_T, 0.0)


def _log_weights(
    logprobs_T: Tensor, sampler_logprobs_T: Tensor, mask_T: Tensor, nonfinite: str
) -> tuple[Tensor, Tensor, int]:
    """(log w, valid positions, tokens dropped). A non-finite trained token raises, or is dropped on request."""
    if mask_T.dtype != torch.bool:
        raise TypeError(f"mask_T has dtype {mask_T.dtype}; it must be bool")
    log_w_T = _masked(logprobs_T, mask_T) - _masked(sampler_logprobs_T, mask_T)
    bad_T = ~log_w_T.exp().isfinite() | ~log_w_T.isfinite()
    if not bad_T.any():
        return log_w_T, mask_T, 0
    if nonfinite != "drop":
        position = int(bad_T.nonzero()[0])
        raise NonFiniteError(
            f"correction weight at position {position}: log π = {float(logprobs_T[position])}, log μ = "
            f"{float(sampler_logprobs_T[position])}; set algorithm.nonfinite: drop to drop such tokens and count them"
        )
    return log_w_T.masked_fill(bad_T, 0.0), mask_T & ~bad_T, int(bad_T.sum())


def _sequence_log_ratio(
    log_w_T: Tensor, valid_T: Tensor, lengths: Sequence[int], ratio: SequenceRatio
) -> tuple[Tensor, Tensor, Tensor]:
    """(row of each position, log ratio of each row, rows with a trained token)."""
    lengths_B = torch.tensor(lengths, dtype=torch.long, device=log_w_T.device)
    if int(lengths_B.sum()) != len(log_w_T):
        raise ValueError(f"lengths sum to {int(lengths_B.sum())}, but there are {len(log_w_T)} positions")
    rows_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=log_w_T.device), lengths_B)
    zeros_B = log_w_T.new_zeros(len(lengths_B))
    log_ratio_B = zeros_B.index_add(0, rows_T, log_w_T.masked_fill(~valid_T, 0.0))
    count_B = zeros_B.index_add(0, rows_T, valid_T.to(log_w_T.dtype))
    if ratio == "geometric":
        log_ratio_B = log_ratio_B / count_B.clamp_min(1)
    return rows_T, log_ratio_B, count_B > 0


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _share(flags: Tensor, among: Tensor) -> float:
    return float((flags & among).sum() / among.sum().clamp_min(1))


def _ordered(low: float, high: float) -> None:
    if not 0 <= low <= high or high == 0:
        raise ConfigError(f"low = {low:g}, high = {high:g}: bounds on a ratio need 0 <= low <= high and high > 0")


def _result(weights_T: Tensor, log_w_T: Tensor, valid_T: Tensor, out_of_band: float, dropped: int) -> Correction:
    weights_T = weights_T.detach().masked_fill(~valid_T, 0.0)
    statistics = {"out_of_band": out_of_band, "nonfinite": float(dropped)}
    if valid_T.any():
        raw_N = log_w_T[valid_T]
        statistics |= {
            "weight_mean": float(weights_T[valid_T].double().mean()),
            "ratio_max": float(raw_N.max().exp()),
            "ratio_min": float(raw_N.min().exp()),
        }
    return Correction(weights_T, statistics)
