"""The Metal kernels: what they can compute, and their calls.

A kernel is made at its first use, by `mx.fast.metal_kernel` as it is found then, so that a simulator can take its
place. MLX keeps one compiled library per kernel name and throws it away when the same name comes with another text.
The text depends on which inputs have fewer than 8 elements and on their dtypes, so the names say that.

No input is ever copied to make it contiguous: a pool must not be. The kernels take q and block_tables with any stride
between rows, and rely on pools being contiguous, as they are since they were allocated.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention import work_items
from mlx_paged.attention.kernel_backend import (
    SMALL,
    DecodePlan,
    Gpu,
    Kernel,
    Launch,
    Plan,
    SharedPlan,
    padded,
    put_on_device,
)
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.attention.work_items import SCRATCH, SIMDGROUPS, Shape, Tile, decode_layout, tile_for

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
BLOCK_SIZES = (8, 16, 32, 64)
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KV_HEAD = 16

_HEADERS = {
    "paged_decode": ("packed.h",),
    "paged_prefill": ("packed.h", "tiles.h"),
    "paged_merge": ("packed.h",),
}


def is_available() -> bool:
    """Whether Metal kernels run here: there is a Metal device, and work was not put on the CPU instead of it."""
    on_cpu_by_choice = mx.is_available(mx.gpu) and mx.default_device() == mx.cpu
    return mx.metal.is_available() and not on_cpu_by_choice


def unsupported(dtype: mx.Dtype, num_heads: int, block_shape: Sequence[int], value_dim: int) -> str | None:
    """Why no kernel takes arrays like these, or None if one does. block_shape: block_size, num_kv_heads, head_dim."""
    block_size, num_kv_heads, head_dim = block_shape
    if dtype not in DTYPES:
        return f"no Metal kernel for dtype {dtype}: float16, bfloat16 and float32 have one"
    if block_size not in BLOCK_SIZES:
        return f"no Metal kernel for block_size {block_size}: {', '.join(map(str, BLOCK_SIZES))} have one"
    for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
        if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            return f"no Metal kernel for {name} {dim}: multiples of 8 up to {MAX_HEAD_DIM} have one"
    if num_heads // num_kv_heads > MAX_HEADS_PER_KV_HEAD:
        return (
            f"no Metal kernel for {num_heads} query heads on {num_kv_heads} KV heads: "
            f"at most {MAX_HEADS_PER_KV_HEAD} may share one"
        )
    return None


@cache
def num_cores() -> int:
    """Cores of the GPU: MLX does not tell, so the most that the class of chip has, which its name ends with."""
    architecture = str(mx.device_info().get("architecture", ""))
    if not architecture.startswith("applegpu"):
        return 40
    return {"p": 6, "g": 20, "s": 40, "c": 40, "d": 80}.get(architecture[-1], 40)


class Division(NamedTuple):
    """What a plan depends on beside shapes and lengths: the device's cores, and the tile of its prefill kernel."""

    num_cores: int
    tile: Tile


def plan_decode(
    context_lens: np.ndarray,
    window: int | None,
    shape: Shape,
    prefixes: Sequence[SharedPrefix] = (),
    division: Division | None = None,
) -> DecodePlan:
    """The plan for one query per sequence.

    context_lens: int32 [num_seqs]. prefixes: only without a window. division: None is the one for Metal.
    """
    cores, tile = division or Division(num_cores(), tile_for(shape))
    num_keys = context_lens if window is None else np.minimum(context_lens, window)
    shared = None
    if prefixes:
        num_keys = context_lens.copy()
        for prefix in prefixes:
            num_keys[prefix.members] -= prefix.num_tokens
        items, members, ranges = work_items.shared_items(prefixes, len(context_lens), shape, cores, tile)
        shared = SharedPlan(put_on_device(items), padded(members), padded(ranges))
    size = work_items.keys_per_item(num_keys, shape, cores)
    return DecodePlan(put_on_device(work_items.decode_items(context_lens, num_keys, size)), shared)


def plan_prefill(
    context_lens: np.ndarray,
    cu_seqlens_q: np.ndarray,
    window: int | None,
    shape: Shape,
    division: Division | None = None,
) -> Plan:
    """The plan for any number of queries per sequence. context_lens: int32 [num_seqs], cu_seqlens_q: [num_seqs + 1]."""
    cores, tile = division or Division(num_cores(), tile_for(shape))
    return put_on_device(work_items.prefill_items(context_lens, cu_seqlens_q, window, shape, cores, tile))


def _launch_decode(shape: Shape) -> Launch:
    layout = decode_layout(shape)
    template = {
        "HEADS": shape.heads_per_kv_head,
        "LANES": layout.lanes,
        "PARTS": layout.parts,
        "WIDTH": layout.width,
        "BATCH": layout.batch,
        "QUERY_IN_REGISTERS": layout.query_in_registers,
        "SIMDGROUPS": SIMDGROUPS,
        "SCRATCH": SCRATCH,
    }
    return Launch("paged_decode", 32 * SIMDGROUPS, template)


def _launch_tiles(shape: Shape) -> Launch:
    tile = tile_for(shape)
    return Launch("paged_prefill", 4 * tile.rows, {"TILE_ROWS": tile.rows, "TILE_KEYS": tile.keys})


def check(q: mx.array, k_cache: mx.array, v_cache: mx.array, block_tables: mx.array, sinks: mx.array | None) -> None:
    """Raise ValueError for arrays that do not fit together or that no kernel takes."""
    if reason := unsupported(q.dtype, q.shape[1], k_cache.shape[1:], v_cache.shape[3]):
        raise ValueError(reason)
    if not (q.dtype == k_cache.dtype == v_cache.dtype and block_tables.dtype == mx.int32):
        raise ValueError(
            "q, k_cache and v_cache must have one dtype and block_tables be int32; "
            f"got {q.dtype}, {k_cache.dtype}, {v_cache.dtype} and {block_tables.dtype}"
        )
    if k_cache.shape[:3] != v_cache.shape[:3] or q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"q {q.shape}, k_cache {k_cache.shape} and v_cache {v_cache.shape} do not fit together")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must have one value per query head, [{q.shape[1]}], got {sinks.shape}")


def _kernel(stem: str, inputs: dict[str, mx.array], outputs: tuple[str, ...], _shared_bytes: int) -> Kernel:
    """The kernel metal/{stem}.metal for arrays like `inputs`."""
    if not mx.metal.is_available():
        raise RuntimeError("Metal kernels need a Metal device, and there is none here")
    name = f"{stem}_" + "".join(str(int(array.size < SMALL)) for array in inputs.values())
    if "sinks" in inputs:
        name += f"_{str(inputs['sinks'].dtype).removeprefix('mlx.core.')}"
    return _make(mx.fast.metal_kernel, name, stem, tuple(inputs), outputs)


@cache
def _make(
    metal_kernel: Callable[..., Any], name: str, stem: str, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Kernel:
    folder = files("mlx_paged.metal")
    header = "\n".join(folder.joinpath(file).read_text() for file in _HEADERS[stem])
    return metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        header=header,
        source=folder.joinpath(f"{stem}.metal").read_text(),
        ensure_row_contiguous=False,
    )


METAL = Gpu(_kernel, _launch_decode, _launch_tiles, check, is_flat=False, writes=False)
decode, prefill = METAL.decode, METAL.prefill
