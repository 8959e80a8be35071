"""The key/value memory of a decode batch: a rectangle of slots, one per row, that `transformers` models write into.

Row r's token p stands at column p of slot r, so rows of different lengths advance together, a finished row's slot is
given to another, and nothing is ever shifted. A forward pass is told beforehand, by `plan_prefill` or `plan_decode`,
where its keys and values go. Left out on purpose: paging, quantised KV, and rolling windows (a sliding layer keeps all
its tokens and masks them); layers whose state is not keys and values (Mamba, linear attention).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One attention layer's keys and values, [rows, heads, columns, head width] (K and V may differ in width)."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked column still meets its weight 0 in a product, and 0 · NaN is NaN.
        self.keys, self.values = (
            x.new_zeros(self.cache.rows, x.shape[1], self.cache.columns, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.cache.place(self, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.cache.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.past + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """`rows` slots of `columns` tokens for each of the model's attention layers; memory is taken at the first write."""

    def __init__(self, layers: int, rows: int, columns: int):
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])
        self.rows, self.columns = rows, columns
        self.past = 0
        self._prefill = True
        self._slots: Tensor | slice = slice(0, 0)
        self._source: Tensor | int | None = None
        self._pos_B: Tensor | None = None
        self._shape = (0, 0)

    # ------------------------------------------------------------------------------------------------------- plans

    def plan_prefill(self, slots: Tensor | slice, source: Tensor | int) -> None:
        """The next pass runs whole sequences from column 0. Slot `slots[i]` receives sequence `source[i]`; an integer
        `source` G means that each sequence fills G consecutive slots."""
        self._prefill, self._slots, self._source, self.past = True, slots, source, 0

    def plan_decode(self, pos_B: Tensor, columns: int) -> None:
        """The next pass runs one token for each of the first B slots, at `pos_B` (int64 [B]) < `columns`, and attends
        over `columns` columns."""
        self._prefill, self._pos_B, self.past = False, pos_B, columns - 1
        self._slots, self._shape = torch.arange(len(pos_B), device=pos_B.device), (len(pos_B), columns)

    def place(self, layer: SlotLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values ([B, heads, new tokens, width]); return those to attend over."""
        if not self._prefill:
            B, L = self._shape
            layer.keys[self._slots, :, self._pos_B] = keys[:, :, 0]
            layer.values[self._slots, :, self._pos_B] = values[:, :, 0]
            return layer.keys[:B, :, :L], layer.values[:B, :, :L]
        S = keys.shape[2]
        for store, new in ((layer.keys, keys), (layer.values, values)):
            if isinstance(self._source, int):  # one broadcast copy, without a repeated intermediate
                store[self._slots].unflatten(0, (len(new), self._source))[:, :, :, :S].copy_(new[:, None])
            else:
                store[self._slots, :, :S] = new[self._source]
        return keys, values

    # ----------------------------------------------------------------------------------------------------- geometry

    def reshape(self, rows: int, columns: int, keep: int) -> None:
        """Give the rectangle other sides, keeping the first `keep` rows as far as they fit."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (resized(x, rows, columns, keep, dim=2) for x in (layer.keys, layer.values))
        self.rows, self.columns = rows, columns

    def move(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy the first `columns` columns of the slots `source` onto the slots `target` (int64, disjoint)."""
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                if store is not None:
                    store[target, :, :columns] = store[source, :, :columns]

    def wipe(self, slots: Tensor) -> None:
        """Zero slots that hold something not finite, so that it cannot reach the next row through a masked column."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slots] = 0
                layer.values[slots] = 0

    def token_bytes(self) -> int:
        """Bytes of keys and values of one token, over the layers written so far."""
        return sum(
            x.shape[1] * x.shape[3] * x.element_size()
            for layer in self.layers
            if layer.is_initialized
            for x in (layer.keys, layer.values)
        )


def resized(x: Tensor, rows: int, columns: int, keep: int, dim: int) -> Tensor:
    """Zeros of x's shape but `rows` along 0 and `columns` along `dim`, with x's first `keep` rows copied in."""
    shape = list(x.shape)
    shape[0], shape[dim] = rows, columns
    out = x.new_zeros(shape)
    shared = min(columns, x.shape[dim])
    out[:keep].narrow(dim, 0, shared).copy_(x[:keep].narrow(dim, 0, shared))
    return out
