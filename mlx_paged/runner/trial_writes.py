"""Whether kernels can write into pools here, tried before the first step, and the choice of who writes."""

import os
import warnings

import mlx.core as mx
import numpy as np

from mlx_paged.attention.kernel_backend import KernelBackend
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.errors import EngineWarning, one_line
from mlx_paged.models.patch import PatchedModel

WRITE_VARIABLE = "MLX_PAGED_WRITE"
WRITERS = ("kernel", "scatter")


def choose_writers(model: PatchedModel, block_size: int) -> None:
    """Have the backends of a model's layers write with their kernels where that works.

    MLX knows of no kernel that changes what it is given, and nobody promises that one can. Where a pool does not show
    what a kernel has written into it, an EngineWarning says so, and MLX's scatter takes its place. So it does if the
    environment variable MLX_PAGED_WRITE is "scatter". Raises ValueError if that is "kernel" and kernels can't write, or
    another word.
    """
    asked = os.environ.get(WRITE_VARIABLE)
    if asked and asked not in WRITERS:
        raise ValueError(f"{WRITE_VARIABLE} must be one of {', '.join(WRITERS)}, got {asked!r}")
    layers_of: dict[KernelBackend, set[LayerSpec]] = {}
    for backend, layer in zip(model.backends(block_size), model.layers, strict=True):
        if isinstance(backend, KernelBackend) and layer is not None:
            layers_of.setdefault(backend, set()).add(layer)
    for backend, layers in layers_of.items():
        backend.writes_in_place = asked != "scatter"
        for layer in layers if backend.writes_in_place else ():
            if failure := failure_of_write(backend, layer, block_size):
                text = f"{backend.title} kernels can't write into pools here: {failure}"
                if asked:
                    raise ValueError(f"{text} ({WRITE_VARIABLE})")
                backend.writes_in_place = False
                warnings.warn(f"{text}; MLX's scatter takes their place, more slowly", EngineWarning, stacklevel=5)
                break


def failure_of_write(backend: KernelBackend, layer: LayerSpec, block_size: int) -> str | None:
    """Try to write into a small pool. Returns what went wrong, in one line, or None.

    Both kernels are compiled by that: MLX has another for fewer than eight tokens.
    """
    pool = LayerPool.zeros(layer, 2, block_size)
    mx.eval(pool.arrays)
    _, num_kv_heads, *dims = pool.block_shape
    nothing = np.zeros(0, np.int32)
    try:
        for value, count in enumerate((8, 1), start=1):
            slots = mx.ones(count, mx.int32), mx.arange(count, dtype=mx.int32)
            rows = (mx.full((count, num_kv_heads, dim), value, layer.dtype) for dim in dims)
            backend.write(pool, AttentionMetadata(mx.array(nothing), nothing, nothing, None, *slots), *rows)
        mx.eval(pool.write_done)
        mx.synchronize()
    except Exception as error:  # whatever a compiler or a driver says
        return one_line(error)
    return None if seems_written(pool) else "a pool did not show what was written into it"


def seems_written(pool: LayerPool) -> bool:
    """Whether block 1 holds what was written into its first eight slots, and then into the first again."""
    slots = np.zeros((2, pool.block_shape[0]))
    slots[1, :8], slots[1, 0] = 1, 2
    expected = mx.array(slots.reshape(1, -1, 1))
    found = (pool.gather_blocks(name, mx.arange(2)) for name in ("k" if pool.latent_dim else "kv"))
    return all((mx.abs(each - expected) < 0.1).all().item() for each in found)  # codes are no exact numbers
