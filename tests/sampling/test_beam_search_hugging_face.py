"""Beam searches end as those of transformers do, which were recorded; with torch also as they do now."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.beam_oracle import dense_beam_search
from helpers.beam_searches import EARLY_STOPPING, LENGTH_PENALTIES, NEAR_TIE, run
from helpers.hugging_face import FAMILIES, HuggingFace, Searched, recorded

from mlx_paged.sampling_params import BeamSearchParams


@pytest.fixture(scope="module", params=FAMILIES)
def hugging_face(request: pytest.FixtureRequest) -> Iterator[HuggingFace]:
    yield HuggingFace(request.param)


def assert_same(found: list[tuple[list[int], float, float]], expected: list[tuple[list[int], float, float]]) -> None:
    """The same sequences in the same order, but for the order of scores that are nearly equal."""
    assert len(found) == len(expected)
    for tokens, cum_logprob, score in found:
        twins = [other for other in expected if other[0] == tokens]
        assert len(twins) == 1, (tokens, expected)
        assert score == pytest.approx(twins[0][2], abs=1e-3)
        assert cum_logprob == pytest.approx(twins[0][1], abs=1e-3)
    for (tokens, _, score), (other, _, other_score) in zip(found, expected, strict=True):
        assert tokens == other or abs(score - other_score) < NEAR_TIE


@pytest.mark.parametrize("family", FAMILIES)
def test_searches_find_what_transformers_found(family: str) -> None:
    num_near_ties, tables = 0, Searched(family).tables
    for params, eos, results in recorded(family):
        for logprobs_of, expected in zip(tables, results, strict=True):
            assert len(expected.sequences) == (params.num_return_sequences or params.beam_width)
            if dense_beam_search(logprobs_of, params, eos).margin < NEAR_TIE:
                num_near_ties += 1
                continue
            assert_same([tuple(found) for found in run(logprobs_of, params, eos)], expected.sequences)
    assert num_near_ties <= 1


def test_what_was_recorded_is_what_transformers_finds(
    hugging_face: HuggingFace, request: pytest.FixtureRequest
) -> None:
    kept = recorded(request.node.callspec.params["hugging_face"])
    for (params, eos, results), now in zip(kept, hugging_face.record(), strict=True):
        assert eos == now["eos"]
        for logprobs_of, expected, found in zip(hugging_face.tables, results, now["results"], strict=True):
            if dense_beam_search(logprobs_of, params, eos).margin >= NEAR_TIE:
                assert_same(found, expected.sequences)


@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_searches_end_as_those_of_hugging_face(
    hugging_face: HuggingFace, width: int, early_stopping: bool | str
) -> None:
    num_searches = num_near_ties = 0
    for i, length_penalty in enumerate(LENGTH_PENALTIES):
        eos_token_ids = hugging_face.end_tokens((1, 2, 8)[(i + width) % 3])
        params = BeamSearchParams(width, 10, length_penalty, early_stopping, 1 + i % width if i % 3 else None)
        results = hugging_face.generate(hugging_face.prompts, params, eos_token_ids)
        for prompt, tables, result in zip(hugging_face.prompts, hugging_face.tables, results, strict=True):
            expected = dense_beam_search(tables, params, eos_token_ids)
            found = [tuple(hypothesis) for hypothesis in run(tables, params, eos_token_ids)]
            num_searches += 1
            if expected.margin < NEAR_TIE:
                num_near_ties += 1
                continue
            assert_same(found, expected.sequences)
            assert_same(expected.sequences, result.sequences)
            if i == 3:
                (alone,) = hugging_face.generate([prompt], params, eos_token_ids)
                assert_same(expected.sequences, alone.sequences)
    assert num_near_ties <= num_searches // 10


def test_the_searches_compared_end_in_all_manners(hugging_face: HuggingFace) -> None:
    ended, num_outcomes = [], []
    for num_end_tokens, length_penalty, tables in itertools.product((1, 2, 8), LENGTH_PENALTIES, hugging_face.tables):
        eos_token_ids = hugging_face.end_tokens(num_end_tokens)
        params = [BeamSearchParams(5, 10, length_penalty, early_stopping) for early_stopping in EARLY_STOPPING]
        found = [run(tables, p, eos_token_ids) for p in params]
        ended += [hypothesis.token_ids[-1] in eos_token_ids for hypotheses in found for hypothesis in hypotheses]
        num_outcomes.append(len({str(hypotheses) for hypotheses in found}))
    assert 0.3 < np.mean(ended) < 0.9
    assert np.mean(num_outcomes) > 1.1


def test_a_search_without_end_tokens_runs_as_long_as_that_of_hugging_face(hugging_face: HuggingFace) -> None:
    params = BeamSearchParams(4, 9)
    results = hugging_face.generate(hugging_face.prompts, params, [])
    for tables, result in zip(hugging_face.tables, results, strict=True):
        found = run(tables, params, [])
        assert {len(hypothesis.token_ids) for hypothesis in found} == {9}
        assert_same([tuple(hypothesis) for hypothesis in found], result.sequences)


def test_one_beam_is_the_greedy_decoding_of_hugging_face(hugging_face: HuggingFace) -> None:
    eos_token_ids = hugging_face.end_tokens(2)
    for prompt, tables in zip(hugging_face.prompts, hugging_face.tables, strict=True):
        output = hugging_face.twin.generate(
            hugging_face.torch.tensor([prompt]),
            attention_mask=hugging_face.torch.ones(1, len(prompt), dtype=int),
            do_sample=False, num_beams=1, max_new_tokens=12, eos_token_id=eos_token_ids, pad_token_id=0,
        )  # fmt: skip
        (found,) = run(tables, BeamSearchParams(1, 12, early_stopping="never"), eos_token_ids)
        assert found.token_ids == output[0, len(prompt) :].tolist()
