"""draw_tokens, the kernel that draws a token per row on a GPU: when it is used, and how it is called.

It takes the place of `RandomRows`, which sorts the vocabulary of each row that has a top-k or a top-p, and makes noise
of all its tokens. It makes MLX's own random words from the same keys, so a seed has the same tokens on every device,
but where two of them are as good as equal.
"""

import os
import warnings
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.errors import EngineWarning, one_line
from mlx_paged.kernels import BACKEND_VARIABLE, TITLES, is_available, make_kernel
from mlx_paged.sampling.draws import RandomRows, mix, random_keys

THREADS = 512
"""Of a row."""
_TEXTS = {
    "metal": ("packed.h", "draw.h", "draw_tokens.metal"),
    "cuda": ("intrinsics.cuh", "draw.cuh", "draw_tokens.cu"),
}
_SHARED_WORDS = THREADS // 32 * 18 + 16  # 16 sums, a least and a most key of each simdgroup, and 16 totals
_TRIAL_SIZE = 67


class KernelRows(NamedTuple):
    """The rows of a batch as draw_tokens takes them, greedy ones too."""

    kind: str
    """Of GPU: a key of TITLES."""
    sample_seeds: np.ndarray
    """uint64 [n]."""
    asked: np.ndarray
    """uint32 [n, 8]: two words for a random key; temperature, log min_p, top_p, as bits; top_k; two unused. MLX has
    another kernel for inputs of fewer than 8 elements, which is not made for so many."""

    @classmethod
    def gather(cls, kind: str, params: np.ndarray, vocab_size: int) -> "KernelRows":
        """The rows of parameters [n]."""
        asked = np.zeros((len(params), 8), np.uint32)
        for word, name in enumerate(("temperature", "log_min_p", "top_p", "top_k"), start=2):
            asked[:, word] = np.ascontiguousarray(params[name]).view(np.uint32)
        return cls(kind, params["sample_seed"].copy(), asked)

    def draw(self, scores: mx.array, positions: np.ndarray) -> mx.array:
        """As `RandomRows.draw`."""
        self.asked[:, :2] = random_keys(mix(self.sample_seeds + positions.astype(np.uint64)))
        return draw_tokens(self.kind, scores, self.asked)


def draw_tokens(kind: str, scores: mx.array, asked: np.ndarray) -> mx.array:
    """The kernel's tokens for scores, float32 [n, vocab_size], and rows as in `KernelRows`. Returns uint32 [n]."""
    num_rows = len(asked)
    shared_bytes = 4 * _SHARED_WORDS if kind == "cuda" else 0
    kernel = make_kernel(kind, _TEXTS[kind], ("scores", "rows"), ("tokens",), shared_bytes)
    return kernel(
        inputs=[mx.contiguous(scores), mx.array(asked)],
        template=[("THREADS", THREADS)],
        grid=(THREADS * num_rows, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(num_rows,)],
        output_dtypes=[mx.uint32],
    )[0]


def choose_kind() -> str | None:
    """The kind of GPU whose kernel draws here. None: plain operations do.

    As for attention the environment variable MLX_PAGED_BACKEND decides, and without it the device. The kernel is tried
    first. If it fails, or draws other tokens than plain operations, these go on in its place, and an EngineWarning says
    so.
    """
    asked = os.environ.get(BACKEND_VARIABLE)
    kind = next((kind for kind in TITLES if asked in (None, "", kind) and is_available(kind)), None)
    if kind is None or (failure := _failure(kind, getattr(mx.fast, f"{kind}_kernel"))) is None:
        return kind
    text = f"{TITLES[kind]} kernels can't draw tokens here: {failure}"
    warnings.warn(f"{text}; plain MLX operations take their place, more slowly", EngineWarning, stacklevel=4)
    return None


@cache
def _failure(kind: str, make: object) -> str | None:
    """Draw a few tokens both ways. Returns what went wrong with the kernel that `make` makes, in one line, or None."""
    names = [("temperature", "f4"), ("log_min_p", "f4"), ("top_p", "f4"), ("top_k", "i4"), ("sample_seed", "u8")]
    params = np.array(
        [(1, -np.inf, 1, _TRIAL_SIZE, 1), (0, -np.inf, 1, _TRIAL_SIZE, 2), (2, -1, 1, 9, 3), (1.5, -9, 0.8, 12, 4)],
        np.dtype(names),
    )
    scores = mx.array(np.sin(np.arange(4 * _TRIAL_SIZE, dtype=np.float32) ** 2).reshape(4, -1) * 3)
    ways = RandomRows.gather(params, _TRIAL_SIZE), KernelRows.gather(kind, params, _TRIAL_SIZE)
    try:
        plain, drawn = (np.array(way.draw(scores, np.arange(4))) for way in ways)
    except Exception as error:  # whatever a compiler or a driver says
        return one_line(error)
    return None if (plain == drawn).all() else "it draws other tokens than plain operations"
