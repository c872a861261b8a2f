"""What not every shape has: a few query tokens of a sequence in paged_decode, many heads to a KV head, long heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from helpers.attention_cases import Case, decodes
from helpers.gpu import Gpu
from helpers.planted import Mistake

from mlx_paged.attention.cuda import CudaBackend
from mlx_paged.attention.kernel_backend import KernelBackend
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


@pytest.mark.parametrize(
    "case",
    [
        Case(decodes(70, 0, 300), (8, 1), (512, 512), sinks=True, dtype="bfloat16"),
        Case(decodes(97), (16, 1), (320, 512), window=70, softcap=50.0),
        Case(((1, 40), (9, 30), (2, 2)), (4, 2), (512, 512), window=20),
        Case(((70, 100),), (6, 1), (512, 272), sinks=True, dtype="bfloat16"),
    ],
    ids=["decode", "decode of 16 heads", "decode and prefill", "prefill"],
)
def test_heads_longer_than_256_have_kernels(case: Case, gpu: Gpu) -> None:
    gpu.check(case)
    assert set(gpu.kernels_run) <= ({"decode", "prefill", "merge"} if gpu.name == "metal" else {"latent", "merge"})


@pytest.mark.parametrize(
    ("backend", "dim", "dtype", "refused"),
    [
        (MetalBackend(), 512, mx.bfloat16, False),
        (MetalBackend(), 320, mx.float16, False),
        (MetalBackend(), 264, mx.float16, True),
        (MetalBackend(), 528, mx.float16, True),
        (MetalBackend(), 512, mx.float32, True),
        (CudaBackend(), 512, mx.bfloat16, False),
        (CudaBackend(), 512, mx.float32, True),
        (CudaBackend(), 256, mx.float32, False),
    ],
)
def test_what_is_longer_than_256_has_a_kernel_in_16_bits(
    backend: KernelBackend, dim: int, dtype: mx.Dtype, refused: bool
) -> None:
    for layer in (LayerSpec(1, dim, 64, dtype), LayerSpec(1, 64, dim, dtype)):
        reason = backend.unsupported(layer, 8, 16)
        assert (reason is not None) == refused
        assert reason is None or f"{dim} of {8 * dtype.size} bits: multiples of 8 up to 256" in reason


LONG = Case(((1, 100), (2, 70)), (4, 2), (320, 272), dtype="bfloat16")
MISTAKES = {
    "no wait for values": Mistake("if constexpr (!VALUE_IN_KEY) wait_for_copies<0>();", "", LONG),
    "the next keys are copied over those that are read": Mistake(
        "if constexpr (VALUE_IN_KEY) {\n    stage = 1 - stage;",
        "begin_next_keys();\n  if constexpr (VALUE_IN_KEY) {",
        LONG,
    ),
    "keys for values": Mistake("VALUE_IN_KEY ? keys : stages + STAGE", "keys", LONG),
    "values of another length": Mistake("VALUE_IN_KEY ? KEY_STRIDE : row_stride<T, VALUE_DIM>", "KEY_STRIDE", LONG),
}


@pytest.mark.slow
def test_planted_mistakes_about_long_heads_are_noticed(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("cuda", cuda)
    assert gpu.unnoticed(MISTAKES, monkeypatch) == []
    gpu.check_without(MISTAKES, monkeypatch)
