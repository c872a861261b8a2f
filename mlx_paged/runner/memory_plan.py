"""How many blocks of KV cache there is room for, and what the rest of the device's memory is for."""

import dataclasses
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

import mlx.core as mx

from mlx_paged.attention.chunks import check_chunks
from mlx_paged.blocks.cache_groups import blocks_for_window
from mlx_paged.config import EngineConfig, format_memory, parse_memory, parse_swap_space
from mlx_paged.errors import EngineWarning
from mlx_paged.models.loading import weight_bytes
from mlx_paged.models.patch import PatchedModel
from mlx_paged.runner.warmup import measure_step_bytes
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

GPU_SHARE = 0.75  # of what the device recommends, for weights, activations and cache together
CPU_SHARE = 0.10  # of RAM, for the cache
_STATE_SHARE = 0.4  # of the cache's memory, for states at most
_STATES_PER_SEQUENCE = 2  # that runs: a step makes new ones of the old ones
_MIN_CHECKPOINTS = 32  # that are of use, however few sequences run at once
_NEED_STEP = 1024  # tokens, to multiples of which a need is rounded up
_MAX_BLOCKS = 1 << 16  # where they take no memory, or nobody says how long a context is
_MOST_EMPTY_BLOCKS = 1 << 22  # that take no memory: what is noted of each on the host takes some


class MemoryPlan(NamedTuple):
    """How the device's memory is divided, in bytes. Lists have an entry per cache group."""

    num_blocks: list[int]
    block_bytes: list[int]
    windows: list[int | None]
    block_size: int
    weight_bytes: int
    step_bytes: int
    """What one step takes beside weights and cache: the reserve."""
    device_bytes: int
    """What the device recommends as the most to use."""
    device: str
    """What that number is."""
    state_bytes: int = 0
    """Of the states of recurrent layers, of one sequence; 0: there are none."""
    num_state_slots: int = 0
    """How many such states there is room for: two of each running sequence, and checkpoints."""
    chunked: bool = False
    """Whether the windows are chunks: see `PatchedModel`."""
    kv_cache_dtype: str | None = None
    """As in `EngineConfig`."""
    draft_bytes: int = 0
    """Weights and blocks of a draft model, of which `weight_bytes` has the former, too."""
    by_rank: tuple[str, ...] = ()
    """What is said of each rank, if there are several."""

    def of_draft(self, config: EngineConfig) -> EngineConfig:
        """Return what a draft model is run with: as many blocks."""
        fitted = dataclasses.replace(config, num_kv_blocks=self.num_blocks[0], kv_cache_memory=None)
        return dataclasses.replace(fitted, kv_cache_dtype=None)  # its layers have it already

    @property
    def kv_bytes(self) -> int:
        return sum(count * size for count, size in zip(self.num_blocks, self.block_bytes, strict=True))

    def num_checkpoints(self, max_num_seqs: int) -> int:
        """Count the states that there is room for beside those of so many running sequences."""
        return self.num_state_slots - _STATES_PER_SEQUENCE * max_num_seqs

    def __str__(self) -> str:
        if self.by_rank:
            return "\n".join(self.by_rank)
        groups = zip(self.num_blocks, self.block_bytes, self.windows, strict=True)
        pools = [
            f"{count} blocks for {'chunks' if self.chunked else 'windows'} of {window}" if window else f"{count} blocks"
            for count, size, window in groups
            if size
        ]
        per_token = format_memory(sum(self.block_bytes) / self.block_size)
        kind = f" in {self.kv_cache_dtype}" if self.kv_cache_dtype else ""
        size = f"{format_memory(self.kv_bytes)} ({per_token} per token)"
        cache = f"{' and '.join(pools)} of {self.block_size} tokens{kind}, {size}"
        states = f"; {self.num_state_slots} states of {format_memory(self.state_bytes)}" if self.state_bytes else ""
        states += f"; draft model {format_memory(self.draft_bytes)}" if self.draft_bytes else ""
        return (
            f"KV cache: {cache if pools else 'none'}{states}; weights {format_memory(self.weight_bytes)}, "
            f"reserve {format_memory(self.step_bytes)}; {self.device} {format_memory(self.device_bytes)}"
        )


class _Pools:
    """The bytes of a model's pools, by how many blocks the one without a window has."""

    def __init__(self, model: PatchedModel, config: EngineConfig) -> None:
        self.block_bytes = [0] * len(model.groups)
        for layer, group in model.stored_layers:
            self.block_bytes[group] += config.block_size * layer.bytes_per_token
        sizes = config.block_size, config.max_num_seqs, config.max_num_batched_tokens
        self._window_caps = [blocks_for_window(window, *sizes) for window in model.groups if window is not None]

    def num_blocks(self, num_blocks: int) -> list[int]:
        """Of each group; one with a window gets what its sequences can hold, at most."""
        return [num_blocks, *(min(num_blocks, cap) for cap in self._window_caps)]

    def num_bytes(self, num_blocks: int) -> int:
        """Of all of them together."""
        return sum(count * size for count, size in zip(self.num_blocks(num_blocks), self.block_bytes, strict=True))


def plan_memory(
    model: PatchedModel,
    config: EngineConfig,
    max_model_len: int | None,
    num_needed: int | None = None,
    draft: PatchedModel | None = None,
) -> MemoryPlan:
    """Size the pools from the configuration and the device. Raises ValueError, with the arithmetic, if they can't fit.

    The pool without a window is as large as asked for. num_needed: blocks that it need not exceed if no size is asked
    for; None: not known. draft: a second model, whose pools have as many blocks out of the same memory.
    """
    device_bytes, device = device_limit()
    on_cpu = mx.default_device() == mx.cpu
    draft_weights = 0 if draft is None else weight_bytes(draft.model)
    weights = weight_bytes(model.model) + draft_weights
    if weights >= device_bytes:
        raise ValueError(
            f"the weights take {format_memory(weights)} and there is {format_memory(device_bytes)} of {device}: take a "
            "smaller or a quantised model"
        )
    step_bytes = measure_step_bytes(model, config, max_model_len, on_cpu)
    step_bytes += 0 if draft is None else measure_step_bytes(draft, config, max_model_len, on_cpu)
    bytes_available = device_bytes - weights - step_bytes
    windows = model.groups
    if model.chunked:
        check_chunks(windows, config.block_size)
    pools, draft_pools = _Pools(model, config), None if draft is None else _Pools(draft, config)

    def num_bytes(num_blocks: int) -> int:
        return sum(each.num_bytes(num_blocks) for each in (pools, draft_pools) if each is not None)

    def count_states(room: float) -> int:
        """How many states `room` bytes hold, as many as are of use. Raises ValueError if that is less than three."""
        if not model.state_bytes:
            return 0
        if room < (_STATES_PER_SEQUENCE + 1) * model.state_bytes:
            advice = "kv_cache_memory more" if config.num_kv_blocks is None else "num_kv_blocks less"
            raise ValueError(
                f"states of one sequence take {format_memory(model.state_bytes)}, and {format_memory(max(room, 0))} "
                f"are left for them, where three are needed: give {advice}"
            )
        num_checkpoints = max(config.max_num_seqs, _MIN_CHECKPOINTS) if config.prefix_caching else 1
        return int(min(_STATES_PER_SEQUENCE * config.max_num_seqs + num_checkpoints, room // model.state_bytes))

    most = _MAX_BLOCKS if max_model_len is None else config.max_num_seqs * -(-max_model_len // config.block_size)
    most = most if pools.block_bytes[0] else min(most, _MAX_BLOCKS)
    most = most if num_needed is None else min(most, num_needed)  # those of use
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
        if not pools.block_bytes[0] and num_blocks > _MOST_EMPTY_BLOCKS:
            raise ValueError(f"num_kv_blocks={num_blocks}: blocks that store nothing are at most {_MOST_EMPTY_BLOCKS}")
        num_states = count_states(bytes_available - num_bytes(num_blocks))
    else:
        share = int(CPU_SHARE * device_bytes) if on_cpu else int(GPU_SHARE * device_bytes) - weights - step_bytes
        budget, least = min(share, bytes_available), 1
        if config.kv_cache_memory is not None:
            budget, least = parse_memory(config.kv_cache_memory, device_bytes), 0
            most = budget // pools.block_bytes[0] if pools.block_bytes[0] else most
        num_states = count_states(_STATE_SHARE * budget)
        num_blocks = max(least, _most_that_fit(num_bytes, budget - num_states * model.state_bytes, most))
        if num_blocks < 1:
            one = format_memory(num_bytes(1))
            raise ValueError(f"kv_cache_memory={config.kv_cache_memory!r} holds no block: one takes {one}")
    bytes_available -= num_states * model.state_bytes
    if num_bytes(num_blocks) > bytes_available:
        sizes = [name for name in ("num_kv_blocks", "kv_cache_memory") if getattr(config, name) is not None]
        raise ValueError(
            f"a KV cache of {num_blocks} blocks of {config.block_size} tokens = {format_memory(num_bytes(num_blocks))} "
            f"does not fit: {device} {format_memory(device_bytes)} - weights {format_memory(weights)} - reserve "
            f"{format_memory(step_bytes)} leaves {format_memory(max(bytes_available, 0))}; lower "
            f"{', or '.join([*sizes, 'max_num_batched_tokens'])}, which sets the reserve"
        )
    return MemoryPlan(
        pools.num_blocks(num_blocks), pools.block_bytes, windows, config.block_size, weights, step_bytes, device_bytes,
        device, model.state_bytes, num_states, model.chunked, config.kv_cache_dtype,
        0 if draft_pools is None else draft_weights + draft_pools.num_bytes(num_blocks),
    )  # fmt: skip


def fit_to_states(config: EngineConfig, plan: MemoryPlan) -> EngineConfig:
    """Let no more sequences run than there is room for their states, and for a checkpoint. Says so in a warning.

    Raises ValueError for a swap space that has no room for a state.
    """
    swap = None if config.swap_space is None else parse_swap_space(config.swap_space)
    if isinstance(swap, int) and swap < plan.state_bytes:
        one = format_memory(plan.state_bytes)
        raise ValueError(f"swap_space={config.swap_space!r} holds no state of this model: one takes {one}")
    most = min(config.max_num_seqs, (plan.num_state_slots - 1) // _STATES_PER_SEQUENCE)
    if most < config.max_num_seqs:
        advice = "larger kv_cache_memory" if config.num_kv_blocks is None else "smaller num_kv_blocks"
        warnings.warn(
            f"max_num_seqs is {most} instead of {config.max_num_seqs}: there is room for {plan.num_state_slots} "
            f"states, {_STATES_PER_SEQUENCE} of each sequence that runs, checkpoints included; more with a "
            f"{advice}",
            EngineWarning,
            stacklevel=4,
        )
    return dataclasses.replace(config, max_num_seqs=most)


def blocks_for_requests(
    requests: Iterable[tuple[int, SamplingParams | BeamSearchParams]], config: EngineConfig, max_model_len: int | None
) -> int | None:
    """Count the blocks that requests hold while the largest of them run at once, rounded up.

    requests: of each the tokens of its prompt, and its parameters. Returns None if nothing bounds one of them.
    """
    sizes = []
    for num_prompt, params in requests:
        num_seqs = params.n if isinstance(params, SamplingParams) else params.beam_width
        ends = [num_prompt + params.max_tokens] if params.max_tokens is not None else []
        ends += [max_model_len] if max_model_len is not None else []
        if not ends:
            return None
        num_shared = num_prompt // config.block_size
        num_own = max(0, -(-min(ends) // config.block_size) - num_shared) + 1  # and one to copy to, or to grow into
        sizes.append((num_own, num_seqs, num_shared))
    total, rows = 0, config.max_num_seqs
    for num_own, num_seqs, num_shared in sorted(sizes, key=lambda size: size[0] + size[2] / size[1], reverse=True):
        running = min(num_seqs, rows)
        total += num_shared + num_own * running if running else 0
        rows -= running
    step = max(1, _NEED_STEP // config.block_size)
    return -(-total // step) * step


def _most_that_fit(num_bytes: Callable[[int], int], budget: int, most: int) -> int:
    """Return the largest count up to `most` whose bytes, which rise with it, are within the budget; 0 if none is."""
    return bisect_right(range(most + 1), budget, lo=1, key=num_bytes) - 1


def device_limit() -> tuple[int, str]:
    """Return the most memory to use, in bytes, and what that number is."""
    info = mx.device_info()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"]), "recommended GPU memory"
    if "free_memory" in info:
        own = mx.get_active_memory() + mx.get_cache_memory()  # what MLX keeps for later is free too
        return int(info["free_memory"]) + own, "free GPU memory"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "RAM"
