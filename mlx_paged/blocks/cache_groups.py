"""The block managers of a model whose layers see different parts of the context, moved as one.

Layers with the same window form a group with a pool and block tables of its own. The first group has no window. A
windowed group only ever holds what its window can see, taken chunk by chunk as a prompt is computed:
`blocks_for_window` blocks always suffice for it. With fewer it may run out, as the first group may. Knows no mlx.
"""

from collections.abc import Hashable, Sequence
from typing import Any

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.checkpoints import CheckpointLost, Checkpoints, StateStore
from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.blocks.stored_states import StoredKeys, StoredStates
from mlx_paged.blocks.transfers import BlockCopy, BlockLoad, BlockSave, GroupStoreIndex, Load, Save, Transfer
from mlx_paged.errors import OutOfBlocks

Published = list[tuple[BlockManager | Checkpoints, list[PrefixNode]]]
"""The prefixes that a call of `CacheGroups.publish` let be hit, by group."""


def blocks_for_window(window: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Count the most blocks that a group with a window holds at once, a step's new tokens included."""
    per_sequence = -(-(window - 1) // block_size) + 2
    return max_num_seqs * per_sequence + -(-max_num_batched_tokens // block_size)


class CacheGroups:
    """One manager per group, with the methods of a single one: what has no text here does as `BlockManager`'s.

    All groups change or none, except where `reserve` says otherwise.
    """

    def __init__(
        self,
        managers: Sequence[BlockManager],
        stores: Sequence[GroupStoreIndex] = (),
        transfers: list[Transfer] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """checkpoints: those of the states of recurrent layers, if the model has any."""
        if managers[0].window is not None or any(manager.window is None for manager in managers[1:]):
            raise ValueError("the first group, and only that, must have no window")
        self.managers = list(managers)
        self.block_size = managers[0].block_size
        self.transfers: list[Transfer] = [] if transfers is None else transfers
        """What has to be moved before the next step, in order."""
        self.num_cow_copies = 0
        self.checkpoints = checkpoints
        self._stores = list(stores)
        self._full_context = managers[0]
        self._all: list[BlockManager | Checkpoints] = [*managers, *([] if checkpoints is None else [checkpoints])]

    @classmethod
    def make(
        cls,
        num_blocks: Sequence[int],
        windows: Sequence[int | None],
        block_size: int,
        *,
        stored_keys: StoredKeys | None = None,
        states: StateStore | None = None,
        num_checkpoints: int = 0,
        **options: Any,
    ) -> "CacheGroups":
        """Make one manager per group.

        stored_keys: the keys in the block store, if there is one. states: of recurrent layers, if there are any, of
        which at most `num_checkpoints` are kept. options: those of `BlockManager`.
        """
        transfers: list[Transfer] = []
        stores = []
        if stored_keys is not None:
            stores = [GroupStoreIndex(group, stored_keys, transfers) for group in range(len(windows))]
        managers = [
            BlockManager(count, block_size, window=window, store=stores[group] if stores else None, **options)
            for group, (count, window) in enumerate(zip(num_blocks, windows, strict=True))
        ]
        checkpoints = None if states is None else Checkpoints(states, managers[0], num_checkpoints)
        if checkpoints is not None and stored_keys is not None:
            checkpoints.keep_in(StoredStates(stored_keys, transfers), stores[0])
        return cls(managers, stores, transfers, checkpoints)

    @property
    def num_free_blocks(self) -> int:
        """Those of the first group, which decides what fits."""
        return self._full_context.num_free_blocks

    def num_slots(self, seq_id: Hashable) -> int:
        """Count the tokens that the blocks of a sequence can hold, in the first group."""
        return self._full_context.num_slots(seq_id)

    def num_cached_tokens(self, token_ids: Sequence[int], *, salt: Hashable = None, limit: int | None = None) -> int:
        """Do as `BlockManager.num_cached_tokens`, of tokens that every group can start from."""
        num_cached, before = self._full_context.num_cached_tokens(token_ids, salt=salt, limit=limit), -1
        while num_cached != before:  # until all agree
            before = num_cached
            for each in self._all[1:]:
                num_cached = each.num_cached_tokens(token_ids, salt=salt, limit=num_cached)
        return num_cached

    def attach(
        self,
        seq_id: Hashable,
        token_ids: list[int],
        num_tokens: int,
        *,
        salt: Hashable = None,
        limit: int | None = None,
    ) -> int:
        """Do as `BlockManager.attach`. Cached are at most `limit` leading tokens that every group can start from.

        A sequence that was freed to go on goes on after all that was computed of it, if that can be had.
        """
        parked = self._parked_position(seq_id, token_ids[:num_tokens], salt, limit)
        start = parked or self.num_cached_tokens(token_ids[:num_tokens], salt=salt, limit=limit)
        num_cached = start // self.block_size * self.block_size
        attached: list[BlockManager | Checkpoints] = []
        try:
            for each in self._all:
                count = num_tokens if each.window is None else start + 1
                each.attach(seq_id, token_ids, count, salt=salt, max_cached=num_cached)
                attached.append(each)
        except (OutOfBlocks, CheckpointLost) as error:
            for each in attached:
                each.free(seq_id)
            if isinstance(error, CheckpointLost):
                return self.attach(seq_id, token_ids, num_tokens, salt=salt, limit=limit)
            raise
        if parked:
            self._unpark(seq_id, parked)
        return start

    def _parked_position(self, seq_id: Hashable, token_ids: Sequence[int], salt: Hashable, limit: int | None) -> int:
        """How many tokens of a parked sequence are computed, if all can be had; else 0, and it is parked no more."""
        position = 0 if self.checkpoints is None else self.checkpoints.parked_position(seq_id)
        most = len(token_ids) - 1 if limit is None else min(limit, len(token_ids) - 1)
        num_whole = position // self.block_size * self.block_size
        found = (each.num_cached_tokens(token_ids, salt=salt, limit=num_whole) for each in self.managers)
        if position <= most and all(count == num_whole for count in found):
            return position
        self.forget(seq_id)
        return 0

    def _unpark(self, seq_id: Hashable, position: int) -> None:
        """Have a parked sequence, which has blocks again, go on after `position` tokens."""
        assert self.checkpoints is not None and self.checkpoints.stored is not None
        self.mark_computed(seq_id, position)
        self.checkpoints.stored.unpark(seq_id, self._tails(seq_id))

    def _tails(self, seq_id: Hashable) -> list[tuple[int, int]]:
        """The blocks of a sequence that what is computed of it does not fill."""
        index, rest = divmod(self._full_context.num_computed(seq_id), self.block_size)
        return [(group, each.block_table(seq_id, index)[0]) for group, each in enumerate(self.managers)] if rest else []

    def reserve(self, seq_id: Hashable, num_tokens: int) -> None:
        """Give the first `num_tokens` tokens of a sequence slots in every group, which may be written.

        Raises OutOfBlocks; the groups that had blocks keep what they took, and the next call goes on from there.
        """
        for group, manager in enumerate(self.managers):
            copies = manager.reserve(seq_id, num_tokens)
            self.transfers += [BlockCopy(group, src, dst) for src, dst in copies]
            self.num_cow_copies += len(copies)

    def append_blocks(self, seq_ids: Sequence[Hashable], num_computed: Sequence[int]) -> list[list[int]]:
        """Give each sequence one more block, once what is computed of it is published.

        Returns the block ids of each group. Raises OutOfBlocks with no block given.
        """
        for manager in self.managers:
            for seq_id, count in zip(seq_ids, num_computed, strict=True):
                manager.sync(seq_id, count)
            if len(seq_ids) > manager.num_free_blocks:
                raise OutOfBlocks(f"{len(seq_ids)} blocks needed, {manager.num_free_blocks} are free")
        return [manager.append_blocks(seq_ids) for manager in self.managers]

    def sync(self, seq_id: Hashable, num_tokens: int) -> None:
        for manager in self.managers:
            manager.sync(seq_id, num_tokens)

    def publish(self, seq_id: Hashable, num_tokens: int) -> Published:
        return [(each, each.publish(seq_id, num_tokens)) for each in self._all]

    def unpublish(self, published: Published) -> None:
        """Do as `BlockManager.unpublish`, of what `publish` returned."""
        for each, nodes in published:
            each.unpublish(nodes)

    def mark_computed(self, seq_id: Hashable, num_tokens: int) -> None:
        for manager in self.managers:
            manager.mark_computed(seq_id, num_tokens)

    def fork(self, seq_id: Hashable, new_seq_id: Hashable, token_ids: list[int] | None = None) -> None:
        for each in self._all:
            each.fork(seq_id, new_seq_id, token_ids)

    def free(self, seq_id: Hashable, *, will_return: bool = False, parks: bool = False) -> None:
        """Do as `BlockManager.free`. parks: it will go on from where it is, with the states of its recurrent layers."""
        if parks and self.checkpoints is not None:
            self.checkpoints.park(seq_id, self._tails(seq_id))
        for each in reversed(self._all):  # checkpoints while there are blocks
            each.free(seq_id, will_return=will_return)

    def forget(self, seq_id: Hashable) -> None:
        """Give up what was parked of a sequence, which has started without it or has ended."""
        if self.checkpoints is not None and self.checkpoints.stored is not None:
            self.checkpoints.stored.forget(seq_id)

    def cached_prefixes(self, seq_id: Hashable) -> list[Save]:
        """Return the blocks and states of a sequence that a request of another run could use, by their keys."""
        return [
            *(
                BlockSave(group, block_id, store.key(digest))
                for group, (manager, store) in enumerate(zip(self.managers, self._stores, strict=True))
                for block_id, digest in manager.cached_prefixes(seq_id)
            ),
            *(() if self.checkpoints is None else self.checkpoints.saves_of(seq_id)),
        ]

    def load_done(self, load: Load, *, is_whole: bool) -> None:
        """Note that a load has been run. If it came to nothing, what counted on it is hit no more."""
        if isinstance(load, BlockLoad):
            if not is_whole:
                self.managers[load.group].unpublish([load.node])
        elif self.checkpoints is not None:
            self.checkpoints.load_done(load.owner, is_whole=is_whole)

    def transfers_done(self) -> None:
        """Note that all transfers have been run."""
        for store in self._stores:
            store.transfers_done()

    def clear(self) -> None:
        """Do as `BlockManager.clear`; what was to be moved is not moved any more."""
        for each in self._all:
            each.clear()
        self.transfers.clear()
        self.transfers_done()

    def compaction_helps(self, num_tokens: int) -> bool:
        return self._full_context.compaction_helps(num_tokens)

    def compact(self) -> int:
        """Do as `BlockManager.compact`. Returns how many blocks move."""
        moves = [BlockCopy(g, *pair) for g, manager in enumerate(self.managers) for pair in manager.compact()]
        self.transfers += moves
        return len(moves)

    def check(self) -> None:
        """Do as `BlockManager.check`; a windowed group has the sequences of the first."""
        for manager in self.managers:
            manager.check()
            assert manager.seq_ids == self._full_context.seq_ids, "the groups have different sequences"
