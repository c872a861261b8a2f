"""Carries out what the block managers have decided: copies within the pool, moves to and from the block stores."""

import itertools
import statistics
import time
from collections.abc import Callable, Hashable

from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.transfers import BlockCopy, BlockLoad, BlockSave, Load, Save, StateLoad, StateSave, Transfer
from mlx_paged.cache.block_store import BlockStores
from mlx_paged.cache.kv_cache import BlockContent, PagedKVCache, independent_runs
from mlx_paged.cache.states import States, content_of

_NUM_TIMES = 15


class BlockMover:
    """Runs the transfers of cache groups over a KV cache, states and block stores."""

    def __init__(
        self, groups: CacheGroups, kv_cache: PagedKVCache, stores: BlockStores | None, states: States | None = None
    ) -> None:
        self._groups = groups
        self._kv_cache = kv_cache
        self._stores = stores
        self._states = states
        self.last_run_s = 0.0
        """Seconds that the latest `run` took."""
        self._save_times: list[float] = []  # the latest, in seconds per block
        self._load_times: list[float] = []

    @property
    def num_swapped_blocks(self) -> int:
        """Blocks that have left the pool for a block store."""
        return self._stores.num_swapped_blocks if self._stores is not None else 0

    @property
    def num_swapped_states(self) -> int:
        """States that have left the device for a block store."""
        return self._stores.num_swapped_states if self._stores is not None else 0

    @property
    def round_trip_s(self) -> float | None:
        """Seconds that it lately took to move a block to a store and back; None before the first one."""
        if not self._save_times:
            return None
        save = statistics.median(self._save_times)
        return save + (statistics.median(self._load_times) if self._load_times else save)

    def run(self) -> bool:
        """Run the pending transfers in order.

        Returns False if a stored block could not be read back; the sequences that hit it must be scheduled again.
        """
        transfers, run_started = self._groups.transfers, time.perf_counter()
        all_read_back = True
        while transfers:
            first, started = transfers[0], time.perf_counter()
            count = 1
            if isinstance(first, BlockCopy):
                alike = itertools.takewhile(_of_group(first.group), transfers)
                pairs = [(copy.src, copy.dst) for copy in alike if isinstance(copy, BlockCopy)]
                run = next(independent_runs(pairs))
                self._kv_cache.move_blocks(run, first.group)
                count = len(run)
            elif isinstance(first, BlockLoad | StateLoad):
                if is_whole := self._load(first):
                    self._time(self._load_times, first, started)
                self._groups.load_done(first, is_whole=is_whole)
                all_read_back &= is_whole
            elif self._stores is not None and self._stores.swaps:
                self._stores.put_evicted(first.key, self._read(first), is_state=isinstance(first, StateSave))
                self._time(self._save_times, first, started)
            del transfers[:count]
        self._groups.transfers_done()
        self.last_run_s = time.perf_counter() - run_started
        return all_read_back

    def _load(self, load: Load) -> bool:
        """Read a block or a state back. Returns False if that is not possible any more."""
        content = self._stores.get(load.key) if self._stores is not None else None
        if self._stores is None or content is None:
            return False
        try:
            if isinstance(load, BlockLoad):
                self._kv_cache.write_block(load.block_id, content, load.group)
            else:
                self._write_state(load, content)
        except ValueError as error:
            self._stores.drop(load.key, error)
            return False
        return True

    def _read(self, save: Save) -> BlockContent:
        """What is to be kept."""
        if isinstance(save, BlockSave):
            return self._kv_cache.read_block(save.block_id, save.group)
        return self._read_state(save)

    def _read_state(self, save: StateSave) -> BlockContent:
        tails = [(group, self._kv_cache.read_block(block_id, group)) for group, block_id in save.tails]
        blocks = {f"{group}.{name}": array for group, content in tails for name, array in content.items()}
        return blocks | content_of(save.state)

    def _write_state(self, load: StateLoad, content: BlockContent) -> None:
        """Raises ValueError if it is of another layout."""
        assert self._states is not None
        for group, block_id in load.tails:
            names = [name for name in content if name.startswith(f"{group}.")]
            block = {name.split(".", 1)[1]: content.pop(name) for name in names}
            self._kv_cache.write_block(block_id, block, group)
        self._states.restore(load.owner, content)

    def _time(self, times: list[float], transfer: Transfer, started: float) -> None:
        """Note how long the move of a block took, with the latest others."""
        if isinstance(transfer, BlockLoad | BlockSave):
            times[:] = [*times[1 - _NUM_TIMES :], time.perf_counter() - started]

    def store_prompt(self, seq_id: Hashable) -> None:
        """Store the blocks of a prompt that has just been computed for a later run, if there is a store for them."""
        if self._stores is None or not self._stores.stores_prompts:
            return
        for save in self._groups.cached_prefixes(seq_id):
            if not self._stores.has_prompt(save.key):
                self._stores.put_prompt(save.key, self._read(save))


def _of_group(group: int) -> Callable[[Transfer], bool]:
    """Whether a transfer is a copy within this group."""
    return lambda transfer: isinstance(transfer, BlockCopy) and transfer.group == group
