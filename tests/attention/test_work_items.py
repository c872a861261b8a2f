"""How a step is divided among threadgroups: by arithmetic alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_paged.attention import work_items as kernel_plan
from mlx_paged.attention.work_items import (
    Shape,
    decode_items,
    decode_layout,
    keys_per_item,
    num_key_splits,
    prefill_items,
    tile_for,
)
from mlx_paged.cache.codes import choose_codes

DIMS = (8, 32, 64, 80, 96, 128, 192, 200, 256)


# -- decode --


def num_parts(contexts: list[int], ratio: int = 4, dim: int = 128, cores: int = 10) -> int:
    """Into how many parts the longest context is split, with 8 KV heads in float16."""
    size = keys_per_item(np.array(contexts), Shape(8, ratio, dim, dim, 2), cores)
    return max(1, -(-max(contexts) // size))


@pytest.mark.parametrize("cores", [8, 40, 80])
@pytest.mark.parametrize("ratio", [1, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_one_long_context_fills_the_device(cores: int, ratio: int, dim: int) -> None:
    assert num_parts([4096], ratio, dim, cores) * 8 >= 64
    assert num_parts([32768], ratio, dim, cores) * 8 >= 256


@pytest.mark.parametrize("num_keys", [4096, 5000, 8192, 32768, 131072])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_what_is_merged_is_a_fiftieth_of_what_is_read(num_keys: int, dim: int) -> None:
    for ratio, element_size, cores in itertools.product((1, 2, 4, 5, 7, 8, 16), (2, 4), (10, 40, 80)):
        size = keys_per_item(np.array([num_keys]), Shape(8, ratio, dim, dim, element_size), cores)
        merged = 2 * -(-num_keys // size) * ratio * (dim * element_size + 4)
        if ratio <= 8 or num_keys >= 8192:
            assert merged <= 0.02 * num_keys * 2 * dim * element_size
        else:  # 64 threadgroups for 8 KV heads come first, which 2% would not allow
            assert merged <= 0.033 * num_keys * 2 * dim * element_size


def test_enough_sequences_are_not_split() -> None:
    assert num_parts([4096] * 32) == 1
    assert num_parts([1000 + 37 * i for i in range(32)]) == 1
    assert num_parts([0]) == num_parts([1]) == num_parts([256]) == 1


def test_one_context_that_is_much_longer_than_the_others_is_split() -> None:
    assert num_parts([32768] + [100] * 63) > 8


def test_parts_cover_each_context_once() -> None:
    contexts = np.array([100, 0, 33, 64, 1], np.int32)
    for size, window in itertools.product((32, 64, 100), (None, 1, 40)):
        items = decode_items(contexts, np.arange(6), np.minimum(contexts, window or contexts), size)
        assert items.work.dtype == items.cu_parts.dtype == np.int32
        for i, context in enumerate(contexts):
            runs = items.work[items.work[:, 0] == i]
            keys = [key for begin, end in runs[:, 4:6] for key in range(begin, end)]
            assert keys == list(range(max(0, context - (window or context)), context))
            assert runs[:, 6].tolist() == list(range(len(runs))) and set(runs[:, 7]) == {len(runs)}
            assert items.cu_parts[i + 1] - items.cu_parts[i] == len(runs)
        assert items.is_split == (len(items.work) > len(contexts))
        assert items.num_parts == len(items.work)


def test_every_shape_has_a_layout_that_fits() -> None:
    dims = (*DIMS, 512)
    for element_size, ratio, dim, value_dim in itertools.product((2, 4), range(1, 17), dims, dims):
        layout = decode_layout(Shape(1, ratio, dim, value_dim, element_size))
        heads, lanes, width, batch, simdgroups = layout
        groups, longer = -(-ratio // heads), max(dim, value_dim)
        of_row = -(-longer // (lanes * width)) * width
        assert longer <= lanes * of_row and heads * of_row <= 16
        assert dim % width == value_dim % width == 0 and width * element_size in (4, 8, 16)
        assert lanes % batch == 0 and heads <= lanes <= 32 and simdgroups % groups == 0
        assert simdgroups == groups or simdgroups <= 8
        assert simdgroups <= (16 if longer > 256 else 8)


@pytest.mark.parametrize(
    ("heads", "dim", "of_simdgroup", "simdgroups"),
    [(4, 128, 4, 8), (6, 256, 2, 6), (8, 256, 2, 8), (7, 64, 7, 8), (16, 128, 4, 8), (5, 128, 3, 8), (16, 512, 1, 16)],
)
def test_a_simdgroup_computes_query_heads_of_512_elements_and_its_neighbours_the_others(
    heads: int, dim: int, of_simdgroup: int, simdgroups: int
) -> None:
    layout = decode_layout(Shape(8, heads, dim, dim, 2))
    assert (layout.rows_per_simdgroup, layout.simdgroups) == (of_simdgroup, simdgroups)


def test_a_load_of_codes_lies_in_a_group_and_lanes_have_room_for_the_parameters_of_the_rows_they_read() -> None:
    dims = (32, 64, 96, 128, 192, 256, 320, 512)
    for name, heads, dim, value_dim in itertools.product(("int8", "k8v4", "fp8"), (1, 3, 4, 8, 16), dims, dims):
        codes = choose_codes(name, dim, value_dim)
        layout = decode_layout(Shape(1, heads, dim, value_dim, 2, codes=codes))
        assert layout.width in (4, 8, 16)
        for length, each in zip((dim, value_dim), codes[1:], strict=True):
            in_load = max(layout.width, 32 // each.bits)  # two lanes load for each other what they have half of
            assert length % in_load == 0 and each.group_size % in_load == 0
            groups = 1 << (length // each.group_size - 1).bit_length()
            assert layout.lanes % (layout.batch * groups) == 0


@pytest.mark.parametrize(("dim", "lanes", "width"), [(32, 8, 4), (64, 8, 8), (128, 8, 16), (256, 16, 16)])
def test_one_query_head_reads_the_longest_loads_of_codes_that_leave_no_lane_without(
    dim: int, lanes: int, width: int
) -> None:
    for name in ("int8", "k8v4"):
        layout = decode_layout(Shape(1, 1, dim, dim, 2, codes=choose_codes(name, dim, dim)))
        assert (layout.lanes, layout.width) == (lanes, width)


def test_the_page_tells_how_many_query_heads_a_simdgroup_has() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "kernels.md").read_text().split())
    heads = [decode_layout(Shape(1, 16, dim, dim, 2)).rows_per_simdgroup for dim in (64, 128, 256)]
    assert "{} heads of 64, {} of 128, {} of 256".format(*heads) in page
    layout = decode_layout(Shape(4, 6, 256, 256, 2))
    assert layout.rows_per_simdgroup == 2 and layout.simdgroups == 6 and "simdgroups 3 to 5 the other" in page
    layout = decode_layout(Shape(8, 4 * 4, 128, 128, 2))
    assert layout.rows_per_simdgroup == 4 and layout.simdgroups == 8 and "simdgroups 4 to 7 the other" in page
    lanes = [decode_layout(Shape(1, heads, 128, 128, 2)) for heads in (4, 1)]
    assert [(each.lanes, each.width * 2, each.batch) for each in lanes] == [(32, 8, 8), (8, 16, 2)]


def test_a_query_alone_or_with_another_is_loaded_sixteen_bytes_at_a_time() -> None:
    for ratio, dim in ((1, 64), (2, 64), (1, 128), (2, 128), (8, 256), (8, 512)):
        assert decode_layout(Shape(8, ratio, dim, dim, 2)).width * 2 == 16


# -- prefill --

ONE_HEAD = Shape(8, 1, 128, 128, 2)


@pytest.mark.parametrize("element_size", [2, 4])
def test_tiles_fit_every_head_dim(element_size: int) -> None:
    pad = 16 // element_size
    longest = range(272, 513, 48) if element_size == 2 else ()
    for head_dim, value_dim in itertools.product((*range(8, 257, 8), *longest), repeat=2):
        tile = tile_for(Shape(1, 1, head_dim, value_dim, element_size))
        longer = max(head_dim, value_dim)
        assert tile.rows == (16 if longer > 256 or (longer >= 192 and element_size == 4) else 32)
        assert (tile.rows * (head_dim + pad) + tile.keys * (longer + pad)) * element_size <= 32 << 10
        assert (
            element_size == 4
            or longer > 256
            or tile.keys == (32 if 32 * (head_dim + longer + 2 * pad) <= 16 << 10 else 16)
        )


def test_work_is_listed_sequence_by_sequence_tile_by_tile_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_plan, "num_key_splits", lambda *_: np.array([2, 1, 1, 1]))
    shape = Shape(1, 3, 192, 192, 4)
    cu_seqlens_q, context_lens = np.array([0, 1, 1, 18, 20], np.int32), np.array([9, 5, 40, 0], np.int32)
    items = prefill_items(context_lens, cu_seqlens_q, None, shape, 40, tile_for(shape))
    assert items.work.tolist() == [
        # sequence, first token, queries, first position, first row, part, parts, first part
        [0, 0, 1, 8, 0, 0, 2, 0],
        [0, 0, 1, 8, 0, 1, 2, 0],
        [2, 1, 17, 23, 0, 0, 1, 2],
        [2, 1, 17, 23, 16, 0, 1, 2],
        [2, 1, 17, 23, 32, 0, 1, 2],
        [2, 1, 17, 23, 48, 0, 1, 2],
        [3, 18, 2, -2, 0, 0, 1, 19],
    ]
    assert items.work.dtype == items.cu_parts.dtype == np.int32
    assert items.cu_parts.tolist() == [0, 2, *range(3, 22)]
    assert items.is_split and items.num_parts == 21


@pytest.mark.parametrize(
    ("num_tiles", "num_keys", "parts"),
    [
        ([1], [1000], [1]),  # too short
        ([1], [8192], [16]),
        ([1, 1], [8192, 100], [16, 1]),
        ([1] * 200, [4096] * 200, [1] * 200),  # enough threadgroups
        ([64], [2048], [1]),
        ([64, 1], [2048, 100_000], [1, 18]),  # one that would outlast the others
        ([0, 1], [100_000, 1], [1, 1]),
    ],
)
def test_keys_are_split_where_threadgroups_are_few_or_uneven(num_tiles: Any, num_keys: Any, parts: Any) -> None:
    assert num_key_splits(np.array(num_tiles), np.array(num_keys), ONE_HEAD, 40, tile_for(ONE_HEAD)).tolist() == parts
