"""From logits to tokens: all rows of a step at once, each with its own parameters and random numbers.

Order of operations as in vLLM: log-probabilities of the model's own distribution, then the grammar's mask, logit bias,
penalties, temperature, min-p, top-k, top-p, and a draw by the Gumbel-max method. A row's random numbers depend on its
seed, its index among the samples of its request and the position of the token, and on nothing else.

What a step needs of its rows is gathered once and kept while the same rows come: then only the keys of the draws are
new. A stage works on the rows that need it, and is skipped where none does.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.cpu.exponential import logsumexp
from mlx_paged.sampling.draw_kernel import KernelRows, choose_kind
from mlx_paged.sampling.draws import RandomRows, column, indices, mix, on_rows
from mlx_paged.sampling.token_counts import TokenCounts
from mlx_paged.sampling_params import SamplingParams

_LARGE = 1e30  # a larger parameter means no more than this, and might overflow float32
_UINT64 = (1 << 64) - 1
PARAMETERS = np.dtype(  # of a row; temperature 0: greedy; top_k vocab_size: all
    [(name, np.float32) for name in ("temperature", "log_min_p", "top_p")]
    + [(name, np.float32) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")]
    + [("top_k", np.int32), ("num_top", np.int32), ("sample_seed", np.uint64)]
)


class SampledTokens(NamedTuple):
    """The tokens of a step, a row for each, not evaluated yet."""

    token_ids: mx.array
    """uint32 [n]."""
    logprobs: mx.array
    """Log-probabilities of those tokens in the model's own distribution, float32 [n]."""
    top_token_ids: mx.array | None
    """The most likely tokens, uint32 [n, k], best first; None if no row reports any."""
    top_logprobs: mx.array | None
    """Their log-probabilities, float32 [n, k]."""


class _PenaltyRows(NamedTuple):
    """Rows of a batch that have penalties; each float32 [num_penalty_rows, 1] unless said otherwise."""

    rows: slice | mx.array  # in the batch
    count_rows: np.ndarray  # of `TokenCounts`, int32 [num_penalty_rows]
    device_count_rows: mx.array  # the same
    repetition: mx.array
    presence: mx.array
    frequency: mx.array


class _Batch(NamedTuple):
    """What the rows of a step ask for; None for a stage that no row needs."""

    rows: np.ndarray
    bias: tuple[mx.array, mx.array, mx.array] | None  # row in the batch, token, value
    penalties: _PenaltyRows | None
    random: RandomRows | KernelRows | None
    num_top: int


class Sampler:
    """Choose a token per row, each row by its own parameters."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self.num_rebuilds = 0
        """How often the parameters of a batch had to be gathered."""
        self._vocab_size = vocab_size
        self._params = np.zeros(max_num_seqs, PARAMETERS)
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of the rows that have it: tokens, values
        self._counts = TokenCounts(max_num_seqs, vocab_size)
        self._batch: _Batch | None = None
        kind = choose_kind()
        self._gather_random = RandomRows.gather if kind is None else partial(KernelRows.gather, kind)

    def set_row(
        self, row: int, params: SamplingParams, seed: int, prompt: Sequence[int], output: Sequence[int]
    ) -> None:
        """Give `row` to a sequence with the tokens it has so far. `seed` is its `sample_seed`."""
        self._params[row] = (
            0.0 if params.is_greedy else min(params.temperature, _LARGE),
            math.log(params.min_p) if params.min_p > 0 else -math.inf,
            params.top_p,
            min(max(params.repetition_penalty, 1 / _LARGE), _LARGE),
            params.presence_penalty,
            params.frequency_penalty,
            min(params.top_k or self._vocab_size, self._vocab_size),
            min(params.logprobs or 0, self._vocab_size),
            seed,
        )
        self._bias.pop(row, None)
        if params.logit_bias:
            values = [min(max(value, -_LARGE), _LARGE) for value in params.logit_bias.values()]
            self._bias[row] = np.array(list(params.logit_bias), np.int32), np.array(values, np.float32)
        if params.has_penalties:
            self._counts.set(row, prompt, output)
        else:
            self._counts.release(row)
        if self._batch is not None and (self._batch.rows == row).any():
            self._batch = None

    def sample(
        self,
        logits: mx.array,
        rows: np.ndarray,
        positions: np.ndarray,
        masks: np.ndarray | None = None,
        scores: mx.array | None = None,
        ahead: Sequence[Sequence[int]] = (),
    ) -> SampledTokens:
        """Choose a token for each of `rows`. Returns lazy arrays: nothing is evaluated here.

        logits: [n, vocab_size], any float type. rows: int [n], whose logits they are, in any order, each at most once
        but for drafts.
        positions: int [n], the indices in the rows' outputs of the tokens to draw. masks: 32-bit
        [n, ceil(vocab_size / 32)], where bit t % 32 of word t // 32 allows token t. scores: float32 of the logits'
        shape, to draw from instead of them. ahead: of each row, drafts that come before its token and are not counted
        yet; nothing if no row has any.

        Log-probabilities are those of the logits, without a mask. A row with a logit of NaN or +inf gets the
        log-probability NaN and a token that means nothing.
        """
        batch = self._batch
        if batch is None or not np.array_equal(batch.rows, rows):
            batch = self._batch = self._gather_params(rows)
        logits = logits.astype(mx.float32)
        normaliser = logsumexp(logits)
        normaliser = mx.where(normaliser < mx.inf, normaliser, mx.nan)

        scores = logits if scores is None else scores
        scores = scores if masks is None else _mask(scores, masks)
        if batch.bias is not None:
            row, token, value = batch.bias
            scores = scores.at[row, token].add(value)
        if batch.penalties is not None:
            counted = np.flatnonzero(self._counts.count_rows[rows] >= 0).tolist() if ahead else []
            more = [(i, token) for i, number in enumerate(counted) for token in ahead[number]]
            counts = self._counts.read(batch.penalties.device_count_rows, more)
            scores = _penalise(scores, batch.penalties, *counts)
        random = batch.random
        token_ids = mx.argmax(scores, axis=-1) if random is None else random.draw(scores, positions)
        if batch.penalties is not None:
            count_rows, drawn = batch.penalties.count_rows, token_ids[batch.penalties.rows]
            if ahead:  # of what comes after drafts it is not known whether it counts
                firsts = np.array([i for i, number in enumerate(counted) if not ahead[number]], np.int32)
                count_rows, drawn = count_rows[firsts], drawn[mx.array(firsts)]
            self._counts.add(count_rows, drawn)

        logprobs = (mx.take_along_axis(logits, token_ids[:, None], axis=-1) - normaliser)[:, 0]
        if batch.num_top == 0:
            return SampledTokens(token_ids, logprobs, None, None)
        top, top_logits = likeliest(logits, batch.num_top)
        return SampledTokens(token_ids, logprobs, top, top_logits - normaliser)

    def count(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """Count a token of each of these rows, if it has penalties."""
        self._counts.add_known(rows, token_ids)

    def _gather_params(self, rows: np.ndarray) -> _Batch:
        """Put together what these rows ask for, once for all the steps in which they come."""
        self.num_rebuilds += 1
        params = self._params[rows]
        bias = None
        biased = [(number, *self._bias[row]) for number, row in enumerate(rows.tolist()) if row in self._bias]
        if biased:
            numbers, tokens, values = zip(*biased, strict=True)
            number_of_each = np.repeat(np.array(numbers, np.int32), [len(t) for t in tokens])
            bias = mx.array(number_of_each), mx.array(np.concatenate(tokens)), mx.array(np.concatenate(values))
        penalties = _gather_penalties(params, self._counts.count_rows[rows])
        random = self._gather_random(params, self._vocab_size) if (params["temperature"] > 0).any() else None
        return _Batch(rows.copy(), bias, penalties, random, int(params["num_top"].max()))


def likeliest(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Find k most likely tokens of each row, best first. Returns their ids and logits, both [num_rows, k]."""
    top = mx.argpartition(-logits, kth=k - 1, axis=-1)[:, :k]
    top_logits = mx.take_along_axis(logits, top, axis=-1)
    order = mx.argsort(-top_logits, axis=-1)
    return mx.take_along_axis(top, order, axis=-1), mx.take_along_axis(top_logits, order, axis=-1)


def best_tokens(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Find the k most likely tokens of each row; of equal logits the lower token ids.

    logits: [num_rows, vocab_size], any float type. Returns token ids, int32 [num_rows, min(k, vocab_size)], best
    first, and their log-probabilities, float32 of the same shape. Both are lazy. A row with a NaN among its logits
    gets the log-probabilities NaN.
    """
    vocab_size = logits.shape[-1]
    k = min(k, vocab_size)
    logits = logits.astype(mx.float32)
    keys = mx.partition(_sort_keys(logits), k - 1, axis=-1)[:, :k] if k < vocab_size else _sort_keys(logits)
    token_ids = mx.sort(keys, axis=-1).astype(mx.uint32).astype(mx.int32)  # the low half
    normaliser = logsumexp(logits)
    # Said outright, since the fast exponentials of a GPU need not pass a NaN on.
    normaliser = mx.where(mx.isnan(logits).any(axis=-1, keepdims=True), mx.nan, normaliser)
    return token_ids, mx.take_along_axis(logits, token_ids, axis=-1) - normaliser


def sample_seed(seed: int, index: int) -> int:
    """Derive the 64-bit seed of sample `index` of a request with `seed` (splitmix64, Steele 2014)."""
    seed_bits, index_bits = np.array([[seed & _UINT64], [index & _UINT64]], np.uint64)
    return int(mix(mix(seed_bits) + index_bits)[0])


def _sort_keys(logits: mx.array) -> mx.array:
    """Make uint64 keys that sort as the logits from the highest, then as the token ids from the lowest.

    A partition leaves open which of equal values it keeps, and half types have many: so no two may be equal. The
    high half is the float's bits, made to fall as the float rises; the low half is the token id.
    """
    bits = mx.where(logits == 0, 0, logits).view(mx.uint32)  # one zero, not two
    falling = mx.where(bits >> 31, bits, ~bits & 0x7FFFFFFF)
    return (falling.astype(mx.uint64) << 32) | mx.arange(logits.shape[-1]).astype(mx.uint64)


def _gather_penalties(params: np.ndarray, count_rows: np.ndarray) -> _PenaltyRows | None:
    chosen = count_rows >= 0
    if not chosen.any():
        return None
    params, count_rows = params[chosen], count_rows[chosen]
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    return _PenaltyRows(indices(chosen), count_rows, mx.array(count_rows), *(column(params[name]) for name in names))


def _mask(logits: mx.array, masks: np.ndarray) -> mx.array:
    """Set the logits of tokens that a mask does not allow to -inf."""
    octets = mx.array(np.ascontiguousarray(masks).view(np.uint8))
    bits = octets[:, :, None] & mx.array([1, 2, 4, 8, 16, 32, 64, 128], mx.uint8)
    return mx.where(bits.reshape(len(masks), -1)[:, : logits.shape[-1]] != 0, logits, -mx.inf)


def _penalise(scores: mx.array, penalties: _PenaltyRows, occurs: mx.array, num_out: mx.array) -> mx.array:
    """Penalise the tokens that occur: repetition in prompt and output, presence and frequency in the output."""

    def penalised(scores: mx.array) -> mx.array:
        repeated = mx.where(scores > 0, scores / penalties.repetition, scores * penalties.repetition)
        scores = mx.where(occurs, repeated, scores)
        return scores - penalties.frequency * num_out - penalties.presence * (num_out > 0)

    return on_rows(penalties.rows, scores, penalised)
