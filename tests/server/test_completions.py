"""Completions, as OpenAI's client reads them: prompts of all forms, echo, log-probabilities, streams."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import openai
import pytest
from helpers.servers import post

from mlx_paged.async_llm import AsyncLLM

IDS = [264, 78, 352]
START = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|run_answer|>"


@pytest.mark.parametrize("prompt, count", [("Hello", 1), (["Hello", "x"], 2), (IDS, 1), ([IDS, [1]], 2)])
def test_prompts_are_texts_or_token_ids_one_or_several(prompt: Any, count: int, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt=prompt, n=2)
    assert [choice.index for choice in answer.choices] == list(range(2 * count))
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_sixteen_tokens_come_if_nobody_says_how_many(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt=START.replace("answer", "endless"))
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].text == "tick tack " * 8


def test_streams_of_several_prompts_join_to_the_whole_answer(client: openai.OpenAI) -> None:
    prompts = [START, START.replace("answer", "endless"), "Hello"]
    request: dict[str, Any] = {"model": "scripted", "prompt": prompts, "n": 2, "logprobs": 1, "max_tokens": 9}
    whole = client.completions.create(**request)
    joined: dict[int, str] = defaultdict(str)
    tokens: dict[int, list[str]] = defaultdict(list)
    ends = {}
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert choice.index not in ends
            joined[choice.index] += choice.text
            assert choice.logprobs and choice.logprobs.tokens is not None
            tokens[choice.index] += choice.logprobs.tokens
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
        if not chunk.choices:
            assert whole.usage is not None and chunk.usage == whole.usage
    for choice in whole.choices:
        assert joined[choice.index] == choice.text and ends[choice.index] == choice.finish_reason
        assert choice.logprobs is not None and tokens[choice.index] == choice.logprobs.tokens


def test_log_probabilities_are_parallel_lists_whose_tokens_are_the_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt=START, logprobs=2, max_tokens=3)
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens and found.text_offset and found.top_logprobs
    assert "".join(found.tokens) == answer.choices[0].text == "All done: the tool "
    assert found.text_offset == [0, 4, 8]
    assert [len(top) for top in found.top_logprobs] == [2, 2, 2]
    assert found.token_logprobs == [top[token] for top, token in zip(found.top_logprobs, found.tokens, strict=True)]


@pytest.mark.parametrize(
    "chain, more, text, offsets",
    [
        ("answer", {}, "All done: the tool said so.", [0, 4, 8, 19, 26, 27]),
        ("answer", {"stop": "done: x"}, "All done: the tool said so.", [0, 4, 8, 19, 26, 27]),  # held back for a while
        ("answer", {"stop": "tool said"}, "All done: the ", [0, 4, 8, 19]),
        ("emoji", {}, "\U0001f600", [0, 0, 0, 0, 1]),
    ],
)
def test_each_token_is_placed_where_its_text_begins_streamed_or_not(
    chain: str, more: Any, text: str, offsets: list[int], client: openai.OpenAI
) -> None:
    request: dict[str, Any] = {"model": "scripted", "prompt": START.replace("answer", chain), "logprobs": 2, **more}
    (choice,) = client.completions.create(**request).choices
    chunks = [chunk.choices[0] for chunk in client.completions.create(**request, stream=True)]
    streamed = [place for each in chunks if each.logprobs for place in each.logprobs.text_offset or []]
    assert choice.text == text and choice.logprobs is not None
    assert choice.logprobs.text_offset == streamed == offsets


def test_tokens_that_are_no_whole_character_are_told_apart_by_their_bytes(client: openai.OpenAI, llm: AsyncLLM) -> None:
    ids = [llm.tokenizer.convert_tokens_to_ids(piece) for piece in ("\u00f0", "\u0141")]  # of bytes f0 and 9f
    bias = {str(token): 100 for token in ids}
    request: dict[str, Any] = {
        "model": "scripted",
        "prompt": "x",
        "logit_bias": bias,
        "temperature": 0,
        "max_tokens": 1,
    }
    answer = client.completions.create(**request, logprobs=5)
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens == ["bytes:\\xf0"]


def test_a_seed_of_minus_one_is_any_seed(url: str) -> None:
    request: dict[str, Any] = {"prompt": "x", "seed": -1, "temperature": 1e6, "max_tokens": 8, "ignore_eos": True}
    first, second = (post(f"{url}/v1/completions", request).json()["choices"][0]["text"] for _ in range(2))
    assert first != second
    same = {post(f"{url}/v1/completions", request | {"seed": -2}).json()["choices"][0]["text"] for _ in range(2)}
    assert len(same) == 1


def test_echo_puts_the_prompt_first_and_may_be_all(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt="Hello", echo=True, max_tokens=0)
    assert answer.choices[0].text == "Hello" and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 0


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "logprobs": 6}, "logprobs"),
        ({"prompt": "x", "logprobs": 1, "echo": True}, "logprobs"),
        ({"prompt": "x", "min_tokens": 3}, "min_tokens"),
        ({"prompt": "x", "bad_words": ["y"]}, "bad_words"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": ["x"] * 2000}, "prompt"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(body: Any, param: str, url: str) -> None:
    response = post(f"{url}/v1/completions", body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
