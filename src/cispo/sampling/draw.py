"""From logits to tokens: counter-based uniforms, tempering, truncation, and the inverse-CDF draw.

Everything is a function of its arguments, row by row: no generator is advanced, so a row draws the same token whatever
stands beside it in the batch, and nothing has to be saved to continue after a restart. Left out on purpose: penalties
and logit biases, which would make the sampled policy another one than the trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_BLOCK_V = 512  # vocabularies beyond two of these are summed by block first, and only the drawn block is scanned
_HEAD_V = 2048  # how many of the largest probabilities top-p looks at before it sorts the whole vocabulary


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)


def _wide(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def _shift_right(x_B: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic, and drags the sign bit along."""
    return (x_B >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x_B: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014) on int64, whose product wraps like uint64's."""
    x_B = (x_B ^ _shift_right(x_B, 30)) * _signed(_MIX1)
    x_B = (x_B ^ _shift_right(x_B, 27)) * _signed(_MIX2)
    return x_B ^ _shift_right(x_B, 31)


def row_seed(seed: int, sample: int) -> int:
    """The stream of one sample of one request, as an int64. Any integer is a seed; it is reduced mod 2**64."""
    stream = _mix_int((seed + _GOLDEN) & _MASK64)
    return _signed(_mix_int((stream + (sample + 1) * _GOLDEN) & _MASK64))


def row_seeds(seeds: Sequence[int], samples: Sequence[int]) -> Tensor:
    """`row_seed` of many rows: int64 [B]."""
    streams_B = torch.tensor([_signed((seed + _GOLDEN) & _MASK64) for seed in seeds], dtype=torch.int64)
    return _mix(_mix(streams_B) + (torch.tensor(samples, dtype=torch.int64) + 1) * _signed(_GOLDEN))


def uniforms(seeds_B: Tensor, counters_B: Tensor) -> Tensor:
    """One uniform in [0, 1) per row: SplitMix64's output number `counter` of the stream `seed` (both int64 [B]).

    float64 with 53 random bits; float32 with 24 on devices without float64.
    """
    bits_B = _mix(seeds_B + (counters_B + 1) * _signed(_GOLDEN))
    if _wide(seeds_B.device) == torch.float32:
        return _shift_right(bits_B, 40).to(torch.float32) * 2.0**-24
    return _shift_right(bits_B, 11).to(torch.float64) * 2.0**-53


@dataclass(frozen=True)
class Filters:
    """The rows that truncate their distribution, and how. F rows; the plain facts save the device a question.

    rows_F: their indices in the batch. top_k_F: int64, 0 for all tokens. top_p_F, min_p_F: 1 and 0 for none.
    most: max(top_k). every: whether every row has a top_k. ordered: whether any row has top_k or top_p.
    """

    rows_F: Tensor
    top_k_F: Tensor
    top_p_F: Tensor
    min_p_F: Tensor
    most: int
    every: bool
    ordered: bool

    @classmethod
    def of(
        cls, rows: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray, device: torch.device
    ) -> Filters:
        wide = _wide(device)
        return cls(
            rows_F=torch.from_numpy(rows).to(device),
            top_k_F=torch.from_numpy(top_k).to(device),
            top_p_F=torch.from_numpy(top_p).to(wide).to(device),
            min_p_F=torch.from_numpy(min_p).to(wide).to(device),
            most=int(top_k.max()),
            every=bool((top_k > 0).all()),
            ordered=bool((top_k > 0).any() or (top_p < 1).any()),
        )


def draw(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    greedy_B: Tensor | None = None,
    filters: Filters | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row. Returns tokens int64 [B] and their log-probs float32 [B].

    The log-prob is that of softmax(logits / temperature) *before* truncation, because that is the policy that the
    trainer recomputes. A greedy row takes the largest logit; pass temperature 1 for it, and its log-prob is then of the
    untempered distribution. A row whose logits hold NaN or +inf gets a log-prob that is not finite: the caller's to
    refuse.
    """
    logprobs_BV = _temper(logits_BV, temperature).log_softmax(-1)
    probs_BV = logprobs_BV.exp()
    if filters is not None:
        probs_BV[filters.rows_F] = truncate(probs_BV[filters.rows_F], filters)
    tokens_B = inverse_cdf(probs_BV, uniforms_B)
    if greedy_B is not None:
        tokens_B = torch.where(greedy_B, logits_BV.argmax(-1), tokens_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


def _temper(logits_BV: Tensor, temperature: float | Tensor) -> Tensor:
    logits_BV = logits_BV.float()
    if isinstance(temperature, Tensor):
        return logits_BV / temperature[:, None]
    return logits_BV if temperature == 1.0 else logits_BV / temperature


def truncate(probs_FV: Tensor, filters: Filters) -> Tensor:
    """Zero the tokens outside top-k, then outside the smallest nucleus of mass top_p of what is left, then below
    min_p times the largest probability (the order of `transformers`' logits processors). Not renormalised.

    Each filter is a smallest kept *probability*, so tokens tied at the edge are all kept, and the outcome does not
    depend on the order in which a sort happens to put them.
    """
    V = probs_FV.shape[1]
    wide, V = _wide(probs_FV.device), probs_FV.shape[1]
    least_F = probs_FV.amax(-1).to(wide) * filters.min_p_F
    if filters.ordered:
        K = min(filters.most if filters.every else max(filters.most, _HEAD_V), V)
        largest_FK = probs_FV.topk(K, -1).values
        if not filters.every and K < V:
            # The head of a row without top-k may not hold its nucleus (a nearly flat policy): only then sort it all.
            short_F = (filters.top_k_F == 0) & (filters.top_p_F < 1)
            short_F &= largest_FK.sum(-1, dtype=wide) < filters.top_p_F
            if bool(short_F.any()):
                K, largest_FK = V, probs_FV.sort(-1, descending=True).values
        largest_FK = largest_FK.to(wide)
        rank_K = torch.arange(K, device=probs_FV.device)
        kept_FK = torch.where(filters.top_k_F > 0, filters.top_k_F, V)[:, None] > rank_K
        mass_FK = torch.where(kept_FK, largest_FK, 0).cumsum(-1)
        # Without top-k the whole mass is 1 by definition, however few of the largest were looked at.
        whole_F = torch.where(filters.top_k_F > 0, mass_FK[:, -1], 1)
        nucleus_FK = mass_FK - largest_FK < (filters.top_p_F * whole_F)[:, None]
        kept_FK &= nucleus_FK | (filters.top_p_F >= 1)[:, None]
        edge_F = largest_FK.gather(1, (kept_FK.sum(-1, keepdim=True) - 1).clamp(min=0))[:, 0]
        truncated_F = (filters.top_k_F > 0) | (filters.top_p_F < 1)
        least_F = torch.maximum(least_F, torch.where(truncated_F, edge_F, 0))
    return torch.where(probs_FV >= least_F.to(probs_FV.dtype)[:, None], probs_FV, 0)


def inverse_cdf(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token whose cumulative mass exceeds `uniform · total`: int64 [B]. Rows need not be normalised.

    Sums run in the uniforms' dtype (float64), so that a tail of 10⁵ tiny probabilities is drawn as often as it should.
    A token of probability 0 is never drawn: u < 1 puts the target strictly below the total, and the search is strict.
    """
    wide, V = uniforms_B.dtype, probs_BV.shape[1]
    if V <= 2 * _BLOCK_V:
        cdf_BV = probs_BV.cumsum(-1, dtype=wide)
        return _search(cdf_BV, uniforms_B * cdf_BV[:, -1])
    whole = V // _BLOCK_V * _BLOCK_V
    mass_BN = probs_BV[:, :whole].unflatten(1, (-1, _BLOCK_V)).sum(-1, dtype=wide)
    if whole < V:
        mass_BN = torch.cat([mass_BN, probs_BV[:, whole:].sum(-1, keepdim=True, dtype=wide)], 1)
    cdf_BN = mass_BN.cumsum(-1)
    target_B = uniforms_B * cdf_BN[:, -1]
    block_B = _search(cdf_BN, target_B)
    before_BN = torch.nn.functional.pad(cdf_BN, (1, 0))
    target_B = target_B - before_BN.gather(1, block_B[:, None])[:, 0]
    tokens_BW = block_B[:, None] * _BLOCK_V + torch.arange(_BLOCK_V, device=probs_BV.device)
    within_BW = probs_BV.gather(1, tokens_BW.clamp(max=V - 1)).where(tokens_BW < V, 0).cumsum(-1, dtype=wide)
    # The block's mass was summed in another order: keep the target below what the scan adds up to.
    target_B = torch.minimum(target_B, within_BW[:, -1].nextafter(torch.zeros_like(target_B)))
    return block_B * _BLOCK_V + _search(within_BW, target_B)


def _search(cdf_BN: Tensor, target_B: Tensor) -> Tensor:
    index_B = torch.searchsorted(cdf_BN, target_B[:, None], right=True)[:, 0]
    return index_B.clamp(max=cdf_BN.shape[1] - 1)  # only a row with NaN in it ever reaches the clamp
