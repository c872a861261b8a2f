"""What can only be found out by running a model before its cache is made: memory beside the cache, safe overlap."""

import time
import warnings
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.cache.states import Stretch
from mlx_paged.config import EngineConfig
from mlx_paged.errors import EngineWarning
from mlx_paged.models.patch import PatchedModel
from mlx_paged.scheduler.block_tables import MIN_COLUMNS

_CPU_TOKENS = 8
_TELLING_BYTES = 1 << 20  # of a pool: what a step takes varies by as much as a smaller one
_POOL_BYTES = 16 << 20  # of one layer's K and V, large beside what a step of a few tokens takes
_NUM_OVERLAPPED = 3
_NUM_MEASURED = 3  # the first of them compiles
_MEASURE_S = 2.0


def measure_step_bytes(model: PatchedModel, config: EngineConfig, max_model_len: int | None, on_cpu: bool) -> int:
    """Bytes that one step takes beside weights and cache: one prefill at the largest chunk, measured.

    On a CPU, where that would take minutes for a large model, a few tokens are measured and scaled.
    """
    mx.eval(model.model.parameters())
    chunk = min(config.max_num_batched_tokens, max_model_len or config.max_num_batched_tokens)
    num_tokens = min(chunk, _CPU_TOKENS) if on_cpu else chunk
    num_rows = 1 if on_cpu else min(num_tokens, config.max_num_seqs)
    kv_cache, inputs = _one_sequence(model, config, num_tokens, num_rows)
    measured = _peak_bytes(lambda: mx.eval(mx.logsumexp(model(kv_cache, inputs).astype(mx.float32), axis=-1)))
    scores = 4 * config.max_num_seqs * model.vocab_size  # one float per token for each sequence
    if not on_cpu:
        return measured + scores  # the counts that penalties need
    return measured * chunk // num_tokens + 5 * scores  # with the logits, and what the sampler makes of them


def overlap_is_safe(
    model: PatchedModel, config: EngineConfig, all_agree: Callable[[bool], bool] = bool, max_blocks: int = _POOL_BYTES
) -> bool:
    """Whether a step may be submitted while the one before it runs, without a write that copies a pool.

    A write is in place only if nothing holds the pool, and a step that has not finished reading does. Whether that
    happens depends on how far the host may run ahead of this device in this model: a few steps that are submitted
    while the device is busy tell, by their peak memory. The pools for that have at most `max_blocks` blocks. Where
    even a step that nothing runs beside copies them, which an EngineWarning tells, no more is tried. all_agree: whether
    something is true for all processes that a model is divided among, which have to run the same steps.
    """
    if config.pipelining != "auto":
        return config.pipelining == "submit"
    layers = [layer for layer, _ in model.stored_layers]
    smallest = min((layer.bytes_per_token for layer in layers), default=0)
    if not smallest:
        return True
    num_blocks = min(max_blocks, max(1, _POOL_BYTES // (smallest * config.block_size)))
    without_pools = _bytes_alone(model, *_one_sequence(model, config, 1, 1))
    kv_cache, inputs = _one_sequence(model, config, 1, 1, num_blocks)
    pool_bytes = min(max(array.nbytes for array in pool.arrays.values()) for pool in kv_cache.pools)
    alone = _bytes_alone(model, kv_cache, inputs)
    if not all_agree(pool_bytes < _TELLING_BYTES or alone - without_pools <= pool_bytes // 2):
        copies = "each step copies whole pools of KV blocks to write into them, so steps are slow and do not overlap"
        warnings.warn(copies, EngineWarning, stacklevel=4)
        return False
    busy = _peak_bytes(_keep_busy)
    steps = [model(kv_cache, inputs) for _ in range(_NUM_OVERLAPPED)]

    def run_overlapped() -> None:
        _keep_busy()
        for logits in steps:
            mx.async_eval(logits)
        mx.eval(steps)

    return all_agree(_peak_bytes(run_overlapped) < busy + _NUM_OVERLAPPED * alone + pool_bytes // 2)


def step_seconds(
    model: PatchedModel, config: EngineConfig, sizes: Sequence[int], begin: Callable[[int], None]
) -> dict[int, float]:
    """Measure, as the best of a few times, steps of so many tokens of one sequence, as long as there is time for it.

    begin: called before the steps of each size.
    """
    found, started = dict[int, float](), time.perf_counter()
    for size in sizes:
        if size > config.max_num_batched_tokens or (found and time.perf_counter() - started > _MEASURE_S):
            break
        begin(size)
        kv_cache, inputs = _one_sequence(model, config, size, size)
        times = []
        for _ in range(_NUM_MEASURED):
            before = time.perf_counter()
            mx.eval(mx.argmax(model(kv_cache, inputs), axis=-1))
            times.append(time.perf_counter() - before)
        found[size] = min(times)
    return found


def _bytes_alone(model: PatchedModel, kv_cache: PagedKVCache, inputs: ModelInputs) -> int:
    """Bytes that a step takes which nothing else runs beside."""
    mx.eval(model(kv_cache, inputs))
    return _peak_bytes(lambda: mx.eval(model(kv_cache, inputs)))


def _keep_busy() -> None:
    """Give the device some tens of milliseconds of work, so that what is submitted next has to queue."""
    if mx.default_device() == mx.cpu:
        mx.async_eval(mx.sort(mx.arange(1 << 19, dtype=mx.int32) * 1103515245))
    else:
        product = mx.ones((4096, 4096), mx.float16)
        for _ in range(4):
            product = product @ product
        mx.async_eval(product)


def _one_sequence(
    model: PatchedModel, config: EngineConfig, num_tokens: int, num_rows: int, pool_blocks: int = 1
) -> tuple[PagedKVCache, ModelInputs]:
    """A step of `num_tokens` tokens of one prompt with logits for its last `num_rows`, and a cache with room for it.

    pool_blocks: that the cache has at least.
    """
    positions = np.arange(num_tokens, dtype=np.int32)
    num_blocks = -(-num_tokens // config.block_size)
    layers = [layer for layer, _ in model.stored_layers]
    kv_cache = PagedKVCache(layers, [max(num_blocks, pool_blocks)] * len(layers), config.block_size, 1)
    metadata = AttentionMetadata(
        mx.arange(max(MIN_COLUMNS, num_blocks), dtype=mx.int32)[None],
        np.array([num_tokens], np.int32),
        np.array([0, num_tokens], np.int32),
        slot_block_ids=mx.array(positions // config.block_size),
        slot_offsets=mx.array(positions % config.block_size),
    )
    token_ids, logits_indices = mx.zeros(num_tokens, mx.int32), mx.array(positions[num_tokens - num_rows :])
    stretches = [Stretch(slice(0, num_tokens), [0], is_first=True)]
    return kv_cache, ModelInputs(
        token_ids, mx.array(positions), logits_indices, [metadata] * len(model.groups), stretches
    )


def _peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes that are in use at once while something runs, beside those that were before."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    run()
    mx.synchronize()
    return max(0, mx.get_peak_memory() - before)
