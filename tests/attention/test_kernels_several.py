"""paged_decode with a few query tokens of a sequence, or with the heads of one that are too many for it."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest
from helpers.attention_cases import Case
from helpers.gpu import Gpu

from mlx_paged.attention.cuda import CudaBackend
from mlx_paged.attention.metal import MetalBackend
from mlx_paged.cache.layer_spec import LayerSpec


@pytest.mark.parametrize(
    "lengths",
    [((1, 40), (7, 20), (1, 33), (1, 0), (16, 17)), ((20, 20), (1, 40)), ((1, 40), (4, 9), (5, 9), (2, 2))],
    ids=str,
)
def test_steps_with_decodes_and_prompts_come_back_in_the_order_of_their_tokens(
    lengths: Sequence[tuple[int, int]], gpu: Gpu
) -> None:
    gpu.check(Case(lengths, dtype="float32"))
    assert set(gpu.kernels_run) == {"decode", "prefill"}


@pytest.mark.parametrize("heads", [(24, 1), (71, 1), (34, 2)], ids=str)
def test_more_heads_to_a_kv_head_than_16_fill_the_tiles_of_prompts(heads: tuple[int, int], gpu: Gpu) -> None:
    gpu.check(Case(((1, 130), (1, 0), (2, 40), (9, 33)), heads, sinks=True, window=20))
    assert gpu.kernels_run == ["prefill"]


@pytest.mark.parametrize(
    ("num_heads", "layer", "expected"),
    [
        (8, LayerSpec(8, 128, 128, mx.float16), 8),
        (32, LayerSpec(8, 128, 128, mx.float16), 4),
        (14, LayerSpec(2, 64, 64, mx.float32), 2),
        (9, LayerSpec(3, 64, 64, mx.float32), 5),
        (16, LayerSpec(1, 64, 64, mx.float16), 1),
        (71, LayerSpec(1, 64, 64, mx.float16), 1),
        (16, LayerSpec(1, 576, 512, mx.float16, value_in_key=True), 1),
        (8, LayerSpec(1, 576, 512, mx.float16, value_in_key=True), 2),
    ],
)
def test_as_many_queries_of_a_sequence_as_make_16_rows_read_its_blocks_once(
    num_heads: int, layer: LayerSpec, expected: int
) -> None:
    assert MetalBackend().max_decode_queries(layer, num_heads) == expected
    if not layer.value_in_key:
        assert CudaBackend().max_decode_queries(layer, num_heads) in (expected, 128 // num_heads)


@pytest.mark.parametrize("queries", [2, 4])
def test_several_queries_read_the_keys_that_any_of_them_sees_once(queries: int, gpu: Gpu) -> None:
    lengths = ((queries, 200), (queries, 90))
    gpu.check(Case(lengths, window=33))
    (report,) = gpu.reports
    for name in ("k_cache", "v_cache"):
        assert report.traffic.buffers[name].distinct_bytes_read == 2 * (33 + queries - 1) * 2 * 64 * 2
