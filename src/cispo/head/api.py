"""The two public functions of the head: check the inputs, choose the backend, name what is not finite.

Left out on purpose: every formula (see `reference.py`, the spec).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from cispo.head import chunked, reference
from cispo.head.inputs import HeadInputs, PolicyInputs, raise_nonfinite
from cispo.types import ConfigError, Objective

Backend = Literal["auto", "reference", "chunked", "triton"]
CPU_BUDGET, DEVICE_BUDGET = 256 << 20, 1792 << 20
"""Bytes that a call may use beyond its inputs and their gradients, where the caller does not say."""


@dataclass(frozen=True)
class LinearPolicyLoss:
    """loss: scalar Σ weights·loss, differentiable in hidden, head and bias. logprobs_T, entropy_T, loss_T: detached, 0
    where a row was not evaluated. dropped_T: trained rows left out because a value was not finite."""

    loss: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor
    loss_T: Tensor
    dropped_T: Tensor

    @property
    def dropped(self) -> int:
        return int(self.dropped_T.sum())


def _backend(name: str, device: torch.device) -> ModuleType:
    """The module that computes. `triton` is imported only here, and only when it is going to be used."""
    match name:
        case "auto":
            has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
            return _backend("triton" if has_triton else "chunked", device)
        case "reference":
            return reference
        case "chunked":
            return chunked
        case "triton":
            if importlib.util.find_spec("triton") is None:
                raise ConfigError("backend = 'triton': the package triton is not installed; use 'auto' or 'chunked'")
            from cispo.head import triton

            if device.type != "cuda" and not triton.INTERPRETED:
                raise ConfigError(f"backend = 'triton': hidden_TD is on {device}, not on CUDA; use 'auto' or 'chunked'")
            return triton
    raise ConfigError(f"backend = {name!r}: unknown; use 'auto', 'chunked', 'triton' or 'reference'")


def _budget(given: int | None, device: torch.device) -> int:
    if given is None:
        return CPU_BUDGET if device.type == "cpu" else DEVICE_BUDGET
    return given


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, matmul inputs become its dtype, as they would in `torch.nn.functional.linear`."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


@torch.compiler.disable
def linear_policy_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    *,
    objective: Objective,
    columns: Mapping[str, Tensor],
    weights_T: Tensor,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    backend: Backend = "auto",
    nonfinite: Literal["raise", "drop"] = "raise",
    entropy_coef: float = 0.0,
    evaluate_T: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> LinearPolicyLoss:
    """Loss Σ_t weights_t · objective(log π_t) of logits (hidden @ headᵀ + bias)/temperature, in one pass.

    hidden_TD: [T, D], the model's last hidden states. head_VD: [V, D]. targets_T: long [T], the token whose log-prob
    each row gives. objective: token-local, `(logprobs, **columns) -> loss`, both [n]; called on subsets of the rows.
    columns: [T] each. weights_T: [T]; a row of weight 0 may hold anything (inf, NaN, any target) in hidden and columns,
    and reaches neither loss nor gradient nor the outputs.

    nonfinite: what to do where a column, log-prob, loss or derivative at a trained row is not finite: "raise"
    NonFiniteError, or "drop" the row and count it. entropy_coef β adds −β Σ weights·entropy to the loss.
    evaluate_T: bool [T], the rows to run; default: weight ≠ 0. A trained row left out adds nothing (for rows known to
    have a zero coefficient), and a row of weight 0 put in gets log-prob and entropy and nothing else.
    compute_dtype=torch.float32 runs the products of a bf16 head in float32 (MiniMax-M1 §3). Log-softmax is in float32
    (float64 for float64 inputs) in any case, and gradients come back in the inputs' dtypes. memory_budget: bytes beyond
    inputs and gradients (default: 256 MiB on CPU, 1.75 GiB on an accelerator); it never goes below one row of logits.

    Raises DataError for shapes, dtypes, devices, targets or objectives that do not fit, ConfigError for settings,
    NonFiniteError as above; each names the argument. Backward of backward is refused except by `reference`.
    """
    if compute_dtype is None:
        hidden_TD, head_VD, bias_V = _autocast(hidden_TD, head_VD, bias_V)
    inputs = PolicyInputs(
        hidden_TD=hidden_TD,
        head_VD=head_VD,
        targets_T=targets_T,
        bias_V=bias_V,
        temperature=temperature,
        compute_dtype=compute_dtype,
        memory_budget=_budget(memory_budget, hidden_TD.device),
        objective=objective,
        columns=columns,
        weights_T=weights_T.detach(),
        entropy_coef=entropy_coef,
        nonfinite=nonfinite,
    )
    inputs.check_policy(evaluate_T)
    run = _backend(backend, hidden_TD.device).policy_loss
    with torch.autocast(hidden_TD.device.type, enabled=False):
        loss, logprobs_T, entropy_T, loss_T, bad_T = run(inputs)
    dropped = int(bad_T.sum())
    if dropped and nonfinite == "raise":
        raise_nonfinite(inputs, logprobs_T, int(bad_T.nonzero()[0]))
    if dropped:
        logprobs_T, entropy_T = torch.where(bad_T, 0.0, logprobs_T), torch.where(bad_T, 0.0, entropy_T)
    return LinearPolicyLoss(loss, logprobs_T, entropy_T, loss_T, bad_T)


@torch.compiler.disable
def linear_logprobs(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    backend: Backend = "auto",
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target (differentiable) and entropy (detached), float32 [T] each (float64 for float64 inputs).

    For objectives over whole sequences: the logits are computed again in backward, four products in all. Rows whose
    incoming gradient is exactly zero are left out there, whatever they hold. Arguments and errors as in
    `linear_policy_loss`.
    """
    if compute_dtype is None:
        hidden_TD, head_VD, bias_V = _autocast(hidden_TD, head_VD, bias_V)
    inputs = HeadInputs(
        hidden_TD=hidden_TD,
        head_VD=head_VD,
        targets_T=targets_T,
        bias_V=bias_V,
        temperature=temperature,
        compute_dtype=compute_dtype,
        memory_budget=_budget(memory_budget, hidden_TD.device),
    )
    inputs.check()
    rows_T = torch.arange(len(targets_T), device=targets_T.device)
    inputs.check_targets(rows_T)
    run = _backend(backend, hidden_TD.device).logprobs
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logprobs_T, entropy_T = run(inputs)
    return logprobs_T, entropy_T.detach()
