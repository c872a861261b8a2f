"""The groups against a model: random lives of sequences in steps, with the contents of all blocks simulated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from helpers.block_contents import Contents, Written, held, most_blocks
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_paged import BlockManager
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.free_lists import POLICIES

PICK = st.integers(0, 1 << 16)
WINDOWS = st.lists(st.integers(1, 20), min_size=1, max_size=2)


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
        chunked=st.booleans(),
        block_size=st.integers(1, 5),
        prefix_caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks: int, windows: list[int], chunked: bool, block_size: int, prefix_caching: bool) -> None:
        options = {"allocator": self.policy, "prefix_caching": prefix_caching, "chunked": chunked}
        kinds = [(num_blocks, None), *((max(4, num_blocks - 2 * i), window) for i, window in enumerate(windows))]
        self.groups = CacheGroups(
            [BlockManager(count, block_size, window=window, **options) for count, window in kinds]
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
        # A window of 1, or a new chunk, needs no earlier block to go on from, and is not found by one that is gone.
        may_miss = 1 in self.windows or any(manager.chunked for manager in self.groups.managers)
        assert num_cached <= expected if may_miss else num_cached == expected
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

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6), num_right=st.integers(0, 5))
    def verify_drafts(self, pick: int, tokens: list[int], num_right: int) -> None:
        """Compute a next token and drafts after it, of which the first ones turn out to be right."""
        seq_id = self.pick(pick)
        life = self.sequences[seq_id]
        start, end = life.num_computed, life.num_computed + len(tokens)
        needed = self.blocks_for(len(tokens)) + 1
        if seq_id in self.in_step or start < len(life.tokens):
            return
        if any(needed > manager.num_free_blocks for manager in self.groups.managers):
            return
        self.groups.reserve(seq_id, end)
        self.contents.run_transfers()
        self.contents.write(seq_id, life.tokens + tokens, start, end)
        for query in range(start, end):
            self.contents.check_visible(seq_id, life.tokens + tokens, query, end)
        life.tokens += tokens[: 1 + num_right]
        life.num_computed = len(life.tokens)
        self.groups.sync(seq_id, life.num_computed)
        self.history.append(list(life.tokens))

    @rule()
    def end_the_step(self) -> None:
        for seq_id, end in self.in_step.items():
            life = self.sequences[seq_id]
            life.num_computed = end
            self.groups.mark_computed(seq_id, end)
            for manager in self.groups.managers[1:]:
                assert manager.window is not None
                num_ahead = len(manager.block_table(seq_id)) - self.blocks_for(end)  # of drafts that were wrong
                assert len(held(manager, seq_id)) <= most_blocks(manager.window, manager.block_size) + num_ahead
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
