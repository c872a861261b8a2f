"""Log-probabilities that the sampler reports are the model's own, and tell of logits that are no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.sampling_oracle import VOCAB_SIZE, Row, bitmask, log_softmax, make_logits, run

from mlx_paged import SamplingParams


def test_logprobs_are_the_models_before_bias_penalties_and_temperature() -> None:
    logits = make_logits(3, seed=7)
    params = SamplingParams(
        temperature=0.3, repetition_penalty=1.9, presence_penalty=1.0, logit_bias={4: 50.0}, top_k=2, logprobs=6
    )
    rows = [Row(params, i, 0, [1, 2], [4]) for i in range(3)]
    sampled = run(logits, rows)
    assert sampled.token_ids.tolist() == [4, 4, 4]
    assert sampled.top_token_ids is not None and sampled.top_logprobs is not None
    for row in range(3):
        model = log_softmax(logits[row])
        np.testing.assert_allclose(sampled.logprobs[row], model[4], atol=1e-5)
        best = np.argsort(-model)[:6]
        assert sampled.top_token_ids[row].tolist() == best.tolist()
        np.testing.assert_allclose(sampled.top_logprobs[row], model[best], atol=1e-5)


def test_logprobs_are_the_models_also_where_only_some_rows_have_penalties() -> None:
    logits = make_logits(3, seed=22)
    params = SamplingParams(temperature=0, repetition_penalty=3.0, presence_penalty=2.0, logprobs=VOCAB_SIZE)
    rows = [Row(SamplingParams()), Row(params, 0, 0, [1, 2], list(range(30))), Row(SamplingParams(top_k=2))]
    drawn = run(logits, rows)
    assert drawn.top_logprobs is not None
    for row in range(3):
        model = log_softmax(logits[row])
        np.testing.assert_allclose(drawn.logprobs[row], model[drawn.token_ids[row]], atol=1e-5)
        np.testing.assert_allclose(drawn.top_logprobs[row], np.sort(model)[::-1], atol=1e-5)


def test_top_logprobs_are_sorted_and_as_many_as_the_row_that_asks_for_most() -> None:
    logits = make_logits(4, seed=8)
    rows = [Row(SamplingParams(logprobs=k), 0) for k in (None, 0, 2, 5)]
    sampled = run(logits, rows)
    assert sampled.top_logprobs is not None
    assert sampled.top_logprobs.shape == (4, 5)
    assert (np.diff(sampled.top_logprobs, axis=-1) < 0).all()


def test_more_logprobs_than_tokens_gives_all_tokens() -> None:
    sampled = run(make_logits(1), [Row(SamplingParams(logprobs=1000))])
    assert sampled.top_token_ids is not None
    assert sorted(sampled.top_token_ids[0].tolist()) == list(range(VOCAB_SIZE))


def test_without_a_wish_for_logprobs_none_are_gathered() -> None:
    sampled = run(make_logits(2), [Row(SamplingParams()), Row(SamplingParams(logprobs=0))])
    assert sampled.top_token_ids is None and sampled.top_logprobs is None
    assert sampled.logprobs.shape == (2,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("column", [0, 17, VOCAB_SIZE - 1])
def test_a_row_with_a_logit_that_is_no_number_is_marked_and_harms_no_other(bad: float, column: int) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"top_p": 0.8, "top_k": 5},
        {"min_p": 0.1},
        {"presence_penalty": 1.0},
    ]
    rows = [Row(SamplingParams(**values, logprobs=2), i) for i, values in enumerate(settings)]
    logits = make_logits(5, seed=10)
    clean = run(logits, rows)
    for row in range(5):
        broken = logits.copy()
        broken[row, column] = bad
        drawn = run(broken, rows)
        assert np.isnan(drawn.logprobs).tolist() == [i == row for i in range(5)]
        assert (drawn.token_ids < VOCAB_SIZE).all()
        others = np.arange(5) != row
        for before, after in zip(clean, drawn, strict=True):
            assert before is not None and after is not None
            np.testing.assert_array_equal(before[others], after[others])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_of_nothing_but_bad_logits_is_marked(value: float) -> None:
    logits = np.full((2, VOCAB_SIZE), value, np.float32)
    drawn = run(logits, [Row(SamplingParams()), Row(SamplingParams(temperature=0))])
    assert np.isnan(drawn.logprobs).all()
    assert (drawn.token_ids < VOCAB_SIZE).all()


def test_a_row_is_marked_even_if_its_bad_logit_could_not_be_drawn() -> None:
    logits = make_logits(2, seed=21)
    logits[:, 3] = np.inf, np.nan
    allowed = np.ones((2, VOCAB_SIZE), bool)
    allowed[:, 3] = False
    assert np.isnan(run(logits, [Row(SamplingParams(temperature=0))] * 2, bitmask(allowed)).logprobs).all()


def test_logprobs_are_those_without_the_mask() -> None:
    logits = make_logits(2, seed=15)
    allowed = np.zeros((2, VOCAB_SIZE), bool)
    allowed[:, 9] = True
    drawn = run(logits, [Row(SamplingParams(logprobs=3))] * 2, bitmask(allowed))
    assert drawn.token_ids.tolist() == [9, 9]
    assert drawn.top_token_ids is not None
    for row in range(2):
        model = log_softmax(logits[row])
        np.testing.assert_allclose(drawn.logprobs[row], model[9], atol=1e-5)
        assert drawn.top_token_ids[row].tolist() == np.argsort(-model)[:3].tolist()
