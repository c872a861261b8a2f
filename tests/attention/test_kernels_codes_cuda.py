from __future__ import annotations
import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import DTYPES, Case, check, decodes
from cudasim.fixture import Cuda
from helpers.cuda_text import slots_of
from mlx_paged.attention.paged_attention import BACKENDS
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

@pytest.mark.parametrize("codes", ["int8", "k8v4", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_write(codes, dtype, cuda):
    rng = np.random.default_rng(0)
    layer = LayerSpec(2, 96, 128, DTYPES[dtype]).quantised(codes)
    pools = [LayerPool.zeros(layer, 3, 8) for _ in range(2)]
    where = np.array([2, 0, 1, 2, 0], np.int32), np.array([7, 1, 3, 0, 4], np.int32)
    rows = [mx.array(rng.standard_normal((5, 2, dim)).astype(np.float32)).astype(layer.dtype) for dim in (96, 128)]
    mx.eval([p.arrays for p in pools])
    BACKENDS["cuda"].write(pools[0], slots_of(*where), *rows)
    pools[1].write(*map(mx.array, where), *rows)
    for name in pools[0].arrays:
        a,b=(p.arrays[name] for p in pools)
        assert mx.array_equal(a,b), (name)

@pytest.mark.parametrize("codes", ["int8", "k8v4", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [decodes(54, 3), ((33, 70),), ((2,40),(3,50))])
def test_attend(codes, dtype, lengths, cuda):
    check(Case(lengths, head_dim=(128, 64), dtype=dtype, codes=codes), backend="cuda")
