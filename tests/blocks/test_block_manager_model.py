"""The block manager against a model: random lives of sequences, with the blocks' contents simulated in an array.

A slot holds one number that stands for the whole prefix up to its token, salt included, as real K and V do: so a
block that is served to a wrong prefix, overwritten too early, copied late or moved wrongly is seen when a sequence's
contents are read back through its table.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers.block_contents import visible
from helpers.budget import budget
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_paged import BlockManager, OutOfBlocks
from mlx_paged.blocks.block_manager import NO_BLOCK
from mlx_paged.blocks.free_lists import POLICIES
from mlx_paged.blocks.prefix_tree import PrefixNode

TOKEN = st.sampled_from((1, 2, 12, 21))  # written side by side, 1 21 and 12 1 are the same
TOKENS = st.lists(TOKEN, min_size=1, max_size=14)
SALTS = st.sampled_from([None, None, None, "a"])
PICK = st.integers(0, 1 << 16)


@dataclass
class Model:
    """A sequence as its user knows it."""

    tokens: list[int]
    num_computed: int
    salt: str | None


class Store:
    """A block store that carries out at once what it is asked for."""

    def __init__(self, contents: np.ndarray) -> None:
        self.contents = contents
        self.kept: dict[bytes, np.ndarray] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.kept

    def save(self, node: PrefixNode, block_id: int) -> None:
        self.kept[node.digest] = self.contents[block_id].copy()

    def load(self, node: PrefixNode, block_id: int) -> None:
        self.contents[block_id] = self.kept[node.digest]


class BlockManagerMachine(RuleBasedStateMachine):
    policy = "lru"

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 5),
        prefix_caching=st.sampled_from([True, True, False]),
        window=st.sampled_from([None, None, 1, 2, 5, 8]),
        chunked=st.booleans(),
        has_store=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool,
        window: int | None,
        chunked: bool,
        has_store: bool,
    ) -> None:
        self.contents = np.full((num_blocks, block_size), -1)
        self.store = Store(self.contents)
        self.manager = BlockManager(
            num_blocks,
            block_size,
            allocator=self.policy,
            prefix_caching=prefix_caching,
            window=window,
            chunked=chunked,
            store=self.store if has_store else None,
        )
        self.prefix_numbers: dict[Any, int] = {}
        self.sequences: dict[int, Model] = {}
        self.next_id = 0
        self.history: list[list[int]] = [[0]]

    # -- what happens to sequences ------------------------------------------------------------------------------

    @rule(tokens=TOKENS, salt=SALTS)
    def allocate(self, tokens: list[int], salt: str | None) -> None:
        before = self.snapshot()
        seq_id, self.next_id = self.next_id, self.next_id + 1
        try:
            num_hit = self.manager.allocate(seq_id, tokens, salt=salt)
        except OutOfBlocks:
            assert self.snapshot() == before
            assert self.blocks_for(len(tokens)) > self.manager.num_free_blocks
            return
        assert num_hit % self.manager.block_size == 0
        assert 0 <= num_hit < len(tokens)
        assert num_hit == 0 or self.manager.prefix_caching
        self.sequences[seq_id] = Model(list(tokens), num_hit, salt)
        self.history.append(list(tokens))

    @rule(pick=PICK, more=TOKENS, salt=SALTS)
    def allocate_a_known_prefix(self, pick: int, more: list[int], salt: str | None) -> None:
        self.allocate(self.history[-8:][pick % len(self.history[-8:])][:12] + more[:4], salt)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, more=st.lists(TOKEN, max_size=7))
    def append(self, pick: int, more: list[int]) -> None:
        seq_id = self.pick(pick)
        sequence = self.sequences[seq_id]
        before = self.snapshot()
        table = self.manager.block_table(seq_id)
        tail = len(sequence.tokens) % self.manager.block_size
        must_copy = bool(more) and tail > 0 and self.manager.ref_count(table[-1]) > 1
        try:
            pairs = self.manager.append(seq_id, more)
        except OutOfBlocks:
            needed = self.blocks_for(len(sequence.tokens) + len(more)) - len(table) + must_copy
            assert self.snapshot() == before
            assert needed > self.manager.num_free_blocks
            return
        assert [src for src, _ in pairs] == ([table[-1]] if must_copy else [])
        assert [dst for _, dst in pairs] == self.manager.block_table(seq_id)[len(table) - 1 : len(table)][: len(pairs)]
        self.move(pairs)
        sequence.tokens += more
        self.history.append(list(sequence.tokens))

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, share=st.sampled_from([1.0, 1.0, 0.5, 0.0]), outcome=st.sampled_from(["whole", "whole", "fails"]))
    def compute(self, pick: int, share: float, outcome: str) -> None:
        """Publish the K/V of a sequence's next tokens; write it and say so, or fail and start again."""
        seq_id = self.pick(pick)
        sequence = self.sequences[seq_id]
        end = sequence.num_computed + round(share * (len(sequence.tokens) - sequence.num_computed))
        published = self.manager.publish(seq_id, end)
        if outcome == "fails":
            self.manager.unpublish(published)
            self.free(pick)
            return
        for position in range(sequence.num_computed, end):
            self.contents[self.manager.slot(seq_id, position)] = self.prefix_number(sequence, position)
        self.manager.mark_computed(seq_id, end)
        sequence.num_computed = end
        if self.manager.window is not None:
            first = visible(self.manager.window, end, chunked=self.manager.chunked).start
            num_unseen = first // self.manager.block_size
            assert self.manager.block_table(seq_id)[:num_unseen] == [NO_BLOCK] * num_unseen

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        seq_id, new_id = self.pick(pick), self.next_id
        sequence = self.sequences[seq_id]
        self.manager.fork(seq_id, new_id)
        self.next_id += 1
        self.sequences[new_id] = Model(list(sequence.tokens), sequence.num_computed, sequence.salt)
        assert self.manager.block_table(new_id) == self.manager.block_table(seq_id)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, will_return=st.booleans())
    def free(self, pick: int, will_return: bool = False) -> None:
        seq_id = self.pick(pick)
        self.manager.free(seq_id, will_return=will_return)
        del self.sequences[seq_id]
        with pytest.raises(KeyError):
            self.manager.free(seq_id)

    @precondition(lambda self: self.sequences)
    @rule(pick=PICK, more=TOKENS)
    def give_way_and_come_back(self, pick: int, more: list[int]) -> None:
        """As a preempted sequence does: others take all blocks meanwhile, so what it had is in the block store."""
        self.compute(pick, 1.0, "whole")
        sequence = self.sequences[self.pick(pick)]
        self.free(pick, will_return=True)
        num_free = self.manager.num_free_blocks
        if num_free:
            self.allocate([2] * (num_free * self.manager.block_size), "others")
            self.free(len(self.sequences) - 1)
        num_before = len(self.sequences)
        self.allocate(sequence.tokens + more[:2], sequence.salt)
        if len(self.sequences) > num_before:
            self.compute(num_before, 0.0, "whole")

    @rule(pick=PICK)
    def the_store_forgets_a_block(self, pick: int) -> None:
        if self.store.kept:
            del self.store.kept[list(self.store.kept)[pick % len(self.store.kept)]]

    @rule()
    def compact(self) -> None:
        num_cached = self.num_cached()
        empty = self.manager.num_free_blocks - num_cached
        self.move(self.manager.compact())
        used = set(self.holders())
        assert used == set(range(len(used)))
        assert num_cached - self.num_cached() <= (0 if empty else 1)
        assert self.manager.compact() == []

    # -- what must always hold ----------------------------------------------------------------------------------

    @invariant()
    def contents_read_back_through_the_table_are_the_sequences_own(self) -> None:
        for seq_id, sequence in self.sequences.items():
            assert self.manager.num_tokens(seq_id) == len(sequence.tokens)
            assert self.manager.num_computed(seq_id) == sequence.num_computed
            first = visible(self.manager.window, sequence.num_computed, chunked=self.manager.chunked).start
            seen = range(first, sequence.num_computed)
            read = [self.contents[self.manager.slot(seq_id, position)] for position in seen]
            assert read == [self.prefix_number(sequence, position) for position in seen], seq_id

    @invariant()
    def every_block_is_either_free_or_held_as_often_as_it_is_referenced(self) -> None:
        holders = self.holders()
        assert [self.manager.ref_count(i) for i in range(self.manager.num_blocks)] == [
            holders[i] for i in range(self.manager.num_blocks)
        ]
        assert self.manager.num_free_blocks + len(holders) == self.manager.num_blocks
        assert sorted(self.reuse_order()) == [i for i in range(self.manager.num_blocks) if not holders[i]]
        assert sorted(map(str, self.manager.seq_ids)) == sorted(map(str, self.sequences))

    @invariant()
    def shared_tokens_are_counted_once(self) -> None:
        slots = {
            (block_id, offset)
            for seq_id, sequence in self.sequences.items()
            for number, block_id in enumerate(self.manager.block_table(seq_id))
            for offset in range(min(self.manager.block_size, len(sequence.tokens) - number * self.manager.block_size))
            if block_id != NO_BLOCK
        }
        assert self.manager.num_kv_tokens() == len(slots)

    @invariant()
    def its_own_check_agrees(self) -> None:
        self.manager.check()

    # -- helpers ------------------------------------------------------------------------------------------------

    def pick(self, number: int) -> int:
        return list(self.sequences)[number % len(self.sequences)]

    def blocks_for(self, num_tokens: int) -> int:
        return (num_tokens + self.manager.block_size - 1) // self.manager.block_size

    def holders(self) -> Counter[int]:
        tables = map(self.manager.block_table, self.sequences)
        return Counter(block_id for table in tables for block_id in table if block_id != NO_BLOCK)

    def move(self, pairs: list[tuple[int, int]]) -> None:
        for src, dst in pairs:
            self.contents[dst] = self.contents[src]

    def prefix_number(self, sequence: Model, position: int) -> int:
        prefix = sequence.salt, *sequence.tokens[: position + 1]
        return self.prefix_numbers.setdefault(prefix, len(self.prefix_numbers))

    def reuse_order(self) -> list[int]:
        allocator = copy.deepcopy(self.manager._allocator)
        return allocator.allocate(allocator.num_free)

    def num_cached(self) -> int:
        """Free blocks that can still be hit."""
        return sum(block_id in self.manager._tree for block_id in self.reuse_order())

    def snapshot(self) -> Any:
        manager = self.manager
        tables = {seq_id: manager.block_table(seq_id) for seq_id in self.sequences}
        lengths = {seq_id: (manager.num_tokens(seq_id), manager.num_computed(seq_id)) for seq_id in self.sequences}
        cached = {block_id for block_id in range(manager.num_blocks) if block_id in manager._tree}
        return tables, lengths, cached, list(manager.seq_ids), self.reuse_order()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_random_lives_of_sequences_never_mix_up_their_contents(policy: str) -> None:
    machine: Any = type("Machine", (BlockManagerMachine,), {"policy": policy})
    machine.TestCase.settings = settings(max_examples=budget(60, 6_000), stateful_step_count=40, deadline=None)
    machine.TestCase("runTest").debug()
