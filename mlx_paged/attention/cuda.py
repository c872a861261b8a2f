"""The CUDA kernels, twins of the Metal ones: how they are made and launched.

A kernel is made at its first use, by `mx.fast.cuda_kernel` as it is found then, so that a simulator can take its place.
MLX compiles it for the card that is there, once for each set of template arguments and dtypes.

As with Metal no input is ever copied to make it contiguous. Written for Ampere (sm_80) and newer.
"""

from functools import cached_property

import mlx.core as mx

from mlx_paged.attention.kernel_backend import KernelBackend
from mlx_paged.attention.kernel_plan import Launch
from mlx_paged.attention.latent_layout import cuda_layout
from mlx_paged.attention.work_items import Shape, Tile

_HOPPER = 9
_MAX_SHARED_BYTES = 96 << 10  # of a block, which every card since Ampere has
_ROWS = 16  # that a warp computes at once with its matrix instructions
_DECODE_KEYS = 16  # that a warp of paged_decode computes at once
_DECODE_LAYOUTS = ((4, 4), (4, 3), (4, 2), (2, 2), (2, 1))  # warps and stages; the first is for codes alone


class CudaBackend(KernelBackend):
    """The kernels in cuda/, for NVIDIA's cards since Ampere."""

    name = "cuda"
    title = "CUDA"
    suffix = "cu"
    latent_layout = staticmethod(cuda_layout)

    @cached_property
    def num_cores(self) -> int:
        """A fourth of the card's multiprocessors: eight blocks to a "core" are then two to a multiprocessor, as many as
        it holds at once, each of 4 warps. MLX does not tell their number, so it is the one that cards of the
        architecture commonly have.
        """
        architecture = str(mx.device_info().get("architecture", ""))
        common = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_103": 148, "sm_120": 170}
        return common.get(architecture, 128) // 4

    @cached_property
    def has_matrix_units(self) -> bool:
        """Since Hopper, whose matrix units take whole warp groups."""
        return int(mx.device_info().get("compute_capability_major", 0)) >= _HOPPER

    def prefill_tile(self, shape: Shape) -> Tile:
        """The largest whose scores and output a thread's 255 registers hold: benchmarks/cuda_registers.py."""
        is_half, longer = shape.element_size == 2, max(shape.head_dim, shape.value_dim)
        if longer > 128:
            return Tile(64, 32) if is_half else Tile(32, 16)
        return Tile(128, 64 if longer <= 96 else 48) if is_half else Tile(64, 32)

    def grid(self, threads: int, second: int, items: int) -> tuple[int, int, int]:
        return threads * items, second, 1  # only the first dimension is large enough for items

    def launch_decode(self, shape: Shape) -> Launch:
        """As many stages, then warps, as shared memory has room for: what is in flight hides the memory's latency."""
        key_bytes, value_bytes = _row_bytes(shape)
        stage_bytes = _DECODE_KEYS * (_bytes_of_codes(shape) or key_bytes + value_bytes)
        for warps, stages in _DECODE_LAYOUTS[0 if shape.codes else 1 :]:
            merge_bytes = 4 * warps * (shape.heads_per_kv_head * shape.value_dim + 2 * _ROWS)
            shared_bytes = _ROWS * key_bytes + max(warps * stages * stage_bytes, merge_bytes)
            if shared_bytes <= _MAX_SHARED_BYTES:
                sizes = {"VALUE_DIM": shape.value_dim, "TILE_KEYS": _DECODE_KEYS}
                return Launch("paged_decode", 32 * warps, sizes | {"WARPS": warps, "STAGES": stages}, shared_bytes)
        raise AssertionError(f"no layout for {shape}")

    def launch_prefill(self, shape: Shape) -> Launch:
        rows, keys = self.prefill_tile(shape)
        key_bytes, value_bytes = _row_bytes(shape)
        matrices = 2 if rows == 128 else 1
        template = {"VALUE_DIM": shape.value_dim, "TILE_ROWS": rows, "TILE_KEYS": keys, "MATRICES": matrices}
        return Launch(
            "paged_prefill", 2 * rows // matrices, template, rows * key_bytes + keys * (key_bytes + value_bytes)
        )

    def headers(self, kernel_name: str, with_codes: bool) -> tuple[str, ...]:
        return "intrinsics.cuh", "tiles.cuh", *(("codes.cuh",) if with_codes else ())


def _row_bytes(shape: Shape) -> tuple[int, int]:
    """From a row of K, and of V, to the next in shared memory: row_stride of tiles.cuh."""
    multiple = 16 if shape.element_size == 2 else 1
    sizes = [-(-dim // multiple) * multiple * shape.element_size + 16 for dim in (shape.head_dim, shape.value_dim)]
    return sizes[0], sizes[1]


def _bytes_of_codes(shape: Shape) -> int:
    """Of a row of K and one of V in shared memory, where they are codes: TILE_BYTES of codes.cuh. Otherwise 0."""
    each = zip((shape.head_dim, shape.value_dim), shape.codes[1:] if shape.codes else (), strict=False)
    return sum(
        (-(-dim * bits // 128) | 1) * 16 + max(4, dim // group * params * shape.element_size)
        for dim, (bits, group, params) in each
    )
