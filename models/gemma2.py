"""Gemma 2's attention on a paged cache: its own code caps the scores between their product and their softmax."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2

from mlx_paged.models.layer_cache import PagedLayerCache


def cap_scores() -> None:
    """Have Gemma 2's layers leave scores and their cap to the cache's attention, where that is paged."""
    original = gemma2.Attention.__call__
    if hasattr(original, "caps_scores"):
        return

    @functools.wraps(original)
    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not isinstance(cache, PagedLayerCache):
            return original(self, x, mask, cache)

        def by_head(projection: nn.Module, num_heads: int) -> mx.array:
            return projection(x).reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)

        queries = self.rope(by_head(self.q_proj, self.n_heads), offset=cache.offset)
        keys = self.rope(by_head(self.k_proj, self.n_kv_heads), offset=cache.offset)
        cache.update_and_fetch(keys, by_head(self.v_proj, self.n_kv_heads))
        output = cache.attend(queries, self.scale, mask, None, softcap=self.attn_logit_softcapping)
        return self.o_proj(output.swapaxes(1, 2).flatten(2))

    call.caps_scores = True  # type: ignore[attr-defined]
    gemma2.Attention.__call__ = call  # type: ignore[method-assign]
