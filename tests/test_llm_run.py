"""`LLM.run`, the loop under generate, stream and the command line, and what is told of a chat template that refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from mlx_lm.utils import load_tokenizer

from mlx_paged import LLM, SamplingParams

MakeLLM = Callable[..., LLM]


@pytest.fixture
def make_llm(tiny_model: Callable[..., nn.Module]) -> MakeLLM:
    """An LLM over a tiny random model, in blocks of 4, that verifies itself after every step."""

    def make(tokenizer: Any = None, **config: Any) -> LLM:
        small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
        model = tiny_model("llama", **small, **({"vocab_size": len(tokenizer)} if tokenizer else {}))
        config = {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8, "check_invariants": True} | config
        return LLM.from_model(model, tokenizer, **config)

    return make


def all_free(llm: LLM) -> bool:
    stats = llm.stats()
    return stats.num_free_blocks == stats.num_blocks and not llm.engine.has_unfinished() and not llm._outputs


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


def test_a_template_that_does_not_take_a_conversation_says_why(
    make_llm: MakeLLM, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(demo_folder, eos_token_ids=4)
    refusing = "{{ raise_exception('System role not supported') }}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", refusing)
    with pytest.raises(ValueError, match="template does not take this conversation: System role not supported"):
        make_llm(tokenizer).chat([{"role": "user", "content": "Hi"}])
