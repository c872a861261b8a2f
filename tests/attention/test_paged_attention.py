"""paged_attention against dense attention in float64, rebuilt from the blocks."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import DTYPES, Case, assert_close, check, dense_attention, make_arrays, points_of

from mlx_paged import paged_attention
from mlx_paged.attention import cpu as cpu
from mlx_paged.attention import reference as reference
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

# (query length, context length) of each sequence of a batch
BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "one decode": ((1, 54),),
    "decodes of all lengths": tuple((1, n) for n in (1, 15, 16, 17, 54, 97, 1023)),
    "similar decodes": tuple((1, 30 + n) for n in range(17)),
    "one prompt": ((97, 97),),
    "chunk of a prompt": ((33, 129),),
    "several tokens each": ((4, 20), (3, 3), (7, 100)),
    "mixed": ((1, 1024), (16, 16), (1, 17), (40, 200), (1, 1), (1, 97)),
    "decodes and padding": ((1, 300), (1, 0), (1, 20)),
    "padding": ((1, 0), (1, 33), (2, 0), (5, 9)),
}
GRID: dict[str, list[Any]] = {
    "lengths": list(BATCHES.values()),
    "heads": [(8, 8), (32, 8), (40, 40), (14, 2), (6, 1), (5, 1)],
    "head_dim": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 32)],
    "block_size": [1, 3, 8, 16, 32],
    "window": [None, 1, 33, 256],
    "softcap": [None, 50.0],
    "sinks": [False, True],
    "dtype": list(DTYPES),
    "consecutive": [False, True],
}
CASES = [Case(*values) for values in points_of(GRID)]


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
on_a_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="there is no cpu backend beside a GPU")


def skip_without(backend: str) -> None:
    if backend == "cpu" and mx.default_device() != mx.cpu:
        pytest.skip("work goes to a GPU here")


@BACKENDS
@pytest.mark.parametrize("part", range(4))
def test_it_equals_dense_attention_over_the_grid(part: int, backend: str) -> None:
    skip_without(backend)
    for number, case in enumerate(CASES[part::4]):
        check(case, seed=number, backend=backend)


@on_a_cpu
@pytest.mark.parametrize("slow", [False, True], ids=["MLX's exponentials", "our own"])
def test_it_equals_dense_attention_with_exponentials_of_either_kind(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "exp_is_slow", lambda: slow)
    monkeypatch.setattr(cpu, "_MIN_OWN_EXP", 1)
    for number, case in enumerate(CASES[::4]):
        check(case, seed=number, backend="cpu")


@on_a_cpu
def test_decodes_that_read_keys_in_place_equal_dense_attention_whatever_unused_slots_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "_MIN_KEYS_IN_PLACE", 1)
    used = []
    gather_mm = mx.gather_mm
    monkeypatch.setattr(mx, "gather_mm", lambda *arrays: used.append(1) or gather_mm(*arrays))
    for softcap, sinks, heads in itertools.product((None, 30.0), (False, True), ((4, 4), (6, 2), (3, 1))):
        lengths = ((1, 70), (5, 9), (1, 81), (1, 3), (1, 0), (1, 64), (1, 500))
        case = Case(lengths, heads, (24, 40), 8, softcap=softcap, sinks=sinks, dtype="float32")
        check(case, seed=1, backend="cpu")
        assert used
        used.clear()
        check(case._replace(window=20), seed=1, backend="cpu")
        check(case._replace(dtype="float16"), seed=1, backend="cpu")
        assert not used


def record_tiles(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[reference.Tile]:
    """The tiles that a module makes from here on."""
    tiles, original = [], reference.Tile
    monkeypatch.setattr(module, "Tile", lambda *arrays: tiles.append(original(*arrays)) or tiles[-1])
    return tiles


@on_a_cpu
def test_on_a_cpu_prompts_are_computed_in_tiles_that_see_no_more_than_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "_CACHED_BYTES", 4 * 4 * 16 * 100)
    tiles = record_tiles(reference, monkeypatch)
    check(Case(((64, 100),), (4, 2), (64, 64), 8, None, None, False, "float32", False), seed=1, backend="cpu")
    sizes = [(tile.tokens.shape[1], tile.rows.shape[2]) for tile in tiles]
    assert sizes == [(16, 52), (16, 68), (16, 84), (16, 100)]


def transposed(array: mx.array) -> mx.array:
    return mx.contiguous(array.T).T


def every_second(array: mx.array) -> mx.array:
    return mx.stack([array, array + 1], axis=-1).flatten(-2)[..., ::2]


def backwards(array: mx.array) -> mx.array:
    return mx.contiguous(array[..., ::-1])[..., ::-1]


def of_numpy(layout: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """The same layout for an array of the host."""
    found: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
        transposed: np.asfortranarray,
        every_second: lambda array: np.stack([array, array + 1], axis=-1).reshape(*array.shape[:-1], -1)[..., ::2],
        backwards: lambda array: array[..., ::-1].copy()[..., ::-1],
    }
    return found[layout]


@pytest.mark.parametrize("backend", ["reference", "cpu", "metal", "cuda"])
def test_the_layout_of_an_argument_in_memory_changes_nothing(backend: str, request: pytest.FixtureRequest) -> None:
    skip_without(backend)
    if backend in ("metal", "cuda"):
        request.getfixturevalue(backend)
    case = Case(((1, 20), (5, 9), (1, 33), (12, 40)), (4, 2), (32, 32), 8, sinks=True, dtype="float32")
    arrays = make_arrays(case)
    expected, given = dense_attention(arrays), [*arrays[:6], arrays.options["sinks"]]
    names = ("q", "k_cache", "v_cache", "block_tables", "context_lens", "cu_seqlens_q", "sinks")
    for layout, (number, name) in itertools.product((transposed, every_second, backwards), enumerate(names)):
        kinds = [layout] if number in (0, 1, 2, 6) else [lambda a: layout(mx.array(a)), of_numpy(layout)]  # noqa: B023
        for kind in kinds:
            changed = list(given)
            changed[number] = kind(given[number] if kind is layout else np.array(given[number]))
            options = arrays.options | {"sinks": changed[6]}
            out = paged_attention(*changed[:6], **options, backend=backend)
            try:
                assert_close(out, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}, {layout.__name__}: {error}") from None


@BACKENDS
@pytest.mark.parametrize("limit", [1, 20_000])
def test_tiles_and_groups_bounded_by_memory_give_the_same_result(
    limit: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(backend)
    monkeypatch.setattr(reference, "MAX_BYTES", limit)
    tiles = record_tiles(reference, monkeypatch)
    for batch, window, consecutive in itertools.product(("mixed", "similar decodes"), (None, 33), (False, True)):
        case = Case(BATCHES[batch], (4, 2), (64, 64), 8, window, None, True, "float32", consecutive)
        check(case, seed=1, backend=backend)
    assert len(tiles) >= 4 * (6 + 17)


@BACKENDS
@pytest.mark.parametrize("spread", [7, 203], ids=["similar", "different"])
def test_a_batch_of_decodes_builds_no_more_operations_than_a_few(
    spread: int, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(backend)
    monkeypatch.setattr(cpu, "_MIN_OWN_EXP", 1)
    monkeypatch.setattr(cpu, "_MIN_KEYS_IN_PLACE", 1)

    def num_operations(batch_size: int) -> int:
        k_cache = mx.zeros((28 * batch_size, 8, 2, 32))
        out = paged_attention(
            mx.zeros((batch_size, 4, 32)),
            k_cache,
            k_cache,
            mx.arange(28 * batch_size, dtype=mx.int32).reshape(batch_size, 28),
            mx.array([25 + 37 * i % spread for i in range(batch_size)], mx.int32),
            mx.arange(batch_size + 1, dtype=mx.int32),
            scale=1.0,
            backend=backend,
        )
        mx.export_to_dot(str(tmp_path / "graph.dot"), out)
        return (tmp_path / "graph.dot").read_text().count("shape=rectangle")

    assert num_operations(64) == num_operations(16) > 0


def test_sequences_are_computed_with_others_of_at_most_twice_their_keys() -> None:
    lengths = np.array([1, 40, 128, 129, 200, 258, 259, 5000, 9000])
    groups = reference._similar_lengths(np.arange(9) + 10, lengths, max_keys=20_000)
    assert [group.tolist() for group in groups] == [[10, 11, 12], [13, 14, 15], [16], [17, 18]]
    groups = reference._similar_lengths(np.arange(9) + 10, lengths, max_keys=400)
    assert [group.tolist() for group in groups] == [[10, 11, 12], [13, 14], [15], [16], [17], [18]]


def test_a_step_keeps_its_plan_for_all_layers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = record_tiles(reference, monkeypatch)
    metadata = AttentionMetadata(
        mx.array([[0, 1], [2, 3]], mx.int32), np.array([20, 10], np.int32), np.array([0, 1, 4], np.int32)
    )
    q, pool = mx.zeros((4, 4, 8)), LayerPool.zeros(LayerSpec(2, 8, 8, mx.float32), 4, 16)
    for window, scale in ((None, 1.0), (None, 2.0), (8, 1.0), (8, 1.0)):
        reference.ReferenceBackend().attend(q, pool, metadata, AttentionOptions(scale, window))
    assert len(tiles) == 2 * 2


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("window", [None, 5000])
def test_long_contexts_cost_the_host_nothing_until_the_device_computes(window: int | None, num_queries: int) -> None:
    num_seqs, context, block_size = 64, 100_000, 16
    no_device_has = mx.zeros((1 << 20, 1 << 20), mx.int32) + 1  # evaluating it would fail
    metadata = AttentionMetadata(
        no_device_has[:num_seqs, : context // block_size],
        np.full(num_seqs, context, np.int32) - np.arange(num_seqs, dtype=np.int32),
        np.arange(num_seqs + 1, dtype=np.int32) * num_queries,
    )
    q, pool = mx.zeros((num_seqs * num_queries, 4, 8)), LayerPool.zeros(LayerSpec(2, 8, 8, mx.float32), 2, block_size)
    mx.eval(q, pool.arrays)
    before = mx.get_active_memory()
    tracemalloc.start()
    try:
        out = reference.ReferenceBackend().attend(q, pool, metadata, AttentionOptions(1.0, window))
        _, host_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert out.shape == q.shape
    assert host_peak < 4 * context
    assert mx.get_active_memory() - before < 4 * context


def _arguments(**changes: Any) -> dict[str, Any]:
    """Valid arguments of two sequences, (1 query, 20 tokens) and (3 queries, 10 tokens), with some replaced."""
    k_cache = mx.zeros((8, 8, 2, 16))
    arguments: dict[str, Any] = {
        "q": mx.zeros((4, 4, 16)),
        "k_cache": k_cache,
        "v_cache": k_cache,
        "block_tables": mx.array([[0, 1, 2], [3, 4, 0]], mx.int32),
        "context_lens": mx.array([20, 10], mx.int32),
        "cu_seqlens_q": mx.array([0, 1, 4], mx.int32),
        "scale": 1.0,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be above 0"),
        ({"sinks": mx.zeros(3)}, ValueError, "sinks"),
        ({"backend": "abacus"}, ValueError, "abacus"),
        ({"q": mx.zeros((4, 4, 16), mx.float16)}, TypeError, "dtype"),
        ({"v_cache": mx.zeros((8, 8, 2, 16), mx.float16)}, TypeError, "dtype"),
        ({"q": mx.zeros((4, 3, 16))}, ValueError, "3 query heads"),
        ({"q": mx.zeros((4, 4, 8))}, ValueError, "head_dim"),
        ({"q": mx.zeros((4, 64))}, ValueError, "num_heads"),
        ({"v_cache": mx.zeros((9, 8, 2, 16))}, ValueError, "differ in blocks"),
        ({"block_tables": mx.zeros((2, 3), mx.int64)}, TypeError, "block_tables must be int32"),
        ({"context_lens": mx.array([20.0, 10.0])}, TypeError, "context_lens must be int32"),
        ({"cu_seqlens_q": mx.array([0, 1, 4], mx.uint32)}, TypeError, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": mx.array([0, 1, 3], mx.int32)}, ValueError, "4 tokens"),
        ({"cu_seqlens_q": mx.array([0, 5, 4], mx.int32)}, ValueError, "rise"),
        ({"cu_seqlens_q": mx.array([0, 4], mx.int32)}, ValueError, "num_seqs"),
        ({"context_lens": mx.array([20, 2], mx.int32)}, ValueError, "3 queries but a context of 2"),
        ({"context_lens": mx.array([25, 10], mx.int32)}, ValueError, "25 tokens, its table room for 24"),
        ({"context_lens": mx.array([-1, 10], mx.int32)}, ValueError, "negative"),
        ({"block_tables": mx.array([[0, 1, 8], [3, 4, 0]], mx.int32)}, ValueError, "block 8"),
        ({"block_tables": mx.array([[0, -1, 2], [3, 4, 0]], mx.int32)}, ValueError, "block -1"),
    ],
)
def test_arguments_that_do_not_fit_together_are_named(changes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        paged_attention(**_arguments(**changes))


def test_metadata_may_be_host_arrays() -> None:
    names = ("block_tables", "context_lens", "cu_seqlens_q")
    arguments = _arguments()
    on_host = arguments | {name: np.array(arguments[name]) for name in names}
    assert mx.array_equal(paged_attention(**arguments), paged_attention(**on_host))


def test_no_tokens_give_an_empty_result() -> None:
    empty = _arguments(
        q=mx.zeros((0, 4, 16)),
        block_tables=mx.zeros((0, 3), mx.int32),
        context_lens=mx.zeros(0, mx.int32),
        cu_seqlens_q=mx.zeros(1, mx.int32),
    )
    assert paged_attention(**empty).shape == (0, 4, 16)


SHARING = (
    Case(((1, 70), (1, 81), (1, 66), (1, 34), (1, 0), (1, 47), (1, 40)), shared=(((0, 1, 2), 4), ((5, 6), 2))),
    Case(((1, 65), (1, 65)), heads=(7, 1), shared=(((0, 1), 4),), sinks=True),
    Case(((1, 33), (9, 40), (1, 700), (1, 34), (1, 2000), (1, 49)), shared=(((0, 2, 3, 5), 2),), softcap=30.0),
    Case(((1, 100), (1, 130), (1, 101)), shared=(((0, 1, 2), 6),), window=64),
)


@on_a_cpu
@pytest.mark.parametrize("slow", [False, True], ids=["MLX's exponentials", "our own"])
@pytest.mark.parametrize("max_bytes", [1 << 27, 20_000])
@pytest.mark.parametrize("case", SHARING, ids=range(len(SHARING)))
def test_prefixes_that_are_computed_once_for_all_change_no_result(
    case: Case, max_bytes: int, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "MIN_SAVED", 1)
    monkeypatch.setattr(cpu, "exp_is_slow", lambda: slow)
    monkeypatch.setattr(cpu, "MAX_BYTES", max_bytes)
    monkeypatch.setattr(reference, "MAX_BYTES", max_bytes)
    tiles = record_tiles(cpu, monkeypatch)
    check(case._replace(dtype="float32"), backend="cpu")
    assert bool(tiles) == (case.window is None)
    assert {tile.rows.shape[0] for tile in tiles} <= {1} and all(tile.tokens.shape[1] > 1 for tile in tiles)


def test_only_the_prefixes_that_save_the_most_are_computed_apart() -> None:
    prefixes = [SharedPrefix(np.array([0, 2]), tokens) for tokens in (4096, 9000, 4095, 8000, 7000, 6000)]

    def worth(found: list[SharedPrefix]) -> list[tuple[list[int], int]]:
        lengths = np.full(5, 10_000, np.int32), np.array([0, 2, 3, 4, 5, 6], np.int32)  # the first one has two queries
        metadata = AttentionMetadata(mx.zeros((5, 1), mx.int32), *lengths, lambda seqs: found)
        return [(members.tolist(), num_tokens) for members, num_tokens in cpu._worth_sharing(metadata)]

    assert worth(prefixes) == [([1, 3], 9000), ([1, 3], 8000), ([1, 3], 7000), ([1, 3], 6000)]
    assert worth(prefixes[2:3]) == worth([]) == []
