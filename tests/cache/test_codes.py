"""K and V as codes: MLX's own, bit for bit, whoever is beside a token; what they take; what can't be quantised."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.attention_cases import DTYPES, exact
from helpers.families import family_model
from helpers.tiny_models import make_model

from mlx_paged import LLM
from mlx_paged.cache.codes import Codes
from mlx_paged.cache.kv_cache import LayerPool, PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.config import KV_CACHE_DTYPES

NUM_BLOCKS, BLOCK_SIZE, HEADS = 5, 4, 3


def spec(kv_cache_dtype: str, dtype: str = "float16", dims: tuple[int, int] = (64, 96)) -> LayerSpec:
    return LayerSpec(HEADS, *dims, DTYPES[dtype]).quantised(kv_cache_dtype)


def rows_of(count: int, layer: LayerSpec, seed: int = 0) -> list[mx.array]:
    """K and V of tokens: ordinary ones, nothing but zeros, one large number, all equal, and tiny ones."""
    rng = np.random.default_rng(seed)
    rows = []
    for dim in layer[1:3]:
        array = rng.standard_normal((count, HEADS, dim)).astype(np.float32) * 3
        array[1], array[2, :, 5], array[3], array[4] = 0, 1e3, -0.3, array[4] * 1e-9
        rows.append(mx.array(array).astype(layer.dtype))
    return rows


def written(layer: LayerSpec, rows: list[mx.array], slots: list[tuple[int, int]]) -> LayerPool:
    pool = LayerPool.zeros(layer, NUM_BLOCKS, BLOCK_SIZE)
    blocks, offsets = (mx.array(each, mx.int32) for each in zip(*slots, strict=True))
    pool.write(blocks, offsets, *rows)
    return pool


SLOTS = [(3, 1), (0, 0), (3, 3), (1, 2), (4, 0), (0, 3), (2, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_codes_and_their_parameters_are_those_of_mlx_bit_for_bit(kv_cache_dtype: str, dtype: str) -> None:
    layer = spec(kv_cache_dtype, dtype)
    rows = rows_of(len(SLOTS), layer)
    pool = written(layer, rows, SLOTS)
    for name, row in zip("kv", rows, strict=True):
        at = tuple(np.array(SLOTS).T)
        codes, params = (
            np.array(pool.arrays[f"{name}_{kind}"].view(mx.uint8)).swapaxes(1, 2)[at] for kind in ("codes", "params")
        )
        if kv_cache_dtype == "fp8":
            scales = mx.abs(row.astype(mx.float32)).max(axis=-1, keepdims=True) / 448
            scales = mx.where(scales.astype(row.dtype) == 0, 1, scales.astype(row.dtype))
            expected, parameters = mx.to_fp8(row.astype(mx.float32) / scales.astype(mx.float32)), scales[..., None]
        else:
            bits, group = {("v", "k8v4"): (4, 32)}.get((name, kv_cache_dtype), (8, {"k": 64, "v": 32}[name]))
            expected, *both = mx.quantize(row, group, bits)
            parameters = mx.stack(both, axis=-1)
            scales, biases = (each.astype(mx.float32) for each in both)
            numbers = mx.dequantize(expected, scales, biases, group, bits)
            read = Codes(bits, group).dequantise(expected, parameters)
            np.testing.assert_allclose(exact(read), exact(numbers), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(codes, np.array(expected.view(mx.uint8)))
        np.testing.assert_array_equal(params, np.array(parameters.view(mx.uint8)))


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_what_is_stored_for_a_token_depends_on_that_token_alone(kv_cache_dtype: str) -> None:
    layer = spec(kv_cache_dtype)
    rows = rows_of(len(SLOTS), layer)
    together = written(layer, rows, SLOTS)
    alone = LayerPool.zeros(layer, NUM_BLOCKS, BLOCK_SIZE)
    for i, (block, offset) in reversed(list(enumerate(SLOTS))):
        alone.write(mx.array([block]), mx.array([offset]), *(each[i : i + 1] for each in rows))
    for name, array in together.arrays.items():
        np.testing.assert_array_equal(np.array(array.view(mx.uint8)), np.array(alone.arrays[name].view(mx.uint8)))


@pytest.mark.parametrize(("kv_cache_dtype", "limit"), [("int8", 0.005), ("k8v4", 0.1), ("fp8", 0.07)])
def test_what_is_read_back_is_near_what_was_written(kv_cache_dtype: str, limit: float) -> None:
    layer = spec(kv_cache_dtype, "float32")
    rows = [each.at[2].multiply(0) for each in rows_of(len(SLOTS), layer)]
    pool = written(layer, rows, SLOTS)
    numbers = pool.row_numbers(*(mx.array(each, mx.int32)[None] for each in zip(*SLOTS, strict=True)))[0]
    for name, row in zip("kv", rows, strict=True):
        found, expected = exact(pool.gather(name, numbers)).swapaxes(0, 1), exact(row)
        assert np.abs(found - expected).max() <= limit * np.abs(expected).max()
        assert not found[1].any(), "zeros are zeros"


def test_parts_of_blocks_are_runs_of_a_head_and_add_up_to_the_bytes_that_are_planned() -> None:
    for kv_cache_dtype, dtype in itertools.product(KV_CACHE_DTYPES, DTYPES):
        layer = spec(kv_cache_dtype, dtype, (128, 64))
        pool = LayerPool.zeros(layer, NUM_BLOCKS, 16)
        assert pool.nbytes == NUM_BLOCKS * 16 * layer.bytes_per_token
        assert pool.block_shape == (16, HEADS, 128, 64)
        assert pool.dtype == layer.dtype
        assert {array.shape[:3] for array in pool.arrays.values()} == {(NUM_BLOCKS, HEADS, 16)}
        assert list(pool.arrays) == ["k_codes", "k_params", "v_codes", "v_params"]
        assert pool.arrays["k_codes"].shape[3] == 128 * 8 // 32
        assert pool.arrays["v_codes"].shape[3] == 64 * (4 if kv_cache_dtype == "k8v4" else 8) // 32


def test_in_the_memory_of_half_precision_there_is_room_for_nearly_twice_the_tokens_and_more() -> None:
    plain = LayerSpec(8, 128, 128, mx.bfloat16)
    per_head = {name: plain.quantised(name).bytes_per_token // 8 for name in KV_CACHE_DTYPES}
    assert per_head == {"int8": 272, "k8v4": 216, "fp8": 260}
    assert plain.bytes_per_token // 8 == 512
    memory = 1 << 28
    model = make_model("qwen3", head_dim=128, dtype=mx.bfloat16)
    blocks = {
        name: LLM.from_model(model, kv_cache_memory=memory, kv_cache_dtype=name).stats().num_blocks
        for name in (None, "int8", "k8v4")
    }
    assert blocks["int8"] / blocks[None] == pytest.approx(1.88, abs=0.01)
    assert blocks["k8v4"] / blocks[None] == pytest.approx(2.37, abs=0.01)


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_copies_and_stores_move_codes_as_they_are(kv_cache_dtype: str) -> None:
    layer = spec(kv_cache_dtype)
    cache = PagedKVCache([layer, layer], [NUM_BLOCKS] * 2, BLOCK_SIZE, 1)
    rows = rows_of(BLOCK_SIZE + 1, layer)
    for pool in cache.pools:
        pool.write(mx.array([1, 1, 1, 1, 2]), mx.array([0, 1, 2, 3, 0]), *rows)
    content = {name: array + 0 for name, array in cache.read_block(1).items()}
    assert {name for name in content if name.endswith("0")} == {"k_codes0", "k_params0", "v_codes0", "v_params0"}
    cache.move_blocks([(1, 3), (3, 4)])
    cache.write_block(0, content)
    for pool in cache.pools:
        for array in pool.arrays.values():
            raw = np.array(array.view(mx.uint8))
            assert raw[1].any()
            for block in (0, 3, 4):
                np.testing.assert_array_equal(raw[block], raw[1])
    with pytest.raises(ValueError, match="another layout"):
        PagedKVCache([LayerSpec(HEADS, 64, 96, mx.float16)], [2], BLOCK_SIZE, 1).write_block(0, content)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_model("llama"), "head_dim must be a multiple of 32, and this model has one of 16"),
        (lambda: family_model("deepseek_v3"), "latents are small as they are and are not quantised"),
        (lambda: family_model("mamba2"), "keeps states and neither keys nor values"),
    ],
)
def test_a_model_that_can_not_be_quantised_is_refused_in_one_line(make: Callable[[], nn.Module], words: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"^kv_cache_dtype='int8': ") as raised:
        LLM.from_model(model, num_kv_blocks=4, kv_cache_dtype="int8")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_heads_that_a_scale_fits_but_no_group_divides_can_be_fp8() -> None:
    assert LLM.from_model(make_model("llama"), num_kv_blocks=4, kv_cache_dtype="fp8").stats().kv_bytes > 0


@pytest.mark.parametrize("kv_cache_dtype", ["int4", "q8_0", "", "float16", 8])
def test_an_unknown_kind_is_refused_with_those_that_there_are(kv_cache_dtype: object) -> None:
    with pytest.raises(ValueError, match=r"^kv_cache_dtype must be one of int8, k8v4, fp8, got "):
        LLM.from_model(make_model("qwen3"), kv_cache_dtype=kv_cache_dtype)
