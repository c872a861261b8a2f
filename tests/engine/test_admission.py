"""What can be asked of an engine: any prompt and any parameters are refused when they come, or hurt nobody else."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import mlx.core as mx
import numpy as np
import pytest
from helpers.budget import budget
from helpers.engines import GREEDY, MakeEngine, complete, is_idle, run, tokens_of
from helpers.faults import PIPELINING
from helpers.junk import anything
from helpers.tiny_models import VOCAB_SIZE
from hypothesis import strategies as st

from mlx_paged import BeamSearchParams, SamplingParams
from mlx_paged.outputs import BeamSearchOutput
from mlx_paged.sampling.sampler import Sampler

PROMPT = [5, 9, 2, 7]
KINDS: list[tuple[type[Any], dict[str, Any]]] = [
    (SamplingParams, {"max_tokens": 3, "seed": 1}),
    (BeamSearchParams, {"max_tokens": 3, "beam_width": 2}),
]


def test_any_parameters_are_refused_when_they_come_or_leave_the_neighbours_alone(
    make_engine: MakeEngine, tokenizer: Any
) -> None:
    engine = make_engine(tokenizer)
    expected = tokens_of(complete(engine, PROMPT, GREEDY))

    @hypothesis.given(st.data(), st.sampled_from(KINDS), anything)
    @hypothesis.settings(max_examples=budget(50, 10_000))
    def try_one(data: st.DataObject, kind: tuple[type[Any], dict[str, Any]], value: Any) -> None:
        name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(kind[0])]))
        try:
            request_id = engine.add_request([3, 4, 5], kind[0](**kind[1] | {name: value}))
        except ValueError:
            request_id = None
        neighbour = engine.add_request(PROMPT, GREEDY)
        outputs = run(engine)
        assert tokens_of(outputs[neighbour]) == expected
        if request_id is not None:
            output: Any = outputs[request_id]
            failed = isinstance(output, BeamSearchOutput) and output.error is not None
            assert not failed and all(one.finish_reason != "error" for one in getattr(output, "outputs", []))

    try_one()
    assert is_idle(engine)


def test_any_prompt_is_text_or_token_ids_or_refused_in_one_line(make_engine: MakeEngine, tokenizer: Any) -> None:
    engine = make_engine(tokenizer)

    @hypothesis.given(anything)
    @hypothesis.settings(max_examples=budget(200, 10_000))
    def try_one(prompt: Any) -> None:
        try:
            request = engine.make_request(prompt, GREEDY)
        except (TypeError, ValueError) as error:
            assert "prompt" in str(error) and "\n" not in str(error)
        else:
            assert all(type(token) is int and 0 <= token < len(tokenizer) for token in request.prompt_token_ids)
            assert request.prompt == (prompt if isinstance(prompt, str) else None)
            assert not isinstance(prompt, bytes | bytearray | dict | set)

    try_one()


@pytest.mark.parametrize(
    "prompt, words",
    [
        (b"12", "bytes first"),
        (bytearray(b"12"), "bytes first"),
        (memoryview(b"12"), "token ids"),
        (None, "None"),
        (5, "5"),
        ({1: 2}, "goes to chat"),
        ([{"role": "user", "content": "Hi"}], "goes to chat"),
        ({1, 2}, "token ids"),
        ([[1, 2], [3]], "in a list"),
        (np.array([[1, 2]]), "in a list"),
        (np.array([1.0]), "1.0 in a list"),
        (["a", "b"], "'a' in a list"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_a_prompt_that_is_neither_text_nor_token_ids_is_told_what_it_is(
    make_engine: MakeEngine, prompt: Any, words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        make_engine().add_request(prompt)


def test_token_ids_may_come_from_an_array_or_an_iterator(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for prompt in (np.array(PROMPT), mx.array(PROMPT), iter(PROMPT), tuple(PROMPT)):
        assert engine.make_request(prompt, GREEDY).prompt_token_ids == PROMPT  # type: ignore[arg-type]
    assert engine.make_request(range(3), GREEDY).prompt_token_ids == [0, 1, 2]


def test_half_of_a_surrogate_pair_in_a_prompt_is_refused(make_engine: MakeEngine, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the prompt is not UTF-8 text"):
        make_engine(tokenizer).add_request("Anna \ud83d")


@pytest.mark.parametrize("name, value", [("stop_token_ids", [3, VOCAB_SIZE]), ("stop_token_ids", [2**31]),
                                         ("logit_bias", {2**40: 1.0})])  # fmt: skip
def test_tokens_outside_the_vocabulary_are_refused_by_the_parameters_name(
    make_engine: MakeEngine, name: str, value: Any
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=rf"^{name}: token id \d+ is outside the model's vocabulary of {VOCAB_SIZE}$"):
        engine.add_request(PROMPT, SamplingParams(**{name: value}))
    assert is_idle(engine)


@pytest.mark.parametrize("params", [{"temperature": 0}, 3, "greedy"], ids=str)
def test_parameters_of_another_kind_are_a_type_error(make_engine: MakeEngine, params: Any) -> None:
    with pytest.raises(TypeError, match="params must be SamplingParams or BeamSearchParams, got"):
        make_engine().add_request(PROMPT, params)


@pytest.mark.parametrize("pipelining", PIPELINING)
@pytest.mark.parametrize("n", [1, 3])
def test_parameters_that_a_step_can_not_take_end_their_request_alone(
    make_engine: MakeEngine, n: int, pipelining: str
) -> None:
    engine = make_engine(pipelining=pipelining)
    others = [SamplingParams(seed=seed, max_tokens=9, n=2) for seed in (1, 2)]
    expected = [[one.token_ids for one in complete(engine, PROMPT, params).outputs] for params in others]
    bad = SamplingParams(max_tokens=9, n=n)
    object.__setattr__(bad, "stop_token_ids", (2**31,))  # what validation would not let through
    ids = [engine.add_request(PROMPT, others[0])]
    engine.step()
    request = engine.make_request([1, 2, 3], SamplingParams(max_tokens=9, n=n))
    request.params = bad
    bad_id = engine.submit(request)
    ids.append(engine.add_request(PROMPT, others[1]))
    outputs = run(engine)
    assert [[one.token_ids for one in outputs[each].outputs] for each in ids] == expected
    assert {one.finish_reason for one in outputs[bad_id].outputs} == {"error"}
    assert "OverflowError" in str(outputs[bad_id].outputs[0].stop_reason)
    assert is_idle(engine)


def test_a_sampler_that_refuses_a_row_ends_that_request_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_row = Sampler.set_row

    def refuse(self: Sampler, row: int, params: SamplingParams, *args: Any) -> None:
        if params.seed == 13:
            raise RuntimeError("no such row")
        set_row(self, row, params, *args)

    monkeypatch.setattr(Sampler, "set_row", refuse)
    engine = make_engine()
    expected = tokens_of(complete(engine, PROMPT, GREEDY))
    bad, good = engine.add_request(PROMPT, SamplingParams(seed=13)), engine.add_request(PROMPT, GREEDY)
    outputs = run(engine)
    assert tokens_of(outputs[good]) == expected
    assert outputs[bad].outputs[0].stop_reason == "RuntimeError: no such row"
    assert is_idle(engine)


def test_many_stop_tokens_stop_as_few_do_and_cost_the_other_rows_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tokens = tokens_of(complete(engine, PROMPT, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)))
    last = next(token for token in reversed(tokens) if tokens.index(token) > 0)
    for ids in ([last], [last, *(token for token in range(VOCAB_SIZE) if token not in tokens)]):
        output = complete(
            engine, PROMPT, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=ids)
        )
        assert output.outputs[0].token_ids == tokens[: tokens.index(last) + 1]
        assert output.outputs[0].stop_reason == last
    assert len(engine._batch._stop_ids) <= 32
