"""The block managers of a model whose layers see different parts of the context, moved as one.

Layers with the same window form a group with a pool and block tables of its own. The first group has no window. A
windowed group only ever holds what its window can see, taken chunk by chunk as a prompt is computed:
`blocks_for_window` blocks always suffice for it. With fewer it may run out, as the first group may. Knows no mlx.
"""

from collections.abc import Container, Hashable, Sequence
from typing import Any, NamedTuple

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.errors import OutOfBlocks


class BlockCopy(NamedTuple):
    """Block `src` of a group is to be copied to `dst`, in all layers of the group."""

    group: int
    src: int
    dst: int


class BlockSave(NamedTuple):
    """A block's content is to be kept in the second tier."""

    group: int
    block_id: int
    key: str


class BlockLoad(NamedTuple):
    """What the second tier keeps under `key` is to be put into a block."""

    group: int
    block_id: int
    key: str
    node: PrefixNode


Transfer = BlockCopy | BlockSave | BlockLoad


class GroupTier:
    """The second tier as one group's block manager sees it: notes what is to be moved, in the order it is decided."""

    def __init__(self, group: int, stored: Container[str], transfers: list[Transfer]) -> None:
        self._group = group
        self._stored = stored
        self._transfers = transfers
        self._saves: set[str] = set()

    def key(self, digest: bytes) -> str:
        """The name of a prefix's block of this group."""
        return f"{self._group}-{digest.hex()}"

    def __contains__(self, digest: bytes) -> bool:
        return self.key(digest) in self._stored or self.key(digest) in self._saves

    def save(self, block_id: int, digest: bytes) -> None:
        if digest not in self:
            self._saves.add(self.key(digest))
            self._transfers.append(BlockSave(self._group, block_id, self.key(digest)))

    def load(self, node: PrefixNode, block_id: int) -> None:
        self._transfers.append(BlockLoad(self._group, block_id, self.key(node.digest), node))

    def settle(self) -> None:
        """What was to be saved is stored, or could not be."""
        self._saves.clear()


def blocks_for_window(window: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """The most blocks that a group with a window holds at once, a step's new tokens included."""
    per_sequence = -(-(window - 1) // block_size) + 2
    return max_num_seqs * per_sequence + -(-max_num_batched_tokens // block_size)


class CacheGroups:
    """One block manager per group, with the methods of a single one.

    All groups change or none, except where `extend` says otherwise. What has to be moved is noted in `transfers`.
    """

    def __init__(
        self, managers: Sequence[BlockManager], tiers: Sequence[GroupTier] = (), transfers: list[Transfer] | None = None
    ) -> None:
        if managers[0].window is not None or any(manager.window is None for manager in managers[1:]):
            raise ValueError("the first group, and only that, must have no window")
        self.managers = list(managers)
        self.block_size = managers[0].block_size
        self.transfers: list[Transfer] = [] if transfers is None else transfers  # to run before the next step, in order
        self.num_cow_copies = 0
        self._tiers = list(tiers)
        self._full = managers[0]
        self._windowed = list(managers[1:])

    @classmethod
    def make(
        cls,
        num_blocks: Sequence[int],
        windows: Sequence[int | None],
        block_size: int,
        *,
        stored: Container[str] | None = None,
        **options: Any,
    ) -> "CacheGroups":
        """One manager per group; options are those of `BlockManager`. stored: the keys in the second tier, if any."""
        transfers: list[Transfer] = []
        tiers = [] if stored is None else [GroupTier(group, stored, transfers) for group in range(len(windows))]
        managers = [
            BlockManager(count, block_size, window=window, tier=tiers[group] if tiers else None, **options)
            for group, (count, window) in enumerate(zip(num_blocks, windows, strict=True))
        ]
        return cls(managers, tiers, transfers)

    @property
    def num_free_blocks(self) -> int:
        """Those of the first group, which decides what fits."""
        return self._full.num_free_blocks

    def num_slots(self, seq_id: Hashable) -> int:
        """As `BlockManager.num_slots`, of the first group."""
        return self._full.num_slots(seq_id)

    def allocate(self, seq_id: Hashable, token_ids: Sequence[int], *, salt: Hashable = None) -> int:
        """As `BlockManager.allocate`; cached are the leading tokens that every group can start from."""
        num_cached = self._full.num_cached_tokens(token_ids, salt=salt)
        agreed = False
        while not agreed:
            before = num_cached
            for manager in self._windowed:
                num_cached = manager.num_cached_tokens(token_ids, salt=salt, limit=num_cached)
            agreed = num_cached == before
        done: list[BlockManager] = []
        try:
            for manager in self.managers:
                tokens = token_ids if manager.window is None else token_ids[: num_cached + 1]
                manager.allocate(seq_id, tokens, salt=salt, max_cached=num_cached)
                done.append(manager)
        except OutOfBlocks:
            for manager in done:
                manager.free(seq_id)
            raise
        return num_cached

    def extend(self, seq_id: Hashable, token_ids: Sequence[int], end: int) -> None:
        """Give the first `end` tokens of a sequence slots in every group; as `BlockManager.append`.

        Raises OutOfBlocks; the groups that had room keep what they took, and the next call goes on from there.
        """
        for group, manager in enumerate(self.managers):
            self._note_copies(group, manager.append(seq_id, token_ids[manager.num_tokens(seq_id) : end]))

    def grow(self, seq_ids: Sequence[Hashable]) -> list[list[int]]:
        """As `BlockManager.grow`, in every group: the block ids of each."""
        for manager in self._windowed:
            if len(seq_ids) > manager.num_free_blocks:
                raise OutOfBlocks(f"{len(seq_ids)} blocks needed for a window, {manager.num_free_blocks} are free")
        return [manager.grow(seq_ids) for manager in self.managers]

    def own_tail(self, seq_id: Hashable) -> None:
        """The slot of a sequence's next token may be written: copies its last block if that is shared.

        Raises OutOfBlocks; as `extend`, the groups that had room keep what they took.
        """
        for group, manager in enumerate(self.managers):
            self._note_copies(group, manager.reserve(seq_id, 1))

    def _note_copies(self, group: int, copies: Sequence[tuple[int, int]]) -> None:
        self.transfers += [BlockCopy(group, src, dst) for src, dst in copies]
        self.num_cow_copies += len(copies)

    def promise(self, seq_id: Hashable, num_tokens: int) -> list[tuple[BlockManager, list[PrefixNode]]]:
        """As `BlockManager.promise`, with the manager of each list."""
        return [(manager, manager.promise(seq_id, num_tokens)) for manager in self.managers]

    def withdraw(self, promised: Sequence[tuple[BlockManager, list[PrefixNode]]]) -> None:
        """As `BlockManager.withdraw`, of what `promise` returned."""
        for manager, nodes in promised:
            manager.withdraw(nodes)

    def mark_computed(self, seq_id: Hashable, num_tokens: int) -> None:
        """As `BlockManager.mark_computed`."""
        for manager in self.managers:
            manager.mark_computed(seq_id, num_tokens)

    def fork(self, seq_id: Hashable, new_seq_id: Hashable) -> None:
        """As `BlockManager.fork`."""
        for manager in self.managers:
            manager.fork(seq_id, new_seq_id)

    def free(self, seq_id: Hashable, *, will_return: bool = False) -> None:
        """As `BlockManager.free`."""
        for manager in self.managers:
            manager.free(seq_id, will_return=will_return)

    def cached_prefixes(self, seq_id: Hashable) -> list[BlockSave]:
        """The blocks of a sequence that a request of another run could use, by their keys."""
        return [
            BlockSave(group, block_id, tier.key(digest))
            for group, (manager, tier) in enumerate(zip(self.managers, self._tiers, strict=True))
            for block_id, digest in manager.cached_prefixes(seq_id)
        ]

    def settle(self) -> None:
        """All transfers have been run."""
        for tier in self._tiers:
            tier.settle()

    def clear(self) -> None:
        """As `BlockManager.clear`; what was to be moved is not moved any more."""
        for manager in self.managers:
            manager.clear()
        self.transfers.clear()
        self.settle()

    def would_gain_a_run(self, num_tokens: int) -> bool:
        """As `BlockManager.would_gain_a_run`."""
        return self._full.would_gain_a_run(num_tokens)

    def compact(self) -> int:
        """As `BlockManager.compact`; how many blocks move."""
        moves = [BlockCopy(g, *pair) for g, manager in enumerate(self.managers) for pair in manager.compact()]
        self.transfers += moves
        return len(moves)

    def check(self) -> None:
        """As `BlockManager.check`; a windowed group has the sequences of the first."""
        for manager in self.managers:
            manager.check()
            assert manager.seq_ids == self._full.seq_ids, "the groups have different sequences"
