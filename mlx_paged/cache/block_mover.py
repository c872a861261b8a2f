"""Carries out what the block managers have decided: copies within the pool, moves to and from the second tier."""

import itertools
import statistics
import time
from collections.abc import Callable, Hashable

from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.transfers import BlockCopy, BlockLoad, BlockSave, Transfer
from mlx_paged.cache.block_store import Stores
from mlx_paged.cache.kv_cache import independent_pieces
from mlx_paged.runner.model_runner import ModelRunner

_NUM_TIMES = 15


class BlockMover:
    """Runs the transfers of cache groups over the arrays of a model runner and the stores of the second tier."""

    def __init__(self, groups: CacheGroups, runner: ModelRunner, stores: Stores | None) -> None:
        self._groups = groups
        self._runner = runner
        self._stores = stores
        self._save_times: list[float] = []  # the latest, in seconds per block
        self._load_times: list[float] = []

    @property
    def num_swapped_blocks(self) -> int:
        """Blocks that have left the pool for the second tier."""
        return self._stores.num_swapped_blocks if self._stores is not None else 0

    @property
    def round_trip_s(self) -> float | None:
        """What it lately took to move a block to the second tier and back; None before the first one."""
        if not self._save_times:
            return None
        save = statistics.median(self._save_times)
        return save + (statistics.median(self._load_times) if self._load_times else save)

    def run(self) -> bool:
        """Run what is due, in the order in which it was decided; what is interrupted is run again by the next call.

        False if a block could not be had back from the second tier: who counted on it has to start again.
        """
        transfers = self._groups.transfers
        complete = True
        while transfers:
            first, started = transfers[0], time.perf_counter()
            count = 1
            if isinstance(first, BlockCopy):
                alike = itertools.takewhile(_of_group(first.group), transfers)
                pairs = [(copy.src, copy.dst) for copy in alike if isinstance(copy, BlockCopy)]
                piece = next(independent_pieces(pairs))
                self._runner.move_blocks(first.group, piece)
                count = len(piece)
            elif self._stores is not None and isinstance(first, BlockSave):
                self._stores.put_evicted(first.key, self._runner.read_block(first.group, first.block_id))
                self._save_times = [*self._save_times[1 - _NUM_TIMES :], time.perf_counter() - started]
            elif isinstance(first, BlockLoad):
                if self._load(first):
                    self._load_times = [*self._load_times[1 - _NUM_TIMES :], time.perf_counter() - started]
                else:
                    self._groups.managers[first.group].unpublish([first.node])
                    complete = False
            del transfers[:count]
        self._groups.transfers_done()
        return complete

    def _load(self, load: BlockLoad) -> bool:
        """Whether a block could be had back from the second tier."""
        content = self._stores.get(load.key) if self._stores is not None else None
        if self._stores is None or content is None:
            return False
        try:
            self._runner.write_block(load.group, load.block_id, content)
        except ValueError as error:
            self._stores.drop(load.key, error)
            return False
        return True

    def store_prompt(self, seq_id: Hashable) -> None:
        """Store the blocks of a prompt that has just been computed for a later run, if there is a place for them."""
        if self._stores is None or not self._stores.takes_prompts:
            return
        for group, block_id, key in self._groups.cached_prefixes(seq_id):
            if not self._stores.has_prompt(key):
                self._stores.put_prompt(key, self._runner.read_block(group, block_id))


def _of_group(group: int) -> Callable[[Transfer], bool]:
    """Whether a transfer is a copy within this group."""
    return lambda transfer: isinstance(transfer, BlockCopy) and transfer.group == group
