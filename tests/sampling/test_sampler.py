"""The sampler against a float64 oracle written from the definitions, and the statistics of its draws."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    rows = [Row(next(choices), sample_seed(9, i), i, [1, 2], [3]) for i in range(12)]
    together = run(logits, rows).token_ids.tolist()
    alone = [int(run(logits[i : i + 1], rows[i : i + 1]).token_ids[0]) for i in range(12)]
    assert together == alone
    order = np.random.default_rng(0).permutation(12)
    shuffled = run(logits[order], [rows[i] for i in order]).token_ids.tolist()
    assert shuffled == [together[i] for i in order]


def test_the_same_draw_gives_the_same_token_and_another_draw_another_one() -> None:
    logits = make_logits(1, seed=6, vocab_size=1000, spread=0.1)
    first = [int(run(logits, [Row(SamplingParams(), draw)]).token_ids[0]) for draw in range(20)]
    again = [int(run(logits, [Row(SamplingParams(), draw)]).token_ids[0]) for draw in range(20)]
    assert first == again
    assert len(set(first)) > 15


@pytest.mark.parametrize("shift", [1, 1 << 31, 1 << 32, 1 << 63])
def test_every_bit_of_a_draws_name_counts(shift: int) -> None:
    logits = np.zeros((2, 100_000), np.float32)
    a, b = run(logits, [Row(SamplingParams(), 5), Row(SamplingParams(), 5 ^ shift)]).token_ids
    assert a != b


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


# -- masks -------------------------------------------------------------------------------------------------------

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


# -- many steps -------------------------------------------------------------------------------------------------

MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.8},
    {"top_k": 4, "repetition_penalty": 1.5},
    {"min_p": 0.1, "logit_bias": {1: 2.0, 40: 3.0}, "logprobs": 3},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"frequency_penalty": 1.2, "top_k": 9, "top_p": 0.9, "logprobs": 1},
    {},
]


def test_a_row_alone_draws_what_it_draws_among_64_mixed_ones_step_after_step() -> None:
    num_rows, num_steps = 64, 5
    rng = np.random.default_rng(1)
    rows = [
        Row(SamplingParams(**MIXED[i % len(MIXED)]), sample_seed(4, i), 3 * i, [i % 41, 5], [7, i % 3])
        for i in range(num_rows)
    ]
    logits = [make_logits(num_rows, seed, spread=1.0) for seed in range(num_steps)]
    allowed = [(rng.random((num_rows, VOCAB_SIZE)) < 0.6) | (np.arange(num_rows)[:, None] % 2 == 0) for _ in logits]

    def tokens(members: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
        sampler = Sampler(100, VOCAB_SIZE)
        for member, number in zip(members, numbers, strict=True):
            row = rows[member]
            sampler.set_row(number, row.params, row.stream, row.prompt, row.output)
        drawn = []
        for step in range(num_steps):
            positions = np.array([rows[member].position + step for member in members])
            masks = bitmask(allowed[step][members])
            sampled = sampler.sample(mx.array(logits[step][members]), np.array(numbers), positions, masks)
            drawn.append(np.array(sampled.token_ids))
        return np.array(drawn)

    together = tokens(range(num_rows), range(num_rows))
    members, numbers = rng.permutation(num_rows).tolist(), rng.permutation(100)[:num_rows].tolist()
    assert tokens(members, numbers).tolist() == together[:, members].tolist()
    for member in range(0, num_rows, 3):
        assert tokens([member], [99 - member])[:, 0].tolist() == together[:, member].tolist()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_penalties_follow_the_tokens_through_steps_and_changes_of_rows(data: st.DataObject, seed: int) -> None:
    num_rows = 5
    rng = np.random.default_rng(seed)
    sampler = Sampler(num_rows, VOCAB_SIZE)
    tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4)
    sequences: dict[int, tuple[SamplingParams, list[int], list[int]]] = {}
    for _ in range(data.draw(st.integers(3, 8))):
        for number in data.draw(st.sets(st.integers(0, num_rows - 1), max_size=3)) or {0}:
            values: dict[str, Any] = data.draw(
                st.sampled_from([{}, {"repetition_penalty": 1.7}, {"presence_penalty": 0.9}])
            )
            values = values | {"frequency_penalty": data.draw(st.sampled_from([0.0, 0.0, 0.6, -0.4]))}
            params, prompt, output = SamplingParams(temperature=0, **values), data.draw(tokens), data.draw(tokens)
            sequences[number] = params, prompt, output
            sampler.set_row(number, params, 0, prompt, output)
        for _ in range(data.draw(st.integers(0, 4))):
            numbers = data.draw(st.permutations(sorted(sequences)))
            numbers = numbers[: data.draw(st.integers(1, len(numbers)))]
            logits = rng.uniform(-1, 1, (len(numbers), VOCAB_SIZE)).astype(np.float32)
            drawn = evaluated(sampler.sample(mx.array(logits), np.array(numbers), np.zeros(len(numbers), int)))
            for i, number in enumerate(numbers):
                params, prompt, output = sequences[number]
                # At temperature 1 the oracle tells how good the token is: of two as good as equal, either will do.
                chances = oracle(logits[i], dataclasses.replace(params, temperature=1.0), prompt, output)
                assert chances[drawn.token_ids[i]] > chances.max() - 1e-6
                output.append(int(drawn.token_ids[i]))


def test_many_steps_that_are_only_evaluated_at_the_end_count_every_token() -> None:
    sampler = Sampler(3, VOCAB_SIZE)
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    for row in range(3):
        sampler.set_row(row, params, 0, [], [])
    logits = make_logits(3, seed=17)
    lazy = [sampler.sample(mx.array(logits), np.arange(3), np.full(3, step)) for step in range(30)]
    outputs: list[list[int]] = [[], [], []]
    for sampled in lazy:
        for row in range(3):
            chances = oracle(logits[row], SamplingParams(frequency_penalty=2.0), [], outputs[row])
            token = int(np.array(sampled.token_ids)[row])
            assert chances[token] > chances.max() - 1e-6
            outputs[row].append(token)


def test_a_steady_batch_is_put_together_once() -> None:
    sampler = Sampler(16, VOCAB_SIZE)
    for row in range(16):
        sampler.set_row(row, SamplingParams(**MIXED[row % len(MIXED)]), row, [1], [2])
    logits = mx.array(make_logits(12))
    assert sampler.num_rebuilds == 0
    for step in range(20):
        sampler.sample(logits, np.arange(12), np.full(12, step))
    assert sampler.num_rebuilds == 1
    sampler.set_row(15, SamplingParams(temperature=0), 0, [], [])  # not one of the batch
    sampler.sample(logits, np.arange(12), np.zeros(12, int))
    assert sampler.num_rebuilds == 1


def test_a_batch_is_put_together_anew_for_other_rows_another_order_and_a_row_that_was_set() -> None:
    sampler = Sampler(4, VOCAB_SIZE)
    logits = make_logits(4, seed=18)
    worst, best = int(logits[1].argmin()), int(logits[1].argmax())
    for row in range(4):
        sampler.set_row(row, SamplingParams(temperature=0), 0, [], [])

    def step(numbers: list[int]) -> list[int]:
        sampled = sampler.sample(mx.array(logits[: len(numbers)]), np.array(numbers), np.zeros(len(numbers), int))
        return np.array(sampled.token_ids).tolist()

    assert step([0, 1, 2])[1] == best and sampler.num_rebuilds == 1
    sampler.set_row(1, SamplingParams(temperature=0, logit_bias={worst: 100.0}), 0, [], [])
    assert step([0, 1, 2])[1] == worst and sampler.num_rebuilds == 2
    assert step([0, 2, 1])[1] == best and sampler.num_rebuilds == 3
    assert step([2, 1])[1] == worst and sampler.num_rebuilds == 4
    sampler.set_row(1, SamplingParams(temperature=0), 0, [], [])
    assert step([2, 1])[1] == best and sampler.num_rebuilds == 5


def test_an_array_of_rows_that_the_caller_changes_is_noticed() -> None:
    sampler = Sampler(2, VOCAB_SIZE)
    logits = make_logits(1, seed=19)
    worst = int(logits[0].argmin())
    sampler.set_row(0, SamplingParams(temperature=0), 0, [], [])
    sampler.set_row(1, SamplingParams(temperature=0, logit_bias={worst: 100.0}), 0, [], [])
    rows = np.array([0])
    sampler.sample(mx.array(logits), rows, np.zeros(1, int))
    rows[0] = 1
    assert sampler.sample(mx.array(logits), rows, np.zeros(1, int)).token_ids.tolist() == [worst]


def test_sampling_evaluates_nothing() -> None:
    vocab_size = 100_000
    sampler = Sampler(16, vocab_size)
    for row in range(16):
        sampler.set_row(row, SamplingParams(**MIXED[row % len(MIXED)]), row, [1], [2])
    logits = mx.random.normal((16, vocab_size), key=mx.random.key(0))
    masks = np.full((16, vocab_size // 32), -1, np.int32)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sampled = sampler.sample(logits, np.arange(16), np.zeros(16, int), masks)
    put_up = masks.nbytes + 4 * vocab_size * len(MIXED)  # the masks and the first counts, which the host made
    assert mx.get_peak_memory() - before < put_up + 10_000
    mx.eval(sampled.token_ids, sampled.logprobs)
    assert mx.get_peak_memory() - before > 4 * 16 * vocab_size


def test_only_rows_that_have_penalties_hold_memory_for_them() -> None:
    vocab_size = 100_000
    logits = mx.zeros((1, vocab_size))
    sampler = Sampler(8, vocab_size)
    mx.eval(logits)
    mx.clear_cache()
    before = mx.get_active_memory()
    for row in range(8):
        for params in (SamplingParams(presence_penalty=1.0), SamplingParams(temperature=0)):
            sampler.set_row(row, params, 0, [], [])
            mx.eval(sampler.sample(logits, np.array([row]), np.zeros(1, int)).token_ids)
    mx.synchronize()
    assert mx.get_active_memory() - before < 4 * vocab_size + 10_000


# -- names of draws ---------------------------------------------------------------------------------------------


def scalar_mix(x: int) -> int:
    """splitmix64's step, in whole numbers of any size."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(), index=st.integers(0, 2**41), position=st.integers(0, 2**31 - 1))
def test_a_seeds_random_numbers_stay_the_same_from_release_to_release(seed: int, index: int, position: int) -> None:
    stream = scalar_mix(scalar_mix(seed % 2**64) + index)
    assert sample_seed(seed, index) == stream
    draw = scalar_mix(stream + position)
    noise = mx.random.gumbel((VOCAB_SIZE,), key=mx.array([draw >> 32, draw % 2**32], mx.uint32))
    logits = make_logits(1, seed=20)
    row = Row(SamplingParams(), stream, position)
    assert run(logits, [row]).token_ids.tolist() == [int(mx.argmax(mx.array(logits[0]) + noise))]


def test_the_generator_is_splitmix64() -> None:
    # The first outputs of the generator seeded with 1234567, as published with it.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    gamma = 0x9E3779B97F4A7C15
    assert [scalar_mix(1234567 + i * gamma) for i in range(3)] == published


def test_seeds_and_indices_name_streams_of_their_own() -> None:
    seeds = [0, 1, 2, -1, -2, 2**31, 2**32, 2**63, 2**64 - 3, 123456789]
    names = {sample_seed(seed, index) for seed in seeds for index in range(100)}
    assert len(names) == len(seeds) * 100
    assert all(0 <= name < 1 << 64 for name in names)


@pytest.mark.parametrize("seed", [-1, -(10**30), 2**64, 10**40])
def test_seeds_of_any_size_name_streams_of_64_bits(seed: int) -> None:
    names = {sample_seed(seed, index) for index in range(150)}
    assert len(names) == 150
    assert all(0 <= name < 1 << 64 for name in names)


def test_positions_of_a_stream_draw_tokens_of_their_own() -> None:
    logits = np.zeros((200, 100_000), np.float32)
    tokens = run(logits, [Row(SamplingParams(), 2**64 - 1, position) for position in range(200)]).token_ids
    assert len(set(tokens.tolist())) > 190
