"""Texts of requests: what the tokenizer decodes their tokens to, whoever asks and however it comes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from helpers.broken_tokenizers import BrokenTokenizer
from helpers.engines import END, MakeEngine, complete, is_idle, run, steered
from helpers.llms import SMALL
from helpers.other_tokenizers import byte_level, llama_style, metaspace, misread_byte_level

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import RequestOutput

SPECIAL = 2  # <|user|> of the demo tokenizer: special, and no end token


def streamed(engine: Engine, prompt: Any, params: SamplingParams) -> list[RequestOutput]:
    engine.add_request(prompt, params, stream=True)
    outputs: list[Any] = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs


def told(output: Any) -> list[Any]:
    """What an output says; its log-probabilities depend a little on what is computed beside it."""
    return [(sample.text, sample.token_ids, sample.finish_reason, sample.stop_reason) for sample in output.outputs]


@pytest.mark.parametrize("skip", [True, False])
def test_text_is_what_decode_gives_in_samples_and_streams(skip: bool, make_engine: MakeEngine, tokenizer: Any) -> None:
    values: dict[str, Any] = {"max_tokens": 40, "temperature": 3.0, "ignore_eos": True, "logit_bias": {SPECIAL: 20}}
    engine = make_engine(tokenizer)
    for seed in range(2):
        params = SamplingParams(seed=seed, skip_special_tokens=skip, **values)
        output = complete(engine, "Anna had a", params).outputs[0]
        assert SPECIAL in output.token_ids
        assert output.text == tokenizer.decode(output.token_ids, skip_special_tokens=skip)
        assert ("<|user|>" in output.text) != skip
        pieces = [piece.outputs[0] for piece in streamed(engine, "Anna had a", params)]
        assert [token for piece in pieces for token in piece.token_ids] == output.token_ids
        assert "".join(piece.text for piece in pieces) == output.text
        assert len([piece for piece in pieces if piece.text]) > 10


def test_the_space_between_a_prompt_and_its_completion_is_in_the_text_and_a_stop_string_may_begin_with_it(
    make_engine: MakeEngine, tokenizer: Any
) -> None:
    (was,) = tokenizer.encode(" was")
    assert complete(make_engine(tokenizer), "The dog", steered(was, max_tokens=2)).outputs[0].text == " was was"
    output = complete(make_engine(tokenizer), "The dog", steered(was, max_tokens=2, stop=" was")).outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("", [was], " was")


@pytest.mark.parametrize("make", [byte_level, llama_style, misread_byte_level])
@pytest.mark.parametrize("pattern", [" (yes|no)", "(yes|no)", "  é?x", " ?the( a|12)+ x"])
def test_a_text_matches_its_regex_the_space_at_its_start_included(make: Any, pattern: str, tiny_model: Any) -> None:
    engine = engine_of(make(), tiny_model)
    params = SamplingParams(n=8, seed=1, temperature=2.0, regex=pattern, max_tokens=60)
    for one in complete(engine, [5, 6], params).outputs:
        assert one.finish_reason == "stop" and re.fullmatch(pattern, one.text), one


@pytest.mark.parametrize("make", [byte_level, llama_style])
def test_a_regex_leaves_both_ways_open_where_a_space_may_come_first(make: Any, tiny_model: Any) -> None:
    engine = engine_of(make(), tiny_model)
    params = SamplingParams(n=8, temperature=9.0, regex=" ?x", max_tokens=9)
    assert {one.text for _ in range(3) for one in complete(engine, [5, 6], params).outputs} == {"x", " x"}


def engine_of(tokenizer: Any, tiny_model: Any, num_more: int = 7) -> Engine:
    """An engine whose model has more logits than its tokenizer has tokens."""
    model = tiny_model("llama", **SMALL, vocab_size=len(tokenizer) + num_more)
    config = {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8, "check_invariants": True}
    return LLM.from_model(model, tokenizer, **config).engine


@pytest.mark.parametrize("make", [byte_level, llama_style, metaspace])
def test_an_id_that_the_tokenizer_has_no_token_for_is_no_text_and_nobody_else_notices(
    make: Any, tiny_model: Any
) -> None:
    tokenizer = make()
    unknown = len(tokenizer) + 3
    plain = SamplingParams(seed=1, max_tokens=9, ignore_eos=True, logit_bias={unknown: -1e9})
    alone = complete(engine_of(tokenizer, tiny_model), [5, 6, 7], plain)
    engine = engine_of(tokenizer, tiny_model)
    others = [engine.add_request([5, 6, 7], plain) for _ in range(2)]
    victims = [
        engine.add_request([5], steered(unknown, max_tokens=6, ignore_eos=True)),
        engine.add_request([5], steered(unknown, max_tokens=6, ignore_eos=True, stop="never")),
    ]
    aborted = engine.add_request([5], steered(unknown, max_tokens=60, ignore_eos=True))
    for _ in range(3):
        engine.step()
    (one,) = engine.abort(aborted).outputs  # type: ignore[union-attr]
    assert (one.text, one.finish_reason, set(one.token_ids)) == ("", "abort", {unknown})
    finished = run(engine)
    for request_id in victims:
        (one,) = finished[request_id].outputs
        assert (one.text, one.token_ids, one.finish_reason) == ("", [unknown] * 6, "length")
    for request_id in others:
        assert told(finished[request_id]) == told(alone)
    assert is_idle(engine)


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_of_hypotheses_are_hidden_unless_they_are_asked_for(
    skip: bool, make_engine: MakeEngine, tokenizer: Any
) -> None:
    engine = make_engine(tokenizer)
    params = BeamSearchParams(beam_width=2, max_tokens=5, skip_special_tokens=skip)
    output: Any = complete(engine, [7, 8, 9], params)  # type: ignore[arg-type]
    for one in output.sequences:
        assert one.text == tokenizer.decode(one.token_ids, skip_special_tokens=skip)


def test_a_hypothesis_ends_at_a_stop_string_and_its_text_before_it(make_engine: MakeEngine, tokenizer: Any) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=12, length_penalty=0.0)
    plain: Any = complete(make_engine(tokenizer), "Anna had a", params)  # type: ignore[arg-type]
    stop = plain.sequences[0].text[4:6]
    stopped = replace(params, stop=["never there", stop])
    output: Any = complete(make_engine(tokenizer), "Anna had a", stopped)  # type: ignore[arg-type]
    endings = [tokenizer.decode(one.token_ids) for one in output.sequences]
    assert any(stop in text for text in endings)
    for one, text in zip(output.sequences, endings, strict=True):
        assert one.text == text.split(stop)[0]
        assert stop not in tokenizer.decode(one.token_ids[:-1])


def test_a_hypothesis_ends_at_a_stop_token_as_at_an_end_token(make_engine: MakeEngine, tokenizer: Any) -> None:
    engine = make_engine(tokenizer)
    params = BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=0.0)
    plain: Any = complete(engine, "Anna", params)  # type: ignore[arg-type]
    stop = plain.sequences[0].token_ids[3]
    output: Any = complete(engine, "Anna", replace(params, stop_token_ids=[stop]))  # type: ignore[arg-type]
    assert any(one.token_ids[-1] == stop for one in output.sequences)
    for one in output.sequences:
        assert stop not in one.token_ids[:-1]
        text_ids = one.token_ids[:-1] if one.token_ids[-1] in (stop, END) else one.token_ids
        assert one.text == tokenizer.decode(text_ids, skip_special_tokens=True)


def test_a_tokenizer_that_raises_in_a_search_for_stop_strings_ends_this_search_alone(
    make_engine: MakeEngine, tokenizer: Any
) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6, stop="never")
    sound: Any = complete(make_engine(tokenizer), "Anna", params)  # type: ignore[arg-type]
    bad = sound.sequences[0].token_ids[1]
    broken = BrokenTokenizer(tokenizer, bad)
    broken.error = KeyError("no text")
    engine = make_engine(broken)
    plain = SamplingParams(seed=1, max_tokens=9, logit_bias={bad: -1e9})
    victim, other = engine.add_request("Anna", params), engine.add_request("Anna", plain)  # type: ignore[arg-type]
    finished: Any = run(engine)
    assert (finished[victim].error, finished[victim].sequences) == ("KeyError: 'no text'", [])
    assert told(finished[other]) == told(complete(make_engine(tokenizer), "Anna", plain))
    assert is_idle(engine)


def test_the_token_that_ends_an_output_is_never_text(make_engine: MakeEngine, tokenizer: Any) -> None:
    engine = make_engine(tokenizer)
    for params in (
        steered(END, max_tokens=5, skip_special_tokens=False),
        steered(SPECIAL, max_tokens=5, skip_special_tokens=False, stop_token_ids=[SPECIAL]),
    ):
        for output in (complete(engine, "Anna", params), streamed(engine, "Anna", params)[-1]):
            assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("", "stop")


def test_a_stop_token_ends_the_text_before_it_and_stays_in_the_tokens_streamed_or_not(
    make_engine: MakeEngine, tokenizer: Any
) -> None:
    params: dict[str, Any] = {"seed": 3, "max_tokens": 20, "ignore_eos": True}
    plain = complete(make_engine(tokenizer), "Anna", SamplingParams(**params)).outputs[0]
    stop = plain.token_ids[7]
    expected = plain.token_ids[: plain.token_ids.index(stop) + 1]
    stopped = SamplingParams(**params, stop_token_ids=[stop])
    pieces = [output.outputs[0] for output in streamed(make_engine(tokenizer), "Anna", stopped)]
    whole = complete(make_engine(tokenizer), "Anna", stopped).outputs[0]
    assert whole.token_ids == [token for piece in pieces for token in piece.token_ids] == expected
    assert whole.text == "".join(piece.text for piece in pieces) == tokenizer.decode(expected[:-1])
