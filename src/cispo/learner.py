"""`LocalLearner`: the four verbs on one process's model.

A batch is laid out in padded micro-batches of similar length; each runs the backbone, takes the trained positions out
of the padding, and hands them to the fused head, which turns any objective into a gradient in one pass. The layout
cannot change the result, because the weights already carry the whole window's normaliser. Parameters that are not
float32 are trained through float32 master copies, in which gradients are accumulated too. Left out on purpose: what the
objective is (`objectives.py`), when to step (`trainer.py`), and several ranks (`sharded.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cispo import model as models
from cispo.batching import micro_batches, pad_rows
from cispo.config import LearnerConfig
from cispo.head import LinearPolicyLoss, linear_logprobs, linear_policy_loss
from cispo.objectives import is_sequence_level
from cispo.types import AdamParams, Batch, DataError, LossOutput, NonFiniteError, Objective


@dataclass(frozen=True)
class _MicroBatch:
    """Padded rows on the device, and where their trained positions stand: in them, and in the batch's T positions."""

    tokens_BS: Tensor
    attention_mask_BS: Tensor | None
    positions_BS: Tensor
    inside: Tensor  # long [n]: indices into the B·S padded positions
    outside: Tensor  # long [n]: indices into the batch's T positions


class LocalLearner:
    """Trains `loaded.model` in this process.

    reference: a frozen model for `forward(reference=True)`; with LoRA none is needed (the model without its adapter).
    head_dtype: float32 runs the head in float32 whatever the model's dtype (MiniMax-M1 §3).
    """

    def __init__(
        self,
        loaded: models.LoadedModel,
        layout: LearnerConfig | None = None,
        *,
        head_dtype: torch.dtype | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self._layout = layout or LearnerConfig()
        self._head_dtype = head_dtype
        self._reference = reference
        self._logit_scale = models.logit_scale_of(self.model)
        self._device = next(self.model.parameters()).device
        self._names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._masters = [_master_of(p) for p in self._parameters]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [m for m in self._masters if m.ndim >= 2]},
                {"params": [m for m in self._masters if m.ndim < 2]},
            ],
            lr=0.0,
            fused=self._device.type in ("cpu", "cuda"),
        )

    # ------------------------------------------------------------------------------------------------------ verbs

    def forward_backward(
        self,
        batch: Batch,
        objective: Objective,
        *,
        temperature: float = 1.0,
        nonfinite: str = "raise",
        entropy_bonus: float = 0.0,
    ) -> LossOutput:
        """Add the gradient of Σ weights·(objective − entropy_bonus·entropy), over trained positions, to the sum so far.

        temperature divides the logits, as it did in sampling. nonfinite: "raise" stops at a NaN or infinity at a
        trained position (NonFiniteError), "drop" leaves that token out and counts it. After an error the accumulated
        gradient is cleared. An objective with `sequence_level` gets whole rows (a micro-batch splits none) and takes
        two passes through the head; "drop" then leaves out the whole row.
        """
        output = _Output(batch)
        try:
            for micro in self._micro_batches(batch):
                hidden_TD = self._hidden(self.model, micro)
                head = self._head(self.model)
                result = self._loss(batch, micro, hidden_TD, head, objective, temperature, nonfinite, entropy_bonus)
                result.loss.backward()
                output.add(micro, result.logprobs_T, result.entropy_T, float(result.loss.detach()), result.dropped_T)
            return self._collect(batch, output)
        except BaseException:
            self.zero_grad()
            raise

    def _loss(
        self,
        batch: Batch,
        micro: _MicroBatch,
        hidden_TD: Tensor,
        head: tuple[Tensor, Tensor | None],
        objective: Objective,
        temperature: float,
        nonfinite: str,
        entropy_bonus: float,
    ) -> LinearPolicyLoss:
        """The loss of one micro-batch, from its hidden states."""
        head_VD, bias_V = head
        inputs = (hidden_TD, head_VD, batch.targets_T[micro.outside].to(self._device))
        columns = {name: c[micro.outside].to(self._device) for name, c in batch.columns.items()}
        weights_T = batch.weights_T[micro.outside].to(self._device)
        options: dict[str, Any] = {
            "bias_V": bias_V,
            "temperature": temperature / self._logit_scale,
            "backend": self._layout.head_backend,
            "compute_dtype": self._head_dtype,
        }
        if is_sequence_level(objective):
            logprobs_T, entropy_T = linear_logprobs(*inputs, **options)
            return sequence_loss(
                objective, logprobs_T, entropy_T, columns=columns, weights_T=weights_T, nonfinite=nonfinite
            )
        return linear_policy_loss(
            *inputs,
            objective=objective,
            columns=columns,
            weights_T=weights_T,
            nonfinite=nonfinite,
            entropy_coef=entropy_bonus,
            **options,
        )

    def forward(self, batch: Batch, *, temperature: float = 1.0, reference: bool = False) -> LossOutput:
        """Log-probs and entropies at the batch's trained positions, under the policy or the reference model."""
        model = self._reference if reference and self._reference is not None else self.model
        if reference and model is self.model and not models.is_lora(model):
            raise DataError("learner: no reference model was given, and the policy has no adapter to take off")
        output = _Output(batch)
        with torch.no_grad(), _without_adapter(model, reference and model is self.model):
            for micro in self._micro_batches(batch):
                hidden_TD = self._hidden(model, micro)
                logprobs_T, entropy_T = self._logprobs(batch, micro, hidden_TD, self._head(model), temperature)
                output.add(micro, logprobs_T, entropy_T, 0.0)
            return self._collect(batch, output)

    def _logprobs(
        self,
        batch: Batch,
        micro: _MicroBatch,
        hidden_TD: Tensor,
        head: tuple[Tensor, Tensor | None],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        head_VD, bias_V = head
        return linear_logprobs(
            hidden_TD,
            head_VD,
            batch.targets_T[micro.outside].to(self._device),
            bias_V=bias_V,
            temperature=temperature / self._logit_scale,
            backend=self._layout.head_backend,
            compute_dtype=self._head_dtype,
        )

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """One AdamW step with the accumulated gradient, which is cleared. Raises NonFiniteError for a NaN gradient."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is not master and parameter.grad is not None:  # a gradient that no hook has moved
                _move_gradient(parameter, master)
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        gradients = [master.grad for master in self._masters]
        norms = self._norms(gradients)
        norm = float(torch.linalg.vector_norm(norms))
        if not math.isfinite(norm):
            infinite = (n for n, size in zip(self._names, norms.tolist(), strict=True) if not math.isfinite(size))
            worst = next(infinite, "their sum, each being finite")
            self.zero_grad()
            raise NonFiniteError(f"the gradient norm is {norm}; first in {worst}. No weight was changed")
        if params.grad_clip_norm and norm > params.grad_clip_norm:
            torch._foreach_mul_(gradients, params.grad_clip_norm / norm)
        for group, decay in zip(self._optimizer.param_groups, (params.weight_decay, 0.0), strict=True):
            group.update(
                lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=params.eps, weight_decay=decay
            )
        self._optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)
        self.zero_grad()
        return {"grad_norm": norm}

    def zero_grad(self) -> None:
        for tensor in (*self._parameters, *self._masters):
            tensor.grad = None

    def weights(self) -> Mapping[str, Tensor]:
        return models.merged_weights(self.model)

    # ------------------------------------------------------------------------------------------------- save and load

    def save(self, folder: Path) -> None:
        """`trainable.safetensors` (masters, exactly) and `optimizer.safetensors` beside an ordinary model folder."""
        self.export(folder / "model", merge=False)
        save_file({n: m.detach().contiguous() for n, m in self._named_masters()}, folder / "trainable.safetensors")
        state: dict[str, Tensor] = {}
        for name, master in self._named_masters():
            for key, value in self._optimizer.state.get(master, {}).items():
                state[f"{key}:{name}"] = torch.as_tensor(value).detach().clone().contiguous()
        save_file(state, folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        """What `save` wrote, bit for bit. Raises DataError where the parameters are not the same ones."""
        stored = load_file(folder / "trainable.safetensors", device=str(self._device))
        if set(stored) != set(self._names):
            odd = sorted(set(stored) ^ set(self._names))[:3]
            raise DataError(f"{folder}: was saved from another model or adapter (differs in {', '.join(odd)} …)")
        state = load_file(folder / "optimizer.safetensors", device=str(self._device))
        with torch.no_grad():
            for parameter, (name, master) in zip(self._parameters, self._named_masters(), strict=True):
                if stored[name].shape != master.shape:
                    raise DataError(
                        f"{folder}: {name} has shape {tuple(stored[name].shape)}, not {tuple(master.shape)}"
                    )
                master.copy_(stored[name])
                if parameter is not master:
                    parameter.copy_(master)
        self._optimizer.state.clear()
        for name, master in self._named_masters():
            entries = {key.partition(":")[0]: value for key, value in state.items() if key.partition(":")[2] == name}
            if entries:
                self._optimizer.state[master] = entries

    def export(self, folder: Path, *, merge: bool = True) -> None:
        models.export(self.model, self.loaded.tokenizer, folder, merge=merge)

    # ------------------------------------------------------------------------------------------------------ inside

    # A learner of several ranks (`sharded.py`) changes these, and how it saves; nothing else.

    def _layout_rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of each micro-batch, by index. An empty one runs a token that is not trained."""
        layout = self._layout
        return micro_batches(lengths, budget=layout.micro_batch_tokens, max_padding_share=layout.max_padding_share)

    def _head(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        return models.head_of(model)

    def _norms(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of each gradient."""
        return torch.stack(torch._foreach_norm(list(gradients)))

    def _collect(self, batch: Batch, output: _Output) -> LossOutput:
        return output.done()

    def _named_masters(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self._names, self._masters, strict=True)

    def _micro_batches(self, batch: Batch) -> Iterator[_MicroBatch]:
        """Rows without a trained position are left out altogether."""
        lengths = batch.lengths
        trained_rows = [row.nonzero().squeeze(1) for row in (batch.weights_T != 0).split(lengths)]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        kept = [i for i, positions in enumerate(trained_rows) if len(positions)]
        # Nothing after a row's last trained position is read by what is trained (the model is causal).
        used = {i: int(trained_rows[i][-1]) + 1 for i in kept}
        none = torch.empty(0, dtype=torch.long)
        for chosen in self._layout_rows([used[i] for i in kept]):
            indices = [kept[c] for c in chosen]
            rows = [batch.rows[i][: used[i]] for i in indices] or [torch.zeros(1, dtype=torch.long)]
            tokens_BS, attention_mask_BS = pad_rows(rows)
            width = tokens_BS.shape[1]
            yield _MicroBatch(
                tokens_BS=tokens_BS.to(self._device),
                attention_mask_BS=None if attention_mask_BS is None else attention_mask_BS.to(self._device),
                positions_BS=torch.arange(width, device=self._device).expand(len(rows), -1),
                inside=torch.cat([none, *(trained_rows[i] + b * width for b, i in enumerate(indices))]).to(
                    self._device
                ),
                outside=torch.cat([none, *(trained_rows[i] + starts[i] for i in indices)]),
            )

    @staticmethod
    def _hidden(model: nn.Module, micro: _MicroBatch) -> Tensor:
        hidden_BSD = models.hidden_states(model, micro.tokens_BS, micro.attention_mask_BS, micro.positions_BS)
        return hidden_BSD.flatten(0, 1)[micro.inside]


def sequence_loss(
    objective: Objective,
    logprobs_T: Tensor,
    entropy_T: Tensor,
    *,
    columns: Mapping[str, Tensor],
    weights_T: Tensor,
    nonfinite: str,
) -> LinearPolicyLoss:
    """Σ weights·objective of a sequence-level objective, from differentiable log-probs of whole rows.

    A non-finite token spoils its whole sequence: it raises NonFiniteError, or the row (column `rows`) is dropped.
    """
    with torch.no_grad():
        loss_T = objective(logprobs_T, **columns)
    bad_T = ~(loss_T.isfinite() & logprobs_T.detach().isfinite())
    if bool(bad_T.any()) and nonfinite != "drop":
        position = int(bad_T.nonzero()[0])
        raise NonFiniteError(
            f"loss {float(loss_T[position])} and log-prob {float(logprobs_T[position].detach())} at trained position "
            f"{position} of a micro-batch; set algorithm.nonfinite: drop to leave its sequence out and count it"
        )
    bad_T |= torch.isin(columns["rows"], columns["rows"][bad_T])
    kept = (~bad_T).nonzero().squeeze(1)
    kept_loss = objective(logprobs_T[kept], **{name: column[kept] for name, column in columns.items()})
    loss = (weights_T[kept] * kept_loss).sum()
    zeroed = [torch.where(bad_T, 0.0, x.detach()) for x in (logprobs_T, entropy_T, loss_T)]
    return LinearPolicyLoss(loss, *zeroed, dropped_T=bad_T)


class _Output:
    """Collects what the micro-batches give, in the batch's order."""

    def __init__(self, batch: Batch) -> None:
        total = len(batch.targets_T)
        self._logprobs_T = torch.zeros(total)
        self._entropy_T = torch.zeros(total)
        self._evaluated_T = torch.zeros(total, dtype=torch.bool)
        self._loss, self._dropped = 0.0, 0

    def add(
        self, micro: _MicroBatch, logprobs_T: Tensor, entropy_T: Tensor, loss: float, dropped_T: Tensor | None = None
    ) -> None:
        """A dropped token has no log-prob, and so no place in any metric: it does not count as evaluated."""
        self._logprobs_T[micro.outside] = logprobs_T.detach().float().cpu()
        self._entropy_T[micro.outside] = entropy_T.detach().float().cpu()
        self._evaluated_T[micro.outside] = True if dropped_T is None else ~dropped_T.cpu()
        self._loss += loss
        self._dropped += 0 if dropped_T is None else int(dropped_T.sum())

    def done(self) -> LossOutput:
        return LossOutput(self._loss, self._logprobs_T, self._entropy_T, self._evaluated_T, self._dropped)


def _without_adapter(model: nn.Module, wanted: bool) -> torch.autograd.grad_mode.no_grad:
    return models.without_adapter(model) if wanted else torch.no_grad()


def _master_of(parameter: nn.Parameter) -> Tensor:
    """The float32 tensor that the optimizer steps: the parameter itself, or a copy that collects its gradients."""
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.detach().float().clone()
    parameter.register_post_accumulate_grad_hook(lambda p: _move_gradient(p, master))
    return master


def _move_gradient(parameter: Tensor, master: Tensor) -> None:
    """Add the parameter's gradient to the master's in float32, so that accumulation does not round in bfloat16."""
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None
