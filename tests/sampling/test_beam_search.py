"""Beam search against a plain implementation of it, in ties and at its ends too."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.beam_oracle import LogprobsOf, dense_beam_search, unpaged_beam_search, unpaged_logprobs
from helpers.beam_searches import EARLY_STOPPING, LENGTH_PENALTIES, NEAR_TIE, advance, random_tables, run
from helpers.budget import budget
from helpers.tiny_models import unpaged_greedy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.sampling.sampler import best_tokens
from mlx_paged.sampling_params import BeamSearchParams


@st.composite
def problems(
    draw: st.DrawFn, levels: tuple[int, ...] = (1, 4, 16, 1 << 20)
) -> tuple[LogprobsOf, BeamSearchParams, list[int]]:
    width = draw(st.integers(1, 5))
    eos_token_ids = draw(st.lists(st.integers(0, 3), max_size=2, unique=True))
    params = BeamSearchParams(
        beam_width=width,
        max_tokens=draw(st.integers(1, 7)),
        length_penalty=draw(st.sampled_from((*LENGTH_PENALTIES, -1.0, 3.0))),
        early_stopping=draw(st.sampled_from(EARLY_STOPPING)),
        num_return_sequences=draw(st.none() | st.integers(1, width)),
    )
    tables = random_tables(draw(st.integers(0, 1 << 30)), draw(st.integers(4, 20)), draw(st.sampled_from(levels)))
    return tables, params, eos_token_ids


@settings(max_examples=budget(300, 30_000))
@given(problems())
def test_every_search_gives_what_the_plain_implementation_gives(problem: Any) -> None:
    found = run(*problem)
    assert [tuple(hypothesis) for hypothesis in found] == dense_beam_search(*problem).sequences
    scores = [hypothesis.score for hypothesis in found]
    assert scores == sorted(scores, reverse=True)


class Letters:
    """A text stream in which token 0 is the letter a, and one stop string is looked for."""

    def __init__(self, stop: str, text: str = "") -> None:
        self._stop = stop
        self._text = text

    def copy(self) -> Letters:
        return Letters(self._stop, self._text)

    def add(self, token: int) -> str | None:
        self._text += chr(ord("a") + token)
        return self._stop if self._text.endswith(self._stop) else None


@settings(max_examples=budget(150, 15_000))
@given(problems(), st.text("abcd", min_size=1, max_size=3), st.lists(st.integers(0, 3), max_size=2))
def test_stop_strings_and_stop_tokens_end_hypotheses_as_end_tokens_do(
    problem: Any, stop: str, stop_token_ids: list[int]
) -> None:
    tables, params, eos_token_ids = problem
    params = dataclasses.replace(params, stop=stop, stop_token_ids=stop_token_ids)
    expected = dense_beam_search(
        tables,
        params,
        {*eos_token_ids, *stop_token_ids},
        lambda output: "".join(chr(ord("a") + token) for token in output).endswith(stop),
    )
    assert [tuple(found) for found in run(tables, params, eos_token_ids, Letters(stop))] == expected.sequences


@settings(max_examples=budget(100, 10_000))
@given(problems(levels=(1 << 20,)), st.integers(1, 6))
def test_a_search_given_up_returns_what_it_would_with_so_many_tokens_allowed(problem: Any, num_steps: int) -> None:
    tables, params, eos_token_ids = problem
    params = dataclasses.replace(params, early_stopping=params.early_stopping is True)
    search = BeamSearch(params, 100, eos_token_ids)
    for _ in range(num_steps):
        advance(search, tables)
        assume(not search.finished)
    expected = dense_beam_search(tables, dataclasses.replace(params, max_tokens=num_steps), eos_token_ids)
    assert [tuple(hypothesis) for hypothesis in search.hypotheses()] == expected.sequences


@settings(max_examples=budget(50, 5_000))
@given(
    st.integers(0, 1 << 30),
    st.sampled_from([(2, 1), (2, 4), (3, 3), (4, 2)]),
    st.sampled_from(LENGTH_PENALTIES),
    st.sampled_from(EARLY_STOPPING),
)
def test_a_beam_as_wide_as_all_outputs_finds_the_best_of_all(
    seed: int, size: tuple[int, int], length_penalty: float, early_stopping: bool | str
) -> None:
    vocab_size, max_tokens = size
    tables = random_tables(seed, vocab_size)
    params = BeamSearchParams(vocab_size**max_tokens, max_tokens, length_penalty, early_stopping)
    every_output = [
        (sum(tables([tokens[:i]])[0, token] for i, token in enumerate(tokens)) / length**length_penalty)
        for length in range(1, max_tokens + 1)
        for tokens in itertools.product(range(vocab_size), repeat=length)
        if 0 not in tokens[:-1] and (tokens[-1] == 0 or length == max_tokens)
    ]
    assert [hypothesis.score for hypothesis in run(tables, params, [0])] == sorted(every_output, reverse=True)


def test_of_equal_candidates_the_lower_token_comes_first_and_then_the_better_parent() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3), 10, [])
    assert search.advance(np.array([[5, 9, 2, 7]]), np.full((1, 4), -1.0)) == [0, 0, 0]
    assert [beam.token_ids for beam in search.beams] == [[2], [5], [7]]
    assert search.advance(np.array([[6, 4], [4, 6], [6, 4]]), np.full((3, 2), -1.0)) == [0, 1, 2]
    assert [beam.token_ids for beam in search.beams] == [[2, 4], [5, 4], [7, 4]]


def test_of_equal_scores_the_hypothesis_that_finished_first_is_kept() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=1, length_penalty=0.0, early_stopping="never"), 10, [0])
    search.advance(np.array([[1, 0]]), np.array([[0.0, -1.0]]))
    search.advance(np.array([[0, 1]]), np.array([[-1.0, -1.0]]))
    assert search.finished
    assert search.hypotheses() == [([1, 0], -1.0, -1.0)]
    search = BeamSearch(BeamSearchParams(beam_width=2, length_penalty=0.0, early_stopping="never"), 3, [0])
    search.advance(np.array([[0, 1, 2, 3]]), np.array([[-1.0, 0.0, -2.0, -3.0]]))
    search.advance(np.array([[0, 2, 3, 4], [0, 2, 3, 4]]), np.array([[-1.0, -0.5, -9, -9], [-9, -9, -9, -9.0]]))
    assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [[1, 2], [0]]
    search.advance(np.array([[0, 2, 3, 4], [0, 2, 3, 4]]), np.array([[-0.5, -0.5, -9, -9], [-9, -9, -9, -9.0]]))
    assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [[0], [1, 0]]


def test_an_end_token_counts_only_among_the_first_beam_width_candidates() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2), 10, [0])
    search.advance(np.array([[1, 2, 0, 3]]), np.array([[-1.0, -2.0, -3.0, -4.0]]))
    assert [beam.token_ids for beam in search.beams] == [[1], [2]]
    assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [[1], [2]]
    search.advance(np.array([[0, 1, 2, 3]] * 2), np.array([[-1.0, -1.5, -8.0, -9.0]] * 2))
    assert [beam.token_ids for beam in search.beams] == [[1, 1], [2, 1]]
    assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [[1, 0], [1, 1]]


@pytest.mark.parametrize(("length_penalty", "goes_on"), [(1.0, True), (0.0, False), (-0.5, False)])
def test_never_grants_running_beams_the_length_that_suits_them_most(length_penalty: float, goes_on: bool) -> None:
    search = BeamSearch(BeamSearchParams(2, 64, length_penalty, "never"), 64, [0, 1])
    search.advance(np.array([[0, 1, 2, 3]]), np.array([[-1.0, -2.0, -3.0, -4.0]]))
    assert search.finished is not goes_on


def test_a_negative_length_penalty_does_not_stop_a_search_that_can_still_improve() -> None:
    search = BeamSearch(BeamSearchParams(2, 64, -1.0, "never"), 64, [0])
    search.advance(np.array([[0, 1, 2, 3]]), np.array([[-1.5, -0.25, -9.0, -9.0]]))
    search.advance(np.array([[0, 1, 2, 3]] * 2), np.array([[-4.0, -0.25, -5.0, -5.5], [-9.0, -9.0, -9.0, -9.0]]))
    assert [hypothesis.score for hypothesis in search.hypotheses()] == [-1.0, -1.5]  # [1, 1], which runs, before [0]
    assert not search.finished
    search.advance(np.array([[0, 1, 2, 3]] * 2), np.array([[-0.5, -0.25, -5.0, -5.5], [-9.0, -9.0, -9.0, -9.0]]))
    assert not search.finished  # 3 tokens at -0.75 in sum: -2.25 beats the -3 of [1, 1, 0], -48 would not


def test_the_candidates_suffice_when_every_end_token_is_likely() -> None:
    assert BeamSearch(BeamSearchParams(beam_width=4), 10, []).num_candidates == 8
    assert BeamSearch(BeamSearchParams(beam_width=4), 10, [3]).num_candidates == 8
    assert BeamSearch(BeamSearchParams(beam_width=4), 10, [3, 5, 5]).num_candidates == 12


def test_a_vocabulary_with_fewer_tokens_than_wanted_gives_fewer_beams() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=4), 10, [0])
    assert search.advance(np.array([[0, 1, 2]]), np.array([[-1.0, -2.0, -3.0]])) == [0, 0]
    assert search.advance(np.array([[0, 1, 2]] * 2), np.array([[-1.0, -2.0, -3.0]] * 2)) == [0, 1, 0, 1]


def test_a_search_in_which_only_the_end_is_left_is_over() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3), 10, [0])
    assert search.advance(np.array([[0]]), np.array([[-1.0]])) == []
    assert search.finished
    assert search.hypotheses() == [([0], -1.0, -1.0)]


def test_an_impossible_token_is_no_candidate() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3), 2, [0])
    assert search.advance(np.array([[0, 1, 2]]), np.array([[-np.inf, -0.5, -np.inf]])) == [0]
    assert search.advance(np.array([[0, 1, 2]]), np.array([[-0.5, -np.inf, -np.inf]])) == []
    assert search.hypotheses() == [([1, 0], -1.0, -0.5)]


def test_a_search_given_up_before_its_first_token_returns_nothing() -> None:
    search = BeamSearch(BeamSearchParams(), 10, [0])
    assert search.hypotheses() == []
    assert not search.finished


def test_nan_is_refused_and_changes_nothing() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2), 3, [0])
    search.advance(np.array([[1, 2]]), np.array([[-1.0, -2.0]]))
    with pytest.raises(ValueError, match=r"not numbers \(NaN\)"):
        search.advance(np.array([[1, 2], [1, 2]]), np.array([[-1.0, -2.0], [-1.0, np.nan]]))
    assert [beam.token_ids for beam in search.beams] == [[1], [2]]
    assert [hypothesis.score for hypothesis in search.hypotheses()] == [-1.0, -2.0]
    search.advance(np.array([[1, 2], [1, 2]]), np.array([[-1.0, -2.0], [-1.0, -9.0]]))
    assert not search.finished  # the refused step was none


def test_candidates_of_another_number_of_beams_are_refused() -> None:
    with pytest.raises(ValueError, match="1 beams need as many rows"):
        BeamSearch(BeamSearchParams(), 10, [0]).advance(np.zeros((2, 8), int), np.zeros((2, 8)))


@pytest.mark.parametrize("length_penalty", [-5e3, 5e3])
def test_an_absurd_length_penalty_is_no_error(length_penalty: float) -> None:
    found = run(random_tables(0, 12), BeamSearchParams(3, 5, length_penalty, "never"), [0, 1])
    assert len(found) == 3
    assert not any(math.isnan(hypothesis.score) for hypothesis in found)


@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_beam_is_greedy_decoding(
    tiny_model: Callable[..., nn.Module], family: str, early_stopping: bool | str
) -> None:
    model = tiny_model(family)
    prompt = [3, 14, 15, 92, 65]
    greedy = unpaged_greedy(model, prompt, 16)
    end = next(i for i in range(4, 16) if greedy.token_ids[i] not in greedy.token_ids[:i])
    params = BeamSearchParams(1, 16, 2.0, early_stopping)
    for eos_token_ids, length in (([], 16), ([greedy.token_ids[end]], end + 1)):
        (found,) = run(unpaged_logprobs(model, prompt), params, eos_token_ids)
        assert found.token_ids == greedy.token_ids[:length]
        assert found.cum_logprob == pytest.approx(sum(greedy.logprobs[:length]), abs=1e-4)
        assert found.score == found.cum_logprob / length**2


def test_the_best_tokens_of_a_model_are_enough_for_the_search(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    prompt = [5, 8, 13]
    for width in (2, 5):
        params = BeamSearchParams(width, 10, early_stopping="never")
        eos_token_ids = [unpaged_beam_search(model, prompt, params, []).sequences[0][0][4]]
        search = BeamSearch(params, 10, eos_token_ids)
        while not search.finished:
            inputs = mx.array([[*prompt, *beam.token_ids] for beam in search.beams])
            token_ids, logprobs = best_tokens(model(inputs)[:, -1], search.num_candidates)
            search.advance(np.array(token_ids), np.array(logprobs))
        expected = unpaged_beam_search(model, prompt, params, eos_token_ids)
        assert expected.margin > NEAR_TIE
        assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [s[0] for s in expected.sequences]
