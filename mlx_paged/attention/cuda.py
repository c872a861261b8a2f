"""The CUDA kernels: the twins of the Metal ones, with the same calls, and one that writes new keys and values.

A kernel is made at its first use, by `mx.fast.cuda_kernel` as it is found then, so that a simulator can take its place.
MLX compiles it for the card that is there, once for each set of template arguments and dtypes.

As with Metal no input is ever copied to make it contiguous. Written for Ampere (sm_80) and newer.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention import metal
from mlx_paged.attention.kernel_backend import DecodePlan, Gpu, Kernel, Launch, Plan
from mlx_paged.attention.metal import Division
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.attention.work_items import Shape, Tile

_AMPERE = 8  # the first with the instructions of intrinsics.cuh
_MAX_SHARED_BYTES = 96 << 10  # of a block, which every card since Ampere has
_ROWS = 16  # that a warp computes at once with its matrix instructions
_THREADS_OF_WRITE = 256
_HEADERS = ("intrinsics.cuh", "tiles.cuh")


def is_available() -> bool:
    """Whether CUDA kernels run here: there is a new enough device, and work was not put on the CPU instead of it."""
    on_cpu_by_choice = mx.is_available(mx.gpu) and mx.default_device() == mx.cpu
    if not mx.cuda.is_available() or on_cpu_by_choice:
        return False
    return int(mx.device_info().get("compute_capability_major", _AMPERE)) >= _AMPERE


def unsupported(dtype: mx.Dtype, num_heads: int, block_shape: Sequence[int], value_dim: int) -> str | None:
    """Why no kernel takes arrays like these, or None if one does. block_shape: block_size, num_kv_heads, head_dim."""
    reason = metal.unsupported(dtype, num_heads, block_shape, value_dim)
    return reason and reason.replace("Metal", "CUDA")


@cache
def num_multiprocessors() -> int:
    """Of the card: MLX does not tell, so the number that cards of the architecture commonly have."""
    architecture = str(mx.device_info().get("architecture", ""))
    common = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_103": 148, "sm_120": 170}
    return common.get(architecture, 128)


# ---- how the work is divided ----


class DecodeLayout(NamedTuple):
    """What a block of paged_decode consists of; see there."""

    warps: int
    stages: int
    tile_keys: int
    shared_bytes: int


@cache
def decode_layout(shape: Shape) -> DecodeLayout:
    """As many stages, then warps, as shared memory has room for: what is under way hides the memory's latency."""
    tile_keys = 16
    query_bytes = _ROWS * _row_bytes(shape.head_dim, shape.element_size)
    stage_bytes = tile_keys * sum(_row_bytes(dim, shape.element_size) for dim in (shape.head_dim, shape.value_dim))
    for warps, stages in ((4, 3), (4, 2), (2, 2), (2, 1)):
        merge_bytes = 4 * warps * (shape.heads_per_kv_head * shape.value_dim + 2 * _ROWS)
        shared_bytes = query_bytes + max(warps * stages * stage_bytes, merge_bytes)
        if shared_bytes <= _MAX_SHARED_BYTES:
            return DecodeLayout(warps, stages, tile_keys, shared_bytes)
    raise AssertionError(f"no layout for {shape}")


class PrefillLayout(NamedTuple):
    """What a block of paged_prefill computes; see there."""

    tile: Tile
    matrices: int
    shared_bytes: int


@cache
def prefill_layout(shape: Shape) -> PrefillLayout:
    """The largest tiles whose scores and output a thread's 255 registers hold: benchmarks/cuda_registers.py."""
    is_half, longer = shape.element_size == 2, max(shape.head_dim, shape.value_dim)
    if longer <= 128:
        tile, matrices = (Tile(128, 64 if longer <= 96 else 48), 2) if is_half else (Tile(64, 32), 1)
    else:
        tile, matrices = Tile(64, 32) if is_half else Tile(32, 16), 1
    key_bytes, value_bytes = (_row_bytes(dim, shape.element_size) for dim in (shape.head_dim, shape.value_dim))
    return PrefillLayout(tile, matrices, tile.rows * key_bytes + tile.keys * (key_bytes + value_bytes))


def _row_bytes(dim: int, element_size: int) -> int:
    """From a row to the next in shared memory: row_stride of tiles.cuh."""
    elements = -(-dim // 16) * 16 if element_size == 2 else dim
    return elements * element_size + 16


def plan_decode(
    context_lens: np.ndarray, window: int | None, shape: Shape, prefixes: Sequence[SharedPrefix] = ()
) -> DecodePlan:
    """As `metal.plan_decode`."""
    return metal.plan_decode(context_lens, window, shape, prefixes, _division(shape))


def plan_prefill(context_lens: np.ndarray, cu_seqlens_q: np.ndarray, window: int | None, shape: Shape) -> Plan:
    """As `metal.plan_prefill`."""
    return metal.plan_prefill(context_lens, cu_seqlens_q, window, shape, _division(shape))


def _division(shape: Shape) -> Division:
    """Eight blocks to a "core" are two to a multiprocessor: as many as it holds at once, each of 4 warps."""
    return Division(num_multiprocessors() // 4, prefill_layout(shape).tile)


# ---- calls ----


def _launch_decode(shape: Shape) -> Launch:
    layout = decode_layout(shape)
    template = {
        "HEADS": shape.heads_per_kv_head,
        "WARPS": layout.warps,
        "STAGES": layout.stages,
        "TILE_KEYS": layout.tile_keys,
    }
    return Launch("paged_decode", 32 * layout.warps, template, layout.shared_bytes)


def _launch_tiles(shape: Shape) -> Launch:
    layout = prefill_layout(shape)
    template = {"TILE_ROWS": layout.tile.rows, "TILE_KEYS": layout.tile.keys, "MATRICES": layout.matrices}
    return Launch("paged_prefill", 2 * layout.tile.rows // layout.matrices, template, layout.shared_bytes)


def write(
    k_cache: mx.array, v_cache: mx.array, block_ids: mx.array, offsets: mx.array, keys: mx.array, values: mx.array
) -> mx.array:
    """Put K and V of at least one token into their slots, in the pools' own memory.

    block_ids, offsets: int32 [num_tokens]; keys, values: [num_tokens, num_kv_heads, dim]. MLX does not know that the
    pools change: it never copies them for that, whoever still reads them, and would compute what reads them next too
    early. So that has to be `decode` or `prefill`, with what is returned here as `written`, or come after
    `mx.synchronize()`; and what read them before has to have been submitted to the device before.
    """
    dtype, num_tokens = k_cache.dtype, block_ids.shape[0]
    (num_kv_heads, head_dim), value_dim = k_cache.shape[2:], v_cache.shape[3]
    new = (mx.contiguous(array.astype(dtype)) for array in (keys, values))
    names = ("k_cache", "v_cache", "block_ids", "offsets", "keys", "values")
    inputs = dict(zip(names, (k_cache, v_cache, block_ids, offsets, *new), strict=True))
    num_threads = num_tokens * num_kv_heads * (head_dim + value_dim) * dtype.size // 16
    kernel = _kernel("paged_write", inputs, ("written",), 0)
    return kernel(
        inputs=list(inputs.values()),
        template=[("T", dtype), ("HEAD_DIM", head_dim), ("VALUE_DIM", value_dim)],
        grid=(-(-num_threads // _THREADS_OF_WRITE) * _THREADS_OF_WRITE, 1, 1),
        threadgroup=(_THREADS_OF_WRITE, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
    )[0]


def _check(q: mx.array, k_cache: mx.array, v_cache: mx.array, block_tables: mx.array, sinks: mx.array | None) -> None:
    """Raise ValueError for arrays that do not fit together or that no kernel takes."""
    if reason := unsupported(q.dtype, q.shape[1], k_cache.shape[1:], v_cache.shape[3]):
        raise ValueError(reason)
    metal.check(q, k_cache, v_cache, block_tables, sinks)


def _kernel(stem: str, inputs: dict[str, mx.array], outputs: tuple[str, ...], shared_bytes: int) -> Kernel:
    """The kernel cuda/{stem}.cu with so much shared memory."""
    if not mx.cuda.is_available():
        raise RuntimeError("CUDA kernels need a CUDA device, and there is none here")
    return _make(mx.fast.cuda_kernel, stem, tuple(inputs), outputs, shared_bytes)


@cache
def _make(
    cuda_kernel: Callable[..., Any], stem: str, inputs: tuple[str, ...], outputs: tuple[str, ...], shared_bytes: int
) -> Kernel:
    return cuda_kernel(
        name=stem,
        input_names=list(inputs),
        output_names=list(outputs),
        header="\n".join(map(read_source, _HEADERS)),
        source=read_source(f"{stem}.cu"),
        ensure_row_contiguous=False,
        shared_memory=shared_bytes,
    )


def read_source(file: str) -> str:
    """The text of a file in cuda/."""
    return files("mlx_paged.cuda").joinpath(file).read_text()


CUDA = Gpu(_kernel, _launch_decode, _launch_tiles, _check, is_flat=True, writes=True)
decode, prefill = CUDA.decode, CUDA.prefill
