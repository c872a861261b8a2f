"""How many blocks of KV cache there is room for, and what the rest of the device's memory is for."""

import os
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_paged.blocks.cache_groups import blocks_for_window
from mlx_paged.config import EngineConfig, format_memory, parse_memory
from mlx_paged.models.loading import weight_bytes
from mlx_paged.models.patch import PatchedModel
from mlx_paged.runner.warmup import measure_step_bytes

_GPU_SHARE = 0.75  # of what the device recommends, for weights, activations and cache together
_CPU_SHARE = 0.10  # of RAM, for the cache
_MOST_BLOCKS = 1 << 20  # of a group that stores nothing, for a model that does not say how long its context is


class MemoryPlan(NamedTuple):
    """How the device's memory is divided, in bytes; `limit` is what it recommends as the most to use.

    num_blocks, block_bytes: of each cache group, the one without a window first.
    """

    num_blocks: list[int]
    block_bytes: list[int]
    windows: list[int | None]
    block_size: int
    weights: int
    reserve: int
    limit: int
    device: str

    @property
    def kv_bytes(self) -> int:
        return sum(count * size for count, size in zip(self.num_blocks, self.block_bytes, strict=True))

    def __str__(self) -> str:
        groups = zip(self.num_blocks, self.block_bytes, self.windows, strict=True)
        pools = [
            f"{count} blocks" + (f" for windows of {window}" if window else "")
            for count, size, window in groups
            if size
        ]
        per_token = format_memory(sum(self.block_bytes) / self.block_size)
        return (
            f"KV cache: {' and '.join(pools)} of {self.block_size} tokens, {format_memory(self.kv_bytes)} ({per_token} "
            f"per token); weights {format_memory(self.weights)}, reserve {format_memory(self.reserve)}; {self.device} "
            f"{format_memory(self.limit)}"
        )


def plan_memory(model: PatchedModel, config: EngineConfig, max_model_len: int | None) -> MemoryPlan:
    """Size the pools from the configuration and the device. Raises ValueError, with the arithmetic, if they can't fit.

    The pool without a window is as large as asked for; one with a window gets what its sequences can hold, at most.
    """
    limit, device = device_limit()
    on_cpu = mx.default_device() == mx.cpu
    weights = weight_bytes(model.model)
    if weights >= limit:
        raise ValueError(
            f"the weights take {format_memory(weights)} and there is {format_memory(limit)} of {device}: take a "
            "smaller or a quantised model"
        )
    reserve = measure_step_bytes(model, config, max_model_len, on_cpu)
    room = limit - weights - reserve
    windows = model.groups
    block_bytes = [0] * len(windows)
    for layer, group in model.stored_layers:
        block_bytes[group] += config.block_size * layer.bytes_per_token
    most = [
        blocks_for_window(window, config.block_size, config.max_num_seqs, config.max_num_batched_tokens)
        for window in windows[1:]
        if window is not None
    ]

    def group_blocks(num_blocks: int) -> list[int]:
        return [num_blocks, *(min(num_blocks, cap) for cap in most)]

    def num_bytes(num_blocks: int) -> int:
        return sum(count * size for count, size in zip(group_blocks(num_blocks), block_bytes, strict=True))

    wanted = _MOST_BLOCKS
    if max_model_len is not None:
        wanted = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory is not None:
        budget = parse_memory(config.kv_cache_memory, limit)
        num_blocks = _most_that_fit(num_bytes, budget, budget // block_bytes[0] if block_bytes[0] else wanted)
        if num_blocks < 1:
            one = format_memory(num_bytes(1))
            raise ValueError(f"kv_cache_memory={config.kv_cache_memory!r} holds no block: one takes {one}")
    else:
        share = int(_CPU_SHARE * limit) if on_cpu else int(_GPU_SHARE * limit) - weights - reserve
        num_blocks = max(1, _most_that_fit(num_bytes, min(share, room), wanted))
    if num_bytes(num_blocks) > room:
        raise ValueError(
            f"a KV cache of {num_blocks} blocks of {config.block_size} tokens = {format_memory(num_bytes(num_blocks))} "
            f"does not fit: {device} {format_memory(limit)} - weights {format_memory(weights)} - reserve "
            f"{format_memory(reserve)} leaves {format_memory(max(room, 0))}; lower num_kv_blocks or kv_cache_memory, "
            "or max_num_batched_tokens, which sets the reserve"
        )
    return MemoryPlan(
        group_blocks(num_blocks), block_bytes, windows, config.block_size, weights, reserve, limit, device
    )


def _most_that_fit(num_bytes: Callable[[int], int], budget: int, most: int) -> int:
    """The largest count up to `most` whose bytes, which rise with it, are within the budget; 0 if none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if num_bytes(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def device_limit() -> tuple[int, str]:
    """The most memory to use, in bytes, and what that number is."""
    info = mx.device_info()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"]), "recommended GPU memory"
    if "free_memory" in info:
        own = mx.get_active_memory() + mx.get_cache_memory()  # what MLX keeps for later is free too
        return int(info["free_memory"]) + own, "free GPU memory"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "RAM"
