"""`ShardedLearner`: the verbs of `LocalLearner` on the ranks of a process group, weights sharded by FSDP2.

Every rank gets the same whole batch, lays it out in the same way and takes its share of the micro-batches, so nothing
has to be agreed upon; ranks with fewer micro-batches run empty ones, because each forward is a collective. Weights of a
batch already carry the whole window's normaliser, so gradients over ranks only add up, in float32, and are never
averaged. An untied head is left out of FSDP: its weight is gathered for a micro-batch where that fits a budget, and
otherwise stays where it is while hidden states travel (`head/vocabulary.py`). Left out on purpose: starting processes
(`cluster/`), and tensor, pipeline and expert parallelism.

    torchrun --nproc-per-node 8 -m cispo train RECIPE.yaml --cluster torchrun
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cispo import model as models
from cispo.batching import micro_batches
from cispo.config import LearnerConfig
from cispo.head import LinearPolicyLoss
from cispo.head.vocabulary import MEMORY_BUDGET, all_gather_rows, reduce_scatter_rows, token_loss, vocabulary_logprobs
from cispo.learner import LocalLearner, _MicroBatch, _Output, sequence_loss
from cispo.objectives import is_sequence_level
from cispo.transfer import Layout, Meeting, Sender, TransferLost
from cispo.types import Batch, ConfigError, DataError, LossOutput, Objective

RANKS = "ranks"
"""The one dimension of the mesh. Its process group also knows CPU tensors (gloo), for commands and outputs."""


def join(*, device: torch.device, timeout_s: float, **rendezvous: Any) -> DeviceMesh:
    """Join the process group and return its mesh of ranks. rendezvous: as of `init_process_group`; none: torchrun's."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=timeout, **rendezvous)
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(RANKS,))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a loaded model in place: each decoder layer, the rest of the backbone, and an untied head by rows of V.

    Trained weights are kept in float32 (they are the optimizer's masters) and gathered in the dtype they had; their
    gradients are added up in float32.
    """
    lm = models.causal_lm(model)
    backbone, head = lm.base_model, lm.get_output_embeddings()
    tied = models.is_tied(lm)
    policy = MixedPrecisionPolicy(param_dtype=head.weight.dtype, reduce_dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    kinds = set(getattr(lm, "_no_split_modules", None) or ())
    for layer in [module for module in backbone.modules() if type(module).__name__ in kinds and module is not backbone]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(backbone, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _groups(model):  # these setters do not recurse; without the first, gloo cannot sum
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    if tied:
        head.weight = lm.get_input_embeddings().weight
        return
    for owner in head.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            part = distribute_tensor(parameter.data.to(mesh.device_type), mesh, [Shard(0)])
            setattr(owner, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


class ShardedLearner(LocalLearner):
    """Trains `loaded.model`, which it shards over `mesh`. All ranks call the same verb with the same arguments.

    An error of one rank inside a verb is raised by all ranks, after the collectives that the others count on. Only rank
    0 returns all log-probs and entropies (others: their own), has something in `weights`, and writes the export.
    head_gather_bytes: how much of an untied head may be gathered; a larger one is used where it lies.
    """

    def __init__(
        self,
        loaded: models.LoadedModel,
        layout: LearnerConfig | None = None,
        *,
        mesh: DeviceMesh,
        head_dtype: torch.dtype | None = None,
        reference: nn.Module | None = None,
        head_gather_bytes: int = 2 << 30,
    ) -> None:
        self._mesh, self._group = mesh, mesh.get_group()
        self._rank, self._ranks = mesh.get_local_rank(), mesh.size()
        self._head_gather_bytes = head_gather_bytes
        state = models.causal_lm(loaded.model).state_dict()
        self._dtypes = {name.replace(".base_layer.", "."): tensor.dtype for name, tensor in state.items()}
        self._head_type = models.head_of(loaded.model)[0].dtype
        self._tied = models.is_tied(models.causal_lm(loaded.model))
        for model in (loaded.model, *([reference] if reference is not None else ())):
            shard(model, mesh)
        odd = [n for n, p in loaded.model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if odd:
            raise ConfigError(
                f"model.path: {odd[0]} is neither in the backbone nor in the head, so it cannot be sharded; train this "
                "model with cluster.kind: none"
            )
        self._error: Exception | None = None
        super().__init__(loaded, layout, head_dtype=head_dtype, reference=reference)

    # ------------------------------------------------------------------------------------------------------- layout

    def _layout_rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of this rank's micro-batches. As many for every rank: the last may be empty.

        Micro-batches come in order of length, so those of one round cost about the same. Where a smaller budget makes
        the rounds cheaper (few rows, or few micro-batches in the last round), it is taken.
        """
        budget, share = self._layout.micro_batch_tokens, self._layout.max_padding_share
        whole = micro_batches(lengths, budget=budget, max_padding_share=share)
        slots = max(1, math.ceil(len(whole) / self._ranks) * self._ranks)
        split = micro_batches(
            lengths, budget=max(1, min(budget, math.ceil(sum(lengths) / slots))), max_padding_share=share
        )

        def cost(parts: list[list[int]]) -> int:
            sizes = [len(part) * lengths[part[0]] for part in parts]
            return sum(max(sizes[i : i + self._ranks]) for i in range(0, len(sizes), self._ranks))

        best = min((whole, split), key=cost)
        best += [[] for _ in range(-len(best) % self._ranks)]
        return best[self._rank :: self._ranks]

    # --------------------------------------------------------------------------------------------- several ranks' verbs

    def forward_backward(self, batch: Batch, objective: Objective, **options: Any) -> LossOutput:
        try:
            return super().forward_backward(batch, objective, **options)
        finally:
            self._reshard()

    def forward(self, batch: Batch, **options: Any) -> LossOutput:
        try:
            return super().forward(batch, **options)
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """The root group keeps its gathered weights after a forward, and an update would not reach those."""
        for model in (self.model, self._reference):
            for module in _groups(model) if model is not None else ():
                module.reshard()

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
        spread = isinstance(head[0], DTensor)
        if spread:
            roots = self._spread_logprobs(batch, micro, hidden_TD, head, temperature)
        else:
            roots = [hidden_TD, *(part for part in head if part is not None)]
        try:
            if spread and len(micro.outside):
                return self._spread_loss(batch, micro, *roots, objective, nonfinite, entropy_bonus)
            if len(micro.outside):
                return super()._loss(batch, micro, hidden_TD, head, objective, temperature, nonfinite, entropy_bonus)
        except Exception as error:  # the others go on to the backward's collectives: `_collect` raises it on all ranks
            self._error = self._error or error
        nothing = torch.zeros(len(micro.outside))
        loss = sum(0.0 * root.float().sum() for root in roots)
        return LinearPolicyLoss(loss, nothing, nothing, nothing, nothing.bool())

    def _spread_logprobs(
        self,
        batch: Batch,
        micro: _MicroBatch,
        hidden_TD: Tensor,
        head: tuple[Tensor, Tensor | None],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Under a head that is not gathered. Every rank must come here, with or without tokens."""
        weight_VD, bias_V = head
        return vocabulary_logprobs(
            hidden_TD,
            weight_VD.to_local(),
            batch.targets_T[micro.outside].to(self._device),
            vocabulary=len(weight_VD),
            group=self._group,
            bias_U=None if bias_V is None else bias_V.to_local(),
            temperature=temperature / self._logit_scale,
            memory_budget=min(MEMORY_BUDGET, self._head_gather_bytes),
        )

    def _spread_loss(
        self,
        batch: Batch,
        micro: _MicroBatch,
        logprobs_T: Tensor,
        entropy_T: Tensor,
        objective: Objective,
        nonfinite: str,
        entropy_bonus: float,
    ) -> LinearPolicyLoss:
        columns = {name: c[micro.outside].to(self._device) for name, c in batch.columns.items()}
        weights_T = batch.weights_T[micro.outside].to(self._device)
        given = {"columns": columns, "weights_T": weights_T, "nonfinite": nonfinite}
        if is_sequence_level(objective):
            return sequence_loss(objective, logprobs_T, entropy_T, **given)
        return token_loss(objective, logprobs_T, entropy_T, entropy_coef=entropy_bonus, **given)

    def _logprobs(
        self,
        batch: Batch,
        micro: _MicroBatch,
        hidden_TD: Tensor,
        head: tuple[Tensor, Tensor | None],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(head[0], DTensor):
            return self._spread_logprobs(batch, micro, hidden_TD, head, temperature)
        try:
            return super()._logprobs(batch, micro, hidden_TD, head, temperature)
        except Exception as error:
            self._error = self._error or error
            return torch.zeros(len(micro.outside)), torch.zeros(len(micro.outside))

    def _collect(self, batch: Batch, output: _Output) -> LossOutput:
        """Rank 0 gets every position from the one rank that evaluated it. Raises the first rank's error everywhere."""
        error, self._error = self._error, None
        own = output.done()
        sums = torch.tensor([float(error is not None), own.loss, own.dropped], dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        if sums[0]:
            errors: list[Exception | None] = [None] * self._ranks
            dist.all_gather_object(errors, error, group=self._group)
            raise next(e for e in errors if e is not None)
        trained = (batch.weights_T != 0).nonzero().squeeze(1)
        values = torch.stack([x[trained].float() for x in (own.logprobs_T, own.entropy_T, own.evaluated_T)])
        dist.reduce(values, group=self._group, group_dst=0)
        for whole, part in zip((own.logprobs_T, own.entropy_T, own.evaluated_T), values, strict=True):
            whole[trained] = part.to(whole.dtype)
        return replace(own, loss=float(sums[1]), dropped=int(sums[2]))

    def _norms(self, gradients: Sequence[Tensor]) -> Tensor:
        """In float64, because squares of gradients of 1e-18 are nothing in float32."""
        squares = torch.stack(torch._foreach_norm([g.to_local() for g in gradients])).double().square()
        dist.all_reduce(squares, group=self._group)
        return squares.sqrt()

    def rest(self) -> None:
        """Give back the device's memory that is set aside and not used. Weights and optimizer stay."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # --------------------------------------------------------------------------------------------------------- head

    def _head(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        if self._tied:  # the root group has gathered it for the embedding, and holds it until the backward is over
            return models.causal_lm(model).get_input_embeddings().weight, None
        weight_VD, bias_V = models.head_of(model)
        if weight_VD.numel() * self._head_type.itemsize > self._head_gather_bytes:
            return weight_VD, bias_V  # as they are sharded: `_loss` and `_logprobs` take the other way
        return self._gather(weight_VD), None if bias_V is None else self._gather(bias_V)

    def _gather(self, sharded: Tensor) -> Tensor:
        return _Gather.apply(sharded.to_local(), len(sharded), self._head_type, self._group)

    # ------------------------------------------------------------------------------------------------- save and load

    def weights(self) -> Mapping[str, Tensor]:
        """On rank 0, on the CPU, in the dtypes of the model folder; empty on the other ranks."""
        return self._full(models.merged_weights(self.model))

    def sender(self, host: str, *, patience_s: float, timeout_s: float) -> Sender:
        """For `send_weights` of this rank. As of `transfer.Sender`."""
        return Sender(host, self._device, patience_s=patience_s, timeout_s=timeout_s)

    def send_weights(self, meeting: Meeting, sender: Sender | None) -> None:
        """What `weights` has, by broadcast from device to device. sender: of rank 0; the others only help to gather.

        Raises TransferLost on all ranks, which have then done nothing, or gathered for nobody.
        """
        state = models.merged_weights(self.model)
        layout = None
        if self._rank == 0:
            layout = Layout.of(state, {name: self._folder_dtype(name, tensor) for name, tensor in state.items()})
        layout = self._told(lambda: sender.open(meeting, layout), layout)
        gathered = (_whole(state[name]) for name in layout.names)  # one at a time, so that no device holds them all

        def send() -> None:
            try:
                sender.send(layout, gathered)
            finally:
                _exhaust(gathered)  # the other ranks do not know of a loss yet

        if self._rank != 0:
            _exhaust(gathered)
        self._told(send, None)

    def _told(self, act: Callable[[], None], value: Any) -> Any:
        """Rank 0 acts, and all ranks get its value. Raises the TransferLost that it met, on all ranks."""
        told = [value, None]
        if self._rank == 0:
            try:
                act()
            except TransferLost as error:
                told = [None, error]
        dist.broadcast_object_list(told, group_src=0, group=self._group)
        value, error = told
        del told  # the error's traceback holds this frame, which would hold the error, and with it the lost group
        if error is None:
            return value
        try:
            raise error
        finally:
            del error

    def _full(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, tensor in state.items():  # one at a time, so that no device holds them all
            gathered = _whole(tensor)
            if self._rank == 0:
                whole[name] = gathered.detach().to("cpu", self._folder_dtype(name, tensor))
        return whole

    def _folder_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        return self._dtypes.get(name.replace(".base_layer.", "."), tensor.dtype)

    def export(self, folder: Path, *, merge: bool = True) -> None:
        lora = models.is_lora(self.model)
        state = self.model.state_dict() if lora and not merge else models.merged_weights(self.model)
        weights = self._full(state)
        if self._rank == 0:
            models.export(self.model, self.loaded.tokenizer, folder, merge=merge, weights=weights)
        dist.barrier(group=self._group)

    def save(self, folder: Path) -> None:
        """`shards/`, by torch's distributed checkpoint, beside an ordinary model folder. Loads at any number of ranks.

        All ranks must see one file system.
        """
        self.export(folder / "model", merge=False)
        dcp.save(self._state(), checkpoint_id=folder / "shards", process_group=self._group)

    def load(self, folder: Path) -> None:
        """What `save` wrote at any number of ranks. Raises DataError where the parameters are not the same ones."""
        if not (folder / "shards").is_dir():
            raise DataError(f"{folder}: was saved by a run without sharding; resume it with cluster.kind: none")
        state = self._state()
        stored = dcp.FileSystemReader(folder / "shards").read_metadata().state_dict_metadata
        for name in set(stored) ^ set(state):
            raise DataError(f"{folder}: was saved from another model or adapter (differs in {name})")
        for name, tensor in state.items():
            if tuple(stored[name].size) != tuple(tensor.shape):
                raise DataError(f"{folder}: {name} has shape {tuple(stored[name].size)}, not {tuple(tensor.shape)}")
        dcp.load(state, checkpoint_id=folder / "shards", process_group=self._group)

    def _state(self) -> dict[str, Tensor]:
        """Masters and optimizer state, made where there is none yet; `dcp.load` writes into these tensors."""
        state: dict[str, Tensor] = {}
        for name, master in self._named_masters():
            moments = self._optimizer.state[master]
            if not moments:
                moments["step"] = torch.zeros((), device=self._device)
                moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            state[f"master.{name}"] = master.detach()
            for key, value in moments.items():
                state[f"{key}.{name}"] = value
        return state


class _Gather(torch.autograd.Function):
    """All rows of a tensor that is sharded by rows; backward adds the ranks' gradients up, in float32."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, rows: int, dtype: torch.dtype, group: dist.ProcessGroup) -> Tensor:
        ctx.rows, ctx.group, ctx.local, ctx.dtype = rows, group, len(local), local.dtype
        chunk = math.ceil(rows / group.size())
        whole = local.new_empty((chunk * group.size(), *local.shape[1:]), dtype=dtype)
        all_gather_rows(whole, _padded(local.to(dtype), chunk), group=group)
        return whole[:rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        chunk = math.ceil(ctx.rows / ctx.group.size())
        own = gradient.new_empty((chunk, *gradient.shape[1:]), dtype=torch.float32)
        reduce_scatter_rows(own, _padded(gradient.float(), chunk * ctx.group.size()), group=ctx.group)
        return own[: ctx.local].to(ctx.dtype), None, None, None


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _exhaust(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def _padded(rows: Tensor, length: int) -> Tensor:
    missing = length - len(rows)
    return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing else rows.contiguous()


def _groups(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
