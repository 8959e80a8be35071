"""What both backends share: the checked inputs of a call, and the step from log-probs to coefficients.

Left out on purpose: any matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cispo.types import ConfigError, DataError, NonFiniteError, Objective


def fail(argument: str, problem: str) -> None:
    raise DataError(f"{argument}: {problem}")


@dataclass
class HeadInputs:
    """hidden_TD, head_VD (and bias_V) in a floating dtype, targets_T long, all on one device. Logits are divided by
    `temperature`. Products and log-softmax run in `compute_dtype` or wider; None takes the inputs' own dtype."""

    hidden_TD: Tensor
    head_VD: Tensor
    targets_T: Tensor
    bias_V: Tensor | None
    temperature: float
    compute_dtype: torch.dtype | None
    memory_budget: int

    @property
    def wide(self) -> torch.dtype:
        """The dtype of log-softmax, coefficients and accumulators."""
        return torch.float64 if torch.float64 in (self.hidden_TD.dtype, self.compute_dtype) else torch.float32

    def check(self) -> None:
        hidden, head, bias = self.hidden_TD, self.head_VD, self.bias_V
        for name, x, axes in (("hidden_TD", hidden, "[T, D]"), ("head_VD", head, "[V, D]")):
            if x.ndim != 2:
                fail(name, f"shape {tuple(x.shape)} is not {axes}; flatten batch and sequence into rows")
            if not x.is_floating_point():
                fail(name, f"dtype {x.dtype} is not a floating dtype")
            if hasattr(x, "full_tensor"):
                fail(name, "is a sharded DTensor; gather it first: full_tensor(grad_placements=[Partial()])")
        D, V = hidden.shape[1], head.shape[0]
        if head.shape[1] != D:
            fail("head_VD", f"shape {tuple(head.shape)} does not end in D = {D} of hidden_TD {tuple(hidden.shape)}")
        if V == 0:
            fail("head_VD", "has no rows: the vocabulary is empty")
        if bias is not None and bias.shape != (V,):
            fail("bias_V", f"shape {tuple(bias.shape)} is not [V] = [{V}]")
        if self.targets_T.dtype != torch.int64:
            fail("targets_T", f"dtype {self.targets_T.dtype} is not torch.int64")
        self.check_column("targets_T", self.targets_T)
        for name, x in (("head_VD", head), ("bias_V", bias)):
            if x is None:
                continue
            if x.device != hidden.device:
                fail(name, f"is on {x.device} but hidden_TD is on {hidden.device}")
            if x.dtype != hidden.dtype and self.compute_dtype is None:
                fail(name, f"dtype {x.dtype} differs from hidden_TD's {hidden.dtype}; cast one or set compute_dtype")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"temperature = {self.temperature}: must be a positive finite number; 1.0 is the policy's own"
            )
        if self.compute_dtype not in (None, torch.float32, torch.float64):
            raise ConfigError(
                f"compute_dtype = {self.compute_dtype}: use torch.float32, or None for the inputs' own dtype"
            )
        if self.memory_budget <= 0:
            raise ConfigError(f"memory_budget = {self.memory_budget}: must be a positive number of bytes")

    def check_column(self, name: str, x: Tensor) -> None:
        T = self.hidden_TD.shape[0]
        if not isinstance(x, Tensor):
            fail(name, f"is {type(x).__name__}, not a tensor of T = {T} values")
        if x.shape != (T,):
            fail(name, f"shape {tuple(x.shape)} is not [T] = [{T}]")
        if x.device != self.hidden_TD.device:
            fail(name, f"is on {x.device} but hidden_TD is on {self.hidden_TD.device}")

    def check_targets(self, rows_R: Tensor) -> None:
        """Targets of the rows that are evaluated must be token ids; elsewhere they may be anything."""
        if not len(rows_R):
            return
        targets_R, V = self.targets_T[rows_R], self.head_VD.shape[0]
        low, high = torch.stack(targets_R.aminmax()).tolist()
        if low < 0 or high >= V:
            wrong_R = (targets_R < 0) | (targets_R >= V)
            i = int(wrong_R.nonzero()[0])
            fail("targets_T", f"{int(targets_R[i])} at row {int(rows_R[i])} is not a token id below V = {V}")


@dataclass
class PolicyInputs(HeadInputs):
    """A call of `linear_policy_loss`. rows_R: the trained rows, in order. extra_E: rows that only want log-probs."""

    objective: Objective
    columns: Mapping[str, Tensor]
    weights_T: Tensor
    entropy_coef: float
    nonfinite: str
    rows_R: Tensor = field(init=False)
    extra_E: Tensor = field(init=False)

    def check_policy(self, evaluate_T: Tensor | None) -> None:
        self.check()
        if self.nonfinite not in ("raise", "drop"):
            raise ConfigError(f"nonfinite = {self.nonfinite!r}: use 'raise' or 'drop'")
        if not math.isfinite(self.entropy_coef):
            raise ConfigError(f"entropy_coef = {self.entropy_coef}: must be finite; 0 leaves the bonus out")
        self.check_column("weights_T", self.weights_T)
        for name, column in self.columns.items():
            self.check_column(f"columns[{name!r}]", column)
        trained_T = self.weights_T != 0
        if evaluate_T is None:
            self.rows_R, self.extra_E = trained_T.nonzero().flatten(), trained_T.new_empty(0, dtype=torch.int64)
        else:
            self.check_column("evaluate_T", evaluate_T)
            if evaluate_T.dtype != torch.bool:
                fail("evaluate_T", f"dtype {evaluate_T.dtype} is not torch.bool")
            self.rows_R = (trained_T & evaluate_T).nonzero().flatten()
            self.extra_E = (~trained_T & evaluate_T).nonzero().flatten()
        self.check_targets(self.rows_R)
        self.check_targets(self.extra_E)


def coefficients(inputs: PolicyInputs, logprobs_C: Tensor, rows_C: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per token, coefficient c = d(Σ w·loss)/d(log π), and which rows are non-finite; all of shape [C], detached.

    At a non-finite row loss and coefficient are 0. Where the call says `nonfinite="raise"` the caller then raises
    through `raise_nonfinite`, once for all chunks, so that a GPU is asked only once.
    """
    columns_C = {name: column[rows_C] for name, column in inputs.columns.items()}
    weights_C = inputs.weights_T[rows_C]
    can_differentiate = not torch.is_inference_mode_enabled()
    with torch.set_grad_enabled(can_differentiate):
        leaf_C = logprobs_C.detach().requires_grad_(can_differentiate)
        loss_C = inputs.objective(leaf_C, **columns_C)
        if not isinstance(loss_C, Tensor) or loss_C.shape != leaf_C.shape:
            got = tuple(loss_C.shape) if isinstance(loss_C, Tensor) else type(loss_C).__name__
            fail("objective", f"returned {got} for {len(leaf_C)} log-probs; it must return one loss per token, [T]")
        coef_C = torch.zeros_like(leaf_C)
        if can_differentiate:
            if not loss_C.requires_grad:
                fail("objective", "returned a tensor that does not depend differentiably on logprobs (detached?)")
            (coef_C,) = torch.autograd.grad(loss_C, leaf_C, weights_C.to(loss_C.dtype), allow_unused=True)
    if coef_C is None:
        fail("objective", "returned a tensor that does not depend differentiably on logprobs")
    loss_C = loss_C.detach().to(logprobs_C.dtype)
    finite_C = loss_C.isfinite() & coef_C.isfinite() & logprobs_C.isfinite() & weights_C.isfinite()
    for column_C in columns_C.values():
        if column_C.is_floating_point():
            finite_C &= column_C.isfinite()
    return torch.where(finite_C, loss_C, 0.0), torch.where(finite_C, coef_C, 0.0), ~finite_C


def raise_nonfinite(inputs: PolicyInputs, logprobs_T: Tensor, row: int) -> None:
    """Name what is not finite at a trained row. Columns come first: they are the cause where the loss is the effect."""
    here = torch.tensor([row], device=logprobs_T.device)
    named = {f"columns[{name!r}]": column[here] for name, column in inputs.columns.items()}
    named |= {"weights_T": inputs.weights_T[here], "the log-prob of the target": logprobs_T[here]}
    named["the loss"] = inputs.objective(logprobs_T[here], **{name: x[here] for name, x in inputs.columns.items()})
    for name, value in named.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise NonFiniteError(f"{name} is {value.item()} at row {row}, which is trained; {_REMEDY}")
    raise NonFiniteError(
        f"the loss's derivative in the log-prob is not finite at row {row}, which is trained; {_REMEDY}"
    )


_REMEDY = "find its cause, or pass nonfinite='drop' to leave such rows out and count them"
