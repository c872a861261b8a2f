"""How paged_latent, on Metal and on CUDA, divides what it computes among threads, and which rows it takes."""

from functools import cache
from typing import NamedTuple

from mlx_paged.attention.kernel_plan import Launch
from mlx_paged.attention.work_items import Shape, Tile

_METAL_KEYS = 16
_METAL_WORDS = 96  # of registers, that a thread keeps
_CUDA_KEYS = 32
_CUDA_PADDING = 8  # elements after those of a tile's row of scores and weights
_MOST_OF_CUDA = 576, 512  # of K and of V: 96 KB of shared memory, 64 registers for the output of 16 rows


class LatentLayout(NamedTuple):
    """What a threadgroup of paged_latent computes at once, and how it is launched."""

    tile: Tile
    launch: Launch


@cache
def metal_layout(shape: Shape) -> LatentLayout | None:
    """Choose as many rows and simdgroups as a thread's registers and the columns of a row are enough for."""
    if not shape.value_in_key or shape.head_dim % 8 or shape.value_dim % 8:
        return None
    for rows in (16, 8):
        # Each simdgroup has the same number of 8 columns of the values, and of the rest of a key.
        shares = (8, 4, 2, 1)
        simdgroups = next(n for n in shares if not shape.head_dim % (8 * n) and not shape.value_dim % (8 * n))
        of_key, of_value = shape.head_dim // (8 * simdgroups), shape.value_dim // (8 * simdgroups)
        scores = -(-rows * _METAL_KEYS // (32 * simdgroups))
        words = (rows + _METAL_KEYS) // 8 * of_key * shape.element_size // 2  # Q and K
        words += rows // 8 * of_value * 2 + 4 * scores + _METAL_KEYS // 8  # output; softmax; where keys lie
        if words <= _METAL_WORDS:
            template = {"VALUE_DIM": shape.value_dim, "TILE_ROWS": rows, "TILE_KEYS": _METAL_KEYS}
            launch = Launch("paged_latent", 32 * simdgroups, template | {"SIMDGROUPS": simdgroups})
            return LatentLayout(Tile(rows, _METAL_KEYS), launch)
    return None


@cache
def cuda_layout(shape: Shape) -> LatentLayout | None:
    """Choose 16 rows, or 32 where one query has more heads, of half types: of latents, or of heads longer than 256."""
    dims = shape.head_dim, shape.value_dim
    fits = all(dim % 8 == 0 and dim <= most for dim, most in zip(dims, _MOST_OF_CUDA, strict=True))
    if not (shape.value_in_key or max(dims) > 256) or shape.element_size != 2 or not fits:
        return None
    rows, stride = 32 if shape.heads_per_kv_head > 16 else 16, _CUDA_KEYS + _CUDA_PADDING
    row_bytes = -(-max(dims) // 16) * 32 + 16  # from a row to the next: row_stride of tiles.cuh
    shared_bytes = 2 * _CUDA_KEYS * row_bytes + rows * (4 * stride * 4 + stride * 2 + 4)
    template = {"VALUE_DIM": shape.value_dim, "TILE_ROWS": rows, "TILE_KEYS": _CUDA_KEYS}
    template |= {"VALUE_IN_KEY": shape.value_in_key}
    return LatentLayout(Tile(rows, _CUDA_KEYS), Launch("paged_latent", 8 * rows, template, shared_bytes))


def unsupported_latents(title: str, shape: Shape) -> str:
    """Say that there is no kernel for such rows."""
    have = {"Metal": "multiples of 64 up to 512 and 64", "CUDA": "multiples of 8 up to 512 and 64, of 16 bits,"}[title]
    return (
        f"no {title} kernel for latents of {shape.value_dim} and rotated keys of {shape.head_dim - shape.value_dim} "
        f"numbers of {8 * shape.element_size} bits: {have} have one"
    )
