"""Keys and values of a decode batch: a slot for each row in flight, and prompts stored once for all their samples.

Two stores. A *row's* slot, [rows, heads, columns, width], holds its tokens from its column 0 on, so rows that began at
different times advance together, a finished row's slot is given to another, and nothing is shifted. Where several
samples continue one prompt, its keys stand once in the *prefix* store, [prefixes, heads, columns, width], and the
rows' slots hold only what they drew: attention then reads the prompt once for all of them, as queries of one product
(`shared_attention`; the decomposition of Juravsky et al., "Hydragen", arXiv:2402.05099, with one softmax over both
parts). Before a forward pass the cache is told by a plan (`Prefill`, `Decode`, `Extend`) where its keys go.
Left out on purpose: paging, quantised keys, rolling windows (a sliding layer keeps all its tokens and masks them), and
layers whose state is not keys and values (Mamba, linear attention).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

SHARED_ATTENTION = "cispo_shared_prefix"


class Sharing:
    """Which prefix each of B rows continues. N prefixes of at most `columns` tokens, at most G rows on each.

    group_B: place of its prefix in the store, -1 for a row that has all its tokens in its own slot. Such a row takes a
    seat at the least occupied prefix, and its `length_B` of 0 masks what it sees there.
    """

    def __init__(self, group_B: np.ndarray, lengths_N: np.ndarray, device: torch.device):
        self.N, self.columns, self.device = len(lengths_N), int(lengths_N.max()), device
        own_B = group_B < 0
        self.length_B = torch.from_numpy(np.where(own_B, 0, lengths_N[group_B])).to(device)
        counts_N = np.bincount(group_B[~own_B], minlength=self.N)
        if own_B.any():
            seats = max(int(counts_N.max()), -(-len(group_B) // self.N))
            group_B = group_B.copy()
            group_B[own_B] = np.repeat(np.arange(self.N), seats - counts_N)[: own_B.sum()]
            counts_N = np.bincount(group_B, minlength=self.N)
        rank_B = np.empty_like(group_B)
        order_B = np.argsort(group_B, kind="stable")
        rank_B[order_B] = np.arange(len(group_B)) - (counts_N.cumsum() - counts_N)[group_B[order_B]]
        self.G = int(counts_N.max())
        self._group_B, self._rank_B = group_B, rank_B
        self._lanes: dict[int, Tensor] = {}

    def _lanes_of(self, heads: int) -> Tensor:
        """Where row b's head h stands in [N, heads, G] flattened: int64 [B · heads]."""
        if heads not in self._lanes:
            first_BH = self._group_B[:, None] * heads + np.arange(heads)
            lanes_BH = first_BH * self.G + self._rank_B[:, None]
            self._lanes[heads] = torch.from_numpy(lanes_BH.reshape(-1)).to(self.device)
        return self._lanes[heads]

    def gather(self, x_BHMW: Tensor) -> Tensor:
        """By row to by prefix: [B, H, M, W] to [N·H, G·M, W], zeros where a prefix has fewer than G rows."""
        B, H, M, W = x_BHMW.shape
        out = x_BHMW.new_zeros(self.N * H * self.G, M * W)
        out.index_copy_(0, self._lanes_of(H), x_BHMW.reshape(B * H, M * W))
        return out.view(self.N * H, self.G * M, W)

    def scatter(self, x: Tensor, H: int, M: int) -> Tensor:
        """By prefix to by row: [N·H, G·M, W] to [B·H, M, W]."""
        W = x.shape[-1]
        return x.reshape(-1, M * W).index_select(0, self._lanes_of(H)).view(-1, M, W)


class Plan(Protocol):
    """What a forward pass does with the keys and values that each layer hands over ([B, heads, tokens, width])."""

    past: int  # tokens that the model is told to be in the cache already

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write them down, and return those to attend over."""


class Prefill:
    """Whole sequences from their first token. The prefixes at `prefixes` receive the sequences `of_prefixes`, and the
    slots at `rows` the sequences `of_rows` (int64; either pair may be empty; a slice writes faster than indices)."""

    past = 0

    def __init__(self, prefixes: slice | Tensor, of_prefixes: Tensor, rows: slice | Tensor, of_rows: Tensor):
        self.prefixes, self.of_prefixes, self.rows, self.of_rows = (prefixes, of_prefixes, rows, of_rows)

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for prefix_store, store, new in (
            (layer.prefix_keys, layer.keys, keys),
            (layer.prefix_values, layer.values, values),
        ):
            for to, slots, of in ((prefix_store, self.prefixes, self.of_prefixes), (store, self.rows, self.of_rows)):
                if len(of):
                    S = min(new.shape[2], to.shape[2])  # a store may be narrower than the padding beside its sequences
                    to[slots, :, :S] = new[of, :, :S]
        return keys, values


class Decode:
    """One token for each of the first B slots, written at column `column_B` < `columns` of its slot. even: all of them
    at the last of these columns."""

    def __init__(self, sharing: Sharing | None, column_B: Tensor, columns: int, *, even: bool = False):
        self.sharing, self.column_B, self.columns, self.even = sharing, column_B, columns, even
        self.past = columns - 1 + (sharing.columns if sharing else 0)
        self._flat: dict[int, Tensor] = {}

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        B, H, _, _ = keys.shape
        if H not in self._flat and not self.even:
            lanes_BH = torch.arange(B * H, device=keys.device).view(B, H)
            self._flat[H] = (lanes_BH * layer.keys.shape[2] + self.column_B[:, None]).flatten()
        for store, new in ((layer.keys, keys), (layer.values, values)):
            if self.even:
                store[:B, :, self.columns - 1 : self.columns] = new
            else:
                store.view(-1, store.shape[3]).index_copy_(0, self._flat[H], new.reshape(B * H, -1))
        keys, values = (layer.keys[:B, :, : self.columns], layer.values[:B, :, : self.columns])
        if self.sharing:
            keys.slot_layer, keys.slot_sharing = (layer, self.sharing)  # `shared_attention` is handed these keys
        return keys, values


class Extend:
    """Several tokens for each of the slots `rows` (int64), written at columns `begin` to `end`."""

    def __init__(self, sharing: Sharing, rows: Tensor, begin: int, end: int):
        self.sharing, self.rows, self.begin, self.end = sharing, rows, begin, end
        self.past = sharing.columns + begin

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        layer.keys[self.rows, :, self.begin : self.end] = keys
        layer.values[self.rows, :, self.begin : self.end] = values
        keys, values = layer.keys[self.rows, :, : self.end], layer.values[self.rows, :, : self.end]
        keys.slot_layer, keys.slot_sharing = layer, self.sharing
        return keys, values


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Softmax attention of each row over its prefix and its slot, by the signature of `transformers`' attention
    functions. query: [B, query heads, S, width]; key, value: the slots, [B, heads, columns, width]; attention_mask:
    additive, [B, 1, S, prefix columns + slot columns]. Returns [B, S, query heads, width].

    Scores and sums are float32 whatever the model's dtype. Raises NotImplementedError for attention sinks and position
    biases.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name} over a shared prefix")
    layer, sharing = key.slot_layer, key.slot_sharing
    B, queries, S, D = query.shape
    H, Lp, L = key.shape[1], sharing.columns, sharing.columns + key.shape[2]
    M = queries // H * S
    query = query.reshape(B, H, M, D)
    prefix_keys, prefix_values = (
        x[: sharing.N, :, :Lp].flatten(0, 1) for x in (layer.prefix_keys, layer.prefix_values)
    )
    scores = query.new_empty(B * H, M, L, dtype=torch.float32)
    scores[:, :, :Lp] = sharing.scatter(_product(sharing.gather(query), prefix_keys.transpose(1, 2)), H, M)
    scores[:, :, Lp:] = _product(query.view(B * H, M, D), key.flatten(0, 1).transpose(1, 2))
    scores = scores.mul_(D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores.view(B, queries, S, L).add_(attention_mask)
    probs = scores.softmax(-1).to(value.dtype)
    out = _product(probs[:, :, Lp:], value.flatten(0, 1))
    of_prefix = _product(sharing.gather(probs.view(B, H, M, L)[..., :Lp]), prefix_values)
    out += sharing.scatter(of_prefix, H, M)
    return out.to(value.dtype).view(B, queries, S, -1).transpose(1, 2).contiguous(), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, as fused attention adds up; a half-precision product would round every score."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda and "dtype" in torch.ops.aten.bmm.overloads():
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


AttentionInterface.register(SHARED_ATTENTION, shared_attention)


class SlotLayer(CacheLayerMixin):
    """One attention layer's stores (keys and values may differ in width)."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache
        self.prefix_keys: Tensor | None = None
        self.prefix_values: Tensor | None = None

    @property
    def stores(self) -> tuple[Tensor, ...]:
        return (self.prefix_keys, self.prefix_values, self.keys, self.values) if self.is_initialized else ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked column still meets its weight 0 in a product, and 0 · NaN is NaN.
        (N, P), (R, C) = self.cache.prefix_sides, self.cache.row_sides
        for name, x in (("keys", key_states), ("values", value_states)):
            setattr(self, f"prefix_{name}", x.new_zeros(N, x.shape[1], P, x.shape[3]))
            setattr(self, name, x.new_zeros(R, x.shape[1], C, x.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.cache.plan.place(self, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.cache.plan.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.plan.past + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The stores of all layers. `prefix_sides` and `row_sides` are (slots, columns); memory is taken at the first
    write, and a store that has grown is a new one, so nothing may keep a view of it from one pass to the next."""

    def __init__(self, layers: int):
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.prefix_sides = self.row_sides = (0, 0)
        self.plan: Plan | None = None

    def reshape(self, prefix_sides: tuple[int, int], row_sides: tuple[int, int], prefixes: int, rows: int) -> None:
        """Give the stores other sides, keeping the first `prefixes` and `rows` slots as far as they fit."""
        for layer in self.layers:
            if layer.is_initialized:
                if prefix_sides != self.prefix_sides:
                    layer.prefix_keys = resized(layer.prefix_keys, *prefix_sides, prefixes, dim=2)
                    layer.prefix_values = resized(layer.prefix_values, *prefix_sides, prefixes, dim=2)
                if row_sides != self.row_sides:
                    layer.keys = resized(layer.keys, *row_sides, rows, dim=2)
                    layer.values = resized(layer.values, *row_sides, rows, dim=2)
        self.prefix_sides, self.row_sides = prefix_sides, row_sides

    def move_rows(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy the first `columns` columns of the rows' slots `source` onto the slots `target` (int64, disjoint)."""
        for layer in self.layers:
            for store in layer.stores[2:]:
                store[target, :, :columns] = store[source, :, :columns]

    def move_prefixes(self, source: Tensor, target: Tensor) -> None:
        for layer in self.layers:
            for store in layer.stores[:2]:
                store[target] = store[source]

    def wipe(self, rows: Tensor, prefixes: Tensor) -> None:
        """Zero slots that hold something not finite: through a masked column it would reach their next owner."""
        for layer in self.layers:
            for store, slots in zip(layer.stores, (prefixes, prefixes, rows, rows)):
                store[slots] = 0

    def token_bytes(self) -> int:
        """Bytes of keys and values of one token, over the layers written so far."""
        return sum(x.shape[1] * x.shape[3] * x.element_size() for layer in self.layers for x in layer.stores[2:])


def resized(x: Tensor, slots: int, columns: int, keep: int, dim: int) -> Tensor:
    """Zeros of x's shape but `slots` along 0 and `columns` along `dim`, with x's first `keep` slots copied in."""
    shape = list(x.shape)
    shape[0], shape[dim] = slots, columns
    out = x.new_zeros(shape)
    shared = min(columns, x.shape[dim])
    out[:keep].narrow(dim, 0, shared).copy_(x[:keep].narrow(dim, 0, shared))
    return out
