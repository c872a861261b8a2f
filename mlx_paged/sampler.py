"""From logits to tokens: all rows of a step at once, each with its own parameters and random stream.

Order of operations as in vLLM: log-probabilities of the model's own distribution, then logit bias, penalties,
temperature, min-p, top-k, top-p, and a draw by the Gumbel-max method. A row's random numbers depend on its seed, its
index among the samples of its request and the position of the token, and on nothing else.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.sampling_params import SamplingParams

_MASK = (1 << 64) - 1


class TokenCounts:
    """How often each token occurs in a sequence, for penalties: arrays of the tokens seen, which grow in place."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._slot: dict[int, int] = {}
        self._tokens = np.zeros(64, np.int32)
        self._counts = np.zeros(64, np.float32)
        for token in prompt:
            self._slot_of(token)

    def add(self, token: int) -> None:
        """`token` was put out."""
        slot = self._slot_of(token)  # may replace the arrays by larger ones
        self._counts[slot] += 1

    @property
    def tokens(self) -> np.ndarray:
        """int32: the distinct tokens of prompt and output."""
        return self._tokens[: len(self._slot)]

    @property
    def counts(self) -> np.ndarray:
        """float32: how often each of `tokens` was put out; 0 for those of the prompt alone."""
        return self._counts[: len(self._slot)]

    def _slot_of(self, token: int) -> int:
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[slot] = token
        return slot


class SampleRow(NamedTuple):
    """What the sampler needs to know of a row: parameters, 64 bits that name its random draw, and token counts."""

    params: SamplingParams
    draw: int
    counts: TokenCounts | None


class SampledTokens(NamedTuple):
    """token_ids: int [num_rows]; logprobs: float [num_rows], the model's, of those tokens; top_*: [num_rows, k]."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_token_ids: np.ndarray | None
    top_logprobs: np.ndarray | None


def draw_id(seed: int, index: int, position: int) -> int:
    """64 bits for the draw of the token at `position` of sample `index` under `seed` (splitmix64, Steele 2014)."""
    return _mix(_mix(_mix(seed & _MASK) + index) + position)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def sample(logits: mx.array, rows: Sequence[SampleRow]) -> SampledTokens:
    """Choose a token per row. logits: [num_rows, vocab_size], any float type; a value of NaN never wins."""
    logits = logits.astype(mx.float32)
    logits = mx.where(mx.isnan(logits), -mx.inf, logits)
    params = [row.params for row in rows]
    model_logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    logits = _penalise(_bias(logits, params), rows)
    tokens = mx.argmax(logits, axis=-1)
    if not all(p.is_greedy for p in params):
        greedy = np.array([p.is_greedy for p in params])
        temperature = [1.0 if p.is_greedy else p.temperature for p in params]
        scaled = _truncate(logits / _column(temperature), params)
        noise = _gumbel([row.draw for row in rows], logits.shape[-1])
        tokens = mx.where(mx.array(greedy), tokens, mx.argmax(scaled + noise, axis=-1))
    logprobs = mx.take_along_axis(model_logprobs, tokens[:, None], axis=-1)[:, 0]
    num_top = max((p.logprobs or 0 for p in params), default=0)
    if num_top == 0:
        mx.eval(tokens, logprobs)
        return SampledTokens(np.array(tokens), np.array(logprobs), None, None)
    num_top = min(num_top, logits.shape[-1])
    top = mx.argpartition(-model_logprobs, kth=num_top - 1, axis=-1)[:, :num_top]
    top_logprobs = mx.take_along_axis(model_logprobs, top, axis=-1)
    order = mx.argsort(-top_logprobs, axis=-1)
    top, top_logprobs = (mx.take_along_axis(x, order, axis=-1) for x in (top, top_logprobs))
    mx.eval(tokens, logprobs, top, top_logprobs)
    return SampledTokens(np.array(tokens), np.array(logprobs), np.array(top), np.array(top_logprobs))


def _column(values: Sequence[float]) -> mx.array:
    """float32 [num_rows, 1]"""
    return mx.array(np.array(values, np.float32)[:, None])


def _bias(logits: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    entries = [
        (row, token, value) for row, p in enumerate(params) for token, value in (p.logit_bias or {}).items()
    ]
    if not entries:
        return logits
    rows, tokens, values = zip(*entries, strict=True)
    return logits.at[mx.array(rows), mx.array(tokens)].add(mx.array(values, mx.float32))


def _penalise(logits: mx.array, rows: Sequence[SampleRow]) -> mx.array:
    """Repetition (of prompt and output), presence and frequency (of output) penalties on the tokens that occur."""
    penalised = [(i, row.params, row.counts) for i, row in enumerate(rows) if row.counts is not None]
    if not penalised:
        return logits
    sizes = [len(counts.tokens) for _, _, counts in penalised]
    row_ids = mx.array(np.repeat([i for i, _, _ in penalised], sizes).astype(np.int32))
    tokens = mx.array(np.concatenate([counts.tokens for _, _, counts in penalised]))
    counts_out = mx.array(np.concatenate([counts.counts for _, _, counts in penalised]))

    def per_token(name: str) -> mx.array:
        return mx.array(np.repeat([getattr(p, name) for _, p, _ in penalised], sizes).astype(np.float32))

    repetition = per_token("repetition_penalty")
    seen = logits[row_ids, tokens]
    seen = mx.where(seen > 0, seen / repetition, seen * repetition)
    seen = seen - per_token("frequency_penalty") * counts_out - per_token("presence_penalty") * (counts_out > 0)
    penalised_logits = logits + 0  # the model's log-probabilities still need the original
    penalised_logits[row_ids, tokens] = seen
    return penalised_logits


def _truncate(logits: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    """Min-p, then top-k, then top-p: what they rule out becomes -inf. Equal logits stay or go together."""
    vocab_size = logits.shape[-1]
    if any(p.min_p > 0 for p in params):
        with np.errstate(divide="ignore"):
            least = mx.array(np.log(np.array([[p.min_p] for p in params], np.float32)))
        logits = mx.where(logits < logits.max(axis=-1, keepdims=True) + least, -mx.inf, logits)
    top_k = [p.top_k if 0 < p.top_k < vocab_size and not p.is_greedy else vocab_size for p in params]
    top_p = [p.top_p if not p.is_greedy else 1.0 for p in params]
    if min(top_k) == vocab_size and min(top_p) == 1:
        return logits
    descending = -mx.sort(-logits, axis=-1)
    kth = mx.take_along_axis(descending, mx.array(np.array(top_k, np.int32)[:, None] - 1), axis=-1)
    logits = mx.where(logits < kth, -mx.inf, logits)
    if min(top_p) < 1:
        descending = mx.where(descending < kth, -mx.inf, descending)
        probabilities = mx.softmax(descending, axis=-1, precise=True)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        num_kept = mx.maximum((before < _column(top_p)).sum(axis=-1, keepdims=True), 1)
        least = mx.take_along_axis(descending, num_kept - 1, axis=-1)
        # A top_p of 1 keeps everything, also what rounding in the sum would drop.
        logits = mx.where((logits < least) & (_column(top_p) < 1), -mx.inf, logits)
    return logits


def _gumbel(draws: Sequence[int], vocab_size: int) -> mx.array:
    """Standard Gumbel noise, float32 [num_rows, vocab_size]; each row from the key that its draw names."""
    keys = np.array([[draw >> 32, draw & 0xFFFFFFFF] for draw in draws], np.uint32)
    return mx.vmap(lambda key: mx.random.gumbel(shape=(vocab_size,), key=key))(mx.array(keys))
