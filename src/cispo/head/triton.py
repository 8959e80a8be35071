"""The head on CUDA: cuBLAS for the products, and Triton kernels for what stands between them.

`LogitsPass` follows `chunked.py` with two kernels per chunk: one reads each row of logits once and gives log-sum-exp,
log-prob of the target and entropy; the objective's coefficients come from plain torch on that small vector; the other
reads the logits again and writes their gradients, in the products' dtype, compacted to the rows that have any. Bias and
temperature ride along. Rows of the workspace are padded so that an odd V costs cuBLAS nothing; row offsets are int64.

`TilePass` never writes logits to memory (online log-sum-exp, in the manner of Cut Cross-Entropy, arXiv:2411.09009): it
multiplies tile by tile and multiplies again in backward, five products instead of three. It is for budgets that hold
only a few rows of logits. Its gradients are summed with atomics in float32: exact to rounding, not bit for bit.

Left out on purpose: hand-written matrix products where the logits fit, tuning tables, and gradient filtering. These
kernels are tested through Triton's interpreter, and have not been timed on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/test_head.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.head import chunked
from cispo.head.inputs import HeadInputs, PolicyInputs

INTERPRETED = triton.knobs.runtime.interpret
_COLUMNS = 4096
"""Columns of a row that a program holds at a time."""
_TILE_T, _TILE_V, _TILE_D = 64, 128, 64
_FEW_ROWS = 128
"""A product of fewer rows than this leaves tensor cores idle: then computing logits twice, tile by tile, costs less."""
_ALIGNMENT = 64
"""Elements to which rows of the workspace are padded."""


@triton.jit
def _reduce_kernel(
    z_ptr, bias_ptr, targets_ptr, logp_ptr, entropy_ptr, lse_ptr, V, stride, inv_temperature,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program: m = max z, s = Σ exp(z − m), t = Σ exp(z − m)·(z − m), all online."""
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride
    m = tl.full((), -1e38, WIDE)
    s = tl.full((), 0.0, WIDE)
    t = tl.full((), 0.0, WIDE)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(z_row + columns, mask=inside, other=0.0).to(WIDE) * inv_temperature
        if HAS_BIAS:
            z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
        z = tl.where(inside, z, float("-inf"))
        new_m = tl.maximum(m, tl.max(z, axis=0))
        e = tl.exp(z - new_m)
        t = tl.exp(m - new_m) * (t + s * (m - new_m)) + tl.sum(
            tl.where(z == float("-inf"), 0.0, e * (z - new_m)), axis=0
        )
        s = tl.exp(m - new_m) * s + tl.sum(e, axis=0)
        m = new_m
    target = tl.load(targets_ptr + row)
    z_target = tl.load(z_row + target).to(WIDE) * inv_temperature
    if HAS_BIAS:
        z_target += tl.load(bias_ptr + target)
    log_s = tl.log(s)
    tl.store(logp_ptr + row, z_target - m - log_s)
    tl.store(entropy_ptr + row, log_s - t / s)
    tl.store(lse_ptr + row, m + log_s)


@triton.jit
def _dlogits_kernel(
    z_ptr, d_ptr, bias_ptr, active_ptr, targets_ptr, lse_ptr, k_ptr, g_ptr, entropy_ptr,
    V, z_stride, d_stride, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_BONUS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i of d ← k·(p − onehot) + g·p·(log p + H) of the logits' row active[i]."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(active_ptr + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = tl.load(z_ptr + source * z_stride + columns, mask=inside, other=0.0).to(WIDE) * inv_temperature
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    logp = z - tl.load(lse_ptr + source)
    p = tl.exp(logp)
    d = tl.load(k_ptr + source) * (p - tl.where(columns == tl.load(targets_ptr + source), 1.0, 0.0))
    if HAS_BONUS:
        bonus = tl.load(g_ptr + source) * p * (logp + tl.load(entropy_ptr + source))
        d += tl.where(p > 0, bonus, 0.0)
    tl.store(d_ptr + row * d_stride + columns, d.to(d_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_logits(
    hidden_ptr, head_ptr, bias_ptr, rows, columns, R, V, D, inv_temperature,
    HAS_BIAS: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
    TILE_T: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Tempered logits of a tile of rows × columns of the vocabulary, −inf outside it."""
    z = tl.zeros((TILE_T, TILE_V), WIDE)
    for start in range(0, D, TILE_D):
        d = start + tl.arange(0, TILE_D)
        hidden_offsets = rows[:, None].to(tl.int64) * D + d[None, :]
        head_offsets = columns[:, None].to(tl.int64) * D + d[None, :]
        hidden = tl.load(hidden_ptr + hidden_offsets, mask=(rows < R)[:, None] & (d < D)[None, :], other=0.0)
        head = tl.load(head_ptr + head_offsets, mask=(columns < V)[:, None] & (d < D)[None, :], other=0.0)
        z += tl.dot(hidden.to(DOT), tl.trans(head.to(DOT)), input_precision="ieee", out_dtype=WIDE)
    z *= inv_temperature
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < V, other=0.0)[None, :]
    return tl.where((columns < V)[None, :], z, float("-inf"))


@triton.jit
def _tile_reduce_kernel(
    hidden_ptr, head_ptr, bias_ptr, targets_ptr, z_target_ptr, m_ptr, s_ptr, t_ptr, R, V, D, inv_temperature,
    HAS_BIAS: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
    TILE_T: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """m, s, t (as in `_reduce_kernel`) of each row within one tile of columns; and the target's logit, where it is."""
    rows = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    z = _tile_logits(
        hidden_ptr,
        head_ptr,
        bias_ptr,
        rows,
        columns,
        R,
        V,
        D,
        inv_temperature,
        HAS_BIAS,
        DOT,
        WIDE,
        TILE_T,
        TILE_V,
        TILE_D,
    )
    m = tl.maximum(tl.max(z, axis=1), -1e38)
    e = tl.exp(z - m[:, None])
    t = tl.sum(tl.where(z == float("-inf"), 0.0, e * (z - m[:, None])), axis=1)
    offsets = rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(m_ptr + offsets, m, mask=rows < R)
    tl.store(s_ptr + offsets, tl.sum(e, axis=1), mask=rows < R)
    tl.store(t_ptr + offsets, t, mask=rows < R)
    targets = tl.load(targets_ptr + rows, mask=rows < R, other=-1)
    hit = columns[None, :] == targets[:, None]
    here = (targets >= tl.program_id(1) * TILE_V) & (targets < (tl.program_id(1) + 1) * TILE_V)
    tl.store(z_target_ptr + rows, tl.sum(tl.where(hit, z, 0.0), axis=1), mask=(rows < R) & here)


@triton.jit
def _tile_gradient_kernel(
    hidden_ptr, head_ptr, bias_ptr, targets_ptr, lse_ptr, k_ptr, g_ptr, entropy_ptr, dhidden_ptr, dhead_ptr, dbias_ptr,
    R, V, D, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_BONUS: tl.constexpr, NEED_HIDDEN: tl.constexpr, NEED_HEAD: tl.constexpr,
    NEED_BIAS: tl.constexpr, PRODUCT: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr,
    TILE_T: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Logits of a tile again, their gradient d, and d @ head and dᵀ @ hidden added to the sums in memory."""
    rows = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    columns = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    z = _tile_logits(
        hidden_ptr,
        head_ptr,
        bias_ptr,
        rows,
        columns,
        R,
        V,
        D,
        inv_temperature,
        HAS_BIAS,
        DOT,
        WIDE,
        TILE_T,
        TILE_V,
        TILE_D,
    )
    logp = z - tl.load(lse_ptr + rows, mask=rows < R, other=0.0)[:, None]
    p = tl.exp(logp)
    targets = tl.load(targets_ptr + rows, mask=rows < R, other=-1)
    k = tl.load(k_ptr + rows, mask=rows < R, other=0.0)
    d = k[:, None] * (p - tl.where(columns[None, :] == targets[:, None], 1.0, 0.0))
    if HAS_BONUS:
        g = tl.load(g_ptr + rows, mask=rows < R, other=0.0)
        entropy = tl.load(entropy_ptr + rows, mask=rows < R, other=0.0)
        d += tl.where(p > 0, g[:, None] * p * (logp + entropy[:, None]), 0.0)
    d = tl.where((rows < R)[:, None] & (columns < V)[None, :], d, 0.0)
    if NEED_BIAS:
        tl.atomic_add(dbias_ptr + columns, tl.sum(d, axis=0), mask=columns < V)
    d = d.to(PRODUCT).to(DOT)
    for start in range(0, D, TILE_D):
        i = start + tl.arange(0, TILE_D)
        hidden_offsets = rows[:, None].to(tl.int64) * D + i[None, :]
        head_offsets = columns[:, None].to(tl.int64) * D + i[None, :]
        hidden_mask = (rows < R)[:, None] & (i < D)[None, :]
        head_mask = (columns < V)[:, None] & (i < D)[None, :]
        if NEED_HIDDEN:
            head = tl.load(head_ptr + head_offsets, mask=head_mask, other=0.0).to(DOT)
            part = tl.dot(d, head, input_precision="ieee", out_dtype=WIDE)
            tl.atomic_add(dhidden_ptr + hidden_offsets, part, mask=hidden_mask)
        if NEED_HEAD:
            hidden = tl.load(hidden_ptr + hidden_offsets, mask=hidden_mask, other=0.0).to(DOT)
            part = tl.dot(tl.trans(d), hidden, input_precision="ieee", out_dtype=WIDE)
            tl.atomic_add(dhead_ptr + head_offsets, part, mask=head_mask)


# the interpreter multiplies bf16 tiles as integers: there DOT, the dtype of a tile in a product, is the wide one
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class LogitsPass(chunked.Pass):
    """`chunked.Pass` with its passes over the logits in kernels, and a second buffer for the logits' gradients."""

    def _block_rows(self, num_rows: int) -> int:
        return 0

    def _width(self) -> int:
        return triton.cdiv(self.head_VD.shape[0], _ALIGNMENT) * _ALIGNMENT

    def _row_bytes(self) -> int:
        return self._width() * (self.wide.itemsize + self.product.itemsize)

    def __init__(self, inputs: HeadInputs, num_rows: int, need: tuple[bool, bool, bool]):
        super().__init__(inputs, num_rows, need)
        chunk = len(self.logits_CV) if any(need) else 0
        self.dlogits_CV = self.hidden_TD.new_empty(chunk, self._width(), dtype=self.product)[:, : len(self.head_VD)]

    def logits(self, rows_C: Tensor | slice) -> Tensor:
        """The bare product: bias and temperature are applied where it is read."""
        return self._product(self.hidden_TD[rows_C])

    def reduce_(self, z_CV: Tensor, rows_C: Tensor | slice) -> chunked.Rows:
        logp_C, entropy_C, lse_C = z_CV.new_empty(3, len(z_CV))
        _reduce_kernel[(len(z_CV),)](
            z_CV, self._bias(), self.inputs.targets_T[rows_C], logp_C, entropy_C, lse_C, z_CV.shape[1], z_CV.stride(0),
            1 / self.inputs.temperature, self.bias_V is not None, _TYPES[self.wide], self._columns(),
        )  # fmt: skip
        return chunked.Rows(rows_C, logp_C, entropy_C, lse_C)

    def reduced_(self, z_CV: Tensor, lse_C: Tensor) -> None:
        """The logits stay logits here."""

    def _dlogits(self, z_CV, rows, active, k_C, g_C):
        d_AV, V = self.dlogits_CV[: len(active)], z_CV.shape[1]
        _dlogits_kernel[(len(active), triton.cdiv(V, self._columns()))](
            z_CV, d_AV, self._bias(), active, self.inputs.targets_T[rows.rows_C], rows.lse_C, k_C,
            k_C if g_C is None else g_C, rows.entropy_C, V, z_CV.stride(0), d_AV.stride(0), 1 / self.inputs.temperature,
            self.bias_V is not None, g_C is not None, _TYPES[self.wide], self._columns(),
        )  # fmt: skip
        return d_AV, k_C.new_ones(len(active), 1)

    def _bias(self) -> Tensor:
        return self.head_VD if self.bias_V is None else self.bias_V  # a pointer that is not read

    def _columns(self) -> int:
        return min(_COLUMNS, triton.next_power_of_2(self.head_VD.shape[0]))


class TilePass(chunked.Pass):
    """All rows at once; what is handed from step to step is their hidden states, because logits are never kept."""

    def _plan(self, num_rows: int) -> tuple[int, int, int]:
        self.dhead_dtype = self.wide
        return 0, 0, 0

    def __init__(self, inputs: HeadInputs, num_rows: int, need: tuple[bool, bool, bool]):
        super().__init__(inputs, num_rows, need)
        self.head_VD = self.head_VD.to(self.product).contiguous()
        self.dhead_is_empty = False
        if self.dhead_VD is not None:
            self.dhead_VD.zero_()

    def chunks(self, rows_R: Tensor) -> tuple[Tensor, ...]:
        return (rows_R,) if len(rows_R) else ()

    def logits(self, rows_C: Tensor | slice) -> Tensor:
        return self.hidden_TD[rows_C].to(self.product)

    def _call(self, kernel, hidden_CD: Tensor, *pointers: Tensor, **constants) -> None:
        (R, D), V = hidden_CD.shape, self.head_VD.shape[0]
        bias = self.head_VD if self.bias_V is None else self.bias_V
        kernel[(triton.cdiv(R, _TILE_T), triton.cdiv(V, _TILE_V))](
            hidden_CD, self.head_VD, bias, *pointers, R, V, D, 1 / self.inputs.temperature,
            HAS_BIAS=self.bias_V is not None, WIDE=_TYPES[self.wide],
            DOT=_TYPES[self.wide if INTERPRETED else self.product],
            TILE_T=_TILE_T, TILE_V=_TILE_V, TILE_D=min(_TILE_D, max(16, triton.next_power_of_2(D))), **constants,
        )  # fmt: skip

    def reduce_(self, hidden_CD: Tensor, rows_C: Tensor | slice) -> chunked.Rows:
        R, tiles = len(hidden_CD), triton.cdiv(self.head_VD.shape[0], _TILE_V)
        m_CU, s_CU, t_CU = hidden_CD.new_empty(3, R, tiles, dtype=self.wide)
        target_C = hidden_CD.new_empty(R, dtype=self.wide)
        self._call(_tile_reduce_kernel, hidden_CD, self.inputs.targets_T[rows_C], target_C, m_CU, s_CU, t_CU)
        m_C1 = m_CU.amax(dim=1, keepdim=True)
        scale_CU = (m_CU - m_C1).exp()
        s_C = (s_CU * scale_CU).sum(1)
        t_C = (scale_CU * t_CU + torch.where(scale_CU > 0, scale_CU * s_CU * (m_CU - m_C1), 0.0)).sum(1)
        lse_C = m_C1[:, 0] + s_C.log()
        return chunked.Rows(rows_C, target_C - lse_C, s_C.log() - t_C / s_C, lse_C)

    def reduced_(self, z_CV: Tensor, lse_C: Tensor) -> None:
        """There are no logits to change."""

    def accumulate(self, hidden_CD: Tensor, rows: chunked.Rows, coef_C: Tensor, g_C: Tensor | None = None) -> None:
        temperature = self.inputs.temperature
        k_C = -coef_C.to(self.wide) / temperature
        active = (k_C != 0 if g_C is None else (k_C != 0) | (g_C != 0)).nonzero().flatten()
        if not len(active):
            return
        rows_A, unused = rows.at(active), self.head_VD
        dhidden_AD = hidden_CD.new_zeros(len(active), hidden_CD.shape[1], dtype=self.wide)
        self._call(
            _tile_gradient_kernel, hidden_CD[active], self.inputs.targets_T[rows_A], rows.lse_C[active], k_C[active],
            unused if g_C is None else g_C[active] / temperature, rows.entropy_C[active], dhidden_AD,
            unused if self.dhead_VD is None else self.dhead_VD, unused if self.dbias_V is None else self.dbias_V,
            HAS_BONUS=g_C is not None, NEED_HIDDEN=self.dhidden_TD is not None, NEED_HEAD=self.dhead_VD is not None,
            NEED_BIAS=self.dbias_V is not None, PRODUCT=_TYPES[self.product],
        )  # fmt: skip
        if self.dhidden_TD is not None:
            self.dhidden_TD[rows_A] = dhidden_AD.to(self.dhidden_TD.dtype)


def _pass_for(inputs: HeadInputs) -> type[chunked.Pass]:
    if inputs.wide == torch.float64:
        return chunked.Pass  # float64 is for checking other results; a kernel's scalar arguments are float32
    row_bytes = inputs.head_VD.shape[0] * (inputs.wide.itemsize + inputs.hidden_TD.dtype.itemsize)
    fits = inputs.memory_budget // row_bytes
    return TilePass if fits < min(_FEW_ROWS, len(inputs.targets_T)) else LogitsPass


def policy_loss(inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.policy_loss`."""
    return chunked.policy_loss(inputs, _pass_for(inputs))


def logprobs(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """As `reference.logprobs` at every row, the entropy detached."""
    return chunked.logprobs(inputs, _pass_for(inputs))
