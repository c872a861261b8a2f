"""Products of few rows with float32 weights, on processors where the usual way takes up to twice as long.

Before OpenBLAS multiplies it copies the whole weight matrix into an order of its own, which for a few rows takes as
long as multiplying them. Its AVX-512 kernels for small products read the matrix where it lies, and a product with
32 outputs at a time is a small one. It saves most with 2 to 4 rows, nothing from 24 on: `benchmarks/few_rows.py`. Two
threads copy faster and leave little to save; OpenBLAS for AVX2 has no such kernels, and pieces take longer.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlx_paged.models.replace import replace_method

_CORES = (b"SkylakeX", b"Cooperlake", b"SapphireRapids")  # OpenBLAS's names of those with AVX-512
_MOST_ROWS = 16
_LEAST_WEIGHTS = 2**16  # a smaller matrix is copied in no time
_PIECES = (32, 16)  # outputs
_MOST_MULTIPLICATIONS = 10**6  # of a small product, for OpenBLAS

_thread = threading.local()


@functools.cache
def pieces_are_faster() -> bool:
    """Whether what MLX multiplies with on a CPU is OpenBLAS with AVX-512 kernels and one thread."""
    return mx.default_device() == mx.cpu and _has_small_kernels(ctypes.CDLL(None))


def _has_small_kernels(library: ctypes.CDLL) -> bool:
    try:
        name, num_threads = library.openblas_get_corename, library.openblas_get_num_threads
    except AttributeError:  # another BLAS
        return False
    name.restype = ctypes.c_char_p
    return num_threads() == 1 and name() in _CORES


@contextmanager
def in_pieces() -> Iterator[None]:
    """Inside it this thread's linear layers multiply in pieces, if `patch_linear` has been called."""
    _thread.active = True
    try:
        yield
    finally:
        _thread.active = False


def patch_linear() -> None:
    """Let MLX's linear layers and output heads multiply in pieces, inside `in_pieces` and nowhere else."""
    for cls, name in ((nn.Linear, "__call__"), (nn.Embedding, "as_linear")):
        replace_method(cls, name, _dispatch)


def _dispatch(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(self: nn.Module, x: mx.array) -> mx.array:
        size = _piece_size(x, self.weight) if getattr(_thread, "active", False) else None
        if size is None:
            return original(self, x)
        out = product(x, self.weight, size)
        return out + self.bias if "bias" in self else out

    return call


def _piece_size(x: mx.array, weight: mx.array) -> int | None:
    """How many outputs to compute at a time, None for all at once."""
    num_outputs, dim = weight.shape
    rows = x.size // dim
    if not 0 < rows <= _MOST_ROWS or weight.size < _LEAST_WEIGHTS or {x.dtype, weight.dtype} != {mx.float32}:
        return None
    fits = (size for size in _PIECES if num_outputs % size == 0 and rows * size * dim <= _MOST_MULTIPLICATIONS)
    return next(fits, None)


def product(x: mx.array, weight: mx.array, size: int) -> mx.array:
    """x [..., dim] times the transpose of weight [num_outputs, dim], `size` outputs at a time: [..., num_outputs]."""
    num_outputs, dim = weight.shape
    pieces = weight.reshape(-1, size, dim).swapaxes(1, 2)
    out = x.reshape(1, -1, dim) @ pieces
    return out.swapaxes(0, 1).reshape(*x.shape[:-1], num_outputs)
