"""What a sampler should draw, in float64 from the definitions, and rows to ask a sampler for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged import SamplingParams
from mlx_paged.sampling.sampler import SampledTokens, Sampler, sample_seed

VOCAB_SIZE = 41


def make_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB_SIZE, spread: float = 2.0) -> np.ndarray:
    """float32 [num_rows, vocab_size], no two of a row closer than 1e-3 unless there are very many."""
    rng = np.random.default_rng(seed)
    while True:
        logits = (spread * rng.standard_normal((num_rows, vocab_size))).astype(np.float32)
        if np.diff(np.sort(logits, axis=-1), axis=-1).min() > 1e-3 or logits.size >= 1000:
            return logits


class Row(NamedTuple):
    """A sequence as the sampler sees it."""

    params: SamplingParams
    stream: int = 0
    position: int = 0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()


class Drawn(NamedTuple):
    """SampledTokens, evaluated."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    top_token_ids: np.ndarray | None
    top_logprobs: np.ndarray | None


def evaluated(sampled: SampledTokens) -> Drawn:
    tops = (None if x is None else np.array(x) for x in sampled[2:])
    return Drawn(np.array(sampled.token_ids), np.array(sampled.logprobs), *tops)


def run(
    logits: np.ndarray | mx.array,
    rows: list[Row],
    masks: np.ndarray | None = None,
    numbers: Sequence[int] | None = None,
) -> Drawn:
    """One step of a new sampler, in which the rows have `numbers`, or 0, 1, 2..."""
    numbers = range(len(rows)) if numbers is None else numbers
    sampler = Sampler(max(numbers) + 1, logits.shape[-1])
    for number, row in zip(numbers, rows, strict=True):
        sampler.set_row(number, row.params, row.stream, row.prompt, row.output)
    positions = np.array([row.position for row in rows])
    return evaluated(sampler.sample(mx.array(logits), np.array(numbers), positions, masks))


def bitmask(allowed: np.ndarray) -> np.ndarray:
    """uint32 [n, words] of bool [n, vocab_size], by the definition."""
    masks = np.zeros((allowed.shape[0], -(-allowed.shape[1] // 32)), np.uint32)
    for row, token in zip(*np.nonzero(allowed), strict=True):
        masks[row, token // 32] |= np.uint32(1 << (token % 32))
    return masks


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def oracle(logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> np.ndarray:
    """The probabilities [vocab_size] that a row is drawn from, one token after another, in float64."""
    x = logits.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in range(len(x)):
        if token in prompt or token in output:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        occurrences = output.count(token)
        x[token] -= params.frequency_penalty * occurrences
        if occurrences:
            x[token] -= params.presence_penalty
    if params.temperature == 0:
        return (np.arange(len(x)) == x.argmax()).astype(float)
    probabilities = np.exp(log_softmax(x / params.temperature))
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    best_first = np.argsort(-probabilities, kind="stable")
    if params.top_k:
        probabilities[best_first[params.top_k :]] = 0
    probabilities /= probabilities.sum()
    before = 0.0
    for token in best_first:
        share = probabilities[token]
        if before >= params.top_p:
            probabilities[token] = 0
        before += share
    return probabilities / probabilities.sum()


def frequencies(logits: np.ndarray, params: SamplingParams, num_draws: int, **tokens: list[int]) -> np.ndarray:
    """How often each token is drawn, as shares, in one batch of `num_draws` rows of the same logits."""
    rows = [Row(params, sample_seed(123, 0), position, **tokens) for position in range(num_draws)]
    drawn = run(np.repeat(logits[None], num_draws, axis=0), rows).token_ids
    return np.bincount(drawn, minlength=len(logits)) / num_draws


PROMPT, OUTPUT = [3, 3, 5, 8, 40], [5, 5, 5, 7, 0]
