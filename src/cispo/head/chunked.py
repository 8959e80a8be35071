"""The head in one pass over chunks of rows, on any torch device: three matrix products and no `[T, V]`.

A chunk's logits z live in one workspace. Blocks of a few rows, small enough for the cache, are turned in place into
e = exp(z − max z), giving log-prob and entropy on the way; the objective's coefficients follow from the chunk's log-probs;
then e − s·onehot (s = Σ e) meets the head and the hidden states, and the next chunk overwrites it:

    dz_t      = c_t/temperature · (onehot − e_t/s_t)    =  k_t · (e_t − s_t·onehot),    k_t = −c_t/(s_t·temperature)
    dHidden_t = k_t · (e_t − s_t·onehot) @ head         dHead = Σ_t (e_t − s_t·onehot)ᵀ (k_t · hidden_t)

so that the row scale k never costs a pass over the logits. Rows with c = 0 are moved out before the two products.

Left out on purpose: double backward, and objectives that are not token-local (`linear_logprobs` serves those).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cispo.head.inputs import HeadInputs, PolicyInputs, coefficients

_BLOCK_ELEMENTS = 1 << 18
"""Rows are reduced in blocks of about this many logits (1 MiB of float32: a core's L2 cache)."""


class _Pass:
    """The workspace and the accumulated gradients of one pass over the rows."""

    def __init__(self, inputs: HeadInputs, num_rows: int, need: tuple[bool, bool, bool]):
        self.inputs, self.wide = inputs, inputs.wide
        hidden_TD, V = inputs.hidden_TD, inputs.head_VD.shape[0]
        self.head_VD = inputs.head_VD.detach().to(self.wide)
        self.bias_V = None if inputs.bias_V is None else inputs.bias_V.detach().to(self.wide) / inputs.temperature
        self.has_neginf = self.bias_V is not None and bool(self.bias_V.isneginf().any())
        size = torch.finfo(self.wide).bits // 8
        block = max(1, min(num_rows, _BLOCK_ELEMENTS // V))
        chunk = max(1, inputs.memory_budget // (V * size) - block)
        chunk = max(1, math.ceil(num_rows / max(1, math.ceil(num_rows / chunk))))
        self.logits_CV = hidden_TD.new_empty(chunk, V, dtype=self.wide)
        self.work_BV = hidden_TD.new_empty(min(block, chunk), V, dtype=self.wide)
        self.dhidden_TD = torch.zeros_like(hidden_TD) if need[0] else None
        self.dhead_VD = torch.zeros_like(self.head_VD) if need[1] else None
        self.dbias_V = self.head_VD.new_zeros(V) if need[2] else None

    def chunks(self, rows_R: Tensor):
        return rows_R.split(len(self.logits_CV)) if len(rows_R) else ()

    def hidden(self, rows_C: Tensor) -> Tensor:
        return self.inputs.hidden_TD.detach()[rows_C].to(self.wide)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Tempered logits of a chunk, in the workspace."""
        z_CV = self.logits_CV[: len(hidden_CD)]
        scaled_CD = hidden_CD if self.inputs.temperature == 1.0 else hidden_CD / self.inputs.temperature
        if self.bias_V is None:
            return torch.mm(scaled_CD, self.head_VD.T, out=z_CV)
        return torch.addmm(self.bias_V, scaled_CD, self.head_VD.T, out=z_CV)

    def exp_(self, z_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z ← e = exp(z − max z). Returns log-prob of the target, entropy, s = Σ e, and log-sum-exp; each [C]."""
        logp_C, entropy_C, sum_C, lse_C = z_CV.new_empty(4, len(z_CV))
        for start in range(0, len(z_CV), len(self.work_BV)):
            block = slice(start, start + len(self.work_BV))
            z_BV = z_CV[block]
            work_BV = self.work_BV[: len(z_BV)]
            max_B1 = z_BV.amax(dim=-1, keepdim=True)
            torch.sub(z_BV, max_B1, out=work_BV)
            shifted_B1 = work_BV.gather(1, targets_C[block, None])
            torch.exp(work_BV, out=z_BV)
            if self.has_neginf:
                work_BV.clamp_(min=-1e4)  # exp of it is 0 already, and 0 · −inf would make the entropy NaN
            s_B = torch.sum(z_BV, dim=-1, out=sum_C[block])
            log_s_B = s_B.log()
            entropy_C[block] = log_s_B - torch.linalg.vecdot(z_BV, work_BV) / s_B
            logp_C[block] = shifted_B1[:, 0] - log_s_B
            lse_C[block] = max_B1[:, 0] + log_s_B
        return logp_C, entropy_C, sum_C, lse_C

    def entropy_gradient_(self, e_CV: Tensor, k_C: Tensor, g_C: Tensor, entropy_C: Tensor, sum_C: Tensor) -> None:
        """e ← k·e + g·e·(log p + H), in place: −β·w·H has the derivative β·w·p·(log p + H)/temperature in z."""
        for start in range(0, len(e_CV), len(self.work_BV)):
            block = slice(start, start + len(self.work_BV))
            e_BV, g_B1 = e_CV[block], g_C[block, None]
            work_BV = torch.special.xlogy(e_BV, e_BV, out=self.work_BV[: len(e_BV)]).mul_(g_B1)
            e_BV.mul_(k_C[block, None] + g_B1 * (entropy_C[block, None] - sum_C[block, None].log())).add_(work_BV)

    def accumulate(self, d_CV: Tensor, hidden_CD: Tensor, k_C: Tensor, rows_C: Tensor) -> None:
        """Add the gradients of logits whose gradient is k·d; the rows with k = 0 are taken out first."""
        active = (k_C != 0).nonzero().flatten()
        if len(active) < len(k_C):
            d_CV = self.compact_(d_CV, active)
            hidden_CD, k_C, rows_C = hidden_CD[active], k_C[active], rows_C[active]
        if not len(active):
            return
        if self.dhidden_TD is not None:
            self.dhidden_TD[rows_C] = (torch.mm(d_CV, self.head_VD) * k_C[:, None]).to(self.dhidden_TD.dtype)
        if self.dhead_VD is not None:
            self.dhead_VD.addmm_(d_CV.T, hidden_CD * k_C[:, None])
        if self.dbias_V is not None:
            self.dbias_V.addmv_(d_CV.T, k_C)

    def compact_(self, d_CV: Tensor, active: Tensor) -> Tensor:
        """Move the active rows to the front, in place; ascending, so none is overwritten before it is read."""
        for start in range(0, len(active), len(self.work_BV)):
            source = active[start : start + len(self.work_BV)]
            rows_BV = torch.index_select(d_CV, 0, source, out=self.work_BV[: len(source)])
            d_CV[start : start + len(source)] = rows_BV
        return d_CV[: len(active)]

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dHidden, dHead, dBias in the inputs' dtypes."""
        head, bias = self.inputs.head_VD, self.inputs.bias_V
        dhead_VD = None if self.dhead_VD is None else self.dhead_VD.to(head.dtype)
        return self.dhidden_TD, dhead_VD, None if self.dbias_V is None else self.dbias_V.to(bias.dtype)


def _refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} cannot be differentiated twice (create_graph=True); use backend='reference' for that"
        )


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, bias_V, inputs: PolicyInputs, need: tuple[bool, bool, bool]):
        T, temperature = len(inputs.targets_T), inputs.temperature
        logp_T, entropy_T, loss_T = hidden_TD.new_zeros(3, T, dtype=inputs.wide)
        bad_T = torch.zeros(T, dtype=torch.bool, device=hidden_TD.device)
        work = _Pass(inputs, max(len(inputs.rows_R), len(inputs.extra_E)), need)

        for rows_C in work.chunks(inputs.extra_E):
            z_CV = work.logits(work.hidden(rows_C))
            logp_T[rows_C], entropy_T[rows_C], _, _ = work.exp_(z_CV, inputs.targets_T[rows_C])

        for rows_C in work.chunks(inputs.rows_R):
            hidden_CD, targets_C = work.hidden(rows_C), inputs.targets_T[rows_C]
            e_CV = work.logits(hidden_CD)
            logp_C, entropy_C, sum_C, _ = work.exp_(e_CV, targets_C)
            loss_T[rows_C], coef_C, bad_C = coefficients(inputs, logp_C, rows_C)
            logp_T[rows_C], entropy_T[rows_C], bad_T[rows_C] = logp_C, entropy_C, bad_C
            if not any(need):
                continue
            k_C = torch.where(coef_C != 0, -coef_C / (sum_C * temperature), 0.0)
            if inputs.entropy_coef:
                weights_C = torch.where(bad_C, 0.0, inputs.weights_T[rows_C].to(inputs.wide))
                g_C = torch.where(bad_C, 0.0, inputs.entropy_coef * weights_C / (sum_C * temperature))
                work.entropy_gradient_(e_CV, k_C, g_C, entropy_C, sum_C)
                e_CV[torch.arange(len(e_CV), device=e_CV.device), targets_C] -= k_C * sum_C
                k_C = torch.where(bad_C, 0.0, torch.ones_like(k_C))
            else:
                e_CV[torch.arange(len(e_CV), device=e_CV.device), targets_C] -= sum_C
            work.accumulate(e_CV, hidden_CD, k_C, rows_C)

        weights_T = torch.where(bad_T | (loss_T == 0), 0.0, inputs.weights_T.to(inputs.wide))
        loss = (weights_T * loss_T).sum()
        if inputs.entropy_coef:
            rows_R = inputs.rows_R[~bad_T[inputs.rows_R]]
            loss = loss - inputs.entropy_coef * (inputs.weights_T[rows_R] * entropy_T[rows_R]).sum()
        ctx.save_for_backward(*work.gradients())
        ctx.mark_non_differentiable(logp_T, entropy_T, loss_T, bad_T)
        return loss, logp_T, entropy_T, loss_T, bad_T

    @staticmethod
    def backward(ctx, dloss, *_):
        _refuse_double_backward("linear_policy_loss")
        scaled = [x if x is None or dloss == 1 else x * dloss.to(x.dtype) for x in ctx.saved_tensors]
        return *scaled, None, None


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, head_VD, bias_V, inputs: HeadInputs, need: tuple[bool, bool, bool]):
        rows_T = torch.arange(len(inputs.targets_T), device=hidden_TD.device)
        logp_T, entropy_T, lse_T = hidden_TD.new_empty(3, len(rows_T), dtype=inputs.wide)
        work = _Pass(inputs, len(rows_T), (False, False, False))
        for rows_C in work.chunks(rows_T):
            z_CV = work.logits(work.hidden(rows_C))
            logp_T[rows_C], entropy_T[rows_C], _, lse_T[rows_C] = work.exp_(z_CV, inputs.targets_T[rows_C])
        ctx.save_for_backward(hidden_TD, head_VD, bias_V, inputs.targets_T, lse_T)
        ctx.inputs, ctx.need = inputs, need
        ctx.mark_non_differentiable(entropy_T)
        return logp_T, entropy_T

    @staticmethod
    def backward(ctx, dlogp_T, _):
        _refuse_double_backward("linear_logprobs")
        _, _, _, targets_T, lse_T = ctx.saved_tensors  # also raises where an input was modified in place since
        rows_R = (dlogp_T != 0).nonzero().flatten()
        work = _Pass(ctx.inputs, len(rows_R), ctx.need)
        for rows_C in work.chunks(rows_R):
            hidden_CD = work.hidden(rows_C)
            p_CV = work.logits(hidden_CD).sub_(lse_T[rows_C, None]).exp_()
            p_CV[torch.arange(len(p_CV), device=p_CV.device), targets_T[rows_C]] -= 1
            work.accumulate(p_CV, hidden_CD, -dlogp_T[rows_C].to(work.wide) / ctx.inputs.temperature, rows_C)
        return *work.gradients(), None, None


def _needs(inputs: HeadInputs) -> tuple[bool, bool, bool]:
    """Which of hidden, head and bias want a gradient now."""
    differentiable = (inputs.hidden_TD, inputs.head_VD, inputs.bias_V)
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable)


def policy_loss(inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.policy_loss`."""
    return _PolicyLoss.apply(inputs.hidden_TD, inputs.head_VD, inputs.bias_V, inputs, _needs(inputs))


def logprobs(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """As `reference.logprobs` at every row, the entropy detached."""
    return _Logprobs.apply(inputs.hidden_TD, inputs.head_VD, inputs.bias_V, inputs, _needs(inputs))
