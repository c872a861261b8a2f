"""Attention over quantised K and V: as near to float64 on what the codes stand for as over plain ones."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import DTYPES, Arrays, Case, assert_close, decodes, dense_attention, make_arrays

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import BACKENDS
from mlx_paged.attention.shared_prefix import find_shared_prefixes
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.config import KV_CACHE_DTYPES

CASES = {
    "decodes": Case(decodes(1, 16, 17, 130, 300), dtype="float32"),
    "long decodes": Case(decodes(700, 800), heads=(6, 3), dtype="float32"),
    "a prompt": Case([(130, 130)], heads=(4, 1), head_dim=(32, 96), block_size=8, dtype="float32"),
    "chunks beside decodes": Case([(1, 40), (30, 90), (1, 3), (30, 31)], block_size=32, dtype="float32"),
    "a window": Case([(1, 200), (40, 100)], window=24, dtype="float32"),
    "sinks and a soft cap": Case([(1, 70), (20, 20)], softcap=5.0, sinks=True, dtype="float32"),
    "a shared prefix": Case(decodes(2070, 2080, 2100, 90), shared=[((0, 1, 2), 128)], dtype="float32"),
    "half precision": Case([(1, 70), (20, 44)], dtype="float16"),
    "bfloat16": Case([(1, 70), (20, 44)], dtype="bfloat16"),
}


def quantised(arrays: Arrays, layer: LayerSpec) -> tuple[LayerPool, Arrays]:
    """The pool of what a case has in its slots, NaN in the others, and the numbers that its codes stand for."""
    num_blocks, block_size, *_ = arrays.k_cache.shape
    pool = LayerPool.zeros(layer, num_blocks, block_size)
    for name, array in pool.arrays.items():
        if name.endswith("params"):
            pool.arrays[name] = mx.full(array.shape, mx.nan, array.dtype)
    used = np.argwhere(~np.isnan(np.array(arrays.k_cache.astype(mx.float32))[:, :, 0, 0])).astype(np.int32)
    blocks, offsets = mx.array(used[:, 0]), mx.array(used[:, 1])
    metadata = AttentionMetadata(*arrays[3:6], slot_block_ids=blocks, slot_offsets=offsets)
    keys, values = (cache[blocks, offsets] for cache in (arrays.k_cache, arrays.v_cache))
    BACKENDS["reference"].write(pool, metadata, keys, values)
    caches = []
    for name, cache in (("k", arrays.k_cache), ("v", arrays.v_cache)):
        numbers = pool.gather(name, pool.row_numbers(blocks[None], offsets[None])[0])
        full = mx.full(cache.shape, mx.nan, mx.float32)
        full[blocks, offsets] = numbers.swapaxes(0, 1)
        caches.append(full)
    return pool, arrays._replace(k_cache=caches[0], v_cache=caches[1])


@pytest.mark.parametrize(("kv_cache_dtype", "case"), list(itertools.product(KV_CACHE_DTYPES, CASES)))
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_is_that_over_the_numbers_that_codes_stand_for(backend: str, kv_cache_dtype: str, case: str) -> None:
    arrays = make_arrays(CASES[case])
    _, num_kv_heads = CASES[case].heads
    layer = LayerSpec(num_kv_heads, *CASES[case].head_dim, DTYPES[CASES[case].dtype]).quantised(kv_cache_dtype)
    pool, numbers = quantised(arrays, layer)
    tables, block_size = np.array(arrays.block_tables), arrays.k_cache.shape[1]
    metadata = AttentionMetadata(
        *arrays[3:6], lambda seqs: find_shared_prefixes(tables[seqs], arrays.context_lens[seqs], block_size)
    )
    out = BACKENDS[backend].attend(arrays.q, pool, metadata, AttentionOptions(**arrays.options))
    assert out.dtype == arrays.q.dtype
    assert_close(out, dense_attention(numbers))


@pytest.mark.parametrize("backend", ["metal", "cuda"])
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "k8v4", "fp8"])
def test_kernels_compute_quantised_layers_that_they_would_compute_plain(backend: str, kv_cache_dtype: str) -> None:
    for dim, dtype, is_supported in ((64, mx.float16, True), (512, mx.bfloat16, True), (512, mx.float32, False)):
        plain = LayerSpec(2, dim, dim, dtype)
        for layer in (plain, plain.quantised(kv_cache_dtype)):
            assert (BACKENDS[backend].unsupported(layer, 4, 16) is None) == is_supported
