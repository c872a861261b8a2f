"""The CUDA kernels, twins of the Metal ones: how they are made and launched, and one that writes new keys and values.

A kernel is made at its first use, by `mx.fast.cuda_kernel` as it is found then, so that a simulator can take its place.
MLX compiles it for the card that is there, once for each set of template arguments and dtypes.

As with Metal no input is ever copied to make it contiguous. Written for Ampere (sm_80) and newer.
"""

from collections.abc import Callable
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_paged.attention.kernel_backend import Kernel, KernelBackend, Launch
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.work_items import Shape, Tile

_AMPERE = 8  # the first with the instructions of intrinsics.cuh
_MAX_SHARED_BYTES = 96 << 10  # of a block, which every card since Ampere has
_ROWS = 16  # that a warp computes at once with its matrix instructions
_THREADS_OF_WRITE = 256
_HEADERS = ("intrinsics.cuh", "tiles.cuh")


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


class CudaBackend(KernelBackend):
    """The kernels in cuda/, for NVIDIA's cards since Ampere."""

    name = "cuda"
    title = "CUDA"
    writes_in_place = True

    def is_available(self) -> bool:
        on_cpu_by_choice = mx.is_available(mx.gpu) and mx.default_device() == mx.cpu
        if not mx.cuda.is_available() or on_cpu_by_choice:
            return False
        return int(mx.device_info().get("compute_capability_major", _AMPERE)) >= _AMPERE

    @cached_property
    def num_cores(self) -> int:
        """A fourth of the card's multiprocessors: eight blocks to a "core" are then two to a multiprocessor, as many as
        it holds at once, each of 4 warps. MLX does not tell their number, so it is the one that cards of the
        architecture commonly have.
        """
        architecture = str(mx.device_info().get("architecture", ""))
        common = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_103": 148, "sm_120": 170}
        return common.get(architecture, 128) // 4

    def prefill_tile(self, shape: Shape) -> Tile:
        return prefill_layout(shape).tile

    def grid(self, threads: int, second: int, items: int) -> tuple[int, int, int]:
        return threads * items, second, 1  # only the first dimension is large enough for items

    def launch_decode(self, shape: Shape) -> Launch:
        layout = decode_layout(shape)
        template = {
            "HEADS": shape.heads_per_kv_head,
            "WARPS": layout.warps,
            "STAGES": layout.stages,
            "TILE_KEYS": layout.tile_keys,
        }
        return Launch("paged_decode", 32 * layout.warps, template, layout.shared_bytes)

    def launch_prefill(self, shape: Shape) -> Launch:
        layout = prefill_layout(shape)
        template = {"TILE_ROWS": layout.tile.rows, "TILE_KEYS": layout.tile.keys, "MATRICES": layout.matrices}
        return Launch("paged_prefill", 2 * layout.tile.rows // layout.matrices, template, layout.shared_bytes)

    def write(
        self, k_cache: mx.array, v_cache: mx.array, metadata: AttentionMetadata, keys: mx.array, values: mx.array
    ) -> mx.array:
        """Put K and V of at least one token into their slots, in the pools' own memory.

        MLX does not know that the pools change: it never copies them for that, whoever still reads them, and would
        compute what reads them next too early. So that has to be `attend` with what is returned here as `write_done`,
        or come after `mx.synchronize()`. What read them before has to have been submitted to the device before.
        """
        assert metadata.slot_block_ids is not None and metadata.slot_offsets is not None
        inputs = {
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_ids": metadata.slot_block_ids,
            "offsets": metadata.slot_offsets,
            "keys": mx.contiguous(keys.astype(k_cache.dtype)),
            "values": mx.contiguous(values.astype(k_cache.dtype)),
        }
        num_kv_heads, head_dim = k_cache.shape[2:]
        value_dim, size = v_cache.shape[3], k_cache.dtype.size
        num_threads = keys.shape[0] * num_kv_heads * (head_dim + value_dim) * size // 16
        kernel = self.make_kernel("paged_write", inputs, ("write_done",), 0)
        return kernel(
            inputs=list(inputs.values()),
            template=[("T", k_cache.dtype), ("HEAD_DIM", head_dim), ("VALUE_DIM", value_dim)],
            grid=(-(-num_threads // _THREADS_OF_WRITE) * _THREADS_OF_WRITE, 1, 1),
            threadgroup=(_THREADS_OF_WRITE, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
        )[0]

    def make_kernel(
        self, kernel_name: str, inputs: dict[str, mx.array], outputs: tuple[str, ...], shared_bytes: int
    ) -> Kernel:
        if not mx.cuda.is_available():
            raise RuntimeError("CUDA kernels need a CUDA device, and there is none here")
        return _make(mx.fast.cuda_kernel, kernel_name, tuple(inputs), outputs, shared_bytes)


@cache
def _make(
    cuda_kernel: Callable[..., Any], kernel_name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], shared: int
) -> Kernel:
    kernel: Kernel = cuda_kernel(
        name=kernel_name,
        input_names=list(inputs),
        output_names=list(outputs),
        header="\n".join(map(read_source, _HEADERS)),
        source=read_source(f"{kernel_name}.cu"),
        ensure_row_contiguous=False,
        shared_memory=shared,
    )
    return kernel


def read_source(file: str) -> str:
    """The text of a file in cuda/."""
    return files("mlx_paged.cuda").joinpath(file).read_text()
