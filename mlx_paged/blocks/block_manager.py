"""Block tables of sequences over one pool: growth, sharing, copy-on-write, prefix caching and compaction.

It decides which block holds which tokens and says which blocks must be copied. It never sees K or V, so it works
for any arrays that follow its answers, and imports no mlx. A sequence's token at position p is in slot
`block_table[p // block_size] * block_size + p % block_size`.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from mlx_paged.blocks.allocator import BlockAllocator
from mlx_paged.blocks.prefix_tree import PrefixCache, PrefixNode, next_digest
from mlx_paged.errors import OutOfBlocks

NO_BLOCK = -1  # in the table of a sequence with a window: the block has been given back


class BlockTier(Protocol):
    """A second place for the content of blocks, under the digests of their prefixes.

    `save` and `load` are notes for whoever moves K and V: they are carried out in their order, between other copies.
    """

    def __contains__(self, digest: bytes) -> bool:
        """Whether `load` would find it."""

    def save(self, block_id: int, digest: bytes) -> None:
        """The block's content is to be kept before it is overwritten."""

    def load(self, node: PrefixNode, block_id: int) -> None:
        """The content kept under the node's digest is to be put into the block; if it can't be, `withdraw` the node."""


class _SequenceBlocks:
    """The blocks of one sequence; the first `num_registered` are in the prefix cache, the last of them as `node`.

    The first `num_released` of the table are NO_BLOCK.
    """

    __slots__ = ("node", "num_computed", "num_registered", "num_released", "table", "tokens")

    def __init__(self, table: list[int], tokens: list[int], num_computed: int, node: PrefixNode, num_registered: int):
        self.table = table
        self.tokens = tokens
        self.num_computed = num_computed
        self.node = node
        self.num_registered = num_registered
        self.num_released = table.count(NO_BLOCK)

    @property
    def held(self) -> list[int]:
        return self.table[self.num_released :]


class BlockManager:
    """Maps the tokens of sequences to blocks of a pool of `num_blocks`, all of them usable.

    A sequence is named by any hashable id. Method by method, either all of it happens or, with an error, nothing.
    With a `window`, of which a query sees its own key and the window - 1 before it, a sequence gives back the blocks
    that no further query can see: their table entries become NO_BLOCK. With a `tier`, prefixes that are evicted from
    the pool go there if they were of use, and are found there.

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
        tier: BlockTier | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least 1 block of 1 token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.window = window
        self._tier = tier
        self._policy = allocator
        self._sequences: dict[Hashable, _SequenceBlocks] = {}
        self.clear()

    def clear(self) -> None:
        """Forget every sequence and every cached prefix: the pool is as at the start."""
        self._allocator = BlockAllocator(self.num_blocks, self._policy)
        self._prefixes = PrefixCache()
        self._sequences = {}

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Blocks in no table; those that still hold a cached prefix count as free."""
        return self._allocator.num_free

    @property
    def seq_ids(self) -> list[Hashable]:
        return list(self._sequences)

    def block_table(self, seq_id: Hashable, start: int = 0) -> list[int]:
        """The block ids of a sequence in order, from the `start`-th on. Raises KeyError for an unknown id."""
        return self._get(seq_id).table[start:]

    def num_tokens(self, seq_id: Hashable) -> int:
        """The tokens that a sequence has slots for. Raises KeyError for an unknown id."""
        return len(self._get(seq_id).tokens)

    def num_slots(self, seq_id: Hashable) -> int:
        """The tokens that the blocks of a sequence have room for. Raises KeyError for an unknown id."""
        return len(self._get(seq_id).table) * self.block_size

    def num_computed(self, seq_id: Hashable) -> int:
        """How many tokens of a sequence, from its start, have their K/V in place."""
        return self._get(seq_id).num_computed

    def slot(self, seq_id: Hashable, position: int) -> tuple[int, int]:
        """Address translation: the (block id, offset in it) of a token.

        Raises IndexError outside the sequence and for a token that has fallen out of the window.
        """
        sequence = self._get(seq_id)
        first = sequence.num_released * self.block_size
        if not first <= position < len(sequence.tokens):
            raise IndexError(
                f"sequence {seq_id!r} has {len(sequence.tokens)} tokens, those from {first} on in blocks: no {position}"
            )
        return sequence.table[position // self.block_size], position % self.block_size

    def ref_count(self, block_id: int) -> int:
        """The number of block tables that hold the block."""
        if not 0 <= block_id < self.num_blocks:
            raise KeyError(f"block {block_id}: the pool has blocks 0 to {self.num_blocks - 1}")
        return self._allocator.ref_counts[block_id]

    def is_cached(self, block_id: int) -> bool:
        """Whether the block can be found by its prefix, referenced or not."""
        return block_id in self._prefixes

    def num_kv_tokens(self) -> int:
        """Tokens that have a slot, those in shared blocks counted once."""
        filled: dict[int, int] = {}
        for sequence in self._sequences.values():
            num_full = len(sequence.tokens) // self.block_size
            filled |= dict.fromkeys(sequence.table[sequence.num_released : num_full], self.block_size)
            if tail := len(sequence.tokens) % self.block_size:
                filled[sequence.table[num_full]] = max(tail, filled.get(sequence.table[num_full], 0))
        return sum(filled.values())

    def num_cached_tokens(self, token_ids: Sequence[int], *, salt: Hashable = None, limit: int | None = None) -> int:
        """How many leading tokens a new sequence of `token_ids` would find cached, at most `limit`."""
        return self._num_cached_blocks(token_ids, salt, limit) * self.block_size

    # -- a sequence's life --------------------------------------------------------------------------------------

    def allocate(
        self, seq_id: Hashable, token_ids: Sequence[int], *, salt: Hashable = None, max_cached: int | None = None
    ) -> int:
        """Give a new sequence blocks for `token_ids`, the first of them shared with cached equal prefixes.

        Returns the number of leading tokens whose K/V is already there: whole blocks, at most `max_cached` tokens, and
        never the last token, so that there is always something to compute. Prefixes are shared among equal `salt`s
        only. Raises OutOfBlocks; ValueError for a live `seq_id` or no tokens.
        """
        self._require_new(seq_id)
        if len(token_ids) == 0:
            raise ValueError(f"sequence {seq_id!r} has no tokens to allocate")
        tokens = list(token_ids)
        num_cached = self._num_cached_blocks(tokens, salt, max_cached)
        first = self._first_visible(num_cached * self.block_size)
        chunks = [
            tuple(tokens[start : start + self.block_size])
            for start in range(0, num_cached * self.block_size, self.block_size)
        ]
        held = self._prefixes.blocks_of(self._prefixes.root(salt), chunks)[first:]
        shared = [block_id for block_id in held if block_id is not None]
        needed = self._blocks_for(len(tokens)) - first - len(shared)
        available = self.num_free_blocks - sum(self._allocator.ref_counts[block_id] == 0 for block_id in shared)
        if needed > available:
            raise OutOfBlocks(
                f"{len(tokens)} tokens need {needed} blocks beside {len(shared)} cached ones, "
                f"{available} of {self.num_blocks} are free"
            )
        self._allocator.retain(shared)
        fresh = iter(self._take(needed, after=shared[-1] if shared else None))
        table = [NO_BLOCK] * first
        node = self._prefixes.root(salt)
        for position, chunk in enumerate(chunks):
            node = self._prefixes.child(node, chunk)
            if position < first:
                continue
            if node.block_id is None and node.parent is not None and self._tier is not None:
                block_id = next(fresh)
                self._tier.load(node, block_id)
                self._prefixes.insert(node.parent, chunk, block_id)
            assert node.block_id is not None
            table.append(node.block_id)
            node.is_wanted = True
        table += fresh
        self._sequences[seq_id] = _SequenceBlocks(table, tokens, num_cached * self.block_size, node, num_cached)
        return num_cached * self.block_size

    def append(self, seq_id: Hashable, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """Give a sequence slots for more tokens.

        Returns the (source, destination) block copies to run before their K/V is written: one pair if the last
        block is partly filled and shared, else none; the last owner of a block writes in place. Raises OutOfBlocks,
        and KeyError for an unknown id.
        """
        copies = self.reserve(seq_id, len(token_ids))
        self._get(seq_id).tokens += token_ids
        return copies

    def reserve(self, seq_id: Hashable, num_tokens: int) -> list[tuple[int, int]]:
        """Give a sequence slots for its next `num_tokens` tokens before it is known which they are.

        `append` names them later, and does nothing else then. Returns and raises what `append` does.
        """
        sequence = self._get(seq_id)
        if num_tokens == 0:
            return []
        num_named = len(sequence.tokens)
        needed = max(0, self._blocks_for(num_named + num_tokens) - len(sequence.table))
        tail = sequence.table[num_named // self.block_size] if num_named % self.block_size else None
        must_copy = tail is not None and self._allocator.ref_counts[tail] > 1
        if needed or must_copy:
            holds_any = sequence.num_released < len(sequence.table)
            fresh = self._take(needed + must_copy, after=sequence.table[-1] if holds_any else None)
        if tail is not None and must_copy:
            copy = fresh.pop(0)
            sequence.table[num_named // self.block_size] = copy
            sequence.table += fresh
            self._release([tail])
            return [(tail, copy)]
        if tail is not None:
            # After a fork of a part, the block may be a whole one of a longer sequence that is gone: it ends here.
            self._prefixes.evict(tail)
        if needed:
            sequence.table += fresh
        return []

    def grow(self, seq_ids: Sequence[Hashable]) -> list[int]:
        """One more block for each of the sequences, whose slots are all taken; `append` names its tokens later.

        Returns the block ids. All of it happens or nothing: raises OutOfBlocks.
        """
        tables = [self._sequences[seq_id].table for seq_id in seq_ids]
        if self._allocator.keeps_runs:
            if len(tables) > self.num_free_blocks:
                raise OutOfBlocks(f"{len(tables)} blocks needed, {self.num_free_blocks} of {self.num_blocks} are free")
            block_ids = [self._take(1, after=table[-1] if table[-1] != NO_BLOCK else None)[0] for table in tables]
        else:
            block_ids = self._take(len(tables), after=None)
        for table, block_id in zip(tables, block_ids, strict=True):
            table.append(block_id)
        return block_ids

    def mark_computed(self, seq_id: Hashable, num_tokens: int) -> None:
        """The K/V of a sequence's first `num_tokens` is in place: their full blocks may be hit from now on.

        Blocks that have fallen out of the window are given back, and can be hit for as long as they last. Raises
        ValueError if `num_tokens` is less than before or more than the sequence has.
        """
        sequence = self._get(seq_id)
        if not sequence.num_computed <= num_tokens <= len(sequence.tokens):
            raise ValueError(
                f"sequence {seq_id!r}: {num_tokens} computed tokens, but {sequence.num_computed} were computed before "
                f"and it has {len(sequence.tokens)}"
            )
        sequence.num_computed = num_tokens
        if self.prefix_caching:
            self._register(sequence, num_tokens)
        first = self._first_visible(num_tokens)
        if first > sequence.num_released:
            self._release(sequence.table[sequence.num_released : first][::-1])
            sequence.table[sequence.num_released : first] = [NO_BLOCK] * (first - sequence.num_released)
            sequence.num_released = first

    def _register(self, sequence: _SequenceBlocks, num_tokens: int) -> None:
        """Let the full blocks below `num_tokens` be found."""
        while (sequence.num_registered + 1) * self.block_size <= num_tokens:
            start = sequence.num_registered * self.block_size
            tokens = tuple(sequence.tokens[start : start + self.block_size])
            block_id = sequence.table[sequence.num_registered]
            sequence.node = self._prefixes.insert(sequence.node, tokens, block_id)
            sequence.num_registered += 1

    def fork(self, seq_id: Hashable, new_seq_id: Hashable, *, num_tokens: int | None = None) -> None:
        """Make `new_seq_id` share the blocks of `seq_id`: all of them, or those of its first `num_tokens` tokens.

        Costs work on ids only; K and V are copied at the first write to a shared, partly filled block. Raises
        KeyError; ValueError for a live new id, fewer than 1 or more tokens than there are, or a part whose window has
        been given back.
        """
        sequence = self._get(seq_id)
        self._require_new(new_seq_id)
        num_tokens = len(sequence.tokens) if num_tokens is None else num_tokens
        if not 1 <= num_tokens <= len(sequence.tokens):
            raise ValueError(f"sequence {seq_id!r} has {len(sequence.tokens)} tokens, can't share {num_tokens}")
        table = sequence.table[: self._blocks_for(num_tokens)]
        num_computed = min(sequence.num_computed, num_tokens)
        if self._first_visible(num_computed) < sequence.num_released:
            raise ValueError(f"sequence {seq_id!r} has given back blocks that its first {num_tokens} tokens need")
        num_registered = min(sequence.num_registered, num_tokens // self.block_size)
        node = sequence.node
        for _ in range(sequence.num_registered - num_registered):
            assert node.parent is not None
            node = node.parent
        self._allocator.retain(table[sequence.num_released :])
        tokens = sequence.tokens[:num_tokens]
        self._sequences[new_seq_id] = _SequenceBlocks(table, tokens, num_computed, node, num_registered)

    def free(self, seq_id: Hashable, *, will_return: bool = False) -> None:
        """End a sequence; blocks that nobody else holds become free, cached ones reusable until evicted.

        will_return: it was preempted, so its blocks are worth keeping in the second tier.
        """
        sequence = self._get(seq_id)
        for block_id in sequence.held if will_return else ():
            self._prefixes.want(block_id)
        del self._sequences[seq_id]
        self._release(sequence.held[::-1])  # deepest first, so that a cached chain is consumed from its end

    def promise(self, seq_id: Hashable, num_tokens: int) -> list[PrefixNode]:
        """The K/V of a sequence's first `num_tokens` will be written by the step that is being put together.

        Sequences allocated for the same step may hit their full blocks at once, since a layer writes before it reads.
        Returns the prefixes concerned, for `withdraw` if the step fails.
        """
        sequence = self._get(seq_id)
        first = sequence.num_registered
        if not self.prefix_caching:
            return []
        self._register(sequence, num_tokens)
        nodes = []
        node = sequence.node
        for block_id in reversed(sequence.table[first : sequence.num_registered]):
            if node.block_id == block_id:  # another sequence's block may have been there first
                nodes.append(node)
            assert node.parent is not None
            node = node.parent
        return nodes

    def cached_prefixes(self, seq_id: Hashable) -> list[tuple[int, bytes]]:
        """The block id and prefix digest of each full computed block of a sequence that can be found by its prefix."""
        found = []
        node: PrefixNode | None = self._get(seq_id).node
        while node is not None:
            if node.block_id is not None:
                found.append((node.block_id, node.digest))
            node = node.parent
        return found[::-1]

    def withdraw(self, nodes: Iterable[PrefixNode]) -> None:
        """A promise was not kept: the prefixes can't be hit any more. Their sequences are to be freed after this."""
        for node in nodes:
            if node.block_id is not None:
                self._prefixes.evict(node.block_id)

    # -- the pool as a whole ------------------------------------------------------------------------------------

    def compact(self) -> list[tuple[int, int]]:
        """Move the blocks in use to ids 0 .. n-1, so that the free space is one run.

        Returns (source, destination) copies, right when run one after another. Cached blocks that nobody uses move
        out of the way and stay cached, except one where the pool has no empty block to begin with.
        """
        ref_counts = self._allocator.ref_counts
        num_used = self.num_blocks - self.num_free_blocks
        holes = [block_id for block_id in range(num_used) if ref_counts[block_id] == 0]
        holes.sort(key=lambda block_id: block_id in self._prefixes)  # empty ones first: filling them makes room
        outside = range(num_used, self.num_blocks)
        sources = [block_id for block_id in outside if ref_counts[block_id] > 0]
        room = [block_id for block_id in outside if ref_counts[block_id] == 0 and block_id not in self._prefixes]
        moves: list[tuple[int, int]] = []
        for src, dst in zip(sources, holes, strict=True):
            if dst in self._prefixes and room:
                moves.append((dst, room.pop()))
            elif dst in self._prefixes:
                self._prefixes.evict(dst)
                self._allocator.forget(dst)
            moves.append((src, dst))
            room.append(src)
        self._allocator.move(moves)
        now_at = {}
        for src, dst in moves:
            self._prefixes.move(src, dst)
            now_at[src] = dst
        for sequence in self._sequences.values():
            sequence.table = [now_at.get(block_id, block_id) for block_id in sequence.table]
        return moves

    def would_gain_a_run(self, num_tokens: int) -> bool:
        """Whether `num_tokens` tokens would come in pieces now, and in one run after `compact`."""
        count = self._blocks_for(num_tokens)
        if self._allocator.has_run(count) or count > self.num_free_blocks:
            return False
        # Runs start at multiples of their length, so the free space behind the used blocks may not hold a whole one.
        length = 1 << (count - 1).bit_length()
        num_used = self.num_blocks - self.num_free_blocks
        return -(-num_used // length) * length + length <= self.num_blocks

    def check(self) -> None:
        """Raise AssertionError if an invariant is broken: for tests and `check_invariants=True`."""
        holders = Counter(block_id for sequence in self._sequences.values() for block_id in sequence.held)
        for block_id, count in enumerate(self._allocator.ref_counts):
            assert count == holders[block_id], f"block {block_id} has {count} references, {holders[block_id]} holders"
        assert self.num_free_blocks == self.num_blocks - len(holders), "free blocks and used blocks don't add up"
        self._prefixes.check()
        for seq_id, sequence in self._sequences.items():
            assert len(sequence.table) >= self._blocks_for(len(sequence.tokens)), f"{seq_id!r}: table too short"
            assert len(set(sequence.held)) == len(sequence.held), f"{seq_id!r} holds a block twice"
            assert sequence.table.count(NO_BLOCK) == sequence.num_released, f"{seq_id!r}: blocks lost"
            assert sequence.num_released <= self._first_visible(sequence.num_computed), f"{seq_id!r}: visible, released"
            assert sequence.num_computed <= len(sequence.tokens), f"{seq_id!r}: more computed than there is"
            assert sequence.num_registered * self.block_size <= sequence.num_computed, f"{seq_id!r}: hit too early"

    # -- helpers ------------------------------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _first_visible(self, num_tokens: int) -> int:
        """The first table entry that queries after `num_tokens` tokens can see."""
        return 0 if self.window is None else max(0, num_tokens - self.window + 1) // self.block_size

    def _num_cached_blocks(self, tokens: Sequence[int], salt: Hashable, limit: int | None) -> int:
        """The blocks of the longest prefix of `tokens` that a sequence can start from, short of the last token."""
        if not self.prefix_caching:
            return 0
        most = len(tokens) - 1 if limit is None else min(limit, len(tokens) - 1)
        num_usable = num_held = 0  # blocks of the longest usable prefix; blocks to be had in a row up to here
        node: PrefixNode | None = self._prefixes.root(salt)
        digest = b"" if node is None or self._tier is None else node.digest
        for count, start in enumerate(range(0, most - self.block_size + 1, self.block_size), start=1):
            block_tokens = tuple(tokens[start : start + self.block_size])
            node = self._prefixes.find(node, block_tokens) if node is not None else None
            digest = next_digest(digest, block_tokens) if self._tier is not None else b""
            is_held = (node is not None and node.block_id is not None) or (
                self._tier is not None and digest in self._tier
            )
            if not is_held and (self.window is None or (node is None and self._tier is None)):
                break
            num_held = num_held + 1 if is_held else 0
            if num_held >= count - self._first_visible(count * self.block_size):
                num_usable = count
        return num_usable

    def _get(self, seq_id: Hashable) -> _SequenceBlocks:
        try:
            return self._sequences[seq_id]
        except KeyError:
            raise KeyError(f"no sequence {seq_id!r} in the block manager: never allocated, or freed") from None

    def _require_new(self, seq_id: Hashable) -> None:
        if seq_id in self._sequences:
            raise ValueError(f"sequence {seq_id!r} is live: free it first or choose another id")

    def _take(self, count: int, after: int | None) -> list[int]:
        """Free blocks, to follow block `after`; they lose what they cached."""
        block_ids = self._allocator.allocate(count, after)
        for block_id in self._prefixes.held(block_ids):
            node = self._prefixes.evict(block_id)
            if node is not None and node.is_wanted and self._tier is not None:
                self._tier.save(block_id, node.digest)
        return block_ids

    def _release(self, block_ids: Sequence[int]) -> None:
        self._allocator.release(block_ids, self._prefixes.__contains__)
