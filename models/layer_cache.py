"""What takes the place of mlx-lm's cache in a layer: K and V go into their slots, attention reads the blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from mlx_paged.attention.backend import AttentionOptions, Backend
from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.cache.kv_cache import LayerPool


class PagedMask(NamedTuple):
    """What a model passes from `make_mask` to its attention: causal, over at most `window` keys."""

    window: int


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

    adds_scores = False
    """Whether a model's mask may be scores that it has computed itself."""
    keys = mx.array(0)
    """What a model that is divided by layers lets depend on what it has sent."""

    def __init__(
        self, pool: LayerPool | None, backend: Backend | None, inputs: ModelInputs, group: int, window: int | None
    ) -> None:
        """pool, backend: None where nothing is stored, and so nothing asked of them."""
        self.inputs = inputs
        self.offset = inputs.positions
        self._pool: Any = pool
        self._backend: Any = backend
        self._metadata = inputs.groups[group]
        self._window = window

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PagedKV, PagedKV]:
        """Put keys and values, [num_tokens, num_kv_heads, 1, dim], into their slots."""
        self._backend.write(self._pool, self._metadata, keys.squeeze(2), values.squeeze(2))
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[PagedKV, PagedKV]:
        """Handles of what is stored, for layers that share it."""
        dtype = self._pool.dtype
        return PagedKV(self, dtype), PagedKV(self, dtype)

    def make_mask(self, N: int, *, return_array: bool = False, window_size: int | None = None) -> PagedMask | None:
        """What hides from a query more than what comes after it; None, as of one token without a window, if nothing."""
        window = window_size or self._window
        return None if window is None else PagedMask(window)

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: Any, softcap: float | None = None) -> mx.array:
        """Attention of queries [num_tokens, num_heads, 1, head_dim]. Returns [num_tokens, num_heads, 1, value_dim]."""
        window = min(filter(None, (self._window, mask and mask.window)), default=None)
        options = AttentionOptions(scale, window, softcap, sinks)
        q = queries.squeeze(2).astype(self._pool.dtype)
        out = self._backend.attend(q, self._pool, self._metadata, options)
        return mx.expand_dims(out, 2).astype(queries.dtype)
