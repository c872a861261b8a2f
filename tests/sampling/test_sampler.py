"""The sampler against a float64 oracle written from the definitions: which tokens are drawn, and how often."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.budget import budget
from helpers.sampling_oracle import (
    OUTPUT,
    PROMPT,
    VOCAB_SIZE,
    Row,
    bitmask,
    frequencies,
    log_softmax,
    make_logits,
    oracle,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged import SamplingParams

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB_SIZE},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 7, "top_p": 0.6},
    {"min_p": 0.05, "top_k": 9, "top_p": 0.8, "temperature": 1.7},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.7, "presence_penalty": -1.0},
    {"logit_bias": {2: 4.0, 11: -3.0}},
    {
        "logit_bias": {5: 2.0},
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "temperature": 0.8,
        "min_p": 0.02,
        "top_k": 20,
        "top_p": 0.95,
    },
]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_draws_follow_the_oracles_distribution(values: dict[str, Any]) -> None:
    logits = make_logits(1, seed=4)[0]
    params = SamplingParams(**values)
    expected = oracle(logits, params, PROMPT, OUTPUT)
    num_draws = 6000
    seen = frequencies(logits, params, num_draws, prompt=PROMPT, output=OUTPUT)
    assert set(np.flatnonzero(seen)) <= set(np.flatnonzero(expected)), "a token was drawn that is ruled out"
    kept = expected > 0
    # Pearson's statistic: its mean is the degrees of freedom d, its deviation sqrt(2 d); six of these are never luck.
    statistic = num_draws * ((seen - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = kept.sum() - 1
    assert statistic <= degrees + 6 * np.sqrt(2 * degrees) + 1e-9


@settings(max_examples=budget(60, 6_000), deadline=None)
@given(
    seed=st.integers(0, 1000),
    values=st.fixed_dictionaries(
        {
            "repetition_penalty": st.sampled_from([1.0, 0.7, 1.3, 2.0]),
            "presence_penalty": st.sampled_from([0.0, -1.5, 0.4, 2.0]),
            "frequency_penalty": st.sampled_from([0.0, -0.5, 0.3, 2.0]),
            "logit_bias": st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-9, 9, width=16), max_size=3),
        }
    ),
    prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=9),
    output=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=9),
)
def test_greedy_takes_the_best_token_after_bias_and_penalties(
    seed: int, values: dict[str, Any], prompt: list[int], output: list[int]
) -> None:
    logits = make_logits(1, seed)[0]
    params = SamplingParams(temperature=0, **values)
    # At temperature 1 the oracle tells how far the second best is: of two as good as equal, either will do.
    best = np.sort(oracle(logits, SamplingParams(**values), prompt, output))
    token = int(run(logits[None], [Row(params, 0, 0, prompt, output)]).token_ids[0])
    expected = int(oracle(logits, params, prompt, output).argmax())
    assert token == expected or best[-1] - best[-2] < 1e-5


def test_greedy_rows_are_exact_between_sampled_ones() -> None:
    logits = make_logits(9, seed=2)
    rows = [
        Row(SamplingParams(temperature=0 if i % 2 else 3.0, top_k=3 if i % 2 else 0, min_p=0.9 * (i % 3 == 0)), i)
        for i in range(9)
    ]
    tokens = run(logits, rows).token_ids
    assert tokens[1::2].tolist() == logits[1::2].argmax(axis=-1).tolist()


def test_a_top_p_of_one_and_a_top_k_of_zero_change_nothing_at_all() -> None:
    logits = make_logits(64, seed=3, vocab_size=1000)
    plain = run(logits, [Row(SamplingParams(), i) for i in range(64)]).token_ids
    # The last row asks for truncation, so that the others go through it with values that must not matter.
    rows = [Row(SamplingParams(top_p=1.0, top_k=0, min_p=0.0), i) for i in range(64)]
    rows[-1] = Row(SamplingParams(top_p=0.3, top_k=2, min_p=0.5), 63)
    assert run(logits, rows).token_ids[:-1].tolist() == plain[:-1].tolist()


def test_a_top_p_of_one_keeps_even_tokens_that_rounding_would_lose() -> None:
    # In float32 the first token has a probability of 1, although the others have 0.0025 in all: at this position it
    # is one of those that is drawn.
    rest = -17.4 - 1.91e-6 * np.arange(99_999)
    logits = np.concatenate([[0.0], rest]).astype(np.float32)[None]
    position = 1180
    assert run(logits, [Row(SamplingParams(), 0, position)]).token_ids[0] > 0
    # A top_k that drops the last token only takes the row through the same cut as the other, which has a top_p.
    rows = [Row(SamplingParams(top_k=99_999), 0, position), Row(SamplingParams(top_p=0.5), 0, position)]
    kept, cut = run(np.repeat(logits, 2, axis=0), rows).token_ids
    assert kept > 0 and cut == 0


def test_tokens_with_equal_logits_stay_or_go_together() -> None:
    logits = np.array([5.0, 5.0, 5.0, 1.0], np.float32)
    for values in ({"top_k": 2}, {"top_p": 0.4}):
        seen = frequencies(logits, SamplingParams(**values), 500)
        assert (seen[:3] > 0.2).all() and seen[3] == 0


def test_min_p_is_applied_after_temperature_as_in_vllm() -> None:
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    # At temperature 2 the last has sqrt(1/6) = 0.41 of the best one's probability; before it would be 0.17.
    assert frequencies(logits, SamplingParams(temperature=2.0, min_p=0.4), 500)[2] > 0
    assert frequencies(logits, SamplingParams(temperature=2.0, min_p=0.42), 500)[2] == 0


def test_top_p_is_measured_on_what_top_k_leaves() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the best two alone the first has 4/7 = 0.571, so a top_p of 0.55 keeps only that; of all four it keeps two.
    assert frequencies(logits, SamplingParams(top_k=2, top_p=0.55), 300)[0] == 1
    assert frequencies(logits, SamplingParams(top_p=0.55), 300)[1] > 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_logits_of_any_float_type_are_sampled_in_float32(dtype: mx.Dtype) -> None:
    logits = mx.array(make_logits(3, seed=9)).astype(dtype)
    exact = np.array(logits.astype(mx.float32))
    rows = [Row(SamplingParams(temperature=t), i) for i, t in enumerate((0, 1.0, 0.5))]
    sampled = run(logits, rows)
    assert sampled.token_ids.tolist() == run(exact, rows).token_ids.tolist()
    for row, token in enumerate(sampled.token_ids):
        np.testing.assert_allclose(sampled.logprobs[row], log_softmax(exact[row])[token], atol=1e-5)


def test_logits_are_not_changed_by_sampling() -> None:
    logits = mx.array(make_logits(2))
    before = np.array(logits)
    params = SamplingParams(logit_bias={0: 9.0}, repetition_penalty=1.5, top_k=2, min_p=0.3)
    run(logits, [Row(params, i, 0, [1], [2]) for i in range(2)])
    assert (np.array(logits) == before).all()


def test_a_token_that_the_model_rules_out_is_never_drawn() -> None:
    logits = make_logits(1, seed=11)[0]
    logits[5:] = -np.inf
    for params in (SamplingParams(temperature=9.0), SamplingParams(top_p=0.99), SamplingParams(top_k=20, min_p=0.01)):
        assert not frequencies(logits, params, 300)[5:].any()


def test_penalties_of_long_and_short_rows_do_not_mix() -> None:
    logits = np.zeros((2, VOCAB_SIZE), np.float32)
    logits[:, 10], logits[:, 20] = 2.0, 1.9
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    rows = [Row(params, 0, 0, [], [10]), Row(params, 0, 0, list(range(30)), [20, 21, 22])]
    assert run(logits, rows).token_ids.tolist() == [20, 10]


def test_parameters_beyond_float32_still_choose_an_allowed_token() -> None:
    logits = make_logits(4, seed=16)
    logits[:, 20:] = -np.inf
    rows = [
        Row(SamplingParams(temperature=1e300)),
        Row(SamplingParams(logit_bias={30: 1e300, 3: -1e300})),
        Row(SamplingParams(repetition_penalty=1e300), 0, 0, list(range(0, 40, 3))),
        Row(SamplingParams(repetition_penalty=1e-300), 0, 0, list(range(0, 40, 3))),
    ]
    drawn = run(logits, rows)
    assert (drawn.token_ids < 20).all() and np.isfinite(drawn.logprobs).all()


CHOICES: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 5.0}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}]


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 64, 200])
@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_only_tokens_that_the_mask_allows_are_drawn(vocab_size: int, dtype: type) -> None:
    rng = np.random.default_rng(vocab_size)
    allowed = rng.random((40, vocab_size)) < 0.2
    allowed[np.arange(40), rng.integers(0, vocab_size, 40)] = True
    allowed[::8] = True
    allowed[1] = np.arange(vocab_size) == vocab_size - 1
    logits = make_logits(40, seed=12, vocab_size=vocab_size)
    choices = itertools.cycle(CHOICES)
    rows = [Row(SamplingParams(**next(choices)), i) for i in range(40)]
    drawn = run(logits, rows, bitmask(allowed).view(dtype))
    assert allowed[np.arange(40), drawn.token_ids].all()
    greedy = np.where(allowed, logits, -np.inf).argmax(axis=-1)
    assert drawn.token_ids[::4].tolist() == greedy[::4].tolist()
    free = allowed.all(axis=-1)
    assert drawn.token_ids[free].tolist() == run(logits, rows).token_ids[free].tolist()


def test_a_masked_draw_follows_what_the_mask_leaves() -> None:
    logits = make_logits(1, seed=13)[0]
    params = SamplingParams(top_p=0.9, temperature=1.5)
    allowed = np.arange(VOCAB_SIZE) % 3 == 0
    rows = [Row(params, 5, position) for position in range(4000)]
    batch = np.repeat(logits[None], 4000, axis=0)
    drawn = run(batch, rows, bitmask(np.repeat(allowed[None], 4000, axis=0))).token_ids
    expected = oracle(np.where(allowed, logits, -1e4), params, [], [])
    np.testing.assert_allclose(np.bincount(drawn, minlength=VOCAB_SIZE) / 4000, expected, atol=0.03)


def test_no_bias_or_penalty_brings_back_what_the_mask_forbids() -> None:
    logits = make_logits(2, seed=14)
    allowed = np.ones((2, VOCAB_SIZE), bool)
    allowed[:, 7] = False
    params = SamplingParams(temperature=0, logit_bias={7: 100.0}, presence_penalty=-2.0, repetition_penalty=0.1)
    rows = [Row(params, 0, 0, [7], [7, 7])] * 2
    assert run(logits, rows).token_ids.tolist() == [7, 7]
    assert 7 not in run(logits, rows, bitmask(allowed)).token_ids
