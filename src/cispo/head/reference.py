"""The specification of the head: full logits and plain autograd. Every other backend is tested against it.

Left out on purpose: speed and memory. It holds `[T, V]` in float32 (float64 for float64 inputs) several times over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cispo.head.inputs import HeadInputs, PolicyInputs, coefficients


def logprobs(inputs: HeadInputs, rows_R: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Log-prob of the target and entropy at the given rows (default: all), both differentiable."""
    hidden_RD, head_VD = inputs.hidden_TD[rows_R].to(inputs.wide), inputs.head_VD.to(inputs.wide)
    logits_RV = hidden_RD @ head_VD.T
    if inputs.bias_V is not None:
        logits_RV = logits_RV + inputs.bias_V
    logp_RV = torch.log_softmax(logits_RV / inputs.temperature, dim=-1)
    plogp_RV = torch.where(logp_RV.isneginf(), 0.0, logp_RV.exp() * logp_RV.clamp_min(torch.finfo(inputs.wide).min))
    return logp_RV.gather(1, inputs.targets_T[rows_R, None])[:, 0], -plogp_RV.sum(-1)


def policy_loss(inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scalar loss, then log-probs, entropy, per-token loss and non-finite flags over T, all detached."""
    logp_T, entropy_T, loss_T = (inputs.hidden_TD.new_zeros(len(inputs.targets_T), dtype=inputs.wide) for _ in range(3))
    bad_T = torch.zeros_like(inputs.targets_T, dtype=torch.bool)
    with torch.no_grad():
        rows = torch.cat([inputs.rows_R, inputs.extra_E])
        logp_T[rows], entropy_T[rows] = logprobs(inputs, rows)
        loss_T[inputs.rows_R], _, bad_T[inputs.rows_R] = coefficients(inputs, logp_T[inputs.rows_R], inputs.rows_R)

    rows = inputs.rows_R[~bad_T[inputs.rows_R]]
    logp_R, entropy_R = logprobs(inputs, rows)
    loss_R = inputs.objective(logp_R, **{name: column[rows] for name, column in inputs.columns.items()})
    loss = (inputs.weights_T[rows] * (loss_R - inputs.entropy_coef * entropy_R)).sum()
    return loss.to(inputs.wide), logp_T, entropy_T, loss_T, bad_T
