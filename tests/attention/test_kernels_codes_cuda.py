"""CUDA's kernels over quantised K and V: agreement with float64, bytes that are written, traffic, mistakes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cudasim.fixture import Cuda
from helpers.attention_cases import (
    DTYPES,
    FAR_BLOCK,
    Arrays,
    Case,
    assert_close,
    check_points,
    decodes,
    dense_attention,
    found_far,
    make_arrays,
    points_of,
    share_all,
    split,
)
from helpers.cuda_text import slots_of
from helpers.families import family_model
from helpers.gpu import Gpu
from helpers.planted import Mistake

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.paged_attention import BACKEND_VARIABLE
from mlx_paged.attention.work_items import Shape
from mlx_paged.cache.codes import Codes, choose_codes
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

CODES = ("int8", "k8v4", "fp8")
SHARED = (((1, 70), (1, 81), (1, 34), (1, 47)), (((0, 1), 3), ((2, 3), 2)))
GRID: dict[str, list[Any]] = {
    "groups": [(decodes(1, 54, 0, 97), ()), (((2, 54), (1, 70), (3, 100)), ()), (((17, 33), (9, 90)), ()), SHARED],
    "heads": [(5, 1), (16, 2)],
    "head_dim": [(32, 32), (96, 160), (256, 256)],
    "block_size": [8, 64],
    "window": [None, 5, 33],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "codes": list(CODES),
    "order": ["descending", "random"],
    "part_size": [None, 32],
}
POINTS = points_of(GRID, seed=5, reused=("head_dim", "softcap", "sinks", "dtype", "codes"))


@pytest.fixture
def gpu(cuda: Cuda) -> Gpu:
    return Gpu("cuda", cuda)


@pytest.mark.slow
def test_they_equal_dense_attention_over_the_grid(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    share_all(monkeypatch)

    def attend(arrays: Arrays, part_size: int | None) -> mx.array:
        with monkeypatch.context() as patches:
            split(patches, part_size)
            return arrays.attend(backend=gpu.name)

    points = [
        (*Case(lengths, *others[:-3], False, shared, False, others[-3]), *others[-2:])
        for (lengths, shared), *others in POINTS
    ]
    check_points(points, attend, gpu)


@pytest.mark.parametrize("codes", CODES)
def test_long_heads_have_the_kernel_of_latents(codes: str, gpu: Gpu) -> None:
    gpu.check(Case((*decodes(70, 0), (9, 30)), (4, 2), (512, 320), sinks=True, dtype="bfloat16", codes=codes))
    assert gpu.kernels_run == ["latent"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_heads_that_are_no_whole_number_of_matrices_have_kernels(dtype: str, gpu: Gpu) -> None:
    gpu.check(Case((*decodes(40), (9, 30)), (8, 1), (40, 72), softcap=50.0, dtype=dtype, codes="fp8"))
    assert gpu.kernels_run == ["decode", "prefill"]


#: What is read of block 0 instead, so that what is left is read first.
NEAR = {
    "keys": "",
    "values": "k_cache.begin_copies(rows, slot < 0 ? -1 : row",
    "parameters": "(tile, codes, row",
}


@pytest.mark.parametrize("of", NEAR)
def test_rows_past_the_32_bits_of_a_pool_are_found(of: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 256 bytes of codes and 16 of parameters: the block's are 2**36 and 2**32 bytes from the first."""
    old = NEAR[of]
    if old:
        gpu.plant(Mistake(old, old[: old.rindex(" ")] + " 0 *" + old[old.rindex(" ") :], Case(())), monkeypatch)
    arrays = make_arrays(Case(decodes(3), (8, 2), (256, 256), codes="int8"))
    with pytest.raises(AssertionError, match=found_far("read")):
        arrays._replace(block_tables=mx.full((1, 8), FAR_BLOCK, mx.int32)).attend(backend=gpu.name)


def test_prompts_and_writes_find_them_too(gpu: Gpu) -> None:
    gpu.only_simulated("memory that is not there is read")
    arrays = make_arrays(Case(((9, 9),), (8, 1), (256, 256), codes="int8"))
    with pytest.raises(AssertionError, match=found_far("read")):
        arrays._replace(block_tables=mx.full((1, 8), FAR_BLOCK, mx.int32)).attend(backend=gpu.name)
    rows, where = mx.ones((1, 1, 256), mx.float16), (np.array([FAR_BLOCK], np.int32), np.zeros(1, np.int32))
    with pytest.raises(AssertionError, match=found_far("write")):
        gpu.backend.write(arrays.pool, slots_of(*where), rows, rows)


# -- what is written --


def quantised(each: Codes, rows: mx.array) -> tuple[mx.array, mx.array]:
    """Codes and parameters by MLX's operations for them."""
    if each.num_params == 2:
        codes, scales, biases = mx.quantize(rows, each.group_size, each.bits)
        return codes, mx.stack([scales, biases], axis=-1)
    scales = (mx.abs(rows.astype(mx.float32)).max(axis=-1, keepdims=True) / 448).astype(rows.dtype)
    scales = mx.where(scales == 0, mx.ones_like(scales), scales)
    return mx.to_fp8(rows.astype(mx.float32) / scales.astype(mx.float32)).view(mx.uint32), scales[..., None]


def rows_of(num_heads: int, dim: int, dtype: mx.Dtype, rng: np.random.Generator) -> mx.array:
    """Numbers of all sizes, zeros, equal ones, and halves of a step, which have two nearest codes."""
    rows = rng.standard_normal((11, num_heads, dim)) * 10.0 ** rng.integers(-6, 3, (11, num_heads, 1))
    rows[0], rows[1], rows[2] = 0.0, -3.0, np.linspace(-448, 0.01, dim)
    rows[3] = rng.integers(0, 511, (num_heads, dim)) / 2
    rows[3, :, ::32], rows[3, :, 1::32] = 0.0, 255.0
    rows[4] = -rng.integers(0, 31, (num_heads, dim)) / 2
    rows[4, :, ::32], rows[4, :, 1::32] = -15.0, 0.0
    rows[5] = rng.integers(-448, 449, (num_heads, dim))
    rows[5, :, 0] = 448.0
    rows[6] = rng.integers(-40, 41, (num_heads, dim)) / 1024
    rows[6, :, 0] = 448.0
    return mx.array(rows.astype(np.float32)).astype(dtype)


def check_write(gpu: Gpu, codes: str, dims: tuple[int, int], dtype: mx.Dtype, block_size: int = 8) -> None:
    """All bytes of the pools after 11 tokens are written, against MLX's, beside bytes that stay as they were."""
    rng = np.random.default_rng(len(codes) + dims[0])
    layer, kinds = LayerSpec(3, *dims, dtype).quantised(codes), choose_codes(codes, *dims)
    slots = rng.permutation(4 * block_size)[:11].astype(np.int32)
    pool = LayerPool.zeros(layer, 4, block_size)
    pool.arrays = {name: array + 7 for name, array in pool.arrays.items()}
    new = [rows_of(3, dim, dtype, rng) for dim in dims]
    expected = []
    for rows, kind in zip(new, kinds[1:], strict=True):
        for array, content in zip([*pool.arrays.values()][len(expected) :], quantised(kind, rows), strict=False):
            array = array + 0
            array[mx.array(slots // block_size)[:, None], mx.arange(3), mx.array(slots % block_size)[:, None]] = content
            expected.append(np.array(array.view(mx.uint8)))
    mx.eval(pool.arrays)
    gpu.backend.write(pool, slots_of(slots // block_size, slots % block_size), *new)
    mx.eval(pool.write_done)
    mx.synchronize()
    for (name, array), content in zip(pool.arrays.items(), expected, strict=True):
        np.testing.assert_array_equal(np.array(array.view(mx.uint8)), content, err_msg=name)


@pytest.mark.parametrize("codes", CODES)
def test_codes_and_parameters_are_to_the_byte_what_mlx_makes_of_the_numbers(codes: str, gpu: Gpu) -> None:
    for dims, dtype, order in (
        ((64, 128), mx.float16, "ascending"),
        ((96, 32), mx.bfloat16, "random"),
        ((192, 512), mx.float32, "descending"),
    ):
        gpu.configure(order=order)
        check_write(gpu, codes, dims, dtype)


WRITE_MISTAKES = {
    "a token's row in the slot of its number": ("offsets[token]", "token", "int8"),
    "heads in each other's place": ("new_row % num_kv_heads", "(new_row + 1) % num_kv_heads", "int8"),
    "blocks as long as there are heads": ("head * k_codes_shape[2]", "head * num_kv_heads", "int8"),
    "keys for values": ("values + size_t", "keys + size_t", "k8v4"),
    "a warp past the end writes": ("token < keys_shape[0]", "token <= keys_shape[0]", "k8v4"),
    "nobody is told": ("write_done[thread", "if (false) write_done[thread", "k8v4"),
    "an input is written in secret": ("const_cast<T*>(v_params)", "(T*)v_params", "int8"),
    "a group that is half as long": ("mask = LANES / 2", "mask = LANES / 4", "k8v4"),
    "the nearer edge is exact": ("is_low ? low : high", "is_low ? high : low", "int8"),
    "zero is not exact": ("scale = __fdiv_rn(edge, steps);", "", "int8"),
    "halves go up": ("rintf(steps)", "float(int(steps + 0.5f))", "int8"),
    "the scale is rounded first": ("[k] - bias, scale)", "[k] - bias, float(T(scale)))", "int8"),
    "no scale for zeros": ("if (float(rounded) != 0.0f)", "", "fp8"),
    "the scale is rounded last": ("scale = float(rounded)", "scale = __fdiv_rn(largest, 448.0f)", "fp8"),
    "E4M3 whose halves go up": ("0x7ffff + (magnitude >> 20 & 1)", "0x80000", "fp8"),
    "small E4M3 are cut off": ("rintf(fabsf(number) * 0x1p9f)", "fabsf(number) * 0x1p9f", "fp8"),
    "no sign": ("sign | code", "code", "fp8"),
}


@pytest.mark.slow
def test_mistakes_in_writing_are_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (old, new, codes) in WRITE_MISTAKES.items():
        with monkeypatch.context() as patches:
            planted = gpu.plant(Mistake(old, new, Case(())), patches)
            with pytest.raises(AssertionError):  # a SimulationError is one
                check_write(gpu, codes, (64, 64), mx.float16)
                pytest.fail(f"not noticed: {name}")
            assert planted, name


# -- traffic --


@pytest.mark.parametrize(("codes", "share"), [("int8", 0.53125), ("k8v4", 0.421875), ("fp8", 0.5078125)])
def test_codes_and_parameters_leave_memory_once_in_whole_lines(codes: str, share: float, gpu: Gpu) -> None:
    """2,048 keys of 4 query heads to a KV head of 128, divided as for 8 KV heads, of which one is run."""
    shape = Shape(8, 4, 128, 128, 2, codes=choose_codes(codes, 128, 128))
    plan = gpu.backend.plan_decode(np.array([2048]), np.arange(2), None, shape)
    arrays = make_arrays(Case(decodes(2048), (4, 1), (128, 128), codes=codes))
    out = gpu.backend.run(arrays.q, arrays.pool, arrays.block_tables, plan, AttentionOptions(arrays.options["scale"]))
    assert_close(out, dense_attention(arrays))
    buffers = gpu.reports[0].traffic.buffers
    pools = [buffers[f"{of}_{kind}"] for of in "kv" for kind in ("codes", "params")]
    plain = 2048 * 2 * 128 * 2
    assert sum(pool.distinct_bytes_read for pool in pools) == share * plain
    asked_for = share + (4 / 512 if codes == "fp8" else 0)  # a pair of scales for each
    assert sum(pool.bytes_read for pool in pools) == asked_for * plain
    assert sum(pool.lines_read for pool in pools) * 128 <= 1.05 * share * plain


def test_of_codes_outside_the_window_only_the_scale_beside_the_first_one_is_read(gpu: Gpu) -> None:
    arrays = make_arrays(Case(decodes(200), (4, 2), window=33, codes="fp8"))
    assert_close(arrays.attend(backend=gpu.name), dense_attention(arrays))
    read = gpu.report.traffic.buffers
    assert read["k_codes"].distinct_bytes_read == 33 * 2 * 64  # keys, KV heads, head_dim
    assert read["k_params"].distinct_bytes_read == (33 + 1) * 2 * 2


# -- a whole model --


def test_gemma_4_with_heads_of_512_generates_the_same_tokens_over_codes(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers with windows have heads of 32 here, those that see everything of 512; in float16, as is needed."""
    model = family_model("gemma4_text", head_dim=32, global_head_dim=512)
    model.set_dtype(mx.float16)

    def generated() -> list[list[int]]:
        settings = {"num_kv_blocks": 32, "max_num_batched_tokens": 24, "pipelining": "off", "kv_cache_dtype": "k8v4"}
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        outputs = LLM.from_model(model, **settings).generate([[3, 1, 4] * 11, [5, 9]], params)
        return [output.outputs[0].token_ids for output in outputs]

    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    expected = generated()
    monkeypatch.setenv(BACKEND_VARIABLE, gpu.name)
    assert generated() == expected
    assert set(gpu.kernels_run) >= {"decode", "prefill", "latent", "write_codes"}


# -- mistakes in reading --

INT8 = Case(decodes(90, 20), (4, 2), (128, 128), sinks=True, codes="int8")
K8V4 = Case(decodes(90, 20), (4, 2), (64, 64), codes="k8v4")
FP8 = Case(decodes(90, 20), (4, 2), (40, 72), window=33, codes="fp8")
FLOAT = INT8._replace(dtype="float32")
CHUNK = Case(((9, 70),), (4, 2), (64, 64), codes="k8v4")
LONG = Case(decodes(400), (5, 1), (64, 64), codes="int8")
MISTAKES = {
    "keys and values of another head": Mistake("+ kv_head) * block_size", ") * block_size", K8V4),
    "no zeros past the last key": Mistake("from_row >= 0 && at", "at", K8V4),
    "the scales of other keys": Mistake("IN_PAIRS ? row >> 1 : row", "row", FP8),
    "the other scale of a pair": Mistake("(first_key + row) % 2", "row % 2", FP8),
    "queries in their own order": Mistake("w % 2 * 4 + w / 2", "w", K8V4),
    "keys of the same columns": Mistake("min(s + lane / 16, STEPS - 1)", "s", K8V4),
    "parameters of the keys' first group": Mistake("s * 16 / GROUP);", "0);", INT8),
    "parameters of the values' first group": Mistake("j * 8 / GROUP);", "0);", INT8),
    "parameters of the first group, in float32": Mistake("d / GROUP)", "0)", FLOAT),
    "parameters of the values' first group, in float32": Mistake("j * 8 / GROUP);", "0);", FLOAT, 1),
    "parameters of the first row": Mistake("row * PARAM_BYTES)", "0 * row)", INT8),
    "a row of values": Mistake("first + k / 2 * 8 + k % 2", "first + k % 2 * 8 + k / 2", INT8),
    "columns in the order of plain values": Mistake(
        "(lane % 4 * 2 + c) * 4 + j % 4", "lane % 4 * 2 + c + j % 4 * 8", INT8
    ),
    "codes that are one too great": Mistake("- 0x1p23f", "- 0x1.fffffep22f", INT8),
    "the first code of four": Mistake("0x7440 + i", "0x7440", INT8),
    "E4M3 that are too great": Mistake("0x1p120f", "0x1p121f", FP8),
    "E4M3 without a sign": Mistake("0x87f00000", "0x07f00000", FP8),
    "a stage is used too early": Mistake("wait_for_copies<STAGES - 1>", "wait_for_copies<STAGES>", INT8, 0, 80),
    "a stage is filled too early": Mistake("__syncwarp();", "", LONG, 0, 400),
    "a stage is read before other lanes' copies": Mistake("__syncwarp();", "", INT8, 1, 80),
    "a tile's keys of another head": Mistake(
        "* num_kv_heads + kv_head;\n    const size_t from", "* num_kv_heads;\n    const size_t from", CHUNK
    ),
    "another group in a tile": Mistake("element / GROUP)", "0)", CHUNK),
    "another four in a tile": Mistake("k / 4 * 4)", "0)", CHUNK),
}


@pytest.mark.slow
def test_planted_mistakes_are_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.unnoticed(MISTAKES, monkeypatch) == []


def test_without_a_mistake_the_same_cases_pass(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.check_without(MISTAKES, monkeypatch)
