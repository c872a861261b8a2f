"""`LLM.run`, the loop under generate, stream and the command line, and what is told of a chat template that refuses."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.llms import MakeLLM, all_free

from mlx_paged import SamplingParams


def test_a_run_yields_outputs_as_they_come_and_deltas_of_what_is_streamed(make_llm: MakeLLM) -> None:
    llm = make_llm()
    lengths = {4: 6, 5: 2, 6: 4}  # first token of the prompt -> how many tokens come
    expected = [
        llm.generate([token] * 3, SamplingParams(temperature=0, max_tokens=most))[0].outputs[0].token_ids
        for token, most in lengths.items()
    ]
    requests = [
        llm.engine.make_request([token] * 3, SamplingParams(temperature=0, max_tokens=most), stream=token == 6)
        for token, most in lengths.items()
    ]
    outputs: list[Any] = list(llm.run(requests))
    ended = [output.request_id for output in outputs if output.finished]
    assert ended == [requests[1].request_id, requests[2].request_id, requests[0].request_id]
    tokens: dict[int, list[int]] = {}
    for output in outputs:
        tokens[output.request_id] = tokens.get(output.request_id, []) + output.outputs[0].token_ids
    assert [tokens[request.request_id] for request in requests] == expected
    assert sum(output.request_id == requests[2].request_id for output in outputs) == 4
    assert all_free(llm)


def test_closing_a_run_ends_its_requests_and_keeps_what_others_wait_for(make_llm: MakeLLM) -> None:
    llm = make_llm()
    stream = llm.stream([3] * 4, SamplingParams(temperature=0, max_tokens=30))
    doomed = llm.run([llm.engine.make_request([i + 4] * 5, SamplingParams(max_tokens=9 * i + 9)) for i in range(3)])
    next(stream)
    assert next(doomed).finished  # the first of three; by then the stream has come to some tokens that nobody has read
    doomed.close()
    assert len(list(stream)) == 29
    assert all_free(llm)


@pytest.mark.parametrize("how", ["generate", "stream"])
def test_what_others_have_asked_of_the_engine_is_kept_for_who_steps_it(how: str, make_llm: MakeLLM) -> None:
    llm, params = make_llm(), SamplingParams(temperature=0, max_tokens=6)
    (expected,) = llm.generate([[3] * 5], params)
    whole = llm.engine.add_request([3] * 5, params)
    deltas = llm.engine.add_request([3] * 5, params, stream=True)
    longer = SamplingParams(temperature=0, max_tokens=20)
    outputs = llm.generate([[4] * 5], longer) if how == "generate" else list(llm.stream([4] * 5, longer))
    assert {output.request_id for output in outputs}.isdisjoint({whole, deltas})
    assert llm.engine.has_unfinished()
    kept: list[Any] = llm.engine.step()
    assert not llm.engine.has_unfinished() and llm.engine.step() == []
    tokens: dict[int, list[int]] = {whole: [], deltas: []}
    for output in kept:
        tokens[output.request_id] += output.outputs[0].token_ids
    assert tokens == dict.fromkeys((whole, deltas), expected.outputs[0].token_ids)
    assert sum(output.request_id == deltas for output in kept) > 1
    assert all_free(llm)


def test_what_is_kept_of_a_request_goes_when_it_is_aborted(make_llm: MakeLLM) -> None:
    llm, params = make_llm(), SamplingParams(temperature=0, max_tokens=6)
    ended, running = (llm.engine.add_request([3] * 5, p, stream=True) for p in (params, SamplingParams(max_tokens=50)))
    llm.generate([[4] * 5], SamplingParams(temperature=0, max_tokens=20))
    for request_id, reason in ((ended, "length"), (running, "abort")):
        output: Any = llm.engine.abort(request_id)
        assert (output.request_id, output.outputs[0].finish_reason) == (request_id, reason)
        assert llm.engine.abort(request_id) is None
    assert all_free(llm)


def test_what_an_interrupted_run_has_not_taken_is_nobodys(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    take = llm.engine._outputs.take
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):

        def interrupted(wanted: Any = None) -> Any:
            if llm.engine._outputs.outputs:
                patches.undo()
                raise KeyboardInterrupt
            return take(wanted)

        patches.setattr(llm.engine._outputs, "take", interrupted)
        llm.generate([[3] * 5], SamplingParams(temperature=0, max_tokens=6))
    assert all_free(llm)


def test_a_template_that_does_not_take_a_conversation_says_why(
    make_llm: MakeLLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = "{{ raise_exception('System role not supported') }}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", refusing)
    with pytest.raises(ValueError, match="template does not take this conversation: System role not supported"):
        make_llm(tokenizer).chat([{"role": "user", "content": "Hi"}])
