"""A token for each row of scores by temperature, min-p, top-k and top-p, of plain operations.

These are what a CPU runs, and what the kernel of `draw_kernel` is held to: the same rows, the same random words, the
same tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

LEAST_NOISE = -4.0
"""MLX makes -inf of a random word of 0, with which a token could not be drawn even if it is the only one. Of any other
word it makes more than this."""


class RandomRows(NamedTuple):
    """Rows of a batch that are not greedy; each float32 [num_random_rows, 1] unless said otherwise."""

    rows: slice | mx.array  # in the batch
    row_numbers: np.ndarray  # in the batch
    sample_seeds: np.ndarray  # uint64 [num_random_rows]
    temperature: mx.array
    log_min_p: mx.array | None
    cut_rows: slice | mx.array  # those of the random rows that have a top_k or a top_p
    top_k: mx.array | None  # int32, of the cut rows; None: there are none
    top_p: mx.array | None  # of the cut rows

    @classmethod
    def gather(cls, params: np.ndarray, vocab_size: int) -> "RandomRows":
        """The rows of parameters [n] that have a temperature; there is one at least."""
        chosen = params["temperature"] > 0
        params = params[chosen]
        cut = (params["top_k"] < vocab_size) | (params["top_p"] < 1)
        top_k, top_p = params["top_k"][cut], params["top_p"][cut]
        return cls(
            rows=indices(chosen),
            row_numbers=np.flatnonzero(chosen),
            sample_seeds=params["sample_seed"].copy(),
            temperature=column(params["temperature"]),
            log_min_p=column(params["log_min_p"]) if (params["log_min_p"] > -np.inf).any() else None,
            cut_rows=indices(cut),
            top_k=column(top_k) if cut.any() else None,
            top_p=column(top_p) if (top_p < 1).any() else None,
        )

    def draw(self, scores: mx.array, positions: np.ndarray) -> mx.array:
        """Draw a token for each of these rows, and take the best one of the others. Returns uint32 [n].

        scores: float32 [n, vocab_size]. positions: int [n], the indices in the rows' outputs of the tokens.
        """
        draws = mix(self.sample_seeds + positions[self.row_numbers].astype(np.uint64))
        weights = self._truncate(scores[self.rows] / self.temperature)
        drawn = mx.argmax(weights + gumbel(draws, scores.shape[-1]), axis=-1)
        if isinstance(self.rows, slice):
            return drawn
        token_ids = mx.argmax(scores, axis=-1)
        token_ids[self.rows] = drawn
        return token_ids

    def _truncate(self, scores: mx.array) -> mx.array:
        """Set what min-p, then top-k, then top-p rule out to -inf. Equal scores stay or go together."""
        if self.log_min_p is not None:
            scores = mx.where(scores < scores.max(axis=-1, keepdims=True) + self.log_min_p, -mx.inf, scores)
        top_k, top_p = self.top_k, self.top_p
        if top_k is None:
            return scores

        def cut(scores: mx.array) -> mx.array:
            descending = -mx.sort(-scores, axis=-1)
            kth = mx.take_along_axis(descending, top_k - 1, axis=-1)
            scores = mx.where(scores < kth, -mx.inf, scores)
            if top_p is None:
                return scores
            probabilities = mx.softmax(mx.where(descending < kth, -mx.inf, descending), axis=-1, precise=True)
            before = mx.cumsum(probabilities, axis=-1) - probabilities
            num_kept = mx.maximum((before < top_p).sum(axis=-1, keepdims=True), 1)
            least = mx.take_along_axis(descending, num_kept - 1, axis=-1)
            # A top_p of 1 keeps everything, also what rounding in the sum would drop.
            return mx.where((scores < least) & (top_p < 1), -mx.inf, scores)

        return on_rows(self.cut_rows, scores, cut)


def gumbel(draws: np.ndarray, vocab_size: int) -> mx.array:
    """Draw standard Gumbel noise, float32 [num_rows, vocab_size]; `draws`, uint64 [num_rows], are the rows' keys."""
    keys = mx.array(random_keys(draws))
    noise = mx.vmap(lambda key: mx.random.gumbel(shape=(vocab_size,), key=key))(keys)
    return mx.maximum(noise, LEAST_NOISE)


def random_keys(draws: np.ndarray) -> np.ndarray:
    """MLX's keys of random numbers of 64 bits: uint32 [n, 2], the high word first."""
    return np.ascontiguousarray(draws.view(np.uint32).reshape(-1, 2)[:, ::-1])


def mix(x: np.ndarray) -> np.ndarray:
    """Scatter the bits of uint64 numbers: a step of splitmix64 (Steele 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def indices(chosen: np.ndarray) -> slice | mx.array:
    """Name the rows that are chosen: all of them by a slice, for which nothing is gathered."""
    return slice(None) if chosen.all() else mx.array(np.flatnonzero(chosen).astype(np.int32))


def column(values: np.ndarray) -> mx.array:
    """Put a value per row into an array [n, 1]."""
    return mx.array(np.ascontiguousarray(values)[:, None])


def on_rows(rows: slice | mx.array, x: mx.array, function: Callable[[mx.array], mx.array]) -> mx.array:
    """Apply `function` to some rows of `x`; the others come back as they are."""
    if isinstance(rows, slice):
        return function(x)
    result = mx.array(x)  # so that the assignment leaves `x` as it is
    result[rows] = function(x[rows])
    return result
