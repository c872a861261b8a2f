"""Beam searches to run by hand: over tables of log-probabilities, and over a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from helpers.beam_oracle import LogprobsOf
from mlx_paged.sampling.beam_search import BeamSearch, Hypothesis
from mlx_paged.sampling_params import BeamSearchParams

EARLY_STOPPING = (False, True, "never")
LENGTH_PENALTIES = (-0.5, 0.0, 0.8, 1.0, 2.0)
NEAR_TIE = 1e-4  # float32 in two frameworks: where a decision is closer than this, either outcome is right


def best_of(table: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row in no particular order, of equal ones the lower token ids."""
    token_ids = np.argsort(-table, axis=-1, kind="stable")[:, :k][:, ::-1]
    return token_ids, np.take_along_axis(table, token_ids, axis=-1)


def advance(search: BeamSearch, logprobs_of: LogprobsOf) -> None:
    """One step of a search; the new beams must grow out of the parents that it returns."""
    old = [beam.token_ids for beam in search.beams]
    parents = search.advance(*best_of(logprobs_of([tuple(tokens) for tokens in old]), search.num_candidates))
    assert len(parents) == len(search.beams)
    assert [beam.token_ids[:-1] for beam in search.beams] == [old[parent] for parent in parents]


def run(
    logprobs_of: LogprobsOf, params: BeamSearchParams, eos_token_ids: Collection[int], text_stream: Any = None
) -> list[Hypothesis]:
    search = BeamSearch(params, params.max_tokens, eos_token_ids, text_stream)
    while not search.finished:
        advance(search, logprobs_of)
    assert search.beams == []
    return search.hypotheses()


def random_tables(seed: int, vocab_size: int, levels: int = 1 << 20) -> LogprobsOf:
    """Log-probabilities that depend on the output so far; few `levels` make many ties. Their sums are exact."""

    def logprobs_of(outputs: list[tuple[int, ...]]) -> np.ndarray:
        rows = [np.random.default_rng([seed, *tokens]).integers(1, levels + 1, vocab_size) for tokens in outputs]
        return np.stack(rows) * (-4.0 / levels)

    return logprobs_of
