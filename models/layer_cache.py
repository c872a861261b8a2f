"""What takes the place of mlx-lm's cache in a layer: K and V go into their slots, attention reads the blocks."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.attention.paged_attention import WRITERS, attend, backend_of
from mlx_paged.cache.kv_cache import PagedKVCache


class PagedMask(NamedTuple):
    """What a model passes from `make_mask` to its attention: causal, over at most `window` keys."""

    window: int | None


class PagedKV:
    """Stands for the K (or V) of a layer's sequences. Opaque: no shape, no arithmetic."""

    def __init__(self, layer_cache: PagedLayerCache, dtype: mx.Dtype) -> None:
        self.layer_cache = layer_cache
        self.dtype = dtype

    def astype(self, dtype: mx.Dtype) -> PagedKV:
        """Itself: attention reads K and V as they are stored and computes in float32 anyway."""
        return self


class PagedLayerCache:
    """One layer of a paged KV cache during one step, with the interface of an mlx-lm cache."""

    def __init__(self, kv_cache: PagedKVCache, layer: int, inputs: ModelInputs, group: int, window: int | None) -> None:
        self.inputs = inputs
        self.offset = inputs.positions
        self._kv_cache = kv_cache
        self._layer = layer
        self._metadata = inputs.groups[group]
        self._window = window
        self._new: tuple[mx.array, mx.array] | None = None  # keys and values that are not in their slots yet

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PagedKV, PagedKV]:
        """Take keys and values, [num_tokens, num_kv_heads, 1, dim], which `attend` writes: it knows the backend."""
        self._new = keys.squeeze(2), values.squeeze(2)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[PagedKV, PagedKV]:
        """What is stored, for layers that share it."""
        dtype = self._kv_cache.keys[self._layer].dtype
        return PagedKV(self, dtype), PagedKV(self, dtype)

    def make_mask(self, N: int, *, return_array: bool = False, window_size: int | None = None) -> PagedMask:
        return PagedMask(window_size or self._window)

    def attend(self, queries: mx.array, scale: float, mask: PagedMask | None, sinks: mx.array | None) -> mx.array:
        """queries [num_tokens, num_heads, 1, head_dim] -> [num_tokens, num_heads, 1, value_dim]."""
        window = self._window
        if mask is not None and mask.window is not None:
            window = mask.window if window is None else min(window, mask.window)
        q = queries.squeeze(2).astype(self._kv_cache.keys[self._layer].dtype)
        self._write(q)
        keys, values = self._kv_cache.keys[self._layer], self._kv_cache.values[self._layer]
        written = self._kv_cache.written[self._layer]
        out = attend(q, keys, values, self._metadata, scale=scale, window=window, sinks=sinks, written=written)
        return mx.expand_dims(out, 2).astype(queries.dtype)

    def _write(self, q: mx.array) -> None:
        """Put what is new into its slots, with the writer of the backend that reads it, if that has one."""
        if self._new is None:
            return
        new, self._new = self._new, None
        cache, layer, metadata = self._kv_cache, self._layer, self._metadata
        assert metadata.slot_block_ids is not None and metadata.slot_offsets is not None
        where = metadata.slot_block_ids, metadata.slot_offsets
        writer = WRITERS.get(backend_of(q, cache.keys[layer], cache.values[layer], metadata))
        if writer is None:
            cache.write(layer, *where, *new)
        else:
            cache.write_with(writer, layer, *where, *new)
