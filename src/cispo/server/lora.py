"""Many LoRA adapters on one frozen base model, several of them in one pass.

Every adaptable linear layer is wrapped once, when the model is loaded; which adapters act on which rows is said before
a pass, by a route. An adapter's parameters are one flat float32 vector of which the A's and B's are views, so that an
optimizer step, a snapshot and an eviction are each a few operations on flat vectors, whatever the number of layers.

    y = W x + (α / rank) · B (A x)        Hu et al., arXiv:2106.09685; α = 32 as in Tinker

Left out on purpose: dropout, DoRA and other variants; adapters on embeddings; layers that are not `nn.Linear`
(experts stored as one 3-D parameter).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cispo.types import AdamParams, ConfigError, NonFiniteError

ALPHA = 32.0
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True)
class LoraShape:
    """What a client chose: the rank, and which parts of the model are adapted."""

    rank: int
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    @property
    def scale(self) -> float:
        return ALPHA / self.rank


@dataclass(frozen=True)
class _Site:
    """One wrapped layer: its part of the model ("attn", "mlp", "unembed"), input and output width."""

    name: str
    part: str
    width_in: int
    width_out: int


class LoraHost:
    """A base model whose linear layers listen to a route. Nothing is adapted while no route is set.

    A route is that of the thread which set it: two threads may run passes of the same model at once.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.sites: list[_Site] = []
        self._routes = threading.local()
        model.requires_grad_(False)
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            part = "unembed" if module is head else _part_of(name)
            if part is None or not isinstance(module, nn.Linear):
                continue
            parent, _, child = name.rpartition(".")
            wrapped = _LoraLinear(self, len(self.sites), module)
            setattr(model.get_submodule(parent), child, wrapped)
            self.sites.append(_Site(name, part, module.in_features, module.out_features))
        self.parts = {site.part for site in self.sites}

    @property
    def route(self) -> TrainRoute | SampleRoute | None:
        return getattr(self._routes, "now", None)

    @contextlib.contextmanager
    def routed(self, route: TrainRoute | SampleRoute | None) -> Iterator[None]:
        """The route of the passes inside. Routes do not nest."""
        self._routes.now = route
        try:
            yield
        finally:
            self._routes.now = None

    def adapted(self, shape: LoraShape) -> list[int]:
        """Indices of the sites that the shape adapts. Raises ConfigError where it adapts none, or a part has none."""
        wanted = {"attn": shape.train_attn, "mlp": shape.train_mlp, "unembed": shape.train_unembed}
        for part, yes in wanted.items():
            if yes and part not in self.parts:
                raise ConfigError(f"train_{part} is true, but this model has no linear layers there; pass false")
        chosen = [i for i, site in enumerate(self.sites) if wanted[site.part]]
        if not chosen:
            raise ConfigError("train_attn, train_mlp and train_unembed are all false: nothing would be trained")
        return chosen

    def parameters_of(self, shape: LoraShape) -> int:
        return sum(shape.rank * (self.sites[i].width_in + self.sites[i].width_out) for i in self.adapted(shape))

    def initial(self, shape: LoraShape, seed: int) -> Tensor:
        """A ~ U(−1/√in, 1/√in) from `seed` (peft's Kaiming-uniform), B = 0: the model starts as its base."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        pieces = []
        for i in self.adapted(shape):
            site = self.sites[i]
            bound = 1 / math.sqrt(site.width_in)
            A = torch.empty(shape.rank * site.width_in).uniform_(-bound, bound, generator=generator)
            pieces += [A, torch.zeros(site.width_out * shape.rank)]
        return torch.cat(pieces)

    def views(self, shape: LoraShape, flat: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """By site: A [r, in] and B [out, r], views of the flat vector."""
        out, start = {}, 0
        for i in self.adapted(shape):
            site = self.sites[i]
            a, b = shape.rank * site.width_in, site.width_out * shape.rank
            A = flat[start : start + a].view(shape.rank, site.width_in)
            B = flat[start + a : start + a + b].view(site.width_out, shape.rank)
            out[i] = (A, B)
            start += a + b
        return out


def _part_of(name: str) -> str | None:
    """ "attn" or "mlp" by the names that transformers gives to a layer's halves, else None."""
    parts = name.split(".")[:-1]
    for part in parts:
        if any(word in part for word in _ATTENTION):
            return "attn"
        if any(word in part for word in _MLP):
            return "mlp"
    return None


class _LoraLinear(nn.Module):
    """The base layer, and whatever the host's route adds to it."""

    def __init__(self, host: LoraHost, index: int, base: nn.Linear):
        super().__init__()
        self.base = base
        self.index = index
        object.__setattr__(self, "_host", host)  # not a submodule: the host holds the model

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        route = self._host.route
        return self.base(x) if route is None else route.run(self.index, self.base, x)


# ----------------------------------------------------------------------------------------------------------- training


class Adapter:
    """One training run's parameters and optimizer: flat float32 vectors of P values each.

    flat: the parameters. grad: the accumulated gradient. m, v: AdamW's moments. steps: AdamW steps taken. accumulated:
    whether `grad` holds anything. Leaves are views of `flat` whose `.grad` are views of `grad`, so that autograd adds
    straight into it.
    """

    def __init__(self, host: LoraHost, shape: LoraShape, flat: Tensor):
        self.shape, self.host = shape, host
        self.flat = flat.detach().clone()
        self.grad = torch.zeros_like(self.flat)
        self.m, self.v = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.steps = 0
        self.accumulated = False
        gradients = host.views(shape, self.grad)
        self.leaves: dict[int, tuple[Tensor, Tensor]] = {}
        for i, pair in host.views(shape, self.flat).items():
            leaves = tuple(view.detach().requires_grad_() for view in pair)
            for leaf, gradient in zip(leaves, gradients[i], strict=True):
                leaf.grad = gradient
            self.leaves[i] = leaves

    @property
    def nbytes(self) -> int:
        return 4 * self.flat.nbytes

    def zero_grad(self) -> None:
        self.grad.zero_()
        self.accumulated = False

    @torch.no_grad()
    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with the accumulated gradient, which is cleared.

        Raises NonFiniteError, with no weight changed and the gradient cleared, where the gradient or the new weights
        hold NaN or infinity.
        """
        g = self.grad
        norm = float(torch.linalg.vector_norm(g))
        if not math.isfinite(norm):
            self.zero_grad()
            raise NonFiniteError(f"the gradient norm is {norm}: no weight was changed and the gradient is cleared")
        if params.grad_clip_norm > 0 and norm > params.grad_clip_norm:
            g.mul_(params.grad_clip_norm / norm)
        m = self.m.lerp(g, 1 - params.beta1)
        v = self.v.mul(params.beta2).addcmul_(g, g, value=1 - params.beta2)
        t = self.steps + 1
        denominator = (v / (1 - params.beta2**t)).sqrt_().add_(params.eps)
        decayed = self.flat.mul(1 - params.learning_rate * params.weight_decay)
        new = decayed.addcdiv_(m, denominator, value=-params.learning_rate / (1 - params.beta1**t))
        update = float(torch.linalg.vector_norm(new - self.flat))
        if not math.isfinite(update):
            self.zero_grad()
            raise NonFiniteError("the step leads to weights that are not finite: no weight was changed; lower the rate")
        self.flat.copy_(new)
        self.m, self.v, self.steps = m, v, t
        self.zero_grad()
        return {"grad_norm": norm, "update_norm": update, "weight_norm": float(torch.linalg.vector_norm(new))}

    def state(self) -> dict[str, Tensor]:
        """Everything, copied: later steps do not reach it."""
        out = {"flat": self.flat.clone(), "m": self.m.clone(), "v": self.v.clone(), "steps": torch.tensor(self.steps)}
        if self.accumulated:
            out["grad"] = self.grad.clone()
        return out

    def restore(self, state: dict[str, Tensor], *, optimizer: bool = True) -> None:
        """What `state` gave, bit for bit. Without `optimizer`: the weights, with fresh moments and no gradient."""
        with torch.no_grad():
            self.flat.copy_(state["flat"])
            self.zero_grad()
            if optimizer:
                self.m, self.v = state["m"].clone(), state["v"].clone()
                self.steps = int(state["steps"])
                if "grad" in state:
                    self.grad.copy_(state["grad"])
                    self.accumulated = True
            else:
                self.m, self.v = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
                self.steps = 0


class TrainRoute:
    """Consecutive rows belong to one adapter each, and gradients flow to it.

    Segments are computed apart, so that nothing in one can reach another (0 · inf would).
    """

    def __init__(self, segments: Sequence[tuple[Adapter, int]]):
        self.segments = [(adapter, adapter.leaves, adapter.shape.scale) for adapter, _ in segments]
        self.rows = [rows for _, rows in segments]

    def run(self, index: int, base: nn.Linear, x: Tensor) -> Tensor:
        if len(self.segments) == 1:
            return self._one(self.segments[0], index, base, x)
        pieces = zip(self.segments, x.split(self.rows), strict=True)
        return torch.cat([self._one(segment, index, base, x_) for segment, x_ in pieces])

    @staticmethod
    def _one(segment: tuple[Adapter, dict, float], index: int, base: nn.Linear, x: Tensor) -> Tensor:
        _, leaves, scale = segment
        if index not in leaves:
            return base(x)
        A, B = leaves[index]
        if _merging_pays(base.weight, A, x):
            return nn.functional.linear(x, torch.addmm(base.weight, B, A, alpha=scale), base.bias)
        u = nn.functional.linear(x.to(A.dtype), A) * scale
        y = base(x)
        return y + nn.functional.linear(u, B).to(y.dtype)


def _merging_pays(weight: Tensor, A: Tensor, x: Tensor) -> bool:
    """Whether a forward and backward is less work with W + s·B A, made for the pass, than beside W.

    For N tokens, and widths i and o: N·6io + 6rio operations (three products with the merged weight, and the merge with
    its two gradients) against N·(4io + 6r(i + o)). Only where W is as exact as the sum.
    """
    r, (o, i), N = len(A), weight.shape, x.numel() // x.shape[-1]
    return weight.dtype == A.dtype and x.dtype == A.dtype and (2 * N + 6 * r) * i * o < 6 * N * r * (i + o)


# ----------------------------------------------------------------------------------------------------------- sampling


class FrozenAdapter:
    """Weights to sample from: immutable, and no optimizer."""

    def __init__(self, host: LoraHost, shape: LoraShape, flat: Tensor):
        self.shape, self.flat = shape, flat
        self.views = host.views(shape, flat)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes


class SampleRoute:
    """Rows of several adapters, in any order, without gradients.

    All adapters' A's are stacked to one [Σ ranks, in], and a row's columns of the other adapters are replaced by zero
    before the stacked B's: three operations for any number of adapters. Adapters hold finite weights only
    (`Adapter.optim_step` refuses others), so a replaced column adds exactly 0.
    """

    def __init__(self, host: LoraHost, adapters: Sequence[FrozenAdapter]):
        self.adapters = tuple(adapters)
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        ranks = [adapter.shape.rank for adapter in adapters]
        owner = torch.repeat_interleave(torch.arange(len(adapters)), torch.tensor(ranks, dtype=torch.long))
        self._owner_R = owner
        self._mask: Tensor | None = None
        for i in range(len(host.sites)):
            present = [adapter for adapter in adapters if i in adapter.views]
            if not present:
                continue
            site = host.sites[i]
            A, B = [], []
            for adapter in adapters:
                if i in adapter.views:
                    a, b = adapter.views[i]
                    A.append(a * adapter.shape.scale)
                    B.append(b)
                else:
                    A.append(torch.zeros(adapter.shape.rank, site.width_in))
                    B.append(torch.zeros(site.width_out, adapter.shape.rank))
            self.pairs[i] = (torch.cat(A).t().contiguous(), torch.cat(B, 1).t().contiguous())

    def rows(self, which_B: Tensor | None) -> SampleRoute:
        """Say which adapter each row uses: long [B], -1 for the base alone; None: all rows use the first."""
        if which_B is None and len(self.adapters) == 1:
            self._mask = None
        else:
            which_B = torch.zeros(1, dtype=torch.long) if which_B is None else which_B
            self._mask = (self._owner_R[None, :] != which_B[:, None])[:, None, :]
        return self

    def run(self, index: int, base: nn.Linear, x: Tensor) -> Tensor:
        y, pair = base(x), self.pairs.get(index)
        if pair is None:
            return y
        A, B = pair
        u = x.to(A.dtype) @ A
        if self._mask is not None:
            u = u.masked_fill(self._mask if u.ndim == 3 else self._mask[:, 0], 0.0)
        return y + (u @ B).to(y.dtype)
