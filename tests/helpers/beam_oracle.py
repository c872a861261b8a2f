"""Beam search written down plainly, over whole rows of log-probabilities: what the engine's is compared with.

It shares nothing with `mlx_paged.sampling.beam_search`: every continuation of every beam is a tuple in one sorted
list, and the model, if there is one, is run over whole sequences without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_paged.sampling_params import BeamSearchParams

LogprobsOf = Callable[[list[tuple[int, ...]]], np.ndarray]


@dataclass
class OracleResult:
    """sequences: (token ids, cum_logprob, score), best first. margin: how far the closest decision was from another.

    Rounding below half the margin cannot change which sequences come back; their order follows from the scores.
    """

    sequences: list[tuple[list[int], float, float]] = field(default_factory=list)
    margin: float = math.inf


def dense_beam_search(
    logprobs_of: LogprobsOf,
    params: BeamSearchParams,
    eos_token_ids: Collection[int],
    is_stopped: Callable[[tuple[int, ...]], bool] = lambda output: False,
) -> OracleResult:
    """`logprobs_of`: from outputs so far, all of one length, to the log-probabilities of the next token of each.

    is_stopped: whether an output ends with its last token, beside those that end with an end token.
    """

    def ends(entry: tuple[float, int, int, tuple[int, ...]]) -> bool:
        return entry[1] in eos_token_ids or is_stopped((*entry[3], entry[1]))

    width, penalty = params.beam_width, params.length_penalty
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, float, tuple[int, ...]]] = []  # (score, cum_logprob, tokens)
    margin = math.inf
    for length in range(1, params.max_tokens + 1):
        table = logprobs_of([tokens for _, tokens in running])
        pool = []
        for rank, (cum_logprob, tokens) in enumerate(running):
            for token, logprob in enumerate(table[rank].tolist()):
                pool.append((-(cum_logprob + logprob), token, rank, tokens))
        pool.sort()
        if length == params.max_tokens:
            ended, goes_on = pool[:width], []
        else:
            ended = [entry for entry in pool[:width] if ends(entry)]
            goes_on = [entry for entry in pool if not ends(entry)]
            margin = min(margin, _gap([-entry[0] for entry in goes_on], width))
        if length == params.max_tokens or any(ends(entry) for entry in pool[: 2 * width]):
            margin = min(margin, _gap([-entry[0] for entry in pool], width))
        done += [(-entry[0] / length**penalty, -entry[0], (*entry[3], entry[1])) for entry in ended]
        done.sort(key=lambda hypothesis: hypothesis[0], reverse=True)
        margin = min(margin, _gap([score for score, _, _ in done], width))
        done = done[:width]
        running = [(-entry[0], (*entry[3], entry[1])) for entry in goes_on[:width]]
        if len(done) == width:
            if params.early_stopping is True or width == 1:
                break
            reach = params.max_tokens if params.early_stopping == "never" and penalty > 0 else length
            if running:
                hope = running[0][0] / reach**penalty
                margin = min(margin, abs(hope - done[-1][0]))
                if hope <= done[-1][0]:
                    break
        if not running:
            break
    count = params.num_return_sequences or width
    margin = min(margin, _gap([score for score, _, _ in done], count))
    return OracleResult([(list(tokens), cum_logprob, score) for score, cum_logprob, tokens in done[:count]], margin)


def unpaged_logprobs(model: nn.Module, prompt: Sequence[int]) -> LogprobsOf:
    """The log-probabilities after `prompt` and an output, float64, each computed once however often asked for."""
    known: dict[tuple[int, ...], np.ndarray] = {}

    def logprobs_of(outputs: list[tuple[int, ...]]) -> np.ndarray:
        new = [tokens for tokens in outputs if tokens not in known]
        if new:
            logits = model(mx.array([[*prompt, *tokens] for tokens in new]))[:, -1].astype(mx.float32)
            for tokens, row in zip(new, np.array(logits, dtype=np.float64), strict=True):
                known[tokens] = row - row.max() - np.log(np.exp(row - row.max()).sum())
        return np.stack([known[tokens] for tokens in outputs])

    return logprobs_of


def unpaged_beam_search(
    model: nn.Module, prompt: Sequence[int], params: BeamSearchParams, eos_token_ids: Collection[int]
) -> OracleResult:
    """Beam search with an mlx-lm model that no paged cache has touched."""
    return dense_beam_search(unpaged_logprobs(model, prompt), params, eos_token_ids)


def _gap(descending: list[float], count: int) -> float:
    """How far the last of the first `count` values is from the next."""
    return descending[count - 1] - descending[count] if len(descending) > count else math.inf
