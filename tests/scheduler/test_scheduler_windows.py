"""The scheduler over groups with windows: their pools suffice, and every query sees its window."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.block_contents import Contents, held, most_blocks
from helpers.scheduler_bench import Bench, Planned
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged import BlockManager, OutOfBlocks
from mlx_paged.blocks.cache_groups import CacheGroups, blocks_for_window
from mlx_paged.blocks.free_lists import POLICIES
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.scheduler import Scheduler

WINDOWS = st.lists(st.integers(1, 20), min_size=1, max_size=2)


class AlwaysEnough(BlockManager):
    """A windowed manager whose pool must suffice: running out is a failure."""

    def reserve(self, *args: Any, **kwargs: Any) -> list[tuple[int, int]]:
        try:
            return super().reserve(*args, **kwargs)
        except OutOfBlocks as error:
            raise AssertionError(f"window {self.window}: {error}") from error

    def attach(self, *args: Any, **kwargs: Any) -> int:
        try:
            return super().attach(*args, **kwargs)
        except OutOfBlocks as error:
            raise AssertionError(f"window {self.window}: {error}") from error


class WindowsSuffice(CacheGroups):
    """Groups in which only the first may run out."""

    def append_blocks(self, seq_ids: Sequence[Hashable], num_computed: Sequence[int]) -> list[list[int]]:
        try:
            return super().append_blocks(seq_ids, num_computed)
        except OutOfBlocks as error:
            assert len(seq_ids) > self.num_free_blocks, error
            raise


@dataclass
class WindowBench(Bench):
    """The scheduler over groups with windows and the contents of their blocks.

    tight: windowed pools have no more blocks than the first one, as in an engine, and not always `blocks_for_window`.
    """

    windows: Sequence[int] = (4,)
    tight: bool = False
    chunked: bool = False

    def __post_init__(self) -> None:
        options: Any = {"allocator": self.allocator, "prefix_caching": self.prefix_caching}
        options["chunked"] = self.chunked
        self.manager = BlockManager(self.num_blocks, self.block_size, **options)
        windowed: list[BlockManager] = []
        for window in self.windows:
            most = blocks_for_window(window, self.block_size, self.max_num_seqs, self.budget)
            if self.tight:
                manager = BlockManager(min(self.num_blocks, most), self.block_size, window=window, **options)
            else:
                manager = AlwaysEnough(most, self.block_size, window=window, **options)
            windowed.append(manager)
        self.groups = (CacheGroups if self.tight else WindowsSuffice)([self.manager, *windowed])
        self.contents = Contents(self.groups)
        self.batch = RunningBatch(self.max_num_seqs, len(self.groups.managers), self.num_blocks, self.block_size)
        self.scheduler = Scheduler(self.groups, self.batch, self.config)

    def check(self, plan: Planned) -> None:
        """Compute the step: copies, writes, and what every query then sees."""
        super().check(plan)
        self.contents.run_transfers()
        for item in plan.sequences:
            self.contents.write(item.sequence.seq_id, item.sequence.token_ids, item.start, item.start + item.num_tokens)
        for item in plan.sequences:
            for query in range(item.start, item.start + item.num_tokens):
                self.contents.check_visible(item.sequence.seq_id, item.sequence.token_ids, query, query + 1)

    def step(self) -> Planned:
        plan = super().step()
        self.groups.check()
        for manager in self.groups.managers[1:]:
            assert manager.window is not None
            for sequence in self.scheduler.running:
                assert len(held(manager, sequence.seq_id)) <= most_blocks(manager.window, self.block_size)
        return plan


@settings(max_examples=150, deadline=None)
@given(
    windows=WINDOWS,
    chunked=st.booleans(),
    num_blocks=st.integers(2, 12),
    block_size=st.integers(1, 5),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 16),
    allocator=st.sampled_from(sorted(POLICIES)),
    prefix_caching=st.sampled_from([True, True, False]),
    arrivals=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 24), st.integers(1, 14), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=7,
    ),
)
def test_blocks_for_window_always_suffice_and_every_query_sees_its_window(
    windows: list[int],
    chunked: bool,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    allocator: str,
    prefix_caching: bool,
    arrivals: list[tuple[int, int, int, int, bool]],
) -> None:
    bench = WindowBench(
        num_blocks, block_size, max_num_seqs, budget, allocator, prefix_caching, windows=windows, chunked=chunked
    )
    slots = num_blocks * block_size
    for pause, prompt_len, max_tokens, n, common in arrivals:
        for _ in range(pause):
            bench.step()
        prompt_len = min(prompt_len, slots)
        max_tokens, n = min(max_tokens, slots - prompt_len + 1), min(n, max_num_seqs)
        bench.add(prompt_len, max_tokens, n, first_token=1 if common else None)
    bench.run(most_steps=5000)
    for manager in bench.groups.managers:
        assert manager.num_free_blocks == manager.num_blocks


def test_a_step_full_of_one_prompt_fits_into_its_windows_pool() -> None:
    bench = WindowBench(num_blocks=40, block_size=2, max_num_seqs=1, budget=17, windows=(2, 3))
    bench.add(60, max_tokens=5)
    bench.run()


def test_a_windowed_pool_as_small_as_the_first_one_is_enough_too() -> None:
    """The second request comes back from preemption and computes anew what its first life left in one group's cache.

    The third then shares its prefix with the second in one group, and with what was left behind in the other.
    """
    bench = WindowBench(num_blocks=6, block_size=2, max_num_seqs=2, budget=11, windows=(3,), tight=True)
    bench.add(3, max_tokens=7)
    for _ in range(2):
        bench.step()
    bench.add(4, max_tokens=3, first_token=500)
    bench.add(9, max_tokens=1, first_token=500)
    bench.run()


def test_preempted_sequences_leave_every_group_and_come_back() -> None:
    bench = WindowBench(num_blocks=6, block_size=2, windows=(3, 5), max_num_seqs=4)
    for _ in range(4):
        bench.add(5, max_tokens=7)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert [manager.num_free_blocks for manager in bench.groups.managers] == [
        manager.num_blocks for manager in bench.groups.managers
    ]
