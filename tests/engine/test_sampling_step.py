"""The draw in whole steps: biases and penalties count what was put out before."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.engines import MakeEngine, complete, steered, tokens_of

from mlx_paged import SamplingParams


def test_a_logit_bias_forces_a_token_and_leaves_the_models_logprobs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    output = complete(engine, [1, 2], steered(55, max_tokens=4, logprobs=0)).outputs[0]
    assert output.token_ids == [55] * 4
    assert output.logprobs is not None
    assert all(list(entry) == [55] and entry[55] < -0.01 for entry in output.logprobs)


def test_a_strong_repetition_penalty_lets_no_token_come_twice(make_engine: MakeEngine) -> None:
    candidates = [10, 20, 30, 40]
    output = complete(make_engine(), [1], steered(*candidates, max_tokens=4, repetition_penalty=1e6))
    assert sorted(tokens_of(output)) == candidates


@pytest.mark.parametrize("values", [(2.0, 0.0), (0.0, 1.5), (-0.5, 0.4)], ids=str)
def test_each_token_is_the_best_after_penalties_on_those_put_out_before(
    make_engine: MakeEngine, values: tuple[float, float]
) -> None:
    """Both penalties are subtracted, so the model's log-probabilities are as good as its logits to check them with."""
    presence, frequency = values
    params = SamplingParams(
        temperature=0, max_tokens=30, logprobs=97, presence_penalty=presence, frequency_penalty=frequency
    )
    output = complete(make_engine(), [1, 2, 3], params).outputs[0]
    assert output.logprobs is not None
    for position, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        before = output.token_ids[:position]
        penalised = {t: value - presence * (t in before) - frequency * before.count(t) for t, value in entry.items()}
        assert penalised[token] >= max(penalised.values()) - 1e-4
    assert output.token_ids != tokens_of(
        complete(make_engine(), [1, 2, 3], SamplingParams(temperature=0, max_tokens=30))
    )


def test_a_seed_draws_the_same_from_equal_logits_however_long_the_prompt_is(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run_model = engine._runner.run
    engine._runner.run = lambda inputs: mx.zeros_like(run_model(inputs))  # type: ignore[method-assign]
    params = SamplingParams(seed=5, max_tokens=8)
    short, long = (tokens_of(complete(engine, list(range(1, 1 + length)), params)) for length in (3, 30))
    assert short == long
    assert len(set(short)) > 4


def test_repetition_counts_the_prompt_and_the_other_penalties_do_not(make_engine: MakeEngine) -> None:
    bias = {10: 1000.0}
    for values, expected in (
        ({"repetition_penalty": 1e6}, False),
        ({"presence_penalty": 2.0, "frequency_penalty": 2.0}, True),
    ):
        params = SamplingParams(temperature=0, max_tokens=1, logit_bias=bias, **values)
        assert (tokens_of(complete(make_engine(), [10, 11], params)) == [10]) is expected


def test_penalties_go_on_over_many_distinct_tokens(make_engine: MakeEngine) -> None:
    """More distinct tokens than the counts have room for at first."""
    params = steered(*range(97), max_tokens=90, repetition_penalty=1e9)
    output = complete(make_engine(), [1, 2, 3], params)
    assert len(set(tokens_of(output))) == 90
    assert not {1, 2, 3} & set(tokens_of(output))
