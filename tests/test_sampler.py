"""The sampler against a float64 oracle written from the definitions, and the statistics of its draws."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged import SamplingParams
from mlx_paged.sampler import SampledTokens, SampleRow, TokenCounts, draw_id, sample

VOCAB_SIZE = 41


def make_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB_SIZE, spread: float = 2.0) -> np.ndarray:
    """float32 [num_rows, vocab_size], no two of a row closer than 1e-3."""
    rng = np.random.default_rng(seed)
    while True:
        logits = (spread * rng.standard_normal((num_rows, vocab_size))).astype(np.float32)
        if np.diff(np.sort(logits, axis=-1), axis=-1).min() > 1e-3 or vocab_size > 100:
            return logits


def make_counts(prompt: list[int], output: list[int]) -> TokenCounts:
    counts = TokenCounts(prompt)
    for token in output:
        counts.add(token)
    return counts


def make_row(
    params: SamplingParams, draw: int = 0, prompt: list[int] | None = None, output: list[int] | None = None
) -> SampleRow:
    return SampleRow(params, draw, make_counts(prompt or [], output or []) if params.has_penalties else None)


def run(logits: np.ndarray, rows: list[SampleRow]) -> SampledTokens:
    return sample(mx.array(logits), rows)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def oracle(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
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
    counts = make_counts(tokens.get("prompt", []), tokens.get("output", [])) if params.has_penalties else None
    rows = [SampleRow(params, draw_id(123, 0, position), counts) for position in range(num_draws)]
    drawn = run(np.repeat(logits[None], num_draws, axis=0), rows).token_ids
    return np.bincount(drawn, minlength=len(logits)) / num_draws


PROMPT, OUTPUT = [3, 3, 5, 8, 40], [5, 5, 5, 7, 0]

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


@settings(max_examples=60, deadline=None)
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
    token = int(run(logits[None], [make_row(params, 0, prompt, output)]).token_ids[0])
    expected = int(oracle(logits, params, prompt, output).argmax())
    assert token == expected or best[-1] - best[-2] < 1e-5


def test_greedy_rows_are_exact_between_sampled_ones() -> None:
    logits = make_logits(9, seed=2)
    rows = [
        make_row(SamplingParams(temperature=0 if i % 2 else 3.0, top_k=3 if i % 2 else 0, min_p=0.9 * (i % 3 == 0)), i)
        for i in range(9)
    ]
    tokens = run(logits, rows).token_ids
    assert tokens[1::2].tolist() == logits[1::2].argmax(axis=-1).tolist()


def test_a_top_p_of_one_and_a_top_k_of_zero_change_nothing_at_all() -> None:
    logits = make_logits(64, seed=3, vocab_size=1000)
    plain = run(logits, [make_row(SamplingParams(), i) for i in range(64)]).token_ids
    # The last row asks for truncation, so that the others go through it with values that must not matter.
    rows = [make_row(SamplingParams(top_p=1.0, top_k=0, min_p=0.0), i) for i in range(64)]
    rows[-1] = make_row(SamplingParams(top_p=0.3, top_k=2, min_p=0.5), 63)
    assert run(logits, rows).token_ids[:-1].tolist() == plain[:-1].tolist()


def test_a_top_p_of_one_keeps_even_tokens_that_rounding_would_lose() -> None:
    logits = np.zeros((400, 50), np.float32)
    logits[:, 0] = 14.0  # the others have 1e-6 each
    rows = [make_row(SamplingParams(temperature=8.0), i) for i in range(399)]
    rows.append(make_row(SamplingParams(top_p=0.5), 0))
    plain = run(logits[:399], rows[:399]).token_ids
    assert (plain != 0).any()
    assert run(logits, rows).token_ids[:399].tolist() == plain.tolist()


def test_tokens_with_equal_logits_stay_or_go_together() -> None:
    logits = np.array([5.0, 5.0, 5.0, 1.0], np.float32)
    for values in ({"top_k": 2}, {"top_p": 0.4}):
        seen = frequencies(logits, SamplingParams(**values), 500)  # type: ignore[arg-type]
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


def test_a_draw_depends_on_nothing_else_in_the_batch() -> None:
    logits = make_logits(12, seed=5)
    choices = itertools.cycle(
        [
            SamplingParams(),
            SamplingParams(temperature=0.7, top_p=0.8),
            SamplingParams(temperature=0),
            SamplingParams(top_k=4, repetition_penalty=1.5),
            SamplingParams(min_p=0.1, logit_bias={1: 2.0}, logprobs=3),
        ]
    )
    rows = [make_row(next(choices), draw_id(9, 0, i), [1, 2], [3]) for i in range(12)]
    together = run(logits, rows).token_ids.tolist()
    alone = [int(run(logits[i : i + 1], rows[i : i + 1]).token_ids[0]) for i in range(12)]
    assert together == alone
    order = np.random.default_rng(0).permutation(12)
    shuffled = run(logits[order], [rows[i] for i in order]).token_ids.tolist()
    assert shuffled == [together[i] for i in order]


def test_the_same_draw_gives_the_same_token_and_another_draw_another_one() -> None:
    logits = make_logits(1, seed=6, vocab_size=1000, spread=0.1)
    first = [int(run(logits, [make_row(SamplingParams(), draw)]).token_ids[0]) for draw in range(20)]
    again = [int(run(logits, [make_row(SamplingParams(), draw)]).token_ids[0]) for draw in range(20)]
    assert first == again
    assert len(set(first)) > 15


@pytest.mark.parametrize("shift", [1, 1 << 31, 1 << 32, 1 << 63])
def test_every_bit_of_a_draws_name_counts(shift: int) -> None:
    logits = np.zeros((2, 100_000), np.float32)
    a, b = run(logits, [make_row(SamplingParams(), 5), make_row(SamplingParams(), 5 ^ shift)]).token_ids
    assert a != b


def test_logprobs_are_the_models_before_bias_penalties_and_temperature() -> None:
    logits = make_logits(3, seed=7)
    params = SamplingParams(
        temperature=0.3, repetition_penalty=1.9, presence_penalty=1.0, logit_bias={4: 50.0}, top_k=2, logprobs=6
    )
    rows = [make_row(params, i, [1, 2], [4]) for i in range(3)]
    sampled = run(logits, rows)
    assert sampled.token_ids.tolist() == [4, 4, 4]
    assert sampled.top_token_ids is not None and sampled.top_logprobs is not None
    for row in range(3):
        model = log_softmax(logits[row])
        np.testing.assert_allclose(sampled.logprobs[row], model[4], atol=1e-5)
        best = np.argsort(-model)[:6]
        assert sampled.top_token_ids[row].tolist() == best.tolist()
        np.testing.assert_allclose(sampled.top_logprobs[row], model[best], atol=1e-5)


def test_top_logprobs_are_sorted_and_as_many_as_the_row_that_asks_for_most() -> None:
    logits = make_logits(4, seed=8)
    rows = [make_row(SamplingParams(logprobs=k), 0) for k in (None, 0, 2, 5)]
    sampled = run(logits, rows)
    assert sampled.top_logprobs is not None
    assert sampled.top_logprobs.shape == (4, 5)
    assert (np.diff(sampled.top_logprobs, axis=-1) < 0).all()


def test_more_logprobs_than_tokens_gives_all_tokens() -> None:
    sampled = run(make_logits(1), [make_row(SamplingParams(logprobs=1000))])
    assert sampled.top_token_ids is not None
    assert sorted(sampled.top_token_ids[0].tolist()) == list(range(VOCAB_SIZE))


def test_without_a_wish_for_logprobs_none_are_gathered() -> None:
    sampled = run(make_logits(2), [make_row(SamplingParams()), make_row(SamplingParams(logprobs=0))])
    assert sampled.top_token_ids is None and sampled.top_logprobs is None
    assert sampled.logprobs.shape == (2,)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_logits_of_any_float_type_are_sampled_in_float32(dtype: mx.Dtype) -> None:
    logits = mx.array(make_logits(3, seed=9)).astype(dtype)
    exact = np.array(logits.astype(mx.float32))
    rows = [make_row(SamplingParams(temperature=t), i) for i, t in enumerate((0, 1.0, 0.5))]
    sampled = sample(logits, rows)
    assert sampled.token_ids.tolist() == run(exact, rows).token_ids.tolist()
    for row, token in enumerate(sampled.token_ids):
        np.testing.assert_allclose(sampled.logprobs[row], log_softmax(exact[row])[token], atol=1e-5)


def test_logits_are_not_changed_by_sampling() -> None:
    logits = mx.array(make_logits(2))
    before = np.array(logits)
    params = SamplingParams(logit_bias={0: 9.0}, repetition_penalty=1.5, top_k=2, min_p=0.3)
    sample(logits, [make_row(params, i, [1], [2]) for i in range(2)])
    assert (np.array(logits) == before).all()


def test_a_logit_that_is_not_a_number_is_never_drawn() -> None:
    logits = make_logits(1, seed=10)[0]
    logits[[0, 7, 40]] = np.nan
    best = int(np.nanargmax(logits))
    for params in (SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.9), SamplingParams(min_p=0.1)):
        assert not frequencies(logits, params, 300)[[0, 7, 40]].any()
    assert run(logits[None], [make_row(SamplingParams(temperature=0))]).token_ids.tolist() == [best]


def test_a_token_that_the_model_rules_out_is_never_drawn() -> None:
    logits = make_logits(1, seed=11)[0]
    logits[5:] = -np.inf
    for params in (SamplingParams(temperature=9.0), SamplingParams(top_p=0.99), SamplingParams(top_k=20, min_p=0.01)):
        assert not frequencies(logits, params, 300)[5:].any()


# -- token counts -----------------------------------------------------------------------------------------------


def test_prompt_tokens_are_seen_but_not_counted() -> None:
    counts = make_counts([7, 7, 3], [3, 9, 3])
    assert dict(zip(counts.tokens.tolist(), counts.counts.tolist(), strict=True)) == {7: 0, 3: 2, 9: 1}


@pytest.mark.parametrize("num_distinct", [63, 64, 65, 129, 1000])
def test_counts_grow_past_any_number_of_distinct_tokens(num_distinct: int) -> None:
    prompt = list(range(num_distinct // 2))
    output = [token for token in range(num_distinct) for _ in range(token % 3 + 1)]
    counts = make_counts(prompt, output)
    assert counts.tokens.tolist() == list(range(num_distinct))
    assert counts.counts.tolist() == [token % 3 + 1 for token in range(num_distinct)]


def test_penalties_of_long_and_short_rows_do_not_mix() -> None:
    logits = np.zeros((2, VOCAB_SIZE), np.float32)
    logits[:, 10], logits[:, 20] = 2.0, 1.9
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    rows = [make_row(params, 0, [], [10]), make_row(params, 0, list(range(30)), [20, 21, 22])]
    assert run(logits, rows).token_ids.tolist() == [20, 10]


# -- names of draws ---------------------------------------------------------------------------------------------


def test_seeds_indices_and_positions_name_draws_of_their_own() -> None:
    seeds = [0, 1, 2, -1, -2, 2**31, 2**32, 2**63, 2**64 - 3, 123456789]
    names = {draw_id(seed, index, position) for seed in seeds for index in range(20) for position in range(200)}
    assert len(names) == len(seeds) * 20 * 200
    assert all(0 <= name < 1 << 64 for name in names)


@pytest.mark.parametrize("seed", [-1, -(10**30), 2**64, 10**40])
def test_seeds_of_any_size_name_draws_of_64_bits(seed: int) -> None:
    names = {draw_id(seed, index, position) for index in range(3) for position in range(50)}
    assert len(names) == 150
    assert all(0 <= name < 1 << 64 for name in names)
