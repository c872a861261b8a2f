"""Latent attention: one row per token is stored, of which all heads' keys and values are made (DeepSeek-V2, 2024).

A row is the latent vector and, behind it, the rotated part of the key; V is the latent again. mlx-lm's models, given
one token per row, multiply each head's query into the space of the latents, and compute the scores of the rotated part
themselves, as q_rope * scale @ k_rope.T, to pass them on as a mask. Here k_rope.T is the identity, so what they pass
on is q_rope * scale: the rest of the query, for rows that are read where they lie.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.models.layer_cache import PagedKV, PagedLayerCache


class RotaryKeys(PagedKV):
    """Stands for the rotated part of the stored keys."""

    def __init__(self, layer_cache: PagedLayerCache, dtype: mx.Dtype, dim: int) -> None:
        super().__init__(layer_cache, dtype)
        self._dim = dim

    def swapaxes(self, first: int, second: int) -> mx.array:
        """The identity: see above."""
        if (first, second) != (-1, -2):
            raise TypeError(f"a model swaps the axes {first} and {second} of its keys")
        return mx.eye(self._dim, dtype=self.dtype)


class LatentLayerCache(PagedLayerCache):
    """One layer of latent attention during one step."""

    adds_scores = True

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PagedKV, PagedKV]:
        """Put latents and rotated keys, [num_tokens, 1, 1, dim] each, into their slots."""
        super().update_and_fetch(mx.concatenate([keys, values], axis=-1), keys)
        dtype = self._pool.dtype
        return PagedKV(self, dtype), RotaryKeys(self, dtype, values.shape[-1])

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: Any, softcap: float | None = None) -> mx.array:
        """Attention of queries [num_tokens, num_heads, 1, value_dim]. mask: their rotated part, scaled."""
        return super().attend(join_queries(queries, scale, mask), 1.0, None, sinks, softcap)


def latent_spec(spec: LayerSpec) -> LayerSpec:
    """What a layer stores that gave its latents for K and its rotated keys for V."""
    return LayerSpec(spec.num_kv_heads, spec.key_dim + spec.value_dim, spec.key_dim, spec.dtype, value_in_key=True)


def join_queries(queries: mx.array, scale: float, rotary: Any) -> mx.array:
    """Whole queries, [num_tokens, num_heads, 1, key_dim], scaled. Raises ValueError if `rotary` is no part of them."""
    if not isinstance(rotary, mx.array) or rotary.shape[:3] != queries.shape[:3]:
        raise ValueError("latent attention without the scores of its rotated keys")
    return mx.concatenate([queries * scale, rotary], axis=-1)
