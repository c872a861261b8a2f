"""Conversations go through the model's chat template, and start from the blocks of the turn before."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.llms import GREEDY, MakeLLM, all_free, samples

from mlx_paged import SamplingParams


def test_chat_applies_the_models_template(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    messages = [{"role": "user", "content": "Where is the ball?"}]
    output = llm.chat(messages, GREEDY)
    text = "<|user|>Where is the ball?<|end|><|assistant|>"
    assert output.prompt_token_ids == tokenizer.encode(text, add_special_tokens=False)
    assert samples(output) == samples(llm.generate([output.prompt_token_ids], GREEDY)[0])


def test_what_else_the_template_takes_reaches_it(make_llm: MakeLLM, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Where is the ball?"}]
    token_ids = make_llm(tokenizer).encode_chat(messages, chat_template_kwargs={"add_generation_prompt": False})
    assert tokenizer.decode(token_ids) == "<|user|>Where is the ball?<|end|>"


def test_the_second_turn_of_a_conversation_starts_from_the_blocks_of_the_first(
    make_llm: MakeLLM, tokenizer: Any
) -> None:
    llm = make_llm(tokenizer)
    messages = [{"role": "user", "content": "Anna had a red ball. Where is the ball?"}]
    first = llm.chat(messages, GREEDY)
    assert first.num_cached_tokens == 0
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": "And Anna?"},
    ]
    second = llm.chat(messages, GREEDY)
    assert second.num_cached_tokens >= len(first.prompt_token_ids) // 4 * 4


def test_an_empty_conversation_and_a_model_without_template_are_refused(make_llm: MakeLLM, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        make_llm(tokenizer).chat([])
    with pytest.raises(ValueError, match="chat template"):
        make_llm().chat([{"role": "user", "content": "Hi"}])


QUESTIONS = ["Where is the ball?", "Anna had a red ball.", "Who?"]


def test_a_list_of_conversations_is_answered_at_once_in_its_order(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = [SamplingParams(temperature=0, max_tokens=3 + i) for i in range(3)]
    alone = [llm.chat(conversation, one) for conversation, one in zip(conversations, params, strict=True)]
    num_steps = llm.stats().num_steps
    together = llm.chat(conversations, params)
    assert [samples(one) for one in together] == [samples(one) for one in alone]
    assert llm.stats().num_steps - num_steps < 2 * 3 + 5, "one batch"
    assert samples(llm.chat(iter(conversations[:1]), GREEDY)[0]) == samples(llm.chat(conversations[0], GREEDY))  # type: ignore[call-overload]
    assert all_free(llm)


def test_one_bad_conversation_among_good_ones_stops_all_before_anything_runs(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    for bad in ([], "hello", [{"role": "user"}]):
        with pytest.raises((ValueError, TypeError), match=r"empty|list such as|no content"):
            llm.chat([[{"role": "user", "content": "Hi"}], bad], GREEDY)  # type: ignore[list-item]
    assert llm.stats().num_steps == 0


def test_a_streamed_answer_put_together_is_the_whole_one(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    params = SamplingParams(seed=3, max_tokens=12)
    whole = llm.chat(messages, params)
    deltas = list(llm.stream_chat(messages, params))
    assert len(deltas) > 2 and deltas[-1].finished
    assert "".join(delta.outputs[0].text for delta in deltas) == whole.outputs[0].text
    assert [token for delta in deltas for token in delta.outputs[0].token_ids] == samples(whole)[0]


def test_what_the_template_may_use_reaches_it_from_every_call(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    seen: list[Any] = []
    llm.engine.input_processor.chat_template.encode = (  # type: ignore[method-assign]
        lambda messages, **options: seen.append(options) or [1, 2]
    )
    options: Any = {"tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False}}
    messages = [{"role": "user", "content": "Hi"}]
    llm.chat(messages, GREEDY, **options)
    llm.chat([messages], GREEDY, **options)
    list(llm.stream_chat(messages, GREEDY, **options))
    llm.encode_chat(messages, **options)
    assert seen == [options] * 4


def test_text_where_a_conversation_belongs_is_told_how_one_is_written(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    for call in (llm.chat, llm.stream_chat, llm.encode_chat):
        with pytest.raises(TypeError, match=r"messages must be a list such as \[\{.*'hello'\}\], got 'hello'"):
            call("hello")  # type: ignore[operator]
