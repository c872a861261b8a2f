"""Runs a patched model over the paged KV cache, and finds out how many blocks of cache there is room for."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_paged.attention import AttentionMetadata
from mlx_paged.batch import StepInputs
from mlx_paged.config import EngineConfig, format_memory, parse_memory
from mlx_paged.kv_cache import PagedKVCache
from mlx_paged.models.patch import PatchedModel

_GPU_SHARE = 0.75  # of what the device recommends, for weights, activations and cache together
_CPU_SHARE = 0.10  # of RAM, for the cache
_CPU_PROBE_TOKENS = 8


class MemoryPlan(NamedTuple):
    """How the device's memory is divided, in bytes; `limit` is what it recommends as the most to use."""

    num_blocks: int
    block_bytes: int
    block_size: int
    weights: int
    reserve: int
    limit: int
    device: str

    def __str__(self) -> str:
        pool = f"{self.num_blocks} blocks of {self.block_size} tokens, {format_memory(self.num_blocks * self.block_bytes)}"
        return (
            f"KV cache: {pool} ({format_memory(self.block_bytes / self.block_size)} per token); weights "
            f"{format_memory(self.weights)}, reserve {format_memory(self.reserve)}; {self.device} {format_memory(self.limit)}"
        )


class ModelRunner:
    """A model and its paged KV cache: runs steps and moves blocks."""

    def __init__(self, model: PatchedModel, config: EngineConfig, max_model_len: int | None) -> None:
        self._model = model
        self.plan = _plan_memory(model, config, max_model_len)
        self._kv_cache = PagedKVCache(
            [layer for layer in model.layers if layer is not None],
            self.plan.num_blocks,
            config.block_size,
            parse_memory(config.max_staging),
        )

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def kv_bytes(self) -> int:
        return self._kv_cache.nbytes

    def run(self, inputs: StepInputs) -> mx.array:
        """The logits of the step's rows, [num_rows, vocab_size], not evaluated yet; K and V are written with them."""
        return self._model(self._kv_cache, inputs)

    def wait(self, logits: mx.array) -> None:
        """Have a step computed whose logits nobody needs."""
        mx.eval(logits)

    def move_blocks(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, one after another, in every layer."""
        self._kv_cache.move_blocks(moves)


def _plan_memory(model: PatchedModel, config: EngineConfig, max_model_len: int | None) -> MemoryPlan:
    """Size the pool from the configuration and the device. Raises ValueError, with the arithmetic, if it can't fit."""
    mx.eval(model.model.parameters())
    weights = _parameter_bytes(model)
    block_bytes = config.block_size * sum(layer.bytes_per_token for layer in model.layers if layer is not None)
    limit, device = _device_limit()
    on_cpu = mx.default_device() == mx.cpu
    reserve = _measure_reserve(model, config, max_model_len, on_cpu)
    room = limit - weights - reserve
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory is not None:
        num_blocks = parse_memory(config.kv_cache_memory, limit) // block_bytes
    else:
        share = int(_CPU_SHARE * limit) if on_cpu else int(_GPU_SHARE * limit) - weights - reserve
        num_blocks = min(share, room) // block_bytes
        if max_model_len is not None:
            num_blocks = min(num_blocks, config.max_num_seqs * -(-max_model_len // config.block_size))
    if num_blocks < 1 and room >= block_bytes:
        raise ValueError(
            f"kv_cache_memory={config.kv_cache_memory!r} holds no block: one takes {format_memory(block_bytes)}"
        )
    if num_blocks < 1 or num_blocks * block_bytes > room:
        num_blocks = max(num_blocks, 1)
        raise ValueError(
            f"a KV cache of {num_blocks} blocks of {format_memory(block_bytes)} = "
            f"{format_memory(num_blocks * block_bytes)} does not fit: {device} {format_memory(limit)} - weights "
            f"{format_memory(weights)} - reserve {format_memory(reserve)} leaves {format_memory(max(room, 0))}; lower "
            "num_kv_blocks or kv_cache_memory, or max_num_batched_tokens, which sets the reserve"
        )
    return MemoryPlan(num_blocks, block_bytes, config.block_size, weights, reserve, limit, device)


def _parameter_bytes(model: PatchedModel) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.model.parameters())).values())


def _device_limit() -> tuple[int, str]:
    """The most memory to use, in bytes, and what that number is."""
    info = mx.device_info()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"]), "recommended GPU memory"
    if "free_memory" in info:
        return int(info["free_memory"]) + mx.get_active_memory(), "free GPU memory"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "RAM"


def _measure_reserve(model: PatchedModel, config: EngineConfig, max_model_len: int | None, on_cpu: bool) -> int:
    """Bytes that one step takes beside weights and cache: one prefill at the largest chunk, measured.

    On a CPU, where that would take minutes for a large model, a few tokens are measured and scaled.
    """
    chunk = min(config.max_num_batched_tokens, max_model_len or config.max_num_batched_tokens)
    num_tokens = min(chunk, _CPU_PROBE_TOKENS) if on_cpu else chunk
    num_rows = 1 if on_cpu else min(num_tokens, config.max_num_seqs)
    positions = np.arange(num_tokens, dtype=np.int32)
    num_blocks = -(-num_tokens // config.block_size)
    metadata = AttentionMetadata(
        np.arange(num_blocks, dtype=np.int32)[None],
        np.array([num_tokens], np.int32),
        np.array([0, num_tokens], np.int32),
    )
    inputs = StepInputs(
        mx.zeros(num_tokens, mx.int32),
        mx.array(positions),
        mx.array(positions // config.block_size),
        mx.array(positions % config.block_size),
        mx.arange(num_tokens - num_rows, num_tokens, dtype=mx.int32),
        metadata,
    )
    layers = [layer for layer in model.layers if layer is not None]
    kv_cache = PagedKVCache(layers, num_blocks, config.block_size, 1)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.logsumexp(model(kv_cache, inputs).astype(mx.float32), axis=-1))
    measured = max(0, mx.get_peak_memory() - before)
    if not on_cpu:
        return measured
    sampling = 4 * 4 * config.max_num_seqs * model.vocab_size  # float32 logits and what the sampler makes of them
    return measured * chunk // num_tokens + sampling
