"""Block tables of sequences over one pool: growth, sharing, copy-on-write, prefix caching and compaction.

It decides which block holds which tokens and says which blocks must be copied. It never sees K or V, so it works
for any arrays that follow its answers, and imports no mlx. A sequence's token at position p is in slot
`block_table[p // block_size] * block_size + p % block_size`.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence

from mlx_paged.blocks import compaction, inspection
from mlx_paged.blocks.allocator import BlockAllocator
from mlx_paged.blocks.prefix_tree import PrefixNode, PrefixTree
from mlx_paged.blocks.sequence_blocks import NO_BLOCK, SequenceBlocks
from mlx_paged.blocks.transfers import GroupStoreIndex
from mlx_paged.errors import OutOfBlocks


class BlockManager:
    """Map the tokens of sequences, named by any hashable id, to blocks of a pool of `num_blocks`, all of them usable.

    Method by method, either all of it happens or, with an error, nothing. An unknown id is a KeyError.
    With a `window`, of which a query sees its own key and the window - 1 before it (with `chunked` those since the last
    multiple of it), a sequence gives back the blocks that no further query can see: their entries become NO_BLOCK.
    With a `store`, prefixes that are evicted from the pool go there if they were of use, and are found there.

    The sharing follows Kwon et al. 2023, "Efficient Memory Management for LLM Serving with PagedAttention".
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        allocator: str = "lru",
        prefix_caching: bool = True,
        window: int | None = None,
        chunked: bool = False,
        store: GroupStoreIndex | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least 1 block of 1 token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.window = window
        self.chunked = chunked
        self._store = store
        self._policy = allocator
        self.clear()

    def clear(self) -> None:
        """Forget every sequence and every cached prefix: the pool is as at the start."""
        self._allocator = BlockAllocator(self.num_blocks, self._policy)
        self._tree = PrefixTree()
        self._sequences: dict[Hashable, SequenceBlocks] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks in no table; those that still hold a cached prefix count as free."""
        return self._allocator.num_free

    @property
    def seq_ids(self) -> list[Hashable]:
        return list(self._sequences)

    @property
    def parts(self) -> tuple[Mapping[Hashable, SequenceBlocks], BlockAllocator, PrefixTree]:
        """Its sequences, allocator and tree, for whoever looks at the whole pool; nobody else may change them."""
        return self._sequences, self._allocator, self._tree

    def block_table(self, seq_id: Hashable, start: int = 0) -> list[int]:
        """Return the block ids of a sequence in order, from the `start`-th on."""
        return self._get(seq_id).table[start:]

    def num_tokens(self, seq_id: Hashable) -> int:
        """Count the tokens that a sequence has slots for."""
        return self._get(seq_id).num_tokens

    def num_slots(self, seq_id: Hashable) -> int:
        """Count the tokens that the blocks of a sequence can hold."""
        return len(self._get(seq_id).table) * self.block_size

    def num_computed(self, seq_id: Hashable) -> int:
        """Count the tokens of a sequence, from its start, that have their K/V in place."""
        return self._get(seq_id).num_computed

    def slot(self, seq_id: Hashable, position: int) -> tuple[int, int]:
        """Translate a position to the (block id, offset in it) of its token.

        Raises IndexError outside the sequence and for a token that has fallen out of the window.
        """
        sequence = self._get(seq_id)
        first = sequence.num_released * self.block_size
        if not first <= position < sequence.num_tokens:
            raise IndexError(
                f"sequence {seq_id!r} has {sequence.num_tokens} tokens, those from {first} on in blocks: no {position}"
            )
        return sequence.table[position // self.block_size], position % self.block_size

    def ref_count(self, block_id: int) -> int:
        """Count the block tables that hold the block. Raises KeyError for a block outside the pool."""
        if not 0 <= block_id < self.num_blocks:
            raise KeyError(f"block {block_id}: the pool has blocks 0 to {self.num_blocks - 1}")
        return self._allocator.ref_counts[block_id]

    def is_cached(self, block_id: int) -> bool:
        """Say whether the block can be found by its prefix, referenced or not."""
        return block_id in self._tree

    def num_kv_tokens(self) -> int:
        """Count the tokens that have a slot, those in shared blocks once."""
        return inspection.num_kv_tokens(self._sequences.values(), self.block_size)

    def num_cached_tokens(self, token_ids: Sequence[int], *, salt: Hashable = None, limit: int | None = None) -> int:
        """Count the leading tokens that a new sequence of `token_ids` would find cached, at most `limit`."""
        most = len(token_ids) - 1 if limit is None else min(limit, len(token_ids) - 1)
        return self._num_cached_blocks(token_ids, salt, most) * self.block_size

    def allocate(
        self, seq_id: Hashable, token_ids: Sequence[int], *, salt: Hashable = None, max_cached: int | None = None
    ) -> int:
        """Give a new sequence blocks for `token_ids`, the first of them shared with cached equal prefixes.

        Returns the number of leading tokens whose K/V is already there: whole blocks, at most `max_cached` tokens, and
        never the last token, so that there is always something to compute. Prefixes are shared among equal `salt`s
        only. Raises OutOfBlocks; ValueError for a live `seq_id` or no tokens.
        """
        return self.attach(seq_id, list(token_ids), len(token_ids), salt=salt, max_cached=max_cached)

    def attach(
        self, seq_id: Hashable, token_ids: list[int], num_tokens: int, *, salt: Hashable = None,
        max_cached: int | None = None,
    ) -> int:  # fmt: skip
        """Do as `allocate`, for the first `num_tokens` of a list that its owner appends to; it is never copied."""
        self._require_new(seq_id)
        if num_tokens == 0:
            raise ValueError(f"sequence {seq_id!r} has no tokens to allocate")
        most = num_tokens - 1 if max_cached is None else min(max_cached, num_tokens - 1)
        num_cached = self._num_cached_blocks(token_ids, salt, most)
        first = self._first_visible(num_cached * self.block_size)
        size, node = self.block_size, self._tree.root(salt)
        chunks = [tuple(token_ids[start : start + size]) for start in range(0, num_cached * size, size)]
        shared = [block_id for block_id in self._tree.find_blocks(node, chunks)[first:] if block_id is not None]
        needed = self._blocks_for(num_tokens) - first - len(shared)
        available = self.num_free_blocks - sum(self._allocator.ref_counts[block_id] == 0 for block_id in shared)
        if needed > available:
            raise OutOfBlocks(
                f"{num_tokens} tokens need {needed} blocks beside {len(shared)} cached ones, "
                f"{available} of {self.num_blocks} are free"
            )
        self._allocator.retain(shared)
        fresh = iter(self._allocate(needed, after=shared[-1] if shared else None))
        table = [NO_BLOCK] * first
        for position, chunk in enumerate(chunks):
            node = self._tree.child(node, chunk)
            if position < first:
                continue
            if node.block_id is None and node.parent is not None and self._store is not None:
                block_id = next(fresh)
                self._store.load(node, block_id)
                self._tree.insert(node.parent, chunk, block_id)
            assert node.block_id is not None
            table.append(node.block_id)
            node.worth_storing = True
        table += fresh
        self._sequences[seq_id] = SequenceBlocks(
            token_ids, table, num_tokens, num_cached * size, num_cached, node, first
        )
        return num_cached * size

    def append(self, seq_id: Hashable, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Give a sequence more tokens, and slots for them.

        Returns the (source, destination) block copies to run before their K/V is written: one pair if the last
        block is partly filled and shared, else none; the last owner of a block writes in place. Raises OutOfBlocks.
        """
        sequence = self._get(seq_id)
        copies = self.reserve(seq_id, sequence.num_tokens + len(token_ids))
        sequence.token_ids += token_ids
        return copies

    def reserve(self, seq_id: Hashable, num_tokens: int) -> list[tuple[int, int]]:
        """Give a sequence slots for its first `num_tokens` tokens, known or not yet. Returns and raises as `append`."""
        sequence = self._get(seq_id)
        if num_tokens <= sequence.num_tokens:
            return []
        tail_index = sequence.num_tokens // self.block_size
        tail = sequence.table[tail_index] if sequence.num_tokens % self.block_size else None
        must_copy = tail is not None and self._allocator.ref_counts[tail] > 1
        needed = max(0, self._blocks_for(num_tokens) - len(sequence.table))
        if needed or must_copy:
            holds_any = sequence.num_released < len(sequence.table)
            fresh = self._allocate(needed + must_copy, after=sequence.table[-1] if holds_any else None)
            if must_copy:
                sequence.table[tail_index] = fresh.pop(0)
            sequence.table += fresh
        sequence.num_tokens = num_tokens
        if must_copy and tail is not None:
            self._release([tail])
            return [(tail, sequence.table[tail_index])]
        return []

    def append_blocks(self, seq_ids: Sequence[Hashable]) -> list[int]:
        """Give each of the sequences one more block. Returns the block ids. Raises OutOfBlocks with nothing changed."""
        tables = [self._sequences[seq_id].table for seq_id in seq_ids]
        if self._allocator.free_blocks.prefers_runs:
            if len(tables) > self.num_free_blocks:
                raise OutOfBlocks(f"{len(tables)} blocks needed, {self.num_free_blocks} of {self.num_blocks} are free")
            block_ids = [self._allocate(1, after=t[-1] if t[-1] != NO_BLOCK else None)[0] for t in tables]
        else:
            block_ids = self._allocate(len(tables), after=None)
        for table, block_id in zip(tables, block_ids, strict=True):
            table.append(block_id)
        return block_ids

    def mark_computed(self, seq_id: Hashable, num_tokens: int) -> None:
        """Note that the K/V of a sequence's first `num_tokens` is in place: their full blocks may be hit from now on.

        Blocks out of the window are given back. Raises ValueError if it is less than before or more than there is.
        """
        sequence = self._get(seq_id)
        if not sequence.num_computed <= num_tokens <= sequence.num_tokens:
            raise ValueError(
                f"sequence {seq_id!r}: {num_tokens} computed tokens, but {sequence.num_computed} were computed before "
                f"and it has {sequence.num_tokens}"
            )
        self.sync(seq_id, num_tokens)

    def sync(self, seq_id: Hashable, num_tokens: int) -> None:
        """Note that a sequence has come to `num_tokens` tokens, which lie in its slots and are computed."""
        sequence = self._get(seq_id)
        sequence.num_tokens = max(sequence.num_tokens, num_tokens)
        sequence.num_computed = num_tokens
        if self.prefix_caching:
            sequence.publish(self._tree, self.block_size, num_tokens)
        if self.window is not None:
            self._release(sequence.release(self._first_visible(num_tokens)))

    def publish(self, seq_id: Hashable, num_tokens: int) -> list[PrefixNode]:
        """Let the full blocks of a sequence's first `num_tokens` be hit, computed or about to be by the next step.

        Sequences that start in the same step may share them, since a layer writes before it reads. Returns the
        prefixes concerned, for `unpublish` if it is not.
        """
        if not self.prefix_caching:
            return []
        return self._get(seq_id).publish(self._tree, self.block_size, num_tokens)

    def unpublish(self, nodes: Iterable[PrefixNode]) -> None:
        """Let prefixes whose K/V was not computed be hit no more. Their sequences are to be freed after this."""
        for node in nodes:
            if node.block_id is not None:
                self._tree.evict(node.block_id)

    def fork(self, seq_id: Hashable, new_seq_id: Hashable, token_ids: list[int] | None = None) -> None:
        """Make `new_seq_id` share the blocks of `seq_id`; K and V are copied at the first write to one partly filled.

        token_ids: the new sequence's own list, of which only what is computed is shared; None: a copy of all tokens
        that have slots. Raises KeyError; ValueError for a live new id.
        """
        sequence = self._get(seq_id)
        self._require_new(new_seq_id)
        if token_ids is not None:
            sequence.num_tokens = sequence.num_computed  # `reserve` gives these slots again, and copies what is shared
        fork = sequence.fork(token_ids, self._blocks_for(sequence.num_tokens))
        self._allocator.retain(fork.held_blocks)
        self._sequences[new_seq_id] = fork

    def free(self, seq_id: Hashable, *, will_return: bool = False) -> None:
        """End a sequence; blocks that nobody else holds become free, cached ones reusable until evicted.

        will_return: it was preempted, so its blocks are worth keeping in the block store.
        """
        sequence = self._get(seq_id)
        if will_return:
            sequence.mark_worth_storing()
        del self._sequences[seq_id]
        self._release(sequence.held_blocks[::-1])  # deepest first, so that a cached chain is consumed from its end

    def cached_prefixes(self, seq_id: Hashable) -> list[tuple[int, bytes]]:
        """Return the block id and prefix digest of each published block of a sequence, in order."""
        return self._get(seq_id).published_blocks()

    def compact(self) -> list[tuple[int, int]]:
        """Move the blocks in use to ids 0 .. n-1, so that the free space is one run.

        Returns (source, destination) copies, right when run one after another. Cached blocks stay cached, except one
        where the pool has no empty block to begin with.
        """
        moves = compaction.compact(self._allocator, self._tree)
        now_at = dict(moves)
        for sequence in self._sequences.values():
            sequence.table = [now_at.get(block_id, block_id) for block_id in sequence.table]
        return moves

    def compaction_helps(self, num_tokens: int) -> bool:
        """Say whether `num_tokens` tokens would come in pieces now, and in one run after `compact`."""
        return compaction.compaction_helps(self._allocator, self._blocks_for(num_tokens))

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken: for tests and `check_invariants=True`."""
        inspection.check(self._sequences, self._allocator, self._tree, self.block_size, self._first_visible)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _first_visible(self, num_tokens: int) -> int:
        """The first table entry that queries after `num_tokens` tokens can see."""
        if self.window is None:
            return 0
        first = num_tokens // self.window * self.window if self.chunked else max(0, num_tokens - self.window + 1)
        return first // self.block_size

    def _num_cached_blocks(self, tokens: Sequence[int], salt: Hashable, most: int) -> int:
        """Count the blocks of the longest prefix, of at most `most` tokens, that a sequence can start from."""
        if not self.prefix_caching:
            return 0
        num_usable = num_found = 0  # blocks of the longest usable prefix; blocks to be had in a row up to here
        is_there = self._tree.walk(salt, tokens, self.block_size, most // self.block_size, self._store)
        for count, found in enumerate(is_there, start=1):
            if not found and self.window is None:
                break
            num_found = num_found + 1 if found else 0
            if num_found >= count - self._first_visible(count * self.block_size):
                num_usable = count
        return num_usable

    def _get(self, seq_id: Hashable) -> SequenceBlocks:
        if seq_id not in self._sequences:
            raise KeyError(f"no sequence {seq_id!r} in the block manager: never allocated, or freed")
        return self._sequences[seq_id]

    def _require_new(self, seq_id: Hashable) -> None:
        if seq_id in self._sequences:
            raise ValueError(f"sequence {seq_id!r} is live: free it first or choose another id")

    def _allocate(self, count: int, after: int | None) -> list[int]:
        """Take free blocks, to follow block `after`; they lose what they cached."""
        block_ids = self._allocator.allocate(count, after)
        for block_id in self._tree.cached_blocks(block_ids):
            node = self._tree.evict(block_id)
            if node is not None and node.worth_storing and self._store is not None:
                self._store.save(node, block_id)
        return block_ids

    def _release(self, block_ids: Sequence[int]) -> None:
        self._allocator.release(block_ids, self._tree.__contains__)
