"""Carries out what the block managers have decided: copies within the pool, moves to and from the second tier."""

import itertools
from collections.abc import Callable, Hashable

from mlx_paged.block_store import Stores
from mlx_paged.cache_groups import BlockCopy, BlockLoad, BlockSave, CacheGroups, Transfer
from mlx_paged.kv_cache import independent_pieces
from mlx_paged.model_runner import ModelRunner


class BlockMover:
    """Runs the transfers of cache groups over the arrays of a model runner and the stores of the second tier."""

    def __init__(self, groups: CacheGroups, runner: ModelRunner, stores: Stores | None) -> None:
        self._groups = groups
        self._runner = runner
        self._stores = stores

    @property
    def num_swapped_blocks(self) -> int:
        """Blocks that have left the pool for the second tier."""
        return self._stores.num_swapped_blocks if self._stores is not None else 0

    def run(self) -> bool:
        """Run what is due, in the order in which it was decided; what is interrupted is run again by the next call.

        False if a block could not be had back from the second tier: who counted on it has to start again.
        """
        transfers = self._groups.transfers
        complete = True
        while transfers:
            first = transfers[0]
            count = 1
            if isinstance(first, BlockCopy):
                alike = itertools.takewhile(_of_group(first.group), transfers)
                pairs = [(copy.src, copy.dst) for copy in alike if isinstance(copy, BlockCopy)]
                piece = next(independent_pieces(pairs))
                self._runner.move_blocks(first.group, piece)
                count = len(piece)
            elif self._stores is not None and isinstance(first, BlockSave):
                self._stores.put_evicted(first.key, self._runner.read_block(first.group, first.block_id))
            elif self._stores is not None and isinstance(first, BlockLoad):
                content = self._stores.get(first.key)
                if content is not None:
                    self._runner.write_block(first.group, first.block_id, content)
                else:
                    self._groups.managers[first.group].withdraw([first.node])
                    complete = False
            del transfers[:count]
        self._groups.settle()
        return complete

    def keep_prompt(self, seq_id: Hashable) -> None:
        """Store the blocks of a prompt that has just been computed for a later run, if there is a place for them."""
        if self._stores is None or not self._stores.takes_prompts:
            return
        for group, block_id, key in self._groups.cached_prefixes(seq_id):
            if not self._stores.has_prompt(key):
                self._stores.put_prompt(key, self._runner.read_block(group, block_id))


def _of_group(group: int) -> Callable[[Transfer], bool]:
    """Whether a transfer is a copy within this group."""
    return lambda transfer: isinstance(transfer, BlockCopy) and transfer.group == group
