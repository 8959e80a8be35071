"""Keys and values of a decode batch: prompts stored once for all their samples, and a slot for what each row writes.

The *prefix* store holds one sequence per prompt, [prompts, heads, columns, width]; the *suffix* store one slot per row
in flight, [rows, heads, columns, width]. A row's first token stands at column 0 of its slot, so rows that began at
different times advance together, a finished row's slot is given to another, and nothing is shifted. Attention reads a
prompt once for all of its samples, as queries of one product (`shared_attention`; Juravsky et al., "Hydragen",
arXiv:2402.05099, without the second pass over the softmax), instead of once for each.
Before a forward pass the cache is told by a plan (`Prefill`, `Decode`, `Extend`) where its keys and values go.
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
    """Which prefix each of B rows continues. N prefixes of at most `columns` tokens, at most G rows on each."""

    def __init__(self, group_B: np.ndarray, lengths_N: np.ndarray, device: torch.device):
        self.N, self.columns, self.device = len(lengths_N), int(lengths_N.max()), device
        counts_N = np.bincount(group_B, minlength=self.N)
        order_B = np.argsort(group_B, kind="stable")
        rank_B = np.empty_like(group_B)
        rank_B[order_B] = np.arange(len(group_B)) - (counts_N.cumsum() - counts_N)[group_B[order_B]]
        self.G = int(counts_N.max())
        self.group_B, self._rank_B = group_B, rank_B
        self.length_B = torch.from_numpy(lengths_N[group_B]).to(device)
        self._lanes: dict[int, Tensor] = {}

    def _lanes_of(self, heads: int) -> Tensor:
        """Where row b's head h stands in [N, heads, G] flattened: int64 [B · heads]."""
        if heads not in self._lanes:
            first_BH = self.group_B[:, None] * heads + np.arange(heads)
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

    def prefix_of_rows(self, x: Tensor) -> Tensor:
        """One copy of its prefix for every row: [≥N, H, ≥columns, W] to [B, H, columns, W]."""
        return x[torch.from_numpy(self.group_B).to(self.device), :, : self.columns]


class Plan(Protocol):
    """What a forward pass does with the keys and values that each layer hands over ([B, heads, tokens, width])."""

    past: int  # tokens that the model is told to be in the cache already

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write them down, and return those to attend over."""


class Prefill:
    """Whole sequences from their first token. Prefix slot `slots[i]` receives sequence `source[i]`."""

    past = 0

    def __init__(self, slots: slice | Tensor, source: Tensor | None = None):
        self.slots, self.source = slots, source

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for store, new in ((layer.prefix_keys, keys), (layer.prefix_values, values)):
            store[self.slots, :, : new.shape[2]] = new if self.source is None else new[self.source]
        return keys, values


class Decode:
    """One token for each of the first B slots, written at column `column_B` < `columns` of its slot."""

    def __init__(self, sharing: Sharing, column_B: Tensor, columns: int, *, shared: bool):
        self.sharing, self.column_B, self.columns, self.shared = sharing, column_B, columns, shared
        self.past = sharing.columns + columns - 1
        self._flat: dict[int, Tensor] = {}

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        B, H, _, _ = keys.shape
        if H not in self._flat:
            lanes_BH = torch.arange(B * H, device=keys.device).view(B, H)
            self._flat[H] = (lanes_BH * layer.keys.shape[2] + self.column_B[:, None]).flatten()
        for store, new in ((layer.keys, keys), (layer.values, values)):
            store.view(-1, store.shape[3]).index_copy_(0, self._flat[H], new.reshape(B * H, -1))
        return _continue(self, layer, layer.keys[:B, :, : self.columns], layer.values[:B, :, : self.columns])


class Extend:
    """Several tokens for each of the slots `rows` (int64), written from column 0 on: a row's whole suffix at once."""

    def __init__(self, sharing: Sharing, rows: Tensor, *, shared: bool):
        self.sharing, self.rows, self.shared = sharing, rows, shared
        self.past = sharing.columns

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        layer.keys[self.rows, :, : keys.shape[2]] = keys
        layer.values[self.rows, :, : keys.shape[2]] = values
        return _continue(self, layer, keys, values)


def _continue(plan: Decode | Extend, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    if plan.shared:
        keys.slot_layer, keys.slot_sharing = layer, plan.sharing  # for `shared_attention`, which is handed these keys
        return keys, values
    prefix_keys, prefix_values = (plan.sharing.prefix_of_rows(x) for x in (layer.prefix_keys, layer.prefix_values))
    return torch.cat([prefix_keys, keys], 2), torch.cat([prefix_values, values], 2)


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
    """Softmax attention of each row over its prefix and its suffix, by the signature of `transformers`' attention
    functions. query: [B, query heads, S, width]; key, value: the suffix, [B, heads, columns, width]; attention_mask:
    additive, [B, 1, S, prefix columns + suffix columns]. Returns [B, S, query heads, width].

    Scores are softmaxed in float32. Raises NotImplementedError for attention sinks and position biases.
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
    scores = query.new_empty(B * H, M, L)
    scores[:, :, :Lp] = sharing.scatter(torch.bmm(sharing.gather(query), prefix_keys.transpose(1, 2)), H, M)
    scores[:, :, Lp:] = torch.bmm(query.view(B * H, M, D), key.flatten(0, 1).transpose(1, 2))
    scores = scores.mul_(D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores.view(B, queries, S, L).add_(attention_mask)
    probs = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = torch.bmm(probs[:, :, Lp:], value.flatten(0, 1))
    of_prefix = torch.bmm(sharing.gather(probs.view(B, H, M, L)[..., :Lp]), prefix_values)
    out += sharing.scatter(of_prefix, H, M)
    return out.view(B, queries, S, -1).transpose(1, 2).contiguous(), None


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
        (N, P), (R, C) = self.cache.prefix_sides, self.cache.suffix_sides
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
    """The stores of all layers. `prefix_sides` and `suffix_sides` are (slots, columns); memory is taken at the first
    write, and a store that has grown is a new one, so nothing may keep a view of it from one pass to the next."""

    def __init__(self, layers: int):
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.prefix_sides = self.suffix_sides = (0, 0)
        self.plan: Plan = Prefill(slice(0, 0))

    def reshape(self, prefix_sides: tuple[int, int], suffix_sides: tuple[int, int], prefixes: int, rows: int) -> None:
        """Give the stores other sides, keeping the first `prefixes` and `rows` slots as far as they fit."""
        for layer in self.layers:
            if layer.is_initialized:
                if prefix_sides != self.prefix_sides:
                    layer.prefix_keys = resized(layer.prefix_keys, *prefix_sides, prefixes, dim=2)
                    layer.prefix_values = resized(layer.prefix_values, *prefix_sides, prefixes, dim=2)
                if suffix_sides != self.suffix_sides:
                    layer.keys = resized(layer.keys, *suffix_sides, rows, dim=2)
                    layer.values = resized(layer.values, *suffix_sides, rows, dim=2)
        self.prefix_sides, self.suffix_sides = prefix_sides, suffix_sides

    def move_rows(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy the first `columns` columns of the suffix slots `source` onto the slots `target` (int64, disjoint)."""
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
