"""Kernels over quantised K and V: agreement with float64 over what is stored, the bytes that are written, traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import (
    DTYPES,
    Arrays,
    Case,
    assert_close,
    check_points,
    decodes,
    dense_attention,
    make_arrays,
    points_of,
    share_all,
    split,
)
from helpers.cuda_text import slots_of
from helpers.gpu import Gpu
from helpers.planted import Mistake
from metalsim.order import UnorderedAccess

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.attention import gathered
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import BACKEND_VARIABLE
from mlx_paged.attention.work_items import Shape
from mlx_paged.cache.codes import choose_codes
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

CODES = ("int8", "k8v4", "fp8")
SHARED = (((1, 70), (1, 81), (1, 34), (1, 47)), (((0, 1), 3), ((2, 3), 2)))
GRID: dict[str, list[Any]] = {
    "groups": [
        (decodes(1, 54, 0, 97, 33), ()),
        (((2, 54), (2, 2), (1, 130), (2, 100)), ()),
        (((3, 40), (17, 33), (8, 90)), ()),
        SHARED,
    ],
    "heads": [(3, 3), (8, 2), (5, 1)],
    "head_dim": [(64, 64), (96, 96), (128, 128), (192, 32), (64, 256)],
    "block_size": [8, 32],
    "window": [None, 33],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "codes": list(CODES),
    "order": ["ascending", "descending"],
    "part_size": [None, 32],
}
POINTS = points_of(GRID, seed=7)
NUM_PARTS = 2


@pytest.fixture(params=["metal"])  # of CUDA's kernels see test_kernels_codes_cuda.py
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield Gpu(request.param, request.getfixturevalue(request.param))


def case_of(groups: Any, heads: Any, head_dim: Any, block_size: int, window: Any, sinks: bool, *kind: str) -> Case:
    (lengths, shared), (dtype, codes) = groups, kind
    return Case(lengths, heads, head_dim, block_size, window, None, sinks, dtype, shared=shared, codes=codes)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_it_equals_dense_attention_over_the_grid(part: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.take_part(part)
    share_all(monkeypatch)

    def attend(arrays: Arrays, part_size: int | None) -> mx.array:
        with monkeypatch.context() as patches:
            split(patches, part_size)
            return arrays.attend(backend=gpu.name)

    points = [(*case_of(*point[:-2]), *point[-2:]) for point in POINTS[part::NUM_PARTS]]
    check_points(points, attend, gpu)


@pytest.mark.parametrize(
    "case",
    [
        Case((*decodes(70, 0), (9, 30)), (4, 2), (512, 512), sinks=True, dtype="bfloat16", codes="k8v4"),
        Case((*decodes(40), (9, 30)), (8, 1), (40, 72), softcap=50.0, codes="fp8"),  # rows of 10 and of 18 words
    ],
    ids=["long heads", "odd heads"],
)
def test_heads_of_any_length_have_kernels(case: Case, gpu: Gpu) -> None:
    gpu.check(case)
    assert gpu.kernels_run == ["decode", "prefill"]


@pytest.mark.parametrize("codes", CODES)
def test_stretches_that_mlx_computes_see_the_same_numbers(
    codes: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gathered.VARIABLE, "gathered")
    monkeypatch.setattr(gathered, "MIN_QUERIES", 9)
    gpu.check(Case(((9, 70), (20, 20)), (4, 2), codes=codes))
    assert not gpu.kernels_run


# -- what is written --


def rows_of(shape: tuple[int, int, int], dtype: mx.Dtype, rng: np.random.Generator) -> mx.array:
    """Numbers of all sizes, and rows that are a rule's edge: zeros of both signs, equal ones, and many ties."""
    rows = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3, (*shape[:2], 1))
    rows[0], rows[1] = 0.0, -0.0
    rows[2], rows[3] = 5.0, -3.0
    rows[4] = rng.integers(0, 511, shape[1:]) / 2
    rows[4, :, ::32], rows[4, :, 1::32] = 0.0, 255.0  # a step of 1: half of the numbers lie between two codes
    rows[5] = -rng.integers(0, 31, shape[1:]) / 2
    rows[5, :, ::32], rows[5, :, 1::32] = -15.0, 0.0  # likewise of 4 bits
    rows[6] = rng.integers(-448, 449, shape[1:])
    rows[6, :, 0] = 448.0  # a scale of 1
    rows[7] = np.linspace(-448, 1e-3, shape[2])
    return mx.array(rows.astype(np.float32)).astype(dtype)


WRITES = points_of(
    {
        "num_tokens": [8, 19],
        "num_kv_heads": [1, 3],
        "dims": [(64, 64), (32, 96), (128, 512), (192, 128)],
        "block_size": [8, 16, 64],
        "dtype": list(DTYPES),
        "codes": list(CODES),
        "order": ["ascending", "random"],
    },
    reused=("dims", "dtype", "codes"),
)


def bytes_of(pool: LayerPool) -> dict[str, np.ndarray]:
    return {name: np.array(array.view(mx.uint8)) for name, array in pool.arrays.items()}


def assert_written_as_mlx_quantises(
    gpu: Gpu, layer: LayerSpec, num_tokens: int, block_size: int, seed: int = 0
) -> LayerPool:
    rng = np.random.default_rng(seed)
    num_blocks = 2 + num_tokens // block_size
    slots = rng.permutation(num_blocks * block_size)[:num_tokens].astype(np.int32)
    where = slots // block_size, slots % block_size
    new = [rows_of((num_tokens, layer.num_kv_heads, dim), layer.dtype, rng) for dim in layer[1:3]]
    expected, pool = (LayerPool.zeros(layer, num_blocks, block_size) for _ in range(2))
    for each in (expected, pool):  # what lies beside the slots shows whether it is left alone
        each.arrays = {name: array + 7 for name, array in each.arrays.items()}
    mx.eval(pool.arrays)
    expected.write(*map(mx.array, where), *new)
    gpu.backend.write(pool, slots_of(*where), *new)
    mx.eval(pool.write_done)
    mx.synchronize()
    for (name, content), found in zip(bytes_of(expected).items(), bytes_of(pool).values(), strict=True):
        np.testing.assert_array_equal(found, content, err_msg=name)
    return pool


def test_what_is_written_is_what_mlx_makes_of_it_bit_for_bit(gpu: Gpu) -> None:
    for seed, (num_tokens, num_kv_heads, dims, block_size, dtype, codes, order) in enumerate(WRITES):
        gpu.configure(order=order)
        layer = LayerSpec(num_kv_heads, dims[0], dims[1], DTYPES[dtype]).quantised(codes)
        assert_written_as_mlx_quantises(gpu, layer, num_tokens, block_size, seed)


def test_what_is_stored_for_a_token_depends_on_that_token_alone(gpu: Gpu) -> None:
    layer = LayerSpec(2, 64, 64, mx.float16).quantised("k8v4")
    rows, stored = mx.random.normal((9, 2, 64)).astype(mx.float16), []
    for batch in (rows, rows[3:4]):
        pool = LayerPool.zeros(layer, 1, 16)
        where = np.zeros(len(batch), np.int32), np.arange(len(batch), dtype=np.int32)
        gpu.backend.write(pool, slots_of(*where), batch, batch)
        mx.eval(pool.write_done)
        stored.append(bytes_of(pool))
    for name, content in stored[0].items():
        np.testing.assert_array_equal(content[0, :, 3], stored[1][name][0, :, 0])


def test_codes_that_something_still_reads_are_written_where_they_lie(gpu: Gpu) -> None:
    pool = LayerPool.zeros(LayerSpec(2, 32, 32, mx.float32).quantised("int8"), 3, 8)
    mx.eval(pool.arrays)
    views = {name: array[1] for name, array in pool.arrays.items()}  # on a card: a step that is not over
    arrays = dict(pool.arrays)
    where, rows = np.array([1], np.int32), mx.arange(64, dtype=mx.float32).reshape(1, 2, 32)
    gpu.backend.write(pool, slots_of(where, where), rows, rows)
    mx.eval(pool.write_done)
    mx.synchronize()
    assert all(pool.arrays[name] is array for name, array in arrays.items())
    assert all(view.any().item() for view in views.values())


def test_reads_and_writes_of_codes_wait_for_each_other(gpu: Gpu) -> None:
    pool = LayerPool.zeros(LayerSpec(2, 32, 32, mx.float32).quantised("int8"), 2, 16)
    metadata = AttentionMetadata(
        mx.zeros((2, 8), mx.int32), np.array([9, 8], np.int32), np.array([0, 1, 4], np.int32),
        slot_block_ids=mx.zeros(4, mx.int32), slot_offsets=mx.array([8, 5, 6, 7]),
    )  # fmt: skip
    rows = mx.arange(256, dtype=mx.float32).reshape(4, 2, 32)

    def write() -> None:
        gpu.backend.write(pool, metadata, rows, rows)

    def read() -> None:
        mx.eval(gpu.backend.attend(mx.ones((4, 4, 32)), pool, metadata, AttentionOptions(1.0)))

    write()
    read()
    write()
    before = [] if pool.write_done is None else [pool.write_done]
    read()
    write()
    gpu.only_simulated("the order is checked")
    pool.reads_done = before
    with pytest.raises(UnorderedAccess, match="writes into k_codes"):
        write()
    pool.write_done = before[0]
    with pytest.raises(UnorderedAccess, match="reads k_codes"):
        read()


WRITE_MISTAKES = {
    "a token's row in the slot of its number": ("offsets[token]", "token", "int8"),
    "heads in each other's place": ("row % num_kv_heads;", "(row + 1) % num_kv_heads;", "int8"),
    "blocks as long as there are heads": ("head * k_codes_shape[2]", "head * num_kv_heads", "int8"),
    "keys for values": ("values + size_t", "keys + size_t", "k8v4"),
    "a thread past the end writes": ("token < keys_shape[0]", "token <= keys_shape[0]", "k8v4"),
    "nobody is told": ("write_done[thread", "if (false) write_done[thread", "k8v4"),
    "a group that is half as long": ("mask < GROUP / COUNT", "mask < GROUP / COUNT / 2", "k8v4"),
    "the nearer edge has a code of its own": ("is_least ? least : most, ", "is_least ? most : least, ", "int8"),
    "zero has no code of its own": ("scale = edge / code, bias", "bias", "int8"),
    "ties go up": ("metal::rint((numbers[i] - bias) / scale)", "floor(0.5f + (numbers[i] - bias) / scale)", "int8"),
    "the scale is rounded first": (
        "const float code = metal::rint((", "scale = float(T(scale)); const float code = metal::rint((", "int8"
    ),
    "what is no number is stored as one": ("== 0.0f ? 1.0f", "== 0.0f ? 2.0f", "fp8"),
    "the scale is rounded last": ("float(static_cast<T>(most / 448.0f))", "most / 448.0f", "fp8"),
    "E4M3 with ties up": ("0x7ffffu + (size >> 20 & 1)", "0x80000u", "fp8"),
    "small E4M3 are cut": ("+ 16384.0f) -", "* 1.0f + 16384.0f * 1.0009765625f) -", "fp8"),
    "no sign": ("| (bits >> 31 << 7)", "", "fp8"),
}  # fmt: skip


def test_a_mistake_in_writing_is_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (old, new, codes) in WRITE_MISTAKES.items():
        with monkeypatch.context() as patches:
            planted = gpu.plant(Mistake(old, new, Case(()), -1), patches)
            layer = LayerSpec(2, 64, 64, mx.float16).quantised(codes)
            with pytest.raises(AssertionError):  # a SimulationError is one
                assert_written_as_mlx_quantises(gpu, layer, 9, 16)
                pytest.fail(f"not noticed: {name}")
            assert planted, name


# -- mistakes in reading --

TWO_GROUPS = Case(decodes(90, 20), (4, 2), (128, 128), sinks=True, codes="int8")
FOUR_BITS = Case(decodes(90, 20), (8, 2), (64, 64), codes="k8v4")  # two lanes load for each other
E4M3 = Case(decodes(90, 20), (4, 2), (40, 72), codes="fp8")
CHUNK = Case(((9, 70),), (4, 2), (64, 64), codes="k8v4")
MISTAKES: dict[str, dict[str, Mistake]] = {
    "metal": {
        "sums of queries are forgotten": Mistake("factors.y * query_sums", "0.0f * query_sums", TWO_GROUPS),
        "the parameters of the first group": Mistake("% ROWS * ROOM + group", "% ROWS * ROOM", TWO_GROUPS),
        "the parameters of the first row": Mistake("t % ROWS * ROOM + group", "group", TWO_GROUPS),
        "the parameters of another head": Mistake("(row * GROUPS", "(metal::max(row, size_t(9)) * GROUPS", TWO_GROUPS),
        "no parameters at first": Mistake("Params::load(v_params, own_row, row", "Params::ROWS, (row", TWO_GROUPS),
        "parameters of values before": Mistake("Params::load(v_params, own_row, f", "Params::ROWS, (f", TWO_GROUPS),
        "the keys' parameters for values": Mistake("(v_params, own_row", "(k_params, own_row", TWO_GROUPS, -1),
        "slots before heads": Mistake("if constexpr (HEADS_FIRST) return", "if (false) return", TWO_GROUPS),
        "keys in another order than their rows": Mistake("+ place, last_key", "+ lane, last_key", FOUR_BITS),
        "codes that are one too great": Mistake("-1024.0f", "-1023.0f", TWO_GROUPS),
        "codes in another order": Mistake("[i / APART]", "[i % 2]", FOUR_BITS),
        "half of a word for another's": Mistake("is_second ? word : word >>", "word >>", FOUR_BITS),
        "four bits of eight": Mistake("BITS == 8 ? 0x00ff00ffu", "BITS == 8 ? 0x000f000fu", TWO_GROUPS),
        "E4M3 of another size": Mistake("256.0f * scale", "128.0f * scale", E4M3),
        "no sign": Mistake("(pair & 0x00800080u)", "0u", E4M3),
        "another group in a tile": Mistake("column / GROUP)", "0)", CHUNK),
        "another piece in a tile": Mistake("column / COUNT,", "0,", CHUNK),
    },
}  # fmt: skip


@pytest.mark.slow
def test_planted_mistakes_are_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.unnoticed(MISTAKES[gpu.name], monkeypatch) == []


def test_without_a_mistake_the_same_cases_pass(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.check_without(MISTAKES[gpu.name], monkeypatch)


# -- traffic --


@pytest.mark.parametrize(("codes", "share"), [("int8", 0.53125), ("k8v4", 0.421875), ("fp8", 0.5078125)])
def test_codes_leave_memory_once_in_whole_lines(codes: str, share: float, gpu: Gpu) -> None:
    """2,048 keys of 4 query heads to a KV head of 128, divided as for 8 KV heads, of which one is run."""
    num_keys, heads, dim = 2048, 4, 128
    kind = choose_codes(codes, dim, dim)
    plan = gpu.backend.plan_decode(np.array([num_keys]), np.arange(2), None, Shape(8, heads, dim, dim, 2, codes=kind))
    arrays = make_arrays(Case(decodes(num_keys), (heads, 1), (dim, dim), codes=codes))
    out = gpu.backend.run(arrays.q, arrays.pool, arrays.block_tables, plan, AttentionOptions(arrays.options["scale"]))
    assert_close(out, dense_attention(arrays))
    buffers = gpu.reports[0].traffic.buffers
    compulsory, pools = 2 * num_keys * dim * 2, [buffers[f"{of}_{kind}"] for of in "kv" for kind in ("codes", "params")]
    assert sum(pool.distinct_bytes_read for pool in pools) == share * compulsory
    if gpu.name == "metal":
        assert 128 * sum(pool.lines_read for pool in pools) <= 1.05 * share * compulsory
        assert sum(pool.bytes_read for pool in pools) == share * compulsory


# -- whole models --


@pytest.mark.parametrize(("family", "codes"), [("gpt_oss", "k8v4"), ("qwen3", "int8")])
def test_a_model_generates_the_same_tokens_through_the_kernels(
    family: str, codes: str, gpu: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with chunks of prompts, preemption, samples, and beams; gpt_oss has windows and sinks."""
    share_all(monkeypatch)
    model = tiny_model(family, num_hidden_layers=2)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 97, length).tolist() for length in (3, 45, 20)]

    def generated() -> list[Any]:
        llm = LLM.from_model(
            model, num_kv_blocks=12, block_size=8, max_num_batched_tokens=24, kv_cache_dtype=codes, pipelining="off"
        )
        greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        beams = llm.beam_search(prompts[2:], BeamSearchParams(beam_width=2, max_tokens=3))
        assert llm.engine.stats().num_preemptions > 0
        return [[o.outputs[0].token_ids for o in greedy], [each.token_ids for each in beams[0].sequences]]

    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    expected = generated()
    monkeypatch.setenv(BACKEND_VARIABLE, gpu.name)
    assert generated() == expected
    assert {"write_codes", "decode", "prefill"} <= set(gpu.kernels_run)
