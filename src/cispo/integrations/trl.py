"""`CISPOTrainer`: TRL's `GRPOTrainer` with our head, our normaliser and our metrics; everything else is TRL's.

    from cispo.integrations.trl import CISPOTrainer
    args = GRPOConfig(loss_type="cispo", epsilon_high=5.0)
    trainer = CISPOTrainer(model, reward_funcs, args=args, train_dataset=data)

What changes: the loss and its gradient come from one pass through the fused head over trained tokens only; the token
mean is over the whole optimizer window whatever the accumulation (TRL #5619); completions whose coefficient is zero
cost no backward head matmul; and each step logs the ratio, clip fractions by the sign of A, and effective sample size.
Written against TRL 1.16. Left out on purpose: several processes (`cispo train` has a cluster), images, and TRL's
options that need something other than the sampled tokens' log-probs; each is refused by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from cispo import model as models
from cispo import objectives
from cispo.head import linear_policy_loss
from cispo.metrics import ratio_metrics
from cispo.types import ConfigError

_REFUSED = {
    "top_entropy_quantile": (1.0, "masks by entropy, which the head knows only after the loss"),
    "off_policy_mask_threshold": (None, "is a whole-sequence mask; `cispo train` has it as algorithm.opsm_delta"),
    "use_adaptive_entropy": (False, "adapts the entropy bonus, which is not here"),
    "entropy_coef": (0.0, "is an entropy bonus; `cispo train` has it as algorithm.entropy_bonus"),
    "importance_sampling_level": ("token", "makes the weight a sequence's; CISPO's is a token's"),
}


class CISPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` for `loss_type="cispo"`. Arguments as there.

    Raises ConfigError for a missing `epsilon_high` (TRL would cap every weight at epsilon, 0.2), another loss type,
    several processes, or an option of `_REFUSED`.
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        args = named.get("args") or next((a for a in positional if hasattr(a, "loss_type")), None)
        if args is None:
            raise ConfigError('args is missing: pass GRPOConfig(loss_type="cispo", epsilon_high=5.0)')
        _check(args)
        super().__init__(*positional, **named)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"CISPOTrainer on {self.accelerator.num_processes} processes: it runs on one; use cispo train"
            )

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        unwrapped = self.accelerator.unwrap_model(model)
        mask_BC = _mask(inputs)
        C = mask_BC.shape[1]
        tokens_BS = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_BS = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        head_VD, bias_V = models.head_of(unwrapped)
        columns, objective = self._columns(inputs, mask_BC)
        with self.accelerator.autocast():
            hidden_BSD = models.hidden_states(unwrapped, tokens_BS, attention_BS, positions_BS)
            result = linear_policy_loss(
                hidden_BSD[:, -C - 1 : -1][mask_BC],
                head_VD,
                inputs["completion_ids"][mask_BC],
                objective=objective,
                columns=columns,
                weights_T=torch.full((int(mask_BC.sum()),), 1 / self._window_tokens(mask_BC), device=mask_BC.device),
                bias_V=bias_V,
                temperature=self.temperature / models.logit_scale_of(unwrapped),
                compute_dtype=torch.float32 if self.args.cast_lm_head_to_fp32 else None,
            )
        self._log(result.logprobs_T, result.entropy_T, columns)
        return result.loss

    def _columns(self, inputs: dict[str, Any], mask_BC: Tensor) -> tuple[dict[str, Tensor], Any]:
        """The flat columns of trained tokens, and the objective that reads them."""
        advantages = inputs["advantages"]
        advantages_BC = advantages if advantages.dim() == 2 else advantages[:, None].expand(mask_BC.shape)
        columns = {"advantages": advantages_BC.expand(mask_BC.shape)[mask_BC].float()}
        cap = {"clip_low_threshold": 0.0, "clip_high_threshold": self.epsilon_high}
        objective = partial(objectives.cispo, **cap)
        fresh = inputs.get("old_per_token_logps") is None  # TRL: one update on fresh samples, where the ratio is 1
        if not fresh:
            columns["anchor_logprobs"] = inputs["old_per_token_logps"][mask_BC].float()
        if self.use_vllm and self.vllm_importance_sampling_correction:
            columns["correction_weights"] = inputs["importance_sampling_ratio"].expand(mask_BC.shape)[mask_BC].float()
            objective = objectives.with_weights(objective)
        if self.beta != 0.0:
            columns["reference_logprobs"] = inputs["ref_per_token_logps"][mask_BC].float()
            weighted = self.args.use_bias_correction_kl
            objective = objectives.with_kl(objective, coef=self.beta, form="k3", ratio_weighted=weighted)
        return columns, partial(_on_policy, objective) if fresh else objective

    def _window_tokens(self, mask_BC: Tensor) -> float:
        """Trained tokens of the whole optimizer window that this micro-batch is of."""
        window, per_generation = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        if not self.model.training or self._buffered_inputs is None:
            return max(1.0, float(mask_BC.sum()))
        if window >= per_generation:  # a window of whole generations: their mean
            tokens = sum(float(_mask(x).sum()) for x in self._buffered_inputs) * (window / per_generation)
        else:
            start = self._step % per_generation // window * window
            tokens = sum(float(_mask(x).sum()) for x in self._buffered_inputs[start : start + window])
        return max(1.0, tokens)

    def _log(self, logprobs_T: Tensor, entropy_T: Tensor, columns: dict[str, Tensor]) -> None:
        if not len(logprobs_T):
            return
        metrics = self._metrics["train" if self.model.training else "eval"]
        anchor_T = columns.get("anchor_logprobs", logprobs_T)
        measured = ratio_metrics((logprobs_T - anchor_T).exp(), columns["advantages"], 0.0, self.epsilon_high)
        for name, value in measured.items():
            metrics[f"cispo/{name}"].append(value)
        metrics["cispo_clip_ratio"].append(measured["clip/above_and_positive"])
        metrics["entropy"].append(float(entropy_T.mean()))
        if "reference_logprobs" in columns:
            metrics["kl"].append(float(objectives.kl_estimate(logprobs_T, columns["reference_logprobs"]).mean()))


def _on_policy(objective: Any, logprobs: Tensor, **columns: Tensor) -> Tensor:
    return objective(logprobs, anchor_logprobs=logprobs.detach(), **columns)


def _mask(inputs: dict[str, Any]) -> Tensor:
    mask_BC = inputs["completion_mask"]
    return (mask_BC * inputs["tool_mask"] if "tool_mask" in inputs else mask_BC).bool()


def _check(args: Any) -> None:
    problems = []
    if args.loss_type != "cispo":
        problems.append(f"loss_type = {args.loss_type!r}: CISPOTrainer is for loss_type='cispo'; use GRPOTrainer")
    if args.epsilon_high is None:
        problems.append(
            f"epsilon_high is missing: TRL would cap every weight at epsilon = {args.epsilon}; pass epsilon_high=5.0"
        )
    for name, (harmless, why) in _REFUSED.items():
        if getattr(args, name, harmless) != harmless:
            problems.append(f"{name} = {getattr(args, name)!r}: {why}; set {harmless!r}")
    if problems:
        raise ConfigError("CISPOTrainer: " + "\n".join(problems))
