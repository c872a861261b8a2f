"""Conversations go through the model's chat template, and start from the blocks of the turn before."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.llms import GREEDY, MakeLLM, samples


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
