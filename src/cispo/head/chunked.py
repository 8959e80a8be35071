"""The head in one pass over chunks of rows, on any torch device: three matrix products and no `[T, V]`.

A chunk's logits live in one workspace. They are turned in place, by blocks of rows, into the softmax p,
which gives log-prob and entropy on the way; the objective's coefficients c follow from the chunk's log-probs; then
p − onehot meets the head and the hidden states, and the next chunk overwrites it:

    dlogits_t = c_t/temperature · (onehot − p_t) = k_t · (p_t − onehot),     k_t = −c_t/temperature
    dHidden_t = k_t · (p_t − onehot) @ head          dHead = Σ_t (p_t − onehot)ᵀ (k_t · hidden_t)

In float32 the row scale k is put on the small factors, and never costs a pass over the logits. A bf16 head has its
logits in float32 (bf16 logits would be wrong by 1 part in 256) and multiplies bf16 dlogits; these carry k, because
rounding them takes a pass anyway. Rows with k = 0 are moved out before these two products.

dHead accumulates in float32. A bf16 dHead of few chunks, or one whose float32 copy does not fit into half of the memory
budget, accumulates in bf16 instead, as `.grad` does over micro-batches: each chunk rounds it once.

Left out on purpose: double backward, and objectives that are not token-local (`linear_logprobs` serves those).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cispo.head.inputs import HeadInputs, PolicyInputs, coefficients
from cispo.head.matmul import fast_float32_matmul

_BLOCK = 1 << 22
"""Rows are reduced in blocks of about this many logits (16 MiB of float32). Smaller ones stay in a core's cache and are
no faster, and every operation on one waits for all threads: on a busy machine that costs a time slice each."""
_HEAD_BLOCK = 1 << 22
"""A head of another dtype is converted in blocks of about this many weights (16 MiB of float32)."""

_WIDE_FROM = 4
"""With fewer chunks a bf16 dHead is as exact where it accumulates in bf16: a chunk's product is rounded either way."""
_MM_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
"""Whether this torch can hand out the float32 sum of a bf16 product on CUDA (2.8 and later)."""

_kept: list[np.ndarray] = []
"""The last call's CPU workspace: to be handed fresh memory by the kernel costs more than a product takes to fill it.
A call takes the buffer out of the list, so two threads never share one."""


class Workspace:
    """A flat scratch buffer, kept for the next call. On CPU numpy asks for huge pages, which torch does not."""

    def __init__(self, like: Tensor, numel: int, dtype: torch.dtype):
        self._bytes = None
        if like.device.type != "cpu":
            self.flat = like.new_empty(numel, dtype=dtype)
            return
        size = numel * dtype.itemsize
        try:
            self._bytes = _kept.pop()
        except IndexError:  # asked for afterwards and not before: another thread may take it in between
            self._bytes = None
        if self._bytes is None or self._bytes.size < size:
            self._bytes = np.empty(size, dtype=np.uint8)
        self.flat = torch.from_numpy(self._bytes)[:size].view(dtype)

    def give_back(self) -> None:
        if self._bytes is not None:
            _kept[:] = [self._bytes]


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


@dataclass(frozen=True)
class Rows:
    """What one chunk of rows gave: their places in T, and log-prob of the target, entropy and log-sum-exp, [C] each."""

    rows_C: Tensor | slice
    logp_C: Tensor
    entropy_C: Tensor
    lse_C: Tensor

    def at(self, active: Tensor) -> Tensor | slice:
        """Places in T of some of the chunk's rows, given by their numbers in it, ascending."""
        if len(active) == len(self.logp_C):
            return self.rows_C
        return active + self.rows_C.start if isinstance(self.rows_C, slice) else self.rows_C[active]


class Pass:
    """The workspace and the accumulated gradients of one pass over at most `num_rows` rows.

    Per chunk: `logits`, `reduce_`, and where gradients are wanted `accumulate`, which uses the chunk's logits up.
    """

    def __init__(self, inputs: HeadInputs, num_rows: int, need: tuple[bool, bool, bool]):
        self.inputs, self.wide = inputs, inputs.wide
        narrow = inputs.compute_dtype is None and inputs.hidden_TD.dtype == torch.bfloat16
        self.product = torch.bfloat16 if narrow else self.wide  # float16 cannot hold dlogits: they go below 6e-8
        self.hidden_TD, self.head_VD = inputs.hidden_TD.detach(), inputs.head_VD.detach()
        self.bias_V = None if inputs.bias_V is None else inputs.bias_V.detach().to(self.wide) / inputs.temperature
        self.has_neginf = self.bias_V is not None and bool(self.bias_V.isneginf().any())
        self.dhead_dtype = self.head_VD.dtype
        chunk, block, head_block = self._plan(num_rows)

        (V, D), width = self.head_VD.shape, self._width()
        self.workspace = Workspace(self.hidden_TD, (chunk + block) * width + head_block * D, self.wide)
        logits, work, head = self.workspace.flat.split([chunk * width, block * width, head_block * D])
        self.logits_CV, self.work_BV = logits.view(-1, width)[:, :V], work.view(-1, width)[:, :V]
        self.head_UD = head.view(-1, D)
        self.dhidden_TD = torch.zeros_like(self.hidden_TD) if need[0] else None
        self.dhead_VD = torch.empty_like(self.head_VD, dtype=self.dhead_dtype) if need[1] else None
        self.dbias_V = self.head_VD.new_zeros(V, dtype=self.wide) if need[2] else None
        self.dhead_is_empty = True

    def _plan(self, num_rows: int) -> tuple[int, int, int]:
        """Rows of logits in a chunk, rows of a block within it, and rows of the head converted at a time (0: none)."""
        (V, D), size, budget = self.head_VD.shape, self.wide.itemsize, self.inputs.memory_budget
        block = self._block_rows(num_rows)
        head_block = 0
        if self.head_VD.dtype != self.wide:
            head_block = min(V, max(1, min(_HEAD_BLOCK, budget // (8 * size)) // D))
        left = budget - block * V * size - head_block * D * size
        chunks = math.ceil(num_rows / max(1, left // self._row_bytes()))
        if chunks >= _WIDE_FROM and self.head_VD.dtype != self.wide and V * D * size <= budget // 2:
            self.dhead_dtype = self.wide
            chunks = math.ceil(num_rows / max(1, (left - V * D * size) // self._row_bytes()))
        chunk = max(1, math.ceil(num_rows / max(1, chunks)))
        return chunk, min(block, chunk), head_block

    def _block_rows(self, num_rows: int) -> int:
        V, size = self.head_VD.shape[0], self.wide.itemsize
        return max(1, min(num_rows, min(_BLOCK, self.inputs.memory_budget // (8 * size)) // V))

    def _row_bytes(self) -> int:
        return self._width() * self.wide.itemsize

    def _width(self) -> int:
        """Elements from one row of the workspace to the next."""
        return self.head_VD.shape[0]

    def chunks(self, rows_R: Tensor) -> Iterable[Tensor | slice]:
        """The rows a chunk at a time; as slices, which copy nothing, where they are all of T."""
        if len(rows_R) == len(self.hidden_TD):
            return _blocks(len(rows_R), len(self.logits_CV))
        return rows_R.split(len(self.logits_CV)) if len(rows_R) else ()

    def wide_head(self) -> Iterator[tuple[slice, Tensor]]:
        """The head in the wide dtype, block by block of the vocabulary; whole, where it has that dtype already."""
        if self.head_VD.dtype == self.wide:
            yield slice(0, len(self.head_VD)), self.head_VD
            return
        for block in _blocks(len(self.head_VD), len(self.head_UD)):
            yield block, self.head_UD[: block.stop - block.start].copy_(self.head_VD[block])

    def logits(self, rows_C: Tensor | slice) -> Tensor:
        """Tempered logits of a chunk in the wide dtype, in the workspace."""
        hidden_CD = self.hidden_TD[rows_C]
        if self.bias_V is None and self.inputs.temperature == 1.0:
            return self._product(hidden_CD)
        z_CV = self._product(hidden_CD).div_(self.inputs.temperature)
        return z_CV if self.bias_V is None else z_CV.add_(self.bias_V)

    def _product(self, hidden_CD: Tensor) -> Tensor:
        """hidden @ headᵀ in the wide dtype, in the workspace."""
        z_CV = self.logits_CV[: len(hidden_CD)]
        if z_CV.is_cuda and _MM_OUT_DTYPE and self.product != self.wide:
            # tensor cores add up in float32 and can hand it out: the head needs no conversion
            return torch.mm(hidden_CD, self.head_VD.T, out_dtype=self.wide, out=z_CV)
        wide_CD = hidden_CD.to(self.wide)
        for block, head_UD in self.wide_head():
            torch.mm(wide_CD, head_UD.T, out=z_CV[:, block])
        return z_CV

    def reduce_(self, z_CV: Tensor, rows_C: Tensor | slice) -> Rows:
        """Log-probs, entropies and log-sum-exps of a chunk's logits; z becomes p = softmax z on the way."""
        targets_C = self.inputs.targets_T[rows_C]
        logp_C, entropy_C, lse_C = z_CV.new_empty(3, len(z_CV))
        for block in _blocks(len(z_CV), len(self.work_BV)):
            z_BV, targets_B1 = z_CV[block], targets_C[block, None]
            p_BV = torch.softmax(z_BV, dim=-1, out=self.work_BV[: len(z_BV)])
            target_B, p_target_B = z_BV.gather(1, targets_B1)[:, 0], p_BV.gather(1, targets_B1)[:, 0]
            lse_B = target_B - p_target_B.log()  # as exact as a sum of its own, and a pass over the logits cheaper
            tiny = (p_target_B < 1e-30).nonzero().flatten()
            if len(tiny):
                lse_B[tiny] = z_BV[tiny].logsumexp(dim=-1)
            if self.has_neginf:
                z_BV.clamp_(min=-1e30)  # there p is 0, and 0 · −inf would make the entropy NaN
            lse_C[block], logp_C[block] = lse_B, target_B - lse_B
            entropy_C[block] = (lse_B - torch.linalg.vecdot(p_BV, z_BV)).clamp_(min=0.0)
            z_BV.copy_(p_BV)
        return Rows(rows_C, logp_C, entropy_C, lse_C)

    def reduced_(self, z_CV: Tensor, lse_C: Tensor) -> None:
        """What `reduce_` does to the logits, where the log-sum-exps are known."""
        z_CV.sub_(lse_C[:, None]).exp_()

    def accumulate(self, p_CV: Tensor, rows: Rows, coef_C: Tensor, g_C: Tensor | None = None) -> None:
        """Add the gradients that flow from a chunk after `reduce_`, which is used up.

        coef_C: c, the loss's derivative in log π. g_C: minus its derivative in the entropy, where there is a bonus.
        """
        k_C = -coef_C.to(self.wide) / self.inputs.temperature
        active = (k_C != 0 if g_C is None else (k_C != 0) | (g_C != 0)).nonzero().flatten()
        if not len(active):
            return
        rows_A = rows.at(active)
        d_AV, scale_A1 = self._dlogits(p_CV, rows, active, k_C, None if g_C is None else g_C / self.inputs.temperature)
        if self.dhidden_TD is not None:
            self.dhidden_TD[rows_A] = (self._times_head(d_AV) * scale_A1).to(self.dhidden_TD.dtype)
        if self.dhead_VD is not None:
            self._add_to_dhead(d_AV, (self.hidden_TD[rows_A] * scale_A1).to(self.product))
        if self.dbias_V is not None:
            self.dbias_V += torch.mv(d_AV.T, scale_A1[:, 0].to(self.product))

    def _dlogits(
        self, p_CV: Tensor, rows: Rows, active: Tensor, k_C: Tensor, g_C: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """d and a row scale: d·scale is the logits' gradient k·(p − onehot) + g·p·(log p + H) of the active rows."""
        targets_A1, k_A1 = self.inputs.targets_T[rows.at(active), None], k_C[active, None]
        if self.product == self.wide and g_C is None:
            d_AV = self._compact_(p_CV, active)
            return d_AV.scatter_add_(1, targets_A1, d_AV.new_full((len(active), 1), -1.0)), k_A1
        # written over p, at the front: a bf16 row takes the first half of a float32 row's place
        d_CV = p_CV if self.product == self.wide else p_CV.view(self.product)[:, : p_CV.shape[1]]
        for block in _blocks(len(active), len(self.work_BV)):
            work_BV = torch.index_select(p_CV, 0, active[block], out=self.work_BV[: block.stop - block.start])
            if g_C is None:
                work_BV.mul_(k_A1[block])
            else:
                g_B1, entropy_B1 = g_C[active[block], None], rows.entropy_C[active[block], None]
                plogp_BV = torch.special.xlogy(work_BV, work_BV)
                work_BV.mul_(k_A1[block] + g_B1 * entropy_B1).add_(plogp_BV.mul_(g_B1))
            d_CV[block] = work_BV.scatter_add_(1, targets_A1[block], -k_A1[block])
        return d_CV[: len(active)], torch.ones_like(k_A1)

    def _compact_(self, d_CV: Tensor, active: Tensor) -> Tensor:
        """Move the active rows to the front, in place; ascending, so none is overwritten before it is read."""
        if len(active) < len(d_CV):
            for block in _blocks(len(active), len(self.work_BV)):
                d_CV[block] = torch.index_select(d_CV, 0, active[block], out=self.work_BV[: block.stop - block.start])
        return d_CV[: len(active)]

    def _times_head(self, d_AV: Tensor) -> Tensor:
        if self.head_VD.dtype == self.product:
            return torch.mm(d_AV, self.head_VD)
        out_AD = d_AV.new_zeros(len(d_AV), self.head_VD.shape[1])
        for block, head_UD in self.wide_head():
            out_AD.addmm_(d_AV[:, block], head_UD)
        return out_AD

    def _add_to_dhead(self, d_AV: Tensor, hidden_AD: Tensor) -> None:
        """dHead += dᵀ @ hidden; the first time it is set, which saves writing zeros."""
        first, self.dhead_is_empty = self.dhead_is_empty, False
        if self.dhead_VD.dtype == self.product:
            if first:
                torch.mm(d_AV.T, hidden_AD, out=self.dhead_VD)
            else:
                torch.addmm(self.dhead_VD, d_AV.T, hidden_AD, out=self.dhead_VD)
            return
        D = self.dhead_VD.shape[1]
        scratch = self.head_UD.flatten().view(self.product)
        for block in _blocks(len(self.dhead_VD), len(self.head_UD)):
            part_UD = scratch[: (block.stop - block.start) * D].view(-1, D)
            torch.mm(d_AV[:, block].T, hidden_AD, out=part_UD)
            if first:
                self.dhead_VD[block] = part_UD
            else:
                self.dhead_VD[block] += part_UD

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dHidden, dHead, dBias in the inputs' dtypes. The pass is over: its workspace goes to the next one."""
        self.workspace.give_back()
        if self.dhead_VD is not None and self.dhead_is_empty:
            self.dhead_VD.zero_()
        dhead_VD = None if self.dhead_VD is None else self.dhead_VD.to(self.head_VD.dtype)
        return self.dhidden_TD, dhead_VD, None if self.dbias_V is None else self.dbias_V.to(self.inputs.bias_V.dtype)


def _refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} cannot be differentiated twice (create_graph=True); use backend='reference' for that"
        )


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    @fast_float32_matmul()
    def forward(ctx, hidden_TD, head_VD, bias_V, inputs: PolicyInputs, need: tuple[bool, bool, bool], new_pass):
        logp_T, entropy_T, loss_T = hidden_TD.new_zeros(3, len(inputs.targets_T), dtype=inputs.wide)
        bad_T = torch.zeros_like(inputs.targets_T, dtype=torch.bool)
        work = new_pass(inputs, max(len(inputs.rows_R), len(inputs.extra_E)), need)

        for rows_C in work.chunks(inputs.extra_E):
            rows = work.reduce_(work.logits(rows_C), rows_C)
            logp_T[rows_C], entropy_T[rows_C] = rows.logp_C, rows.entropy_C

        for rows_C in work.chunks(inputs.rows_R):
            z_CV = work.logits(rows_C)
            rows = work.reduce_(z_CV, rows_C)
            logp_T[rows_C], entropy_T[rows_C] = rows.logp_C, rows.entropy_C
            loss_T[rows_C], coef_C, bad_T[rows_C] = coefficients(inputs, rows.logp_C, rows_C)
            if not any(need):
                continue
            g_C = None
            if inputs.entropy_coef:
                weights_C = inputs.weights_T[rows_C].to(inputs.wide)
                g_C = torch.where(bad_T[rows_C], 0.0, inputs.entropy_coef * weights_C)
            work.accumulate(z_CV, rows, coef_C, g_C)

        rows_R = inputs.rows_R[~bad_T[inputs.rows_R]]
        bonus_R = inputs.entropy_coef * entropy_T[rows_R] if inputs.entropy_coef else 0.0
        loss = (inputs.weights_T[rows_R].to(inputs.wide) * (loss_T[rows_R] - bonus_R)).sum()
        ctx.save_for_backward(*work.gradients())
        ctx.mark_non_differentiable(logp_T, entropy_T, loss_T, bad_T)
        return loss, logp_T, entropy_T, loss_T, bad_T

    @staticmethod
    def backward(ctx, dloss, *_):
        _refuse_double_backward("linear_policy_loss")
        scaled = [x if x is None or dloss == 1 else x * dloss.to(x.dtype) for x in ctx.saved_tensors]
        return *scaled, None, None, None


class _Logprobs(torch.autograd.Function):
    @staticmethod
    @fast_float32_matmul()
    def forward(ctx, hidden_TD, head_VD, bias_V, inputs: HeadInputs, need: tuple[bool, bool, bool], new_pass):
        rows_T = torch.arange(len(inputs.targets_T), device=hidden_TD.device)
        logp_T, entropy_T, lse_T = hidden_TD.new_empty(3, len(rows_T), dtype=inputs.wide)
        work = new_pass(inputs, len(rows_T), (False, False, False))
        for rows_C in work.chunks(rows_T):
            rows = work.reduce_(work.logits(rows_C), rows_C)
            logp_T[rows_C], entropy_T[rows_C], lse_T[rows_C] = rows.logp_C, rows.entropy_C, rows.lse_C
        work.workspace.give_back()
        ctx.save_for_backward(hidden_TD, head_VD, bias_V, inputs.targets_T, logp_T, lse_T)
        ctx.inputs, ctx.need, ctx.new_pass = inputs, need, new_pass
        ctx.mark_non_differentiable(entropy_T)
        return logp_T, entropy_T

    @staticmethod
    @fast_float32_matmul()
    def backward(ctx, dlogp_T, _):
        _refuse_double_backward("linear_logprobs")
        *_, logp_T, lse_T = ctx.saved_tensors  # asking for them also refuses inputs that were modified in place since
        rows_R = (dlogp_T != 0).nonzero().flatten()
        work = ctx.new_pass(ctx.inputs, len(rows_R), ctx.need)
        for rows_C in work.chunks(rows_R):
            z_CV, lse_C = work.logits(rows_C), lse_T[rows_C]
            work.reduced_(z_CV, lse_C)
            work.accumulate(z_CV, Rows(rows_C, logp_T[rows_C], torch.zeros_like(lse_C), lse_C), dlogp_T[rows_C])
        return *work.gradients(), None, None, None


def _needs(inputs: HeadInputs) -> tuple[bool, bool, bool]:
    """Which of hidden, head and bias want a gradient now."""
    differentiable = (inputs.hidden_TD, inputs.head_VD, inputs.bias_V)
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable)


def policy_loss(inputs: PolicyInputs, new_pass: type[Pass] = Pass) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.policy_loss`."""
    return _PolicyLoss.apply(inputs.hidden_TD, inputs.head_VD, inputs.bias_V, inputs, _needs(inputs), new_pass)


def logprobs(inputs: HeadInputs, new_pass: type[Pass] = Pass) -> tuple[Tensor, Tensor]:
    """As `reference.logprobs` at every row, the entropy detached."""
    return _Logprobs.apply(inputs.hidden_TD, inputs.head_VD, inputs.bias_V, inputs, _needs(inputs), new_pass)
