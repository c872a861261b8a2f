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


@pytest.mark.parametrize("prompt", ["Hello, is it done?", START])
def test_echo_with_log_probabilities_tells_those_of_the_prompt_as_harnesses_read_them(
    prompt: str, client: openai.OpenAI
) -> None:
    request: dict[str, Any] = {"model": "scripted", "prompt": prompt, "echo": True, "logprobs": 2}
    for _ in range(2):  # also when the prompt is cached
        only = client.completions.create(**request, max_tokens=0)
        more = client.completions.create(**request, max_tokens=3)
        for choice in (*only.choices, *more.choices):
            found = choice.logprobs
            assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs
            tokens = "".join(found.tokens)
            assert choice.text.startswith(prompt) and tokens in (choice.text, f"{choice.text}<|im_end|>")
            assert found.token_logprobs[0] is None and found.top_logprobs[0] is None  # nothing predicts the first
            assert all(value is not None and value <= 0 for value in found.token_logprobs[1:])
            assert all(len(top) == 2 for top in found.top_logprobs[1:])
            begins = [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
            assert found.text_offset == begins
        assert only.choices[0].text == prompt
        assert only.choices[0].logprobs and more.choices[0].logprobs
        assert more.choices[0].logprobs.token_logprobs is not None
        num = len(only.choices[0].logprobs.tokens or ())
        assert more.choices[0].logprobs.token_logprobs[:num] == only.choices[0].logprobs.token_logprobs


def test_a_token_that_is_certain_is_the_likeliest_in_an_echo_too(client: openai.OpenAI, llm: AsyncLLM) -> None:
    chain = ["All\u0120", "done", ":\u0120the\u0120tool\u0120", "said\u0120so", "."]
    prompt = llm.tokenizer.encode(START) + llm.tokenizer.convert_tokens_to_ids(chain)
    answer = client.completions.create(model="scripted", prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs
    assert found.tokens[-5:] == ["All ", "done", ": the tool ", "said so", "."]
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[-5:]:
        assert list(top) == [token] and top[token] == logprob > -1


def test_a_streamed_echo_has_the_log_probabilities_of_the_prompt_once(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "scripted",
        "prompt": START,
        "echo": True,
        "logprobs": 1,
        "n": 2,
        "max_tokens": 4,
    }
    whole = client.completions.create(**request)
    tokens: dict[int, list[Any]] = defaultdict(list)
    for chunk in client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            found = choice.logprobs
            assert found is not None and found.tokens is not None
            assert found.token_logprobs is not None and found.text_offset is not None
            tokens[choice.index] += zip(found.tokens, found.token_logprobs, found.text_offset, strict=True)
    for choice in whole.choices:
        found = choice.logprobs
        assert found is not None and found.tokens and found.token_logprobs and found.text_offset
        together = list(zip(found.tokens, found.token_logprobs, found.text_offset, strict=True))
        assert [each[0] for each in tokens[choice.index]] == found.tokens
        assert [each[2] for each in tokens[choice.index]] == found.text_offset
        assert len(together) == len(tokens[choice.index])


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_prompt_logprobs_are_vllms_in_completions_and_in_chat(path: str, url: str) -> None:
    asked = {"prompt": START} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    body = asked | {"prompt_logprobs": 2, "max_tokens": 2, "n": 2}
    answer = post(f"{url}/v1/{path}", body).json()
    holders = answer["choices"] if path == "completions" else [answer]
    tokens = post(f"{url}/tokenize", asked).json()["tokens"]
    for holder in holders:
        found = holder["prompt_logprobs"]
        assert len(found) == len(tokens) and found[0] is None
        for token, entry in zip(tokens[1:], found[1:], strict=True):
            own = entry[str(token)]
            assert set(own) == {"logprob", "rank", "decoded_token"} and own["logprob"] <= 0
            ranks = [each["rank"] for each in entry.values() if each["rank"] is not None]
            assert sorted(ranks) == [1, 2] and len(entry) == (3 if own["rank"] is None else 2)
    refused = post(f"{url}/v1/{path}", body | {"stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"
    assert "prompt_logprobs" not in post(f"{url}/v1/{path}", asked).json()


def test_fewest_tokens_and_bad_words_are_vllms(url: str) -> None:
    free = post(f"{url}/v1/completions", {"prompt": START, "temperature": 0}).json()["choices"][0]
    assert (free["text"], free["finish_reason"]) == ("All done: the tool said so.", "stop")
    body = {"prompt": START, "temperature": 0, "max_tokens": 12, "min_tokens": 12}
    longer = post(f"{url}/v1/completions", body).json()
    assert longer["choices"][0]["finish_reason"] == "length" and longer["usage"]["completion_tokens"] == 12
    for word in ("tool", "ne: th", " said"):
        other = post(f"{url}/v1/completions", body | {"bad_words": [word]}).json()["choices"][0]["text"]
        assert word.strip() not in other and other


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x y " * 40_000}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "logprobs": 6}, "logprobs"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": ["x"] * 2000}, "prompt"),
        ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": "x", "bad_words": "a"}, "bad_words"),
        ({"prompt": "x", "bad_words": ["a" * 101]}, "bad_words"),
        ({"prompt": "x", "bad_words": [" "]}, "bad_words"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "x", "min_tokens": -1}, "min_tokens"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(body: Any, param: str, url: str) -> None:
    response = post(f"{url}/v1/completions", body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize("stream", [False, True])
def test_more_prompts_than_can_be_taken_now_wait_and_more_than_ever_can_are_refused(
    stream: bool, llm: AsyncLLM, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "max_waiting", 2)
    monkeypatch.setattr(llm._thread, "max_num_seqs", 3)
    body: dict[str, Any] = {"max_tokens": 2, "stream": stream}
    assert post(f"{url}/v1/completions", body | {"prompt": ["x"] * 5}).status_code == 200
    refused = post(f"{url}/v1/completions", body | {"prompt": ["x"] * 6})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"
    assert "6 prompts in it: at most 5 can be taken at once, 3 to run and 2 to wait" in refused.text
    monkeypatch.setattr(llm, "_running", {object()})  # one of another client
    later = post(f"{url}/v1/completions", body | {"prompt": ["x"] * 5})
    assert later.status_code == 429 and "at most 4 more are taken" in later.text
