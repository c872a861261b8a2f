"""A layer's stand-in for mlx-lm's cache: which keys a query sees."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.attention_cases import Case, assert_close, decodes, dense_attention, make_arrays

from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs
from mlx_paged.attention.reference import ReferenceBackend
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.models.layer_cache import PagedLayerCache


@pytest.mark.parametrize(
    ("of_cache", "of_mask", "seen"),
    [(24, 8, 8), (24, None, 24), (None, 8, 8), (8, 24, 8), (None, None, None)],
    ids=str,
)
def test_a_query_sees_as_many_keys_as_the_narrower_of_cache_and_mask(
    of_cache: int | None, of_mask: int | None, seen: int | None
) -> None:
    arrays = make_arrays(Case(decodes(30, 5, 61), (4, 2), (16, 16), block_size=8, window=seen, dtype="float32"))
    pool = LayerPool({"k": arrays.k_cache, "v": arrays.v_cache})
    metadata = AttentionMetadata(arrays.block_tables, arrays.context_lens, arrays.cu_seqlens_q)
    inputs = ModelInputs(mx.zeros(3, mx.int32), mx.zeros(3, mx.int32), None, [metadata])
    cache = PagedLayerCache(pool, ReferenceBackend(), inputs, 0, of_cache)
    mask = cache.make_mask(1, window_size=of_mask)
    out = cache.attend(arrays.q[:, :, None], arrays.options["scale"], mask, None)
    assert_close(out[:, :, 0], dense_attention(arrays))
