"""What an engine looks like from outside: its counters, its pools in cells, its requests, how a prompt meets its cache.

It only reads, between two steps. What it costs grows with the pool, slowly: blocks are counted by arrays, and of
requests and prefixes no more are described than a page can show.
"""

import time
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Any

import numpy as np

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.prefix_bars import nearest_prefix, prefix_bars
from mlx_paged.engine.output_processor import OutputProcessor
from mlx_paged.outputs import EngineStats, PoolSnapshot, PrefixMatch, RequestSnapshot, Snapshot
from mlx_paged.request import Request
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.scheduler.scheduler import Scheduler

MAX_CELLS = 4096
_MAX_REQUESTS = 200
_MAX_BARS = 200
_FIRST_TOKENS = 200
_NUM_AROUND = 16  # tokens before the first that differs


class EngineView:
    """Looks at the parts of an engine."""

    def __init__(
        self, groups: CacheGroups, scheduler: Scheduler, outputs: OutputProcessor, runner: ModelRunner
    ) -> None:
        self._groups = groups
        self._scheduler = scheduler
        self._outputs = outputs
        self._runner = runner

    def stats(self, **of_engine: Any) -> EngineStats:
        """Count. of_engine: the counters that the engine itself keeps."""
        scheduler, manager, runner = self._scheduler, self._groups.managers[0], self._runner
        checkpoints = self._groups.checkpoints
        return EngineStats(
            num_blocks=manager.num_blocks,
            num_free_blocks=manager.num_free_blocks,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            block_size=manager.block_size,
            max_step_ms=1000 * scheduler.step_budget.max_step_s,
            kv_bytes=runner.kv_cache.nbytes,
            num_state_slots=runner.plan.num_state_slots,
            state_bytes=0 if runner.states is None else runner.states.nbytes,
            num_checkpoints=0 if checkpoints is None else len(checkpoints),
            kv_tokens=manager.num_kv_tokens(),
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_cow_copies=self._groups.num_cow_copies,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_output_tokens=self._outputs.num_tokens,
            **of_engine,
        )

    def snapshot(self, count: Callable[[], EngineStats]) -> Snapshot:
        """Describe the engine as it is now. count: makes its counters."""
        started = time.perf_counter()
        stats = count()
        requests = self._outputs.requests
        owners = {sequence.seq_id: r.request_id for r in requests.values() for sequence in r.sequences}
        owners |= {-1 - request_id: request_id for request_id in requests}  # of prompts that are kept
        manager = self._groups.managers[0]
        _, allocator, tree = manager.parts
        bars, num_more_bars = prefix_bars(tree, allocator.ref_counts, manager.block_size, _MAX_BARS)
        now = time.monotonic()
        return Snapshot(
            stats=stats,
            pools=[_pool(each, owners) for each in self._groups.managers],
            requests=[self._request(request, now) for request in islice(requests.values(), _MAX_REQUESTS)],
            num_more_requests=max(0, len(requests) - _MAX_REQUESTS),
            prefixes=bars,
            num_more_prefixes=num_more_bars,
            took_s=time.perf_counter() - started,
        )

    def _request(self, request: Request, now: float) -> RequestSnapshot:
        sequences, _, _ = self._groups.managers[0].parts
        lives = [sequence for sequence in request.sequences if not sequence.finished]
        held = [sequences[s.seq_id] for s in lives if s.seq_id in sequences]
        return RequestSnapshot(
            id=request.request_id,
            client_id=request.client_id,
            state="running" if any(sequence.row >= 0 for sequence in lives) else "waiting",
            kind="sample" if request.search is None else "beam",
            num_sequences=len(request.sequences),
            num_prompt_tokens=len(request.prompt_token_ids),
            num_computed_tokens=max((blocks.num_computed for blocks in held), default=0),
            num_cached_tokens=request.num_cached_tokens,
            num_output_tokens=sum(sequence.num_output_tokens for sequence in request.sequences),
            num_blocks=len(held[0].held_blocks) if len(held) == 1 else len(set().union(*(b.held_blocks for b in held))),
            age_s=now - request.metrics.arrival_time,
            first_tokens=request.prompt_token_ids[:_FIRST_TOKENS],
        )

    def match(self, token_ids: list[int], salt: Hashable, limit: int | None = None) -> PrefixMatch:
        """Compare a prompt with what is cached. limit: the most of its tokens that may be found."""
        manager = self._groups.managers[0]
        _, _, tree = manager.parts
        in_blocks, num_alike, goes_on = nearest_prefix(tree, salt, token_ids, manager.block_size)
        num_cached = self._groups.num_cached_tokens(token_ids, salt=salt, limit=limit)
        if num_cached > num_alike:  # saved, and in no block any more: what went on there is not known
            num_alike, goes_on = num_cached, ()
        differs = bool(goes_on) and 0 < num_alike < len(token_ids)
        start = max(0, num_alike - _NUM_AROUND)
        before = token_ids[start:num_alike]
        match = PrefixMatch(
            num_tokens=len(token_ids),
            num_cached_tokens=num_cached,
            num_matching_tokens=num_alike,
            tokens=token_ids[start : num_alike + _NUM_AROUND] if differs else [],
            cached_tokens=[*before, *goes_on] if differs else [],
            num_tokens_before=len(before),
            reason="",
        )
        match.reason = self._reason(match, token_ids, salt, limit, in_blocks)
        return match

    def _reason(
        self, match: PrefixMatch, token_ids: list[int], salt: Hashable, limit: int | None, in_blocks: int
    ) -> str:
        manager = self._groups.managers[0]
        size, found, num_alike = manager.block_size, match.num_cached_tokens, match.num_matching_tokens
        if not manager.prefix_caching:
            return "prefix caching is off"
        if limit is not None and limit < size:
            return "log-probabilities of the prompt are asked for, so all of it is computed"
        whole = manager.num_cached_tokens(token_ids, salt=salt, limit=limit)
        if found < whole:
            windows = " and ".join(str(each.window) for each in self._groups.managers[1:])
            others = [f"those with a window of {windows}"] if windows else []
            others += [] if self._groups.checkpoints is None else ["recurrent ones"]
            return (
                f"{whole} tokens are cached for the layers that see the whole context, but {' and '.join(others)} "
                f"can start from token {found} at most"
            )
        saved = (
            f"; tokens {in_blocks} to {found - 1} are read back from where they were saved" if found > in_blocks else ""
        )
        if match.tokens:
            where = f"it differs from the nearest cached prefix at token {num_alike}"
            return f"{where}, and only whole blocks of {size} tokens are shared{saved}"
        num_full = (match.num_tokens - 1) // size * size
        if not num_full:
            return f"it has no whole block of {size} tokens before its last token"
        if found >= num_full:
            return f"all is found that can be: whole blocks of {size} tokens, without the last token{saved}"
        if num_alike > found:
            return f"the blocks from token {found} on have been overwritten since"
        if not found:
            return "nothing that is cached begins like it"
        return f"the cached prefix ends at token {found}: a block that was only partly filled is not shared{saved}"


def _pool(manager: BlockManager, owners: dict[Any, int]) -> PoolSnapshot:
    """Sum up the blocks of a pool, cell by cell. owners: the requests of sequences."""
    sequences, _, tree = manager.parts
    num_blocks = manager.num_blocks
    per_cell = -(-num_blocks // MAX_CELLS)
    shape = (-(-num_blocks // per_cell), per_cell)
    refs, holder, position = np.zeros(shape, np.int32), np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    is_cached = np.zeros(shape, bool)
    is_cached.reshape(-1)[np.fromiter(tree.block_ids, np.int64, len(tree.block_ids))] = True
    request_ids = [-1, *sorted({owners[seq_id] for seq_id in sequences})]
    number_of = {request_id: number for number, request_id in enumerate(request_ids)}
    # A shared block is that of the oldest request, which writes last.
    for seq_id, blocks in sorted(sequences.items(), key=lambda item: -owners[item[0]]):
        held = np.array(blocks.held_blocks, np.int64)
        refs.reshape(-1)[held] += 1
        holder.reshape(-1)[held] = number_of[owners[seq_id]]
        position.reshape(-1)[held] = np.arange(blocks.num_released, len(blocks.table))
    most = _most_frequent(holder, len(request_ids))
    first = (holder == most[:, None]).argmax(axis=1)
    columns = (
        np.count_nonzero(refs, axis=1),
        np.count_nonzero(is_cached & (refs == 0), axis=1),
        np.array(request_ids)[most],
        refs.max(axis=1),
        np.take_along_axis(position, first[:, None], axis=1)[:, 0],
    )
    return PoolSnapshot(
        window=manager.window,
        num_blocks=num_blocks,
        block_size=manager.block_size,
        blocks_per_cell=per_cell,
        cells=np.stack(columns, axis=1).tolist(),
    )


def _most_frequent(numbers: np.ndarray, num_numbers: int) -> np.ndarray:
    """Return the number, below `num_numbers`, that most of each row are; 0 where there is no other."""
    if numbers.shape[1] == 1:
        return numbers[:, 0]
    keys = numbers + np.arange(len(numbers))[:, None] * num_numbers
    counts = np.bincount(keys.ravel(), minlength=len(numbers) * num_numbers).reshape(len(numbers), num_numbers)
    counts[:, 0] = 0
    return counts.argmax(axis=1)
