"""The two public functions of the head: check the inputs, choose the backend, name what is not finite.

Left out on purpose: every formula (see `reference.py`, the spec).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cispo.head import chunked, reference
from cispo.head.inputs import HeadInputs, PolicyInputs, raise_nonfinite
from cispo.types import ConfigError, Objective

Backend = Literal["auto", "reference", "chunked"]
MEMORY_BUDGET = 256 << 20
"""Bytes that a call may use beyond its inputs and their gradients."""


@dataclass(frozen=True)
class LinearPolicyLoss:
    """loss: scalar Σ weights·loss, differentiable in hidden, head and bias. logprobs_T, entropy_T, loss_T: detached, 0
    where a row was not evaluated. dropped: trained rows left out because a value was not finite."""

    loss: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor
    loss_T: Tensor
    dropped: int


def _choose(backend: str) -> str:
    match backend:
        case "reference" | "chunked":
            return backend
        case "auto":
            return "chunked"
    raise ConfigError(f"backend = {backend!r}: unknown; use 'auto', 'chunked' or 'reference'")


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
    memory_budget: int = MEMORY_BUDGET,
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
    inputs and gradients.

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
        memory_budget=memory_budget,
        objective=objective,
        columns=columns,
        weights_T=weights_T.detach(),
        entropy_coef=entropy_coef,
        nonfinite=nonfinite,
    )
    inputs.check_policy(evaluate_T)
    run = reference.policy_loss if _choose(backend) == "reference" else chunked.policy_loss
    with torch.autocast(hidden_TD.device.type, enabled=False):
        loss, logprobs_T, entropy_T, loss_T, bad_T = run(inputs)
    dropped = int(bad_T.sum())
    if dropped and nonfinite == "raise":
        raise_nonfinite(inputs, logprobs_T, int(bad_T.nonzero()[0]))
    if dropped:
        logprobs_T, entropy_T = torch.where(bad_T, 0.0, logprobs_T), torch.where(bad_T, 0.0, entropy_T)
    return LinearPolicyLoss(loss, logprobs_T, entropy_T, loss_T, dropped)


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
    memory_budget: int = MEMORY_BUDGET,
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
        memory_budget=memory_budget,
    )
    inputs.check()
    rows_T = torch.arange(len(targets_T), device=targets_T.device)
    inputs.check_targets(rows_T)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        if _choose(backend) == "reference":
            logprobs_T, entropy_T = reference.logprobs(inputs, rows_T)
            return logprobs_T, entropy_T.detach()
        return chunked.logprobs(inputs)
