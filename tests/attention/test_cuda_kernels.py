"""The kernels in cuda/, run on a CPU: agreement with float64, traffic, and that mistakes are noticed."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from cudasim import Cuda
from cudasim.fixture import cuda as cuda
from helpers.attention_cases import DTYPES, Case, assert_close, check, dense_attention, exact, make_arrays, points_of
from helpers.cuda_text import recorded_calls, slots_of
from helpers.planted import with_mistake
from helpers.tiny_models import VOCAB_SIZE

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention import cuda as cuda_kernels
from mlx_paged.attention import paged_attention as attention
from mlx_paged.attention import shared_prefix as shared_prefix
from mlx_paged.attention import work_items as kernel_plan
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.work_items import Shape
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.errors import EngineWarning

CUDA: Any = attention.BACKENDS["cuda"]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def decodes(*context_lens: int) -> tuple[tuple[int, int], ...]:
    """The lengths of a case with one query per sequence."""
    return tuple((1, context) for context in context_lens)


SHAPES: dict[str, list[Any]] = {
    "heads": [(4, 4), (8, 2), (5, 1), (14, 2), (16, 1)],
    "head_dim": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 32), (40, 72)],
    "block_size": [8, 16, 32, 64],
    "window": [None, 1, 5, 33],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "order": ["ascending", "descending"],
    "is_split": [False, True],
}
DECODES = points_of(
    {"lengths": [decodes(54), decodes(1, 15, 16, 17, 97), decodes(70, 0, 33), decodes(300)], **SHAPES},
    reused=("heads", "head_dim", "softcap", "sinks", "dtype"),
)
PREFILLS = points_of(
    {
        "lengths": [
            ((33, 33),),
            ((13, 86),),
            ((2, 33), (8, 70), (5, 16)),
            ((11, 30), (2, 0), (3, 3)),
            ((3, 197),),
            ((70, 150),),
        ],
        **SHAPES,
    },
    reused=("head_dim", "softcap", "sinks", "dtype"),
)
NUM_PARTS = 4


def split(monkeypatch: pytest.MonkeyPatch, part_size: int = 80) -> None:
    """Have the keys of short contexts computed in parts, too."""
    monkeypatch.setattr(kernel_plan, "keys_per_item", lambda *_: part_size)
    monkeypatch.setattr(kernel_plan, "num_key_splits", lambda _, num_keys, *__: (-(-num_keys // part_size)).clip(1))


@pytest.mark.parametrize(
    ("points", "part"), [(points, part) for points in (DECODES, PREFILLS) for part in range(NUM_PARTS)]
)
def test_it_equals_dense_attention_over_the_grid(
    points: list[Any], part: int, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (*values, order, is_split) in enumerate(points[part::NUM_PARTS]):
        cuda.configure(order=order)
        with monkeypatch.context() as patches:
            if is_split:
                split(patches)
            check(Case(*values), seed=number, backend="cuda")


def test_more_parts_than_lanes_are_merged(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, 48)
    check(Case(decodes(1650, 3), heads=(2, 1), sinks=True, dtype="float32"), backend="cuda")
    assert [report.kernel for report in cuda.reports] == ["paged_decode", "paged_merge"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_does_not_matter(dtype: str, cuda: Cuda) -> None:
    for seed in range(2):
        cuda.configure(order="random", seed=seed)
        check(Case([(33, 40), (1, 70), (1, 0)], dtype=dtype), backend="cuda")


def test_steps_with_decodes_and_prompts_come_back_in_the_order_of_their_tokens(cuda: Cuda) -> None:
    check(Case([(1, 40), (7, 20), (1, 33), (1, 0), (16, 17)], dtype="float32"), backend="cuda")
    assert {report.kernel for report in cuda.reports} == {"paged_decode", "paged_prefill"}


@pytest.mark.parametrize("num_queries", [1, 5])
def test_blocks_outside_the_window_are_never_read(num_queries: int, cuda: Cuda) -> None:
    arrays = make_arrays(Case([(num_queries, 200), (num_queries, 49)], window=33))
    tables = np.array(arrays.block_tables)
    for table, context in zip(tables, (200, 49), strict=True):
        table[: (context - num_queries + 1 - 33) // 16] = 2**26  # reading there would be out of bounds
    metadata = attention.AttentionMetadata(mx.array(tables), arrays.context_lens, arrays.cu_seqlens_q)
    out = attention.attend(*arrays[:3], metadata, AttentionOptions(**arrays.options), "cuda")
    assert_close(out, dense_attention(arrays))
    read = cuda.report.traffic.buffers["k_cache"].bytes_read
    assert read == 2 * (33 + num_queries - 1) * 2 * 64 * 2  # sequences, keys, KV heads, head_dim, bytes


def strided(arrays: Any) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The arrays for a kernel, q and tables as parts of larger ones."""
    q = mx.concatenate([arrays.q + 1, arrays.q, arrays.q - 1], axis=2)[:, :, 64:128]
    tables = mx.concatenate([arrays.block_tables] * 3, axis=1)[:, 8:16]
    return q, arrays.k_cache, arrays.v_cache, tables


@pytest.mark.parametrize("lengths", [decodes(40, 0, 33), [(7, 30), (2, 20)]])
def test_rows_of_queries_and_tables_may_have_any_stride(lengths: Any, cuda: Cuda) -> None:
    arrays = make_arrays(Case(lengths, heads=(6, 2), dtype="float32"))
    shape, scale = shape_of(*arrays[:3]), arrays.options["scale"]
    if len(lengths) == 3:
        out = CUDA.decode(*strided(arrays), CUDA.plan_decode(arrays.context_lens, None, shape), AttentionOptions(scale))
    else:
        plan = CUDA.plan_prefill(arrays.context_lens, arrays.cu_seqlens_q, None, shape)
        out = CUDA.prefill(*strided(arrays), plan, AttentionOptions(scale))
    assert_close(out, dense_attention(arrays))


@pytest.mark.parametrize("lengths", [decodes(3), [(3, 3)]])
def test_offsets_have_64_bits(lengths: Any, cuda: Cuda) -> None:
    cuda.only_simulated("memory that is not there is read")
    arrays = make_arrays(Case(lengths, head_dim=(128, 128)))
    tables = np.array(arrays.block_tables)
    tables[0, 0] = (1 << 32) // (16 * 2 * 128)  # with 32 bits of offset this is block 0
    metadata = attention.AttentionMetadata(mx.array(tables), arrays.context_lens, arrays.cu_seqlens_q)
    with pytest.raises(AssertionError, match="out-of-bounds read"):
        attention.attend(*arrays[:3], metadata, AttentionOptions(**arrays.options), "cuda")


# -- prefixes that sequences share --

TWO_GROUPS = Case(
    ((1, 70), (1, 81), (1, 66), (1, 34), (1, 0), (1, 47), (1, 40)), shared=(((0, 1, 2), 4), ((5, 6), 2)), sinks=True
)
MANY_BEAMS = Case(tuple((1, 33 + i) for i in range(40)), heads=(8, 2), shared=((tuple(range(40)), 2),))


@pytest.fixture
def short_prefixes_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "LEAST_KEYS_SAVED", 1)


@pytest.mark.parametrize("case", [TWO_GROUPS, MANY_BEAMS], ids=["two groups", "several tiles"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part_size", [None, 32], ids=["whole", "split"])
@pytest.mark.usefixtures("short_prefixes_are_worth_it")
def test_decodes_that_share_a_prefix_equal_dense_attention(
    case: Case, dtype: str, part_size: int | None, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part_size:
        split(monkeypatch, part_size)
    check(case._replace(dtype=dtype), backend="cuda")
    assert [report.kernel for report in cuda.reports] == ["paged_decode", "paged_prefill", "paged_merge"]


@pytest.mark.usefixtures("short_prefixes_are_worth_it")
def test_a_shared_prefix_is_read_once(cuda: Cuda) -> None:
    check(Case(((1, 81), (1, 83), (1, 84)), shared=(((0, 1, 2), 5),)), backend="cuda")
    own, shared = (report.traffic.buffers["k_cache"].bytes_read for report in cuda.reports[:2])
    assert own == (1 + 3 + 4) * 2 * 64 * 2  # keys, KV heads, head_dim, bytes
    assert shared == 80 * 2 * 64 * 2


# -- new keys and values --

WRITES = points_of(
    {
        "num_tokens": [1, 3, 40],
        "num_kv_heads": [1, 2, 5],
        "dims": [(64, 64), (128, 128), (40, 72), (256, 8)],
        "block_size": [8, 16, 64],
        "dtype": list(DTYPES),
        "new_dtype": list(DTYPES),
        "is_strided": [False, True],
        "order": ["ascending", "random"],
    },
    reused=("dims", "dtype"),
)


def written_by_hand(
    pools: list[mx.array], where: tuple[np.ndarray, np.ndarray], new: list[mx.array]
) -> list[np.ndarray]:
    """What the pools hold when each token's row has been put into its slot."""
    expected = [exact(pool) for pool in pools]
    for content, pool, rows in zip(expected, pools, new, strict=True):
        content[where] = exact(rows.astype(pool.dtype))
    return expected


@pytest.mark.parametrize("part", range(2))
def test_new_keys_and_values_are_put_into_their_slots_and_nowhere_else(part: int, cuda: Cuda) -> None:
    for seed, point in enumerate(WRITES[part::2]):
        num_tokens, num_kv_heads, dims, block_size, dtype, new_dtype, is_strided, order = point
        cuda.configure(order=order)
        rng = np.random.default_rng(seed)

        def normal(shape: tuple[int, ...], kind: str, rng: np.random.Generator = rng) -> mx.array:
            return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(DTYPES[kind])

        num_blocks = 2 + num_tokens // block_size
        slots = rng.permutation(num_blocks * block_size)[:num_tokens].astype(np.int32)
        where = slots // block_size, slots % block_size
        pools = [normal((num_blocks, block_size, num_kv_heads, dim), dtype) for dim in dims]
        new = [normal((num_tokens, num_kv_heads, dim), new_dtype) for dim in dims]
        if is_strided:
            new = [mx.concatenate([rows, rows + 1], axis=2)[:, :, : rows.shape[2]] for rows in new]
        mx.eval(pools, new)
        expected = written_by_hand(pools, where, new)
        written = CUDA.write(*pools, slots_of(*where), *new)
        mx.eval(written)
        assert written.tolist() == [0]
        for pool, content in zip(pools, expected, strict=True):
            np.testing.assert_array_equal(exact(pool), content)


def test_a_pool_that_something_still_reads_is_written_where_it_lies(cuda: Cuda) -> None:
    cache = PagedKVCache([LayerSpec(4, 64, 64, mx.float32)], [16], 8, 1)
    where, rows, pools = np.array([5], np.int32), mx.ones((1, 4, 64)), (cache.pools[0].keys, cache.pools[0].values)
    views = [pool[5] for pool in pools]  # on a card: a step that is not over
    mx.eval(CUDA.write(*pools, slots_of(where, where), rows, rows))
    assert cache.pools[0].keys is pools[0] and cache.pools[0].values is pools[1]
    for view, pool in zip(views, pools, strict=True):
        assert (view[5] == 1).all().item() and pool.sum().item() == 4 * 64


def test_slots_past_the_32_bits_of_a_pool_are_found(cuda: Cuda) -> None:
    cuda.only_simulated("memory that is not there is written")
    pools = [mx.zeros((2, 16, 2, 128), mx.float16) for _ in "kv"]
    new = [mx.ones((1, 2, 128), mx.float16) for _ in "kv"]
    block_id = np.array([(1 << 32) // (16 * 2 * 128)], np.int32)  # with 32 bits of offset this is block 0
    with pytest.raises(AssertionError, match="out-of-bounds write"):
        CUDA.write(*pools, slots_of(block_id, np.zeros(1, np.int32)), *new)


WRITE_MISTAKES = {
    "a token's row in the slot of its number": ("offsets[token]", "token"),
    "the blocks are as long as there are heads": ("k_cache_shape[1]", "num_kv_heads"),
    "the values of the token before": ("token) * value_pieces", "max(token - 1, 0)) * value_pieces"),
    "keys among the values": ("piece < key_pieces", "piece <= key_pieces"),
    "a thread past the end writes": ("token < block_ids_shape[0]", "token <= block_ids_shape[0]"),
    "nobody is told": ("*write_done = 0", "{}"),
    "an input is written in secret": ("const_cast<T*>(v_cache)", "(T*)v_cache"),
}


@pytest.mark.parametrize("name", WRITE_MISTAKES)
def test_a_mistake_in_writing_is_noticed(name: str, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.only_simulated("wrong kernels are run")
    old, new_text = WRITE_MISTAKES[name]

    def make_with_mistake(*, source: str, **arguments: Any) -> Any:
        assert old in source
        return cuda.cuda_kernel(source=source.replace(old, new_text), **arguments)

    monkeypatch.setattr(mx.fast, "cuda_kernel", make_with_mistake)
    pools = [mx.zeros((3, 8, 2, dim), mx.float32) for dim in (64, 32)]
    new = [mx.arange(5 * 2 * dim, dtype=mx.float32).reshape(5, 2, dim) + 1 for dim in (64, 32)]
    where = np.array([2, 0, 1, 2, 0], np.int32), np.array([7, 1, 3, 0, 4], np.int32)
    mx.eval(pools, new)
    expected = written_by_hand(pools, where, new)
    with pytest.raises(AssertionError):  # a SimulationError is one
        CUDA.write(*pools, slots_of(*where), *new)
        for pool, content in zip(pools, expected, strict=True):
            np.testing.assert_array_equal(exact(pool), content)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.usefixtures("short_prefixes_are_worth_it")
def test_what_reads_a_pool_waits_for_what_was_written_into_it(family: str, tiny_model: Callable[..., Any]) -> None:
    """MLX sees no connection between the two but that one is an input of the other: by all kernels that read."""
    with recorded_calls() as calls:
        llm = LLM.from_model(tiny_model(family), num_kv_blocks=32, max_num_batched_tokens=16)
        del calls[:]
        llm.generate([list(range(1, 40)), [5, 6]], SamplingParams(n=3, max_tokens=9, ignore_eos=True))
    pools = {id(array) for call in calls for name, array in call.inputs.items() if name == "k_cache"}
    last: dict[int, mx.array] = {}
    for call in calls:
        if call.kernel == "paged_write":
            (last[id(call.inputs["k_cache"])],) = call.outputs
        elif call.kernel != "paged_merge":
            assert call.inputs["write_done"] is last[id(call.inputs["k_cache"])]
    assert {call.kernel for call in calls} >= {"paged_write", "paged_decode", "paged_prefill"}
    assert any("SHARED = true" in call.text for call in calls if call.kernel == "paged_prefill")
    assert len(pools) == len(tiny_model(family).layers), "pools stay where they are"


def test_what_has_no_kernel_is_written_as_it_is_read(
    cuda: Cuda, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def generated() -> list[Any]:
        llm = LLM.from_model(tiny_model("llama"), num_kv_blocks=16, block_size=4, pipelining="off")
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    with pytest.warns(EngineWarning, match="no CUDA kernel for block_size 4"):
        attention._warn_once.cache_clear()
        found = generated()
    cuda.only_simulated("launches are counted")
    assert not cuda.reports
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "reference")
    assert generated() == found


# -- traffic and resources --


@pytest.mark.parametrize(
    ("ratio", "head_dim", "dtype"), [(1, 64, "float16"), (4, 128, "bfloat16"), (8, 128, "float16"), (16, 64, "float32")]
)
def test_a_decode_reads_keys_and_values_once_in_whole_lines(ratio: int, head_dim: int, dtype: str, cuda: Cuda) -> None:
    make_arrays(Case(decodes(500), heads=(ratio, 1), head_dim=(head_dim, head_dim), dtype=dtype)).attend(backend="cuda")
    compulsory = 500 * head_dim * DTYPES[dtype].size
    traffic = next(report.traffic for report in cuda.reports if report.kernel == "paged_decode")
    for name in ("k_cache", "v_cache"):
        assert traffic.buffers[name].bytes_read == compulsory
        assert traffic.buffers[name].lines_read * 128 == compulsory


@pytest.mark.parametrize("window", [None, 20])
def test_each_tile_of_a_prefill_reads_the_keys_that_its_rows_see_once(window: int | None, cuda: Cuda) -> None:
    case = Case([(70, 70), (40, 90), (2, 40)], head_dim=(128, 64), window=window)
    arrays = make_arrays(case)
    arrays.attend(backend="cuda")
    rows, num_keys = cuda_kernels.prefill_layout(shape_of(*arrays[:3])).tile.rows, 0
    for num_queries, context in case.lengths:
        for first_row in range(0, num_queries * 4, rows):
            first, last = (
                context - num_queries + row // 4 for row in (first_row, min(first_row + rows, num_queries * 4) - 1)
            )
            num_keys += last + 1 - (0 if window is None else max(0, first + 1 - window))
    traffic = cuda.report.traffic
    for name, dim in (("k_cache", 128), ("v_cache", 64)):
        assert traffic.buffers[name].bytes_read == num_keys * 2 * dim * 2
    assert traffic.buffers["q"].bytes_read == arrays.q.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_has_a_layout_that_fits_every_card(dtype: str) -> None:
    size = DTYPES[dtype].size
    for heads, head_dim, value_dim in itertools.product(range(1, 17), range(8, 257, 8), range(8, 257, 8)):
        shape = Shape(1, heads, head_dim, value_dim, size)
        decode = cuda_kernels.decode_layout(shape)
        assert decode.shared_bytes <= 96 << 10 and decode.shared_bytes % 16 == 0
        prefill = cuda_kernels.prefill_layout(shape)
        assert prefill.shared_bytes <= 96 << 10 and prefill.shared_bytes % 16 == 0
        assert prefill.tile.rows % (16 * prefill.matrices) == 0 and prefill.tile.keys % 16 == 0


# -- mistakes --


class Mistake(NamedTuple):
    """Text of a kernel or its headers, what takes its place, which of its occurrences, a case that must show it."""

    old: str
    new: str
    case: Case
    occurrence: int = 0
    part_size: int = 80


DECODE = Case(decodes(150, 20), sinks=True, window=140)
LONG_DECODE = Case(decodes(400), heads=(5, 1), dtype="float32")
PREFILL = Case([(33, 150)])
WINDOWED = Case([(33, 150)], window=5)
SYNC = "__syncthreads();"
WAIT = "wait_for_copies<0>();"
MISTAKES = {
    "the keys of another head": Mistake("num_kv_heads + kv_head) * HEAD_DIM", "num_kv_heads) * HEAD_DIM", DECODE),
    "the values of another head": Mistake("num_kv_heads + kv_head) * VALUE_DIM", "num_kv_heads) * VALUE_DIM", DECODE),
    "the queries of another head": Mistake("kv_head * HEADS + min(row", "min(row", DECODE),
    "a context that is one too long": Mistake("return key < end", "return key <= end", Case(decodes(150, 20))),
    "a key past the end counts": Mistake("% 2 < end ?", "% 2 <= end ?", Case(decodes(150, 20))),
    "the block after": Mistake("table[key >> block_shift]", "table[(key >> block_shift) + 1]", DECODE),
    "a sink in every item": Mistake("is_first && ", "", DECODE),
    "a sink in every warp": Mistake("warp == 0) {\n    UNROLL", "true) {\n    UNROLL", DECODE),
    "no correction of the output": Mistake("[2 * r] *= correction", "[2 * r] *= 1.0f", LONG_DECODE),
    "no correction of the total": Mistake("total[r] *= correction", "total[r] *= 1.0f", LONG_DECODE),
    "rows 8 to 15 are forgotten": Mistake("HEADS > 8 ? 2 : 1", "1", Case(decodes(40), heads=(16, 1))),
    "a stage is used too early": Mistake("wait_for_copies<STAGES - 1>", "wait_for_copies<STAGES>", DECODE),
    "a stage is filled too early": Mistake("__syncwarp();", "", LONG_DECODE, part_size=400),
    "a stage is read before other lanes' copies": Mistake("__syncwarp();", "", DECODE, 1),
    "no wait for the queries": Mistake(WAIT, "", DECODE),
    "no barrier after the queries": Mistake(SYNC, "", DECODE),
    "no barrier before peaks": Mistake(SYNC, "", DECODE, 1),
    "no barrier after peaks": Mistake(SYNC, "", DECODE, 2),
    "no barrier before warps are added": Mistake(SYNC, "", DECODE, 3),
    "a merge that forgets the first items": Mistake(
        "total += own", "total = own", Case(decodes(1650), heads=(2, 1)), part_size=48
    ),
    "a merge of equal weights": Mistake("log_total_of(first + lane) - peak", "0.0f", DECODE),
    "a key of the future is visible": Mistake("distance < 0", "distance < -1", PREFILL),
    "a query does not see itself": Mistake("distance < 0", "distance <= 0", PREFILL),
    "the window is one too long": Mistake("distance >= window_keys", "distance > window_keys", WINDOWED),
    "the window begins one too late": Mistake("+ 1 - window_keys", "+ 2 - window_keys", WINDOWED),
    "the last key is missing": Mistake("last_key + 1)", "last_key)", PREFILL),
    "no mask where it is needed": Mistake("> lowest_position ||", "> lowest_position + 9 ||", PREFILL),
    "tiles are skipped too soon": Mistake("key <= highest_position &&", "key < lowest_position &&", PREFILL),
    "what follows a row counts": Mistake("is_there && element < DIM", "is_there", Case([(33, 33)], head_dim=(40, 72))),
    "rows of another group size": Mistake("(first_row + row) % group", "row % 3", PREFILL),
    "each part has the sink": Mistake(" && part == 0", "", Case([(3, 197)], sinks=True)),
    "parts overlap": Mistake("part * rounds", "part * (rounds - 1)", Case([(3, 197)])),
    "the queries of other members": Mistake("token = members[token]", "token = members[0]", TWO_GROUPS),
    "members see only keys before their number": Mistake(
        "(SHARED ? 0 : (first_row + row)", "-((first_row + row)", TWO_GROUPS
    ),
    "shared parts are forgotten": Mistake("ranges[2 * query + 1] - ranges[2 * query]", "0", TWO_GROUPS),
    "the shared parts of another": Mistake("? ranges[2 * query] - num_own", "? ranges[0] - num_own", TWO_GROUPS),
    "a row of matrix b": Mistake("lane / 16 * 8) * STRIDE + lane", "lane / 16 * 4) * STRIDE + lane", PREFILL),
    "no wait for keys": Mistake(WAIT, "", PREFILL),
    "no wait for values": Mistake(WAIT, "", PREFILL, 1),
    "no barrier before scores": Mistake(SYNC, "", PREFILL),
    "no barrier before values": Mistake(SYNC, "", PREFILL, 1),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("short_prefixes_are_worth_it")
def test_a_planted_mistake_is_noticed(name: str, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.only_simulated("wrong kernels are run")
    mistake, planted = MISTAKES[name], []
    stem = "paged_decode" if mistake.case.lengths[0][0] == 1 and not mistake.case.shared else "paged_prefill"

    def make_with_mistake(*, name: str, source: str, header: str, **arguments: Any) -> Any:
        texts = [source, header]
        if name in (stem, "paged_merge"):
            texts = [with_mistake(text, mistake.old, mistake.new, mistake.occurrence) for text in texts]
            planted.extend(name for before, after in zip((source, header), texts, strict=True) if before != after)
        return cuda.cuda_kernel(name=name, source=texts[0], header=texts[1], **arguments)

    monkeypatch.setattr(mx.fast, "cuda_kernel", make_with_mistake)
    split(monkeypatch, mistake.part_size)
    with pytest.raises(AssertionError):  # a SimulationError is one
        check(mistake.case, backend="cuda")
    assert planted


# -- the wrapper --


def test_without_a_device_the_wrapper_says_so() -> None:
    if mx.cuda.is_available():
        pytest.skip("there is one")
    arrays = make_arrays(Case(decodes(9)))
    plan = CUDA.plan_decode(arrays.context_lens, None, shape_of(*arrays[:3]))
    with pytest.raises(RuntimeError, match="CUDA device"):
        CUDA.decode(*arrays[:4], plan, AttentionOptions(1.0))


def test_what_has_no_kernel_is_named(cuda: Cuda) -> None:
    with pytest.raises(ValueError, match="no CUDA kernel for block_size 12"):
        check(Case(decodes(9), block_size=12), backend="cuda")
    assert not cuda.reports


def test_the_cuda_backend_is_chosen_where_there_is_a_device(cuda: Cuda) -> None:
    check(Case(decodes(9)))
    assert [report.kernel for report in cuda.reports] == ["paged_decode"]


def test_an_older_card_takes_plain_operations(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.only_simulated("the card is another")
    for generation, expected in ((7, False), (8, True), (9, True)):
        monkeypatch.setattr(mx, "device_info", lambda major=generation: {"compute_capability_major": major})
        assert CUDA.is_available() is expected


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_model_generates_the_same_tokens_through_the_kernels(
    family: str, cuda: Cuda, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCAB_SIZE, length).tolist() for length in (3, 45, 20)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def generated(backend: str) -> list[Any]:
        monkeypatch.setenv(attention.BACKEND_VARIABLE, backend)
        llm = LLM.from_model(
            tiny_model(family, num_hidden_layers=2), num_kv_blocks=32, max_num_batched_tokens=24, pipelining="off"
        )
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    expected = generated("reference")
    assert generated("cuda") == expected
    assert {report.kernel for report in cuda.reports} >= {"paged_decode", "paged_prefill", "paged_write"}


# -- the benchmark --


@pytest.mark.slow
def test_everything_to_be_measured_on_a_card_can_be(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.only_simulated("the benchmark is run without measuring")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    on_a_gpu = importlib.import_module("on_a_gpu")
    monkeypatch.setattr(on_a_gpu, "run_tests", lambda files: "none failed")
    results = {part.run.__name__: part.run(True) for part in on_a_gpu.PARTS}
    assert [row["same"] for row in results["wrapper"]] == ["yes"] * 4
    assert all(float(row["result"].split()[-1]) < 8e-3 for row in results["correctness"][2:])
    assert all(row["share"] > 0 for part in ("decode", "prefill") for row in results[part])
    assert {(row["writes"], row["tokens"] > 0) for row in results["writes"]} == {("kernel", True), ("scatter", True)}
    assert len(results["submission"]) == 2 and all(row["tokens_per_s"] > 0 for row in results["submission"])
    assert all(row["microseconds"] > 0 for row in results["uploads"])
    assert all(row["kv"] > 0 for row in results["memory"])
    assert {row["system"] for row in results["end_to_end"]} == {"mlx-lm", "mlx-paged"}


def test_without_a_card_the_benchmark_says_so() -> None:
    if mx.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, BENCHMARKS / "on_a_gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("on_a_gpu.py: there is no CUDA device here")
