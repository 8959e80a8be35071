"""A policy loss for verl: `actor_rollout_ref.actor.policy_loss.loss_mode=cispo_band`, registered by importing this.

verl's own `cispo` with three differences: bounds are absolute and come from `CISPO_LOW` and `CISPO_HIGH` of the
environment (default 0 and 4) or from `configure`; masked tokens are replaced before any arithmetic, so that a −inf
there reaches nothing; and the metrics count both signs of A. Aggregation and rollout weights are verl's. Left out on
purpose: sampling, advantages and KL, which verl has.

    python -c "import cispo.integrations.verl" && python -m verl.trainer.main_ppo … (or set actor.external_lib)
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from cispo import objectives
from cispo.metrics import ratio_metrics
from cispo.types import ConfigError

NAME = "cispo_band"
_bounds = (float(os.environ.get("CISPO_LOW", "0")), float(os.environ.get("CISPO_HIGH", "4")))


def configure(clip_low_threshold: float = 0.0, clip_high_threshold: float = 4.0) -> None:
    """Set the absolute band of the weight. Raises ConfigError where it is out of order."""
    global _bounds
    if not 0 <= clip_low_threshold <= clip_high_threshold:
        raise ConfigError(
            f"clip_low_threshold = {clip_low_threshold:g}, clip_high_threshold = {clip_high_threshold:g}: both are "
            "absolute bounds on the ratio, 0 <= low <= high; 0 and 4 are usual"
        )
    _bounds = (clip_low_threshold, clip_high_threshold)


@register_policy_loss(NAME)
def cispo_band(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's interface: [B, S] each; the scalar loss and metrics."""
    low, high = _bounds
    mask = response_mask.bool()
    old_log_prob, log_prob, advantages = (torch.where(mask, x, 0.0) for x in (old_log_prob, log_prob, advantages))
    loss = objectives.cispo(
        log_prob,
        anchor_logprobs=old_log_prob,
        advantages=advantages,
        clip_low_threshold=low,
        clip_high_threshold=high,
    )
    if rollout_is_weights is not None:
        loss = loss * torch.where(mask, rollout_is_weights, 0.0)
    batch_info = getattr(config, "global_batch_info", None) or {}
    pg_loss = agg_loss(loss_mat=loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **batch_info)
    ratio = (log_prob - old_log_prob).detach().exp()[mask]
    measured = ratio_metrics(ratio, advantages[mask], low, high)
    metrics = {f"actor/{name}": value for name, value in measured.items()}
    if measured:
        metrics |= {"actor/pg_clipfrac": measured["clip/outside"], "actor/pg_clipfrac_lower": measured["clip/below"]}
        metrics["actor/ppo_kl"] = float((old_log_prob - log_prob)[mask].mean())
    return pg_loss, metrics
