"""The head where no rank has all of it: its rows (tokens of the vocabulary) are spread over a process group.

The weight stays where it is and hidden states travel. In chunks, every rank gets all ranks' hidden states, multiplies
its rows of the vocabulary, and three numbers per token are added up: the sum of exponentials, the target's logit, and
what the entropy needs. Backward computes the logits again (four products in all); a rank's weight gradient is then
complete, because it has seen everybody's tokens, and the hidden states' are added up and handed back.

Products are in float32. Left out on purpose: a head small enough to be gathered (`chunked.py` is quicker on it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cispo.head.api import LinearPolicyLoss
from cispo.types import NonFiniteError, Objective

MEMORY_BUDGET = 256 << 20
"""Bytes of logits on each rank at a time."""


def vocabulary_logprobs(
    hidden_TD: Tensor,
    head_UD: Tensor,
    targets_T: Tensor,
    *,
    vocabulary: int,
    group: dist.ProcessGroup,
    bias_U: Tensor | None = None,
    temperature: float = 1.0,
    memory_budget: int = MEMORY_BUDGET,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy, float32 [T], both differentiable. A collective: every rank must call it.

    hidden_TD: this rank's tokens, as many as it has. head_UD: its rows of the head's `vocabulary`, split as
    `torch.chunk` does (a last rank may have fewer, or none). A target outside the vocabulary counts as logit 0.
    """
    return _Logprobs.apply(hidden_TD, head_UD, bias_U, targets_T, vocabulary, group, temperature, memory_budget)


# torch 2.13 has renamed these two.
all_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_rows = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Pass:
    """One pass over all ranks' tokens, C of each rank at a time."""

    def __init__(self, hidden_TD: Tensor, head_UD: Tensor, bias_U: Tensor | None, targets_T: Tensor, options: tuple):
        vocabulary, self.group, self.temperature, memory_budget = options
        self.hidden_TD, self.targets_T = hidden_TD.detach(), targets_T
        self.head_UD = head_UD.detach().float()
        self.bias_U = None if bias_U is None else bias_U.detach().float()
        ranks, rank = self.group.size(), self.group.rank()
        self.first = rank * math.ceil(vocabulary / ranks)
        most = torch.tensor([len(hidden_TD)], device=hidden_TD.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        self.C = max(1, min(int(most), memory_budget // (3 * 4 * vocabulary)))
        self.most = int(most)

    def chunks(self) -> Iterator[slice]:
        return (slice(i, i + self.C) for i in range(0, self.most, self.C))

    def gathered(self, values: Tensor, chunk: slice) -> Tensor:
        """All ranks' rows of this chunk, zeros where a rank has fewer."""
        own = values[chunk]
        if len(own) < self.C:
            own = torch.cat([own, own.new_zeros((self.C - len(own), *own.shape[1:]))])
        whole = own.new_empty((self.C * self.group.size(), *own.shape[1:]))
        all_gather_rows(whole, own.contiguous(), group=self.group)
        return whole

    def own(self, whole: Tensor, chunk: slice) -> Tensor:
        start = self.group.rank() * self.C
        return whole[..., start : start + len(self.targets_T[chunk])]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        logits_NU = hidden_ND.float() @ self.head_UD.T
        return (logits_NU if self.bias_U is None else logits_NU + self.bias_U) / self.temperature

    def placed(self, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are of this rank's rows, and their columns here."""
        columns_N = targets_N - self.first
        here_N = (columns_N >= 0) & (columns_N < len(self.head_UD))
        return here_N.nonzero().squeeze(1), columns_N[here_N]


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_UD: Tensor, bias_U: Tensor | None, targets_T: Tensor, *options: Any):
        run = _Pass(hidden_TD, head_UD, bias_U, targets_T, options)
        logp_T, entropy_T, lse_T = hidden_TD.new_empty((3, len(targets_T)), dtype=torch.float32)
        for chunk in run.chunks():
            logits_NU = run.logits(run.gathered(run.hidden_TD, chunk))
            max_N = torch.cat([logits_NU, logits_NU.new_full((len(logits_NU), 1), -torch.inf)], 1).amax(1)
            dist.all_reduce(max_N, dist.ReduceOp.MAX, group=run.group)
            exp_NU = (logits_NU - max_N[:, None]).exp()
            sums_3N = logits_NU.new_zeros((3, len(logits_NU)))
            sums_3N[0] = exp_NU.sum(1)
            rows, columns = run.placed(run.gathered(run.targets_T, chunk))
            sums_3N[1, rows] = logits_NU[rows, columns]
            sums_3N[2] = torch.special.xlogy(exp_NU, exp_NU).sum(1)
            dist.all_reduce(sums_3N, group=run.group)
            log_sum_N = sums_3N[0].log()
            logp_T[chunk] = run.own(sums_3N[1] - max_N - log_sum_N, chunk)
            entropy_T[chunk] = run.own(log_sum_N - sums_3N[2] / sums_3N[0], chunk)
            lse_T[chunk] = run.own(max_N + log_sum_N, chunk)
        ctx.save_for_backward(hidden_TD, head_UD, bias_U, targets_T, lse_T, entropy_T)
        ctx.options = options
        return logp_T, entropy_T

    @staticmethod
    def backward(ctx: Any, dlogp_T: Tensor, dentropy_T: Tensor):
        hidden_TD, head_UD, bias_U, targets_T, lse_T, entropy_T = ctx.saved_tensors
        run = _Pass(hidden_TD, head_UD, bias_U, targets_T, ctx.options)
        dhidden_TD = torch.zeros_like(hidden_TD)
        dhead_UD = torch.zeros_like(run.head_UD)
        dbias_U = None if bias_U is None else torch.zeros_like(run.bias_U)
        columns_T4 = torch.stack([lse_T, entropy_T, dlogp_T, dentropy_T], 1)
        for chunk in run.chunks():
            hidden_ND = run.gathered(run.hidden_TD, chunk).float()
            lse_N, entropy_N, dlogp_N, dentropy_N = run.gathered(columns_T4, chunk).unbind(1)
            log_p_NU = run.logits(hidden_ND) - lse_N[:, None]
            p_NU = log_p_NU.exp()
            d_NU = p_NU * (-dlogp_N - dentropy_N * entropy_N)[:, None]
            d_NU -= dentropy_N[:, None] * torch.special.xlogy(p_NU, p_NU)
            rows, columns = run.placed(run.gathered(run.targets_T, chunk))
            d_NU[rows, columns] += dlogp_N[rows]
            # A row without a gradient may hold anything (0 · inf is NaN).
            d_NU = torch.where(((dlogp_N == 0) & (dentropy_N == 0))[:, None], 0.0, d_NU) / run.temperature
            dhead_UD += d_NU.T @ hidden_ND
            if dbias_U is not None:
                dbias_U += d_NU.sum(0)
            dhidden_CD = hidden_ND.new_empty((run.C, hidden_ND.shape[1]))
            reduce_scatter_rows(dhidden_CD, d_NU @ run.head_UD, group=run.group)
            dhidden_TD[chunk] = dhidden_CD[: len(targets_T[chunk])].to(dhidden_TD.dtype)
        dbias_U = None if bias_U is None else dbias_U.to(bias_U.dtype)
        return dhidden_TD, dhead_UD.to(head_UD.dtype), dbias_U, *(None,) * 5


def token_loss(
    objective: Objective,
    logprobs_T: Tensor,
    entropy_T: Tensor,
    *,
    columns: Mapping[str, Tensor],
    weights_T: Tensor,
    nonfinite: str,
    entropy_coef: float,
) -> LinearPolicyLoss:
    """Σ weights·(objective − entropy_coef·entropy) of a token-local objective, from differentiable log-probs.

    What is not finite at a token raises NonFiniteError, or the token is dropped, as in `linear_policy_loss`.
    """
    leaf_T = logprobs_T.detach().requires_grad_()
    with torch.enable_grad():
        loss_T = objective(leaf_T, **columns)
        (coef_T,) = torch.autograd.grad(loss_T, leaf_T, weights_T)
    loss_T = loss_T.detach()
    named = {"the log-prob": leaf_T.detach(), "the loss": loss_T, "its derivative": coef_T}
    named = {**{f"columns[{name!r}]": column for name, column in columns.items()}, **named}
    bad_T = ~torch.stack([value.isfinite() for value in named.values()]).all(0)
    if bool(bad_T.any()) and nonfinite != "drop":
        row = int(bad_T.nonzero()[0])
        name = next(name for name, value in named.items() if not bool(value[row].isfinite()))
        raise NonFiniteError(
            f"{name} is {float(named[name][row])} at row {row} of a micro-batch, which is trained; find its cause, or "
            "set algorithm.nonfinite: drop to leave such tokens out and count them"
        )
    kept = (~bad_T).nonzero().squeeze(1)
    gradient = (coef_T[kept] * logprobs_T[kept]).sum()
    value = (weights_T[kept] * loss_T[kept]).sum()
    loss = gradient + (value - gradient).detach() - entropy_coef * (weights_T[kept] * entropy_T[kept]).sum()
    zeroed = [torch.where(bad_T, 0.0, x.detach()) for x in (logprobs_T, entropy_T, loss_T)]
    return LinearPolicyLoss(loss, *zeroed, dropped_T=bad_T)
