"""What layers with a sliding window hold: never more than their windows, never less than a query can still see.

The contents of every group's blocks are simulated in an array. A slot holds one number that stands for the whole
prefix up to its token, as real K and V do, so a block that is given back, reused, copied or moved wrongly is seen as
soon as the keys that a query sees are read back through the table.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from helpers.near_ties import ends_in_near_tie
from helpers.scheduler_bench import Bench, Planned
from helpers.tiny_models import VOCAB_SIZE, Unpaged, unpaged_greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_paged import LLM, BlockManager, OutOfBlocks, SamplingParams
from mlx_paged.blocks.block_manager import NO_BLOCK
from mlx_paged.blocks.cache_groups import CacheGroups, blocks_for_window
from mlx_paged.blocks.free_lists import POLICIES
from mlx_paged.blocks.transfers import BlockCopy
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.scheduler import Scheduler

TinyModel = Callable[..., nn.Module]

PICK = st.integers(0, 1 << 16)
WINDOWS = st.lists(st.integers(1, 20), min_size=1, max_size=2)


def most_blocks(window: int, block_size: int) -> int:
    """The most blocks that `window` consecutive tokens can touch."""
    return -(-(window - 1) // block_size) + 1


def visible(window: int | None, position: int) -> range:
    """The positions whose keys the query at `position` sees."""
    return range(0 if window is None else max(0, position - window + 1), position + 1)


def held(manager: BlockManager, seq_id: int) -> list[int]:
    return [block_id for block_id in manager.block_table(seq_id) if block_id != NO_BLOCK]


# -- one manager -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocator", sorted(POLICIES))
@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 20])
def test_a_sequence_holds_just_the_blocks_of_its_next_querys_window(
    window: int, block_size: int, allocator: str
) -> None:
    manager = BlockManager(40, block_size, window=window, allocator=allocator)
    manager.allocate(0, range(7))
    for end in range(7, 60):
        manager.mark_computed(0, end)
        table = manager.block_table(0)
        needed = {position // block_size for position in visible(window, end)} & set(range(len(table)))
        assert [i for i, block_id in enumerate(table) if block_id != NO_BLOCK] == sorted(needed)
        assert manager.num_blocks - manager.num_free_blocks == len(needed)
        manager.append(0, [end])
        assert len(held(manager, 0)) <= most_blocks(window, block_size)
        manager.check()
    manager.free(0)
    assert manager.num_free_blocks == 40


def test_a_window_of_one_holds_nothing_between_two_blocks() -> None:
    manager = BlockManager(2, 2, window=1)
    manager.allocate(0, [1, 2])
    manager.mark_computed(0, 2)
    assert manager.block_table(0) == [NO_BLOCK]
    assert manager.num_kv_tokens() == 0
    assert manager.append(0, [3]) == []
    assert len(held(manager, 0)) == 1


def test_a_token_that_fell_out_of_the_window_has_no_slot() -> None:
    manager = BlockManager(4, 2, window=3)
    manager.allocate(0, range(6))
    manager.mark_computed(0, 6)
    assert manager.block_table(0)[:2] == [NO_BLOCK] * 2
    with pytest.raises(IndexError, match="from 4 on in blocks: no 3"):
        manager.slot(0, 3)
    assert manager.slot(0, 4) == (manager.block_table(0)[2], 0)


def test_a_block_that_one_of_two_forks_has_left_behind_stays_for_the_other() -> None:
    manager = BlockManager(8, 2, window=2, prefix_caching=False)
    manager.allocate(0, range(3))
    manager.fork(0, 1)
    first, _ = manager.block_table(1)
    manager.mark_computed(0, 3)
    assert manager.block_table(0)[0] == NO_BLOCK
    assert manager.ref_count(first) == 1
    manager.mark_computed(1, 3)
    assert manager.ref_count(first) == 0


def test_a_hit_needs_the_windows_blocks_only() -> None:
    manager = BlockManager(9, 2, window=3)
    manager.allocate(0, range(8))
    manager.mark_computed(0, 8)
    tail = manager.block_table(0)[-1]
    manager.fork(0, "keeper")  # holds the window's last block while everything else is overwritten
    manager.free(0)
    manager.allocate("others", range(100, 116))
    assert [block_id for block_id in range(9) if manager.is_cached(block_id)] == [tail]
    manager.free("others")
    assert manager.allocate(1, [*range(8), 9]) == 8
    assert manager.block_table(1)[:4] == [NO_BLOCK] * 3 + [tail]
    manager.check()


def test_all_groups_start_from_the_same_token() -> None:
    full, windowed = BlockManager(16, 2), BlockManager(8, 2, window=3)
    groups = CacheGroups([full, windowed])
    prompt = list(range(12))
    groups.attach(0, prompt, len(prompt))
    groups.reserve(0, 10)
    groups.mark_computed(0, 10)
    groups.fork(0, "keeper")  # holds the window before token 10
    groups.reserve(0, 12)
    groups.mark_computed(0, 12)
    groups.free(0)
    windowed.allocate("others", range(100, 114))  # overwrites what the window before token 12 needs
    windowed.free("others")
    assert full.num_cached_tokens([*prompt, 12]) == 12
    assert groups.attach(1, [*prompt, 12], len(prompt) + 1) == 10
    assert [manager.num_computed(1) for manager in groups.managers] == [10, 10]
    assert windowed.num_tokens(1) == 11  # a prompt's blocks are taken chunk by chunk
    groups.check()


def test_what_the_last_group_allows_is_asked_of_the_first_again() -> None:
    groups = CacheGroups([BlockManager(16, 2), BlockManager(6, 2, window=3), BlockManager(6, 2, window=3)])
    prompt = list(range(9))
    groups.attach(0, prompt, len(prompt))
    for end in (2, 6, 8):
        groups.reserve(0, end)
        groups.mark_computed(0, end)
        groups.fork(0, end)  # holds the window before token `end`
    groups.free(0)
    for manager, lost in zip(groups.managers[1:], (6, 8), strict=True):
        manager.free(lost)
        manager.allocate("others", range(100, 108))  # overwrites all that is not held
        manager.free("others")
    assert [manager.num_cached_tokens(prompt) for manager in groups.managers] == [8, 8, 6]
    assert (
        groups.attach(1, prompt, len(prompt)) == 2
    )  # the first windowed group can't start from 6, nor the second from 8


def test_compaction_keeps_what_was_given_back_given_back() -> None:
    manager = BlockManager(10, 2, window=3)
    manager.allocate(0, range(10))
    manager.allocate(1, range(50, 56))
    manager.mark_computed(0, 10)
    manager.mark_computed(1, 6)
    before = {seq_id: manager.block_table(seq_id) for seq_id in (0, 1)}
    moved = dict(enumerate(range(10)))
    for src, dst in manager.compact():
        moved |= {block: dst for block, at in list(moved.items()) if at == src}
    for seq_id, table in before.items():
        assert manager.block_table(seq_id) == [b if b == NO_BLOCK else moved[b] for b in table]
    assert sorted(held(manager, 0) + held(manager, 1)) == [0, 1]
    manager.check()


# -- groups, with the contents of their blocks -------------------------------------------------------------------


Written = tuple[np.ndarray, int, int, int]  # an array of blocks, a block and an offset in it, and what it held before


def slot(manager: BlockManager, seq_id: int, position: int) -> tuple[int, int]:
    """As `BlockManager.slot`, also of a token that has been given a slot ahead of its name."""
    block_id = manager.block_table(seq_id)[position // manager.block_size]
    assert block_id != NO_BLOCK
    return block_id, position % manager.block_size


class Contents:
    """What the blocks of every group hold, and the number that stands for a prefix."""

    def __init__(self, groups: CacheGroups) -> None:
        self.groups = groups
        self.arrays = [np.full((manager.num_blocks, manager.block_size), -1) for manager in groups.managers]
        self._numbers: dict[tuple[int, ...], int] = {}

    def number(self, tokens: Sequence[int], position: int) -> int:
        return self._numbers.setdefault(tuple(tokens[: position + 1]), len(self._numbers))

    def run_transfers(self) -> None:
        """What the groups want copied."""
        for transfer in self.groups.transfers:
            assert isinstance(transfer, BlockCopy)
            self.arrays[transfer.group][transfer.dst] = self.arrays[transfer.group][transfer.src]
        self.groups.transfers.clear()

    def write(self, seq_id: int, tokens: Sequence[int], start: int, end: int) -> list[Written]:
        """Write the tokens at positions start .. end - 1; what was overwritten."""
        written = []
        for array, manager in zip(self.arrays, self.groups.managers, strict=True):
            for position in range(start, end):
                block_id, offset = slot(manager, seq_id, position)
                written.append((array, block_id, offset, array[block_id, offset]))
                array[block_id, offset] = self.number(tokens, position)
        return written

    def check_visible(self, seq_id: int, tokens: Sequence[int], query: int, end: int) -> None:
        """The keys that the query at `query` sees, of those below `end`, are the sequence's own in every group."""
        for array, manager in zip(self.arrays, self.groups.managers, strict=True):
            for position in visible(manager.window, query):
                if position < end:
                    read = array[slot(manager, seq_id, position)]
                    assert read == self.number(tokens, position), (seq_id, manager.window, query, position)

    def cached(self, group: int) -> set[tuple[int, ...]]:
        """The contents of the blocks that can be hit."""
        manager = self.groups.managers[group]
        return {tuple(self.arrays[group][b].tolist()) for b in range(manager.num_blocks) if manager.is_cached(b)}

    def longest_hit(self, tokens: Sequence[int]) -> int:
        """By brute force: from how many leading tokens a new sequence could go on in every group."""
        block_size = self.groups.block_size
        blocks = [
            tuple(self.number(tokens, position) for position in range(start, start + block_size))
            for start in range(0, len(tokens) - block_size + 1, block_size)
        ]
        cached = [self.cached(group) for group in range(len(self.arrays))]
        for num_blocks in range((len(tokens) - 1) // block_size, 0, -1):
            end = num_blocks * block_size
            needed = (
                {position // block_size for position in visible(manager.window, end) if position < end}
                for manager in self.groups.managers
            )
            if all(blocks[i] in cached[group] for group, indices in enumerate(needed) for i in indices):
                return end
        return 0


@dataclass
class Life:
    """A sequence as its user knows it."""

    tokens: list[int]
    num_computed: int


class CacheGroupsMachine(RuleBasedStateMachine):
    """Steps in which sequences start, compute a chunk, fork and end, and which now and then fail as a whole."""

    policy = "lru"

    @initialize(
        num_blocks=st.integers(3, 14),
        windows=WINDOWS,
        block_size=st.integers(1, 5),
        prefix_caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks: int, windows: list[int], block_size: int, prefix_caching: bool) -> None:
        kinds = [(num_blocks, None), *((max(4, num_blocks - 2 * i), window) for i, window in enumerate(windows))]
        self.groups = CacheGroups(
            [
                BlockManager(count, block_size, allocator=self.policy, prefix_caching=prefix_caching, window=window)
                for count, window in kinds
            ]
        )
        self.prefix_caching = prefix_caching
        self.windows = windows
        self.contents = Contents(self.groups)
        self.sequences: dict[int, Life] = {}
        self.next_id = 0
        self.history = [[0]]
        self.in_step: dict[int, int] = {}  # sequence -> how many of its tokens will be computed
        self.published: list[Any] = []
        self.written: list[Written] = []

    @rule(pick=PICK, keep=st.integers(0, 30), more=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def allocate(self, pick: int, keep: int, more: list[int]) -> None:
        tokens = self.history[pick % len(self.history)][:keep] + more
        if any(self.blocks_for(len(tokens)) > manager.num_free_blocks for manager in self.groups.managers):
            return
        expected = self.contents.longest_hit(tokens) if self.prefix_caching else 0
        seq_id, self.next_id = self.next_id, self.next_id + 1
        num_cached = self.groups.attach(seq_id, tokens, len(tokens))
        # A window of 1 needs no earlier block to go on from a boundary, and is not found by one that is gone.
        assert num_cached <= expected if 1 in self.windows else num_cached == expected
        assert [manager.num_computed(seq_id) for manager in self.groups.managers] == [num_cached] * len(
            self.groups.managers
        )
        self.sequences[seq_id] = Life(tokens, num_cached)
        self.history.append(tokens)
        if not self.schedule(seq_id, 1 + pick % 7, publish=True):
            self.in_step[seq_id] = num_cached

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, num_tokens=st.integers(1, 9))
    def compute_a_chunk(self, pick: int, num_tokens: int) -> None:
        seq_id = self.pick(pick)
        if seq_id not in self.in_step:
            self.schedule(seq_id, num_tokens, publish=True)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, token=st.integers(0, 1))
    def decode(self, pick: int, token: int) -> None:
        seq_id = self.pick(pick)
        life = self.sequences[seq_id]
        if seq_id in self.in_step or life.num_computed < len(life.tokens):
            return
        life.tokens.append(token)
        if not self.schedule(seq_id, 1, publish=False):
            life.tokens.pop()
        self.history.append(list(life.tokens))

    @rule()
    def end_the_step(self) -> None:
        for seq_id, end in self.in_step.items():
            life = self.sequences[seq_id]
            life.num_computed = end
            self.groups.mark_computed(seq_id, end)
            for manager in self.groups.managers[1:]:
                assert manager.window is not None
                assert len(held(manager, seq_id)) <= most_blocks(manager.window, manager.block_size)
        self.in_step, self.published, self.written = {}, [], []

    @precondition(lambda self: self.in_step)
    @rule()
    def fail_the_step(self) -> None:
        self.groups.unpublish(self.published)
        for array, block_id, offset, before in reversed(self.written):
            array[block_id, offset] = before
        for seq_id in self.in_step:
            self.groups.free(seq_id)
            del self.sequences[seq_id]
        self.in_step, self.published, self.written = {}, [], []

    @precondition(lambda self: self.sequences and not self.in_step)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        seq_id, new_id = self.pick(pick), self.next_id
        self.next_id += 1
        life = self.sequences[seq_id]
        tokens = list(life.tokens)
        self.groups.fork(seq_id, new_id, tokens)
        self.sequences[new_id] = Life(tokens, life.num_computed)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        seq_id = self.pick(pick)
        if seq_id not in self.in_step:
            self.groups.free(seq_id)
            del self.sequences[seq_id]

    @precondition(lambda self: not self.in_step)
    @rule()
    def compact(self) -> None:
        self.groups.compact()
        self.contents.run_transfers()
        assert self.groups.compact() == 0
        for manager in self.groups.managers:
            used = {block_id for seq_id in self.sequences for block_id in held(manager, seq_id)}
            assert used == set(range(len(used)))

    @invariant()
    def what_the_next_query_sees_is_the_sequences_own(self) -> None:
        for seq_id, life in self.sequences.items():
            self.contents.check_visible(seq_id, life.tokens, life.num_computed, life.num_computed)

    @invariant()
    def every_block_is_free_or_referenced_by_those_that_hold_it(self) -> None:
        for manager in self.groups.managers:
            holders = Counter(block_id for seq_id in self.sequences for block_id in held(manager, seq_id))
            counts = [manager.ref_count(block_id) for block_id in range(manager.num_blocks)]
            assert counts == [holders[block_id] for block_id in range(manager.num_blocks)]
            assert manager.num_free_blocks == counts.count(0)

    @invariant()
    def its_own_check_agrees_between_steps(self) -> None:
        if not self.in_step:
            self.groups.check()

    def schedule(self, seq_id: int, num_tokens: int, publish: bool) -> bool:
        """Let the step compute a sequence's next tokens, if there are any and every group has blocks for them."""
        life = self.sequences[seq_id]
        end = min(life.num_computed + num_tokens, len(life.tokens))
        needed = self.blocks_for(end - life.num_computed) + 1
        if end == life.num_computed or any(needed > manager.num_free_blocks for manager in self.groups.managers):
            return False
        self.groups.reserve(seq_id, end)
        self.contents.run_transfers()
        if publish:
            self.published += self.groups.publish(seq_id, end)
        self.written += self.contents.write(seq_id, life.tokens, life.num_computed, end)
        for query in range(life.num_computed, end):
            self.contents.check_visible(seq_id, life.tokens, query, end)
        self.in_step[seq_id] = end
        return True

    def pick(self, number: int) -> int:
        return list(self.sequences)[number % len(self.sequences)]

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.groups.block_size)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_random_lives_in_groups_keep_all_that_a_query_sees_and_agree_on_hits(policy: str) -> None:
    machine: Any = type("Machine", (CacheGroupsMachine,), {"policy": policy})
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    machine.TestCase("runTest").debug()


# -- through the scheduler ---------------------------------------------------------------------------------------


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


@dataclass
class WindowBench(Bench):
    """The scheduler over groups with windows and the contents of their blocks.

    tight: windowed pools have no more blocks than the first one, as in an engine, and not always `blocks_for_window`.
    """

    windows: Sequence[int] = (4,)
    tight: bool = False

    def __post_init__(self) -> None:
        options: Any = {"allocator": self.allocator, "prefix_caching": self.prefix_caching}
        self.manager = BlockManager(self.num_blocks, self.block_size, **options)
        windowed: list[BlockManager] = []
        for window in self.windows:
            most = blocks_for_window(window, self.block_size, self.max_num_seqs, self.budget)
            if self.tight:
                manager = BlockManager(min(self.num_blocks, most), self.block_size, window=window, **options)
            else:
                manager = AlwaysEnough(most, self.block_size, window=window, **options)
            windowed.append(manager)
        self.groups = CacheGroups([self.manager, *windowed])
        self.contents = Contents(self.groups)
        self.rows = RunningBatch(self.max_num_seqs, len(self.groups.managers), self.num_blocks, self.block_size)
        self.scheduler = Scheduler(self.groups, self.rows, self.max_num_seqs, self.budget)

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
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    allocator: str,
    prefix_caching: bool,
    arrivals: list[tuple[int, int, int, int, bool]],
) -> None:
    bench = WindowBench(num_blocks, block_size, max_num_seqs, budget, allocator, prefix_caching, windows=windows)
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


# -- models with windows -----------------------------------------------------------------------------------------

FAMILIES = ("gemma3_text", "gpt_oss")
WINDOW = 24
MAX_TOKENS = 30
LENGTHS = (70, 5, 33, 41)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def references(tiny_model: TinyModel, prompts: list[list[int]]) -> dict[str, list[Unpaged]]:
    return {family: [unpaged_greedy(tiny_model(family), p, MAX_TOKENS) for p in prompts] for family in FAMILIES}


@pytest.mark.parametrize("allocator", sorted(POLICIES))
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_holds_no_more_than_the_windows_and_gives_the_unpaged_results(
    family: str,
    block_size: int,
    allocator: str,
    tiny_model: TinyModel,
    prompts: list[list[int]],
    references: dict[str, list[Unpaged]],
) -> None:
    llm = LLM.from_model(
        tiny_model(family),
        block_size=block_size,
        num_kv_blocks=20 * 8 // block_size,  # of the 36 that all four would fill with blocks of 8
        max_num_batched_tokens=48,
        max_num_seqs=4,
        allocator=allocator,
        check_invariants=True,
    )
    full, windowed = llm.engine.cache_groups.managers
    assert (full.window, windowed.window) == (None, WINDOW)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0)
    request_ids = [llm.engine.add_request(prompt, params) for prompt in prompts]
    outputs = {}
    most_held = 0
    while llm.engine.has_unfinished():
        outputs |= {output.request_id: output for output in llm.engine.step()}
        for seq_id in windowed.seq_ids:
            num_held = sum(block_id != NO_BLOCK for block_id in windowed.block_table(seq_id))
            assert num_held <= most_blocks(WINDOW, block_size)
            most_held = max(most_held, num_held)
    assert most_held >= WINDOW // block_size
    assert llm.stats().num_preemptions > 0
    assert windowed.num_free_blocks == windowed.num_blocks
    near_ties = [
        ends_in_near_tie(reference, outputs[request_id])
        for reference, request_id in zip(references[family], request_ids, strict=True)
    ]
    assert sum(near_ties) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_compaction_between_steps_changes_no_result(
    family: str, tiny_model: TinyModel, prompts: list[list[int]], references: dict[str, list[Unpaged]]
) -> None:
    llm = LLM.from_model(
        tiny_model(family), block_size=8, num_kv_blocks=64, max_num_batched_tokens=48, check_invariants=True
    )
    windowed = llm.engine.cache_groups.managers[1]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0)
    request_ids = [llm.engine.add_request(prompt, params) for prompt in prompts]
    outputs = {}
    num_moved = 0
    while llm.engine.has_unfinished():
        outputs |= {output.request_id: output for output in llm.engine.step()}
        num_moved += llm.engine.compact()
        used = {block_id for seq_id in windowed.seq_ids for block_id in windowed.block_table(seq_id)} - {NO_BLOCK}
        assert used == set(range(len(used)))
    assert num_moved > 0
    near_ties = [
        ends_in_near_tie(reference, outputs[request_id])
        for reference, request_id in zip(references[family], request_ids, strict=True)
    ]
    assert sum(near_ties) <= 1


@pytest.mark.parametrize(("family", "num_full", "num_windowed"), [("gemma3_text", 1, 2), ("gpt_oss", 2, 2)])
def test_the_pools_of_windowed_layers_are_smaller_and_leave_room_for_more_blocks(
    family: str, num_full: int, num_windowed: int, tiny_model: TinyModel
) -> None:
    limits: dict[str, Any] = {"block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    layer_block_bytes = 8 * 2 * (32 + 32) * 4  # block_size x KV heads x (K + V) x float32
    cap = blocks_for_window(WINDOW, 8, 4, 64)
    llm = LLM.from_model(tiny_model(family), num_kv_blocks=200, **limits)
    assert [manager.num_blocks for manager in llm.engine.cache_groups.managers] == [200, cap]
    assert llm.stats().kv_bytes == layer_block_bytes * (num_full * 200 + num_windowed * cap)
    assert llm.stats().kv_bytes < layer_block_bytes * (num_full + num_windowed) * 200
    assert f"200 blocks and {cap} blocks for windows of {WINDOW}" in llm.describe_memory()

    small = LLM.from_model(tiny_model(family), num_kv_blocks=5, **limits)
    assert [manager.num_blocks for manager in small.engine.cache_groups.managers] == [5, 5]

    budget = 150 * layer_block_bytes * (num_full + num_windowed)  # without groups: 150 blocks
    in_bytes = LLM.from_model(tiny_model(family), kv_cache_memory=budget, **limits)
    assert in_bytes.stats().kv_bytes <= budget
    assert in_bytes.stats().num_blocks == (budget // layer_block_bytes - num_windowed * cap) // num_full > 150
