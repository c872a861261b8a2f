"""A tokenizer or a grammar that raises for one sequence: it ends with the error, and nobody else notices."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.broken_tokenizers import BrokenTokenizer
from helpers.engines import MakeEngine, complete, is_idle, tokens_of
from helpers.faults import PIPELINING

from mlx_paged import BeamSearchParams, SamplingParams
from mlx_paged.engine.engine import Engine, Output
from mlx_paged.outputs import BeamSearchOutput, RequestOutput
from mlx_paged.sampling.grammar import GrammarMatcher

PROMPT = "Anna had a"
VICTIM = {"seed": 3, "max_tokens": 8, "ignore_eos": True}

every_pipelining = pytest.mark.parametrize("pipelining", PIPELINING)


def reason(bad: int) -> str:
    return f"ValueError: no text for {bad}"


def add_others(engine: Engine, bad: int) -> list[int]:
    """Samples, a stop string, a stream and a grammar, none of which ever meets the bad token."""
    values: dict[str, Any] = {"ignore_eos": True, "logit_bias": {bad: -1e9}}
    return [
        engine.add_request(PROMPT, SamplingParams(seed=4, n=2, max_tokens=7, **values)),
        engine.add_request(PROMPT, SamplingParams(seed=5, max_tokens=10, stop=["never"], logprobs=2, **values)),
        engine.add_request(PROMPT, SamplingParams(seed=6, max_tokens=9, **values), stream=True),
        engine.add_request(PROMPT, SamplingParams(seed=7, max_tokens=9, regex="[x-z]{2,5}", logit_bias={bad: -1e9})),
    ]


def run_all(engine: Engine) -> dict[int, list[Output]]:
    """Step until nothing is left; everything that was handed out, by request."""
    found: dict[int, list[Output]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    return found


def samples(outputs: list[Output]) -> list[Any]:
    """What can be compared of a request's outputs."""
    assert all(isinstance(output, RequestOutput) for output in outputs)
    return [
        (one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason)
        for output in outputs
        if isinstance(output, RequestOutput)
        for one in output.outputs
    ]


def others_alone(make_engine: MakeEngine, tokenizer: Any, bad: int) -> list[Any]:
    engine = make_engine(tokenizer)
    ids = add_others(engine, bad)
    found = run_all(engine)
    return [samples(found[request_id]) for request_id in ids]


def assert_serves_on(engine: Engine, make_engine: MakeEngine, tokenizer: Any, bad: int) -> None:
    """The engine holds nothing, and what comes next is served as by a new one."""
    assert is_idle(engine)
    params = SamplingParams(seed=9, n=2, max_tokens=6, ignore_eos=True, logit_bias={bad: -1e9})
    assert samples([complete(engine, PROMPT, params)]) == samples([complete(make_engine(tokenizer), PROMPT, params)])
    assert is_idle(engine)


@every_pipelining
@pytest.mark.parametrize("kind", ["plain", "with a stop string", "streamed"])
def test_a_tokenizer_that_raises_is_the_error_of_its_request_alone(
    kind: str, pipelining: str, make_engine: MakeEngine, tokenizer: Any
) -> None:
    params = SamplingParams(**VICTIM, stop=["never"] if kind == "with a stop string" else None)
    sound = complete(make_engine(tokenizer), PROMPT, params).outputs[0]
    bad = sound.token_ids[2]
    assert bad not in sound.token_ids[:2], "the premise: it is its third token"
    engine = make_engine(BrokenTokenizer(tokenizer, bad), pipelining=pipelining)
    victim = engine.add_request(PROMPT, params, stream=kind == "streamed")
    ids = add_others(engine, bad)
    found = run_all(engine)
    assert [samples(found[request_id]) for request_id in ids] == others_alone(make_engine, tokenizer, bad)

    pieces = samples(found[victim])
    assert {piece[3:] for piece in pieces[:-1]} <= {(None, None)}
    assert pieces[-1][3:] == ("error", reason(bad))
    is_watched = kind != "plain"
    assert [token for piece in pieces for token in piece[2]] == sound.token_ids[: 3 if is_watched else None]
    text = "".join(piece[1] for piece in pieces)
    assert bool(text) == is_watched and sound.text.startswith(text)
    assert_serves_on(engine, make_engine, tokenizer, bad)


def test_a_tokenizer_that_raises_for_one_sample_lets_its_siblings_go_on(
    make_engine: MakeEngine, tokenizer: Any
) -> None:
    params = SamplingParams(**VICTIM, n=3)
    first, *siblings = complete(make_engine(tokenizer), PROMPT, params).outputs
    bad = next(t for t in first.token_ids if not any(t in sibling.token_ids for sibling in siblings))
    engine = make_engine(BrokenTokenizer(tokenizer, bad))
    output = complete(engine, PROMPT, params)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("error", reason(bad))
    assert [(one.text, one.token_ids, one.finish_reason) for one in output.outputs[1:]] == [
        (one.text, one.token_ids, "length") for one in siblings
    ]
    assert_serves_on(engine, make_engine, tokenizer, bad)


@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_aborting_a_request_whose_text_raises_returns_it_with_the_error(
    num_steps: int, make_engine: MakeEngine, tokenizer: Any
) -> None:
    params = SamplingParams(**VICTIM)
    bad = tokens_of(complete(make_engine(tokenizer), PROMPT, params))[2]
    engine = make_engine(BrokenTokenizer(tokenizer, bad))
    victim = engine.add_request(PROMPT, params)
    ids = add_others(engine, bad)
    found: dict[int, list[Output]] = {}
    for _ in range(num_steps):
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    aborted = engine.abort(victim)
    assert isinstance(aborted, RequestOutput) and aborted.finished
    (one,) = aborted.outputs
    assert (one.finish_reason, one.stop_reason) == (("error", reason(bad)) if bad in one.token_ids else ("abort", None))
    assert (bad in one.token_ids) == (num_steps == 6)
    assert engine.abort(victim) is None
    for request_id, outputs in run_all(engine).items():
        found.setdefault(request_id, []).extend(outputs)
    assert [samples(found[request_id]) for request_id in ids] == others_alone(make_engine, tokenizer, bad)
    assert_serves_on(engine, make_engine, tokenizer, bad)


@every_pipelining
def test_a_tokenizer_that_raises_for_a_hypothesis_is_the_error_of_its_beam_search(
    pipelining: str, make_engine: MakeEngine, tokenizer: Any
) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    sound: Any = complete(make_engine(tokenizer), PROMPT, params)
    bad = sound.sequences[-1].token_ids[-1]
    engine = make_engine(BrokenTokenizer(tokenizer, bad), pipelining=pipelining)
    victim = engine.add_request(PROMPT, params)
    ids = add_others(engine, bad)
    found = run_all(engine)
    (output,) = found[victim]
    assert isinstance(output, BeamSearchOutput) and output.finished
    assert (output.error, output.sequences, output.aborted) == (reason(bad), [], False)
    assert [samples(found[request_id]) for request_id in ids] == others_alone(make_engine, tokenizer, bad)
    assert_serves_on(engine, make_engine, tokenizer, bad)


def test_aborting_a_beam_search_whose_text_raises_returns_it_with_the_error(
    make_engine: MakeEngine, tokenizer: Any
) -> None:
    def aborted(engine: Engine) -> BeamSearchOutput:
        request_id = engine.add_request(PROMPT, BeamSearchParams(beam_width=3, max_tokens=9))
        for _ in range(4):
            engine.step()
        output = engine.abort(request_id)
        assert isinstance(output, BeamSearchOutput) and output.finished and output.aborted
        return output

    sound = aborted(make_engine(tokenizer))
    assert sound.error is None
    bad = sound.sequences[0].token_ids[0]
    engine = make_engine(BrokenTokenizer(tokenizer, bad))
    output = aborted(engine)
    assert (output.error, output.sequences) == (reason(bad), [])
    assert_serves_on(engine, make_engine, tokenizer, bad)


@every_pipelining
def test_a_grammar_that_raises_is_the_error_of_its_request_alone(
    pipelining: str, make_engine: MakeEngine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(seed=1, regex="[a-h]{12}", max_tokens=20)
    sound = complete(make_engine(tokenizer), PROMPT, params).outputs[0]
    bad = sound.token_ids[1]
    assert bad != sound.token_ids[0], "the premise: it is its second token"
    expected, advance = others_alone(make_engine, tokenizer, bad), GrammarMatcher.advance

    def raising(self: GrammarMatcher, token_id: int) -> None:
        if token_id == bad:
            raise RuntimeError("no such\n  state")
        advance(self, token_id)

    engine = make_engine(tokenizer, pipelining=pipelining)
    with monkeypatch.context() as patch:
        patch.setattr(GrammarMatcher, "advance", raising)
        victim = engine.add_request(PROMPT, params)
        ids = add_others(engine, bad)
        found = run_all(engine)
    assert [samples(found[request_id]) for request_id in ids] == expected
    ((_, text, token_ids, *why),) = samples(found[victim])
    assert (token_ids, why) == (sound.token_ids[:2], ["error", "RuntimeError: no such state"])
    assert sound.text.startswith(text)
    assert_serves_on(engine, make_engine, tokenizer, bad)
    assert complete(engine, PROMPT, params).outputs[0].text == sound.text
