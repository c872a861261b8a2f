"""Kernels with fewer threads compute the same, and prefixes are read once where that costs less."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import Case, decodes
from helpers.gpu import Gpu

from mlx_paged.attention.cuda import CudaBackend
from mlx_paged.attention.found_at_load import ASSUMED, FoundAtLoad, SharingCosts, least_members, smaller
from mlx_paged.attention.kernel_backend import KernelBackend
from mlx_paged.attention.latent_layout import LatentLayout
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.metal import MetalBackend
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.attention.work_items import Shape, Tile

METAL, CUDA = MetalBackend(), CudaBackend()
HALF = Shape(8, 4, 128, 128, 2)
LATENT = Shape(1, 32, 576, 512, 2, value_in_key=True)


class Always(dict[Any, int]):
    """So many halvings of whatever is launched."""

    def __init__(self, count: int) -> None:
        self._count = count

    def get(self, *_: Any) -> int:  # type: ignore[override]
        return self._count


# -- fewer threads --


@pytest.mark.parametrize("count", [1, 2])
def test_kernels_with_fewer_threads_compute_the_same(count: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.backend, "found", FoundAtLoad())
    gpu.backend.found.halvings = Always(count)
    gpu.check(Case((*decodes(70, 300), (40, 90)), (8, 2), (64, 64), sinks=True))
    assert gpu.kernels_run == ["decode", "merge", "prefill"] or gpu.kernels_run == ["decode", "prefill"]


@pytest.mark.parametrize(
    ("backend", "kernel", "sizes"),
    [
        (METAL, "decode", [(256, {"SIMDGROUPS": 8}), (128, {"SIMDGROUPS": 4}), (64, {"SIMDGROUPS": 2})]),
        (METAL, "tiles", [(128, {"TILE_ROWS": 32}), (64, {"TILE_ROWS": 16}), (32, {"TILE_ROWS": 8})]),
        (CUDA, "decode", [(128, {"WARPS": 4}), (64, {"WARPS": 2}), (32, {"WARPS": 1})]),
        (
            CUDA,
            "tiles",
            [
                (128, {"TILE_ROWS": 128, "MATRICES": 2}),
                (128, {"TILE_ROWS": 64, "MATRICES": 1}),
                (64, {"TILE_ROWS": 32, "MATRICES": 1}),
            ],
        ),
    ],
)
def test_a_kernel_gets_half_of_its_threads_or_threads_with_half_of_the_rows(
    backend: KernelBackend, kernel: str, sizes: list[tuple[int, dict[str, int]]]
) -> None:
    launch = backend.launch_decode(HALF) if kernel == "decode" else backend.launch_prefill(HALF)
    for threads, template in sizes:
        assert launch.threads == threads
        assert template.items() <= launch.template.items()
        launch = smaller(launch)


def test_the_threads_of_latent_attention_keep_fewer_rows_each() -> None:
    layout = METAL.tiles(LATENT)
    less = smaller(layout.launch)
    assert layout.tile.rows == 16 and less.template["TILE_ROWS"] == 8 and less.threads == layout.launch.threads
    assert smaller(less) == less


def test_no_kernel_is_launched_with_less_than_a_warp() -> None:
    launch = smaller(CUDA.launch_prefill(Shape(2, 4, 192, 192, 4)))
    assert launch.threads == 32 and launch.template["TILE_ROWS"] == 16
    assert smaller(launch) == launch


def test_what_has_become_smaller_is_planned_so() -> None:
    found = FoundAtLoad()
    found.halvings["paged_prefill", HALF] = 1
    layout = LatentLayout(Tile(32, 32), METAL.launch_prefill(HALF))
    fitted = found.fitted_tiles(layout, HALF)
    assert fitted.tile == Tile(16, 32) and fitted.launch.threads == 64
    assert layout.launch.template["TILE_ROWS"] == 32
    assert found.fitted_tiles(layout, HALF._replace(head_dim=64)) == layout


# -- prefixes --


def worth(costs: SharingCosts | None, *prefixes: tuple[int, int], shape: Shape = HALF) -> list[tuple[int, int]]:
    """Of prefixes, of so many sequences and tokens each, those that are read once, in tiles of 32 rows."""
    found = FoundAtLoad()
    if costs is not None:
        found.costs[shape] = costs
    given = [SharedPrefix(np.arange(members), tokens) for members, tokens in prefixes]
    kept = found.worth_sharing(given, shape, lambda _: METAL.tiles(HALF))
    return [(len(each.members), each.num_tokens) for each in kept]


def test_a_prefix_is_read_once_if_that_takes_less_time_with_another_launch_and_merging() -> None:
    costs = SharingCosts(1.0, 2.0, 3000.0, "us")  # 8 sequences fill a tile
    assert worth(costs, (8, 512)) == [(8, 512)]
    assert worth(costs, (8, 496)) == []
    assert worth(costs, (8, 256), (8, 256)) == [(8, 256), (8, 256)]  # one launch for both
    assert worth(costs, (9, 512)) == []  # a second tile for one more
    assert worth(costs, (16, 512)) == [(16, 512)]
    assert worth(SharingCosts(1.0, 8.0, 0.0, "us"), (8, 4096)) == []


def test_a_prefix_that_few_rows_see_is_read_by_each_sequence() -> None:
    costs = SharingCosts(1.0, 0.0, 0.0, "us")
    assert worth(costs, (3, 4096)) == [] and worth(costs, (4, 4096)) == [(4, 4096)]  # 4 heads each
    one = HALF._replace(heads_per_kv_head=1)
    assert worth(costs, (15, 4096), shape=one) == [] and worth(costs, (16, 4096), shape=one) == [(16, 4096)]


def test_where_nothing_was_timed_512_keys_have_to_be_saved() -> None:
    assert worth(None, (4, 176)) == [(4, 176)] and worth(None, (4, 160)) == []
    assert worth(None) == []


def test_how_many_sequences_a_prefix_needs_is_told() -> None:
    tile = METAL.tiles(HALF).tile
    assert least_members(ASSUMED, 1024, HALF, tile) == 4 and least_members(ASSUMED, 64, HALF, tile) == 10
    assert least_members(SharingCosts(1.0, 9.0, 0.0, "us"), 8192, HALF, tile) is None
    many = HALF._replace(heads_per_kv_head=16)  # of which a lone sequence has rows enough, but shares with nobody
    assert least_members(SharingCosts(1.0, 0.5, 0.0, "us"), 8192, many, tile) == 2


def test_shared_prefixes_are_left_out_of_a_plan_that_gains_nothing_by_them() -> None:
    backend = MetalBackend()
    shape, tables = Shape(2, 4, 64, 64, 4), mx.zeros((4, 8), mx.int32)
    contexts, starts = np.full(4, 1100, np.int32), np.arange(5, dtype=np.int32)
    metadata = AttentionMetadata(tables, contexts, starts, lambda seqs: [SharedPrefix(seqs, 1024)])
    assert backend._plan(metadata, None, shape, True).shared is not None
    backend.found.costs[shape] = SharingCosts(1.0, 5.0, 0.0, "us")
    assert backend._plan(metadata, None, shape, True).shared is None
