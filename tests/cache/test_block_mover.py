"""How long moves take, and whether it pays to store what sequences lose when they are preempted."""

from __future__ import annotations

import time

import mlx.core as mx
import pytest
from helpers.llms import GREEDY, MakeLLM

from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.blocks.transfers import BlockLoad, BlockSave
from mlx_paged.cache import block_store as block_store
from mlx_paged.cache.block_mover import BlockMover
from mlx_paged.cache.block_store import BlockContent, BlockStores, MemoryStore
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.errors import EngineWarning


class Clock:
    """Time that passes only when somebody says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowStore(MemoryStore):
    """A store in which a move takes `seconds` of a clock."""

    takes_more = True

    def touch(self, key: str) -> bool:
        return key in self

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__(10**8)
        self.clock, self.seconds = clock, seconds

    def put(self, key: str, content: BlockContent) -> None:
        self.clock.now += self.seconds
        super().put(key, content)

    def get(self, key: str) -> BlockContent:
        self.clock.now += self.seconds
        return super().get(key)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_a_round_trip_takes_what_saving_and_loading_usually_take(clock: Clock) -> None:
    store = SlowStore(clock, 0.0)
    groups = CacheGroups.make([4], [None], 2, stored_keys=store)
    mover = BlockMover(groups, PagedKVCache([LayerSpec(1, 4, 4, mx.float32)], [4], 2, 1), BlockStores(store, None))

    def move(*moves: tuple[type, float]) -> None:
        for kind, store.seconds in moves:
            node = PrefixNode(None, (), b"")
            groups.transfers.append(BlockSave(0, 1, "a") if kind is BlockSave else BlockLoad(0, 1, "a", node))
            assert mover.run()

    assert mover.round_trip_s is None
    move((BlockSave, 2.0))
    assert mover.round_trip_s == 4.0, "a load is taken to last as long as a save, as long as there was none"
    move((BlockLoad, 1.0))
    assert mover.round_trip_s == 3.0
    move((BlockSave, 2.0), (BlockSave, 90.0), (BlockLoad, 1.0), (BlockLoad, 90.0))
    assert mover.round_trip_s == 3.0, "one that was held up does not count"
    move(*[(BlockSave, 2.0), (BlockLoad, 1.0)] * 20)
    move(*[(BlockSave, 5.0), (BlockLoad, 6.0)] * 15)
    assert mover.round_trip_s == 11.0, "what was long ago does not count"


@pytest.mark.parametrize(("move_s", "pays"), [(0.0019, True), (0.0021, False)])
def test_storing_pays_as_long_as_moving_a_block_is_faster_than_computing_it(
    move_s: float, pays: bool, clock: Clock, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 4 tokens, each of which takes a millisecond: so there and back is worth 4."""
    monkeypatch.setattr(block_store, "_open_swap", lambda _: SlowStore(clock, move_s))
    engine = make_llm(num_kv_blocks=10, swap_space="1GB", pipelining="off").engine
    run_model = engine._runner.run

    def run(inputs):  # type: ignore[no-untyped-def]
        clock.now += 0.001 * inputs.token_ids.size
        return run_model(inputs)

    engine._runner.run = run  # type: ignore[method-assign]
    for first in (1, 31, 61):
        engine.add_request(list(range(first, first + 12)), GREEDY)
    while engine.has_unfinished():
        engine.step()
    assert engine.stats().num_swapped_blocks > 0, "the premise: blocks were moved, since it pays until it is known"
    engine.add_request([5], GREEDY)  # a step with a prompt and nothing to move
    engine.step()
    assert engine._scheduler.storing_pays == pays


def test_a_block_of_another_layout_is_neither_hit_nor_kept(clock: Clock) -> None:
    store = MemoryStore(10**6)
    stores = BlockStores(store, None)
    groups = CacheGroups.make([4], [None], 2, stored_keys=stores)
    store.put("a", {"k0": mx.zeros((2, 1, 3)), "v0": mx.zeros((2, 1, 3))})
    tree = groups.managers[0]._tree
    node = tree.insert(tree.root(), (1, 2), 0)
    groups.transfers.append(BlockLoad(0, 0, "a", node))
    mover = BlockMover(groups, PagedKVCache([LayerSpec(1, 4, 4, mx.float32)], [4], 2, 1), stores)
    with pytest.warns(EngineWarning, match="another layout"):
        assert not mover.run()
    assert "a" not in stores and node.block_id is None


def test_the_blocks_of_a_prompt_are_written_once(clock: Clock) -> None:
    store = SlowStore(clock, 1.0)
    stores = BlockStores(None, store)
    groups = CacheGroups.make([4], [None], 2, stored_keys=stores)
    mover = BlockMover(groups, PagedKVCache([LayerSpec(1, 4, 4, mx.float32)], [4], 2, 1), stores)
    groups.attach(0, [1, 2, 3, 4, 5], 5)
    groups.mark_computed(0, 5)
    for _ in range(2):
        mover.store_prompt(0)
        assert clock.now == 2.0, "two full blocks"
