"""The loss functions of the Tinker API, as objectives of ours: what a request must carry, and the metrics it gets back.

Every loss is a plain sum over tokens and datums. The formulas are `objectives.py`'s; here stand the names, defaults and
inputs of the wire, and the checks that make a bad request a clear refusal before any work. Left out on purpose:
`stable_reinforce`, whose formula is not public, and losses traced on the server (`create_custom_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from cispo import objectives
from cispo.server.wire import Datum, TrainRequest, UserError


@dataclass(frozen=True)
class LossFn:
    """One loss of the wire. inputs: required names; optional: allowed ones; config: settings and their defaults."""

    inputs: frozenset[str]
    optional: frozenset[str] = frozenset()
    config: Mapping[str, float] = field(default_factory=dict)
    thresholds: bool = False
    policy: bool = True


_RL = frozenset({"target_tokens", "logprobs", "advantages"})
_CLIPS = frozenset({"clip_low_threshold", "clip_high_threshold"})


def _clipped(low: float, high: float, *more: str) -> LossFn:
    config = {"clip_low_threshold": low, "clip_high_threshold": high}
    return LossFn(_RL, frozenset({"weights", *_CLIPS, *more}), config, thresholds=True)


LOSSES: dict[str, LossFn] = {
    "cross_entropy": LossFn(frozenset({"target_tokens"}), frozenset({"weights"}), policy=False),
    "importance_sampling": LossFn(_RL, frozenset({"weights"})),
    "ppo": _clipped(0.8, 1.2),
    "cispo": _clipped(0.0, 4.0),
    "dro": LossFn(_RL, frozenset({"weights"}), {"beta": 0.05}),
    "gspo": _clipped(1 - 3e-4, 1 + 4e-4, "sequence_ratio_mask"),
}


@dataclass(frozen=True)
class Row:
    """One datum, ready for the model: S tokens and, per target, what the objective reads.

    K = 1: targets [S]. K > 1: targets [S·K], row-major. weights and columns have the length of targets.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    columns: Mapping[str, Tensor]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TrainWork:
    """A checked `forward_backward`."""

    rows: tuple[Row, ...]
    objective: Callable[..., Tensor]
    loss_fn: str
    forward_only: bool

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


def prepare(request: TrainRequest, vocabulary: int) -> TrainWork:
    """Check everything that a request says before any of it is used. Raises UserError."""
    spec = LOSSES.get(request.loss_fn)
    if spec is None:
        hint = "cispo" if request.loss_fn == "stable_reinforce" else "one of those, or forward_backward_custom"
        why = "has no public formula" if request.loss_fn == "stable_reinforce" else "is unknown"
        raise UserError(
            f"loss_fn {request.loss_fn!r} {why} and is not served; supported: {', '.join(LOSSES)}. Use {hint}"
        )
    config = dict(spec.config)
    for key, value in request.config.items():
        if key not in spec.config:
            known = ", ".join(spec.config) or "no settings"
            raise UserError(f"loss_fn_config.{key} is unknown to {request.loss_fn}, which knows {known}")
        if isinstance(value, str):
            raise UserError(f"loss_fn_config.{key} is the text {value!r}; send a number")
        config[key] = float(value)
    if spec.thresholds:
        _check_thresholds(config["clip_low_threshold"], config["clip_high_threshold"], "loss_fn_config")
    if config.get("beta", 0.0) < 0:
        raise UserError(f"loss_fn_config.beta is {config['beta']:g}: it weighs a penalty and must not be negative")
    rows = tuple(
        _row(datum, f"data[{i}]", spec, request, config, i, vocabulary) for i, datum in enumerate(request.data)
    )
    return TrainWork(rows, _objective(request.loss_fn, config), request.loss_fn, request.forward_only)


def _check_thresholds(low: float, high: float, where: str) -> None:
    if not 0 <= low <= high:
        raise UserError(
            f"{where}: clip_low_threshold {low:g} and clip_high_threshold {high:g} are out of order; they are absolute "
            "bounds on the importance ratio with 0 ≤ low ≤ high (not offsets from 1)"
        )


def _objective(name: str, config: Mapping[str, float]) -> Callable[..., Tensor]:
    match name:
        case "cross_entropy":
            return objectives.cross_entropy
        case "importance_sampling":
            return objectives.importance_sampling
        case "ppo":
            return objectives.ppo_clip
        case "cispo":
            return objectives.cispo
        case "gspo":
            return objectives.gspo
        case "dro":
            return partial(objectives.dro, beta=config["beta"])
    raise AssertionError(name)


def _row(
    datum: Datum,
    where: str,
    spec: LossFn,
    request: TrainRequest,
    config: Mapping[str, float],
    number: int,
    vocabulary: int,
) -> Row:
    S = len(datum.tokens)
    names = set(datum.inputs)
    if missing := spec.inputs - names:
        raise UserError(f"{where}.loss_fn_inputs lacks {', '.join(sorted(missing))}, which {request.loss_fn} needs")
    if unknown := names - spec.inputs - spec.optional:
        raise UserError(
            f"{where}.loss_fn_inputs.{sorted(unknown)[0]} is unknown to {request.loss_fn}, which takes "
            f"{', '.join(sorted(spec.inputs | spec.optional))}"
        )
    targets = datum.inputs["target_tokens"]
    if targets.is_floating_point():
        raise UserError(f"{where}.loss_fn_inputs.target_tokens is float; send int64")
    if len(targets) != S or targets.numel() == 0:
        raise UserError(f"{where}: target_tokens has {list(targets.shape)} entries for {S} model-input tokens")
    if targets.ndim == 2 and spec.policy:
        raise UserError(f"{where}: target_tokens of shape [N, K] goes with cross_entropy only, not {request.loss_fn}")
    bad = (targets < 0) | (targets >= vocabulary)
    if bool(bad.any()):
        token = int(targets[bad][0])
        raise UserError(
            f"{where}: target token {token} is outside the vocabulary of {vocabulary} (weight 0 masks a token)"
        )
    columns: dict[str, Tensor] = {}
    for name, value in datum.inputs.items():
        if name == "target_tokens":
            continue
        if value.shape != targets.shape:
            raise UserError(f"{where}.{name} has shape {list(value.shape)}, target_tokens {list(targets.shape)}")
        value = value.float()
        if not bool(torch.isfinite(value).all()):
            at = int((~torch.isfinite(value.flatten())).nonzero()[0])
            raise UserError(
                f"{where}.{name} is {float(value.flatten()[at])} at position {at}; every value must be finite"
            )
        columns[name] = value.flatten()
    default = 1.0 if spec.policy or not request.forward_only else 0.0
    weights = columns.pop("weights", None)
    if weights is None:
        weights = torch.full((targets.numel(),), default)
    if "logprobs" in columns:
        columns["anchor_logprobs"] = columns.pop("logprobs")
    if spec.thresholds:
        bounds = {}
        for name in sorted(_CLIPS):
            bounds[name] = columns.get(name, torch.full((S,), config[name]))
        low, high = bounds["clip_low_threshold"], bounds["clip_high_threshold"]
        wrong = ~((low >= 0) & (low <= high))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            _check_thresholds(float(low[at]), float(high[at]), f"{where} position {at}")
        columns.update(bounds)
    if request.loss_fn == "gspo":
        mask = columns.pop("sequence_ratio_mask", None)
        mask = columns["advantages"] != 0 if mask is None else mask != 0
        weights = torch.where(mask, weights, 0.0)
        columns["rows"] = torch.full((S,), float(number))
    return Row(datum.tokens, targets.flatten(), weights, columns, tuple(targets.shape))


# ------------------------------------------------------------------------------------------------------------ metrics


def metrics_of(work: TrainWork, loss: float, logprobs: Tensor, entropy: Tensor) -> dict[str, float]:
    """`name:reducer` metrics over all of a request's targets, flat in the order of its rows.

    Statistics of the ratio are over tokens with weight and advantage; where there is none, they are those of a policy
    that equals its sampler. `loss:sum` is Σ weights·loss.
    """
    weights = torch.cat([row.weights for row in work.rows])
    trained = weights != 0
    out = {
        "loss:sum": loss,
        "tokens:sum": float(trained.sum()),
        "entropy:mean": float(entropy[trained].mean()) if bool(trained.any()) else 0.0,
    }
    if not LOSSES[work.loss_fn].policy:
        return out
    column = {name: torch.cat([row.columns[name] for row in work.rows]) for name in work.rows[0].columns}
    used = trained & (column["advantages"] != 0)
    log_ratio = (logprobs - column["anchor_logprobs"])[used]
    if not len(log_ratio):
        log_ratio = torch.zeros(1)
    ratio = log_ratio.exp()
    out |= {
        "ratio:mean": float(ratio.mean()),
        "ratio:max": float(ratio.max()),
        "ratio:min": float(ratio.min()),
        "effective_sample_size:mean": float(ratio.sum() ** 2 / (len(ratio) * ratio.square().sum())),
        "kl_sampler_trainer_k1:mean": float(-log_ratio.mean()),
        "kl_sampler_trainer_k3:mean": float((torch.expm1(log_ratio) - log_ratio).mean()),
        "abs_logprob_difference:max": float(log_ratio.abs().max()),
    }
    if "clip_low_threshold" in column and bool(used.any()):
        above = ratio > column["clip_high_threshold"][used]
        below = ratio < column["clip_low_threshold"][used]
        positive = column["advantages"][used] > 0
        out |= {
            "clipped_fraction:mean": float((above | below).float().mean()),
            "above_cap_fraction_positive:mean": float((above & positive).float().mean()),
            "above_cap_fraction_negative:mean": float((above & ~positive).float().mean()),
            "below_floor_fraction:mean": float(below.float().mean()),
        }
    elif "clip_low_threshold" in column:
        names = (
            "clipped_fraction",
            "above_cap_fraction_positive",
            "above_cap_fraction_negative",
            "below_floor_fraction",
        )
        out |= {f"{name}:mean": 0.0 for name in names}
    return out
