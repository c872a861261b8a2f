"""Chat completions, as OpenAI's client reads them: text, thinking, tool calls, whole and in pieces."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from helpers.servers import post
from openai.types.chat import ChatCompletion, ChatCompletionChunk

USER: list[Any] = [{"role": "user", "content": "hi"}]


def tool(name: str) -> Any:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "x", "parameters": schema}}


def script(name: str) -> list[Any]:
    """A conversation whose answer is a chain of the scripted model."""
    return [{"role": "system", "content": f"SCRIPT:{name}"}, *USER]


def chunks_of(client: openai.OpenAI, **request: Any) -> list[ChatCompletionChunk]:
    return list(client.chat.completions.create(model="scripted", stream=True, **request))


def joined(chunks: list[ChatCompletionChunk]) -> dict[str, Any]:
    """The message that a stream's deltas make up, as clients join them, and why it ended."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert "finish_reason" not in message, "nothing comes after the end"
        message["content"] += choice.delta.content or ""
        message["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or []:
            if call.index == len(message["tool_calls"]):
                assert call.id and call.type == "function" and call.function and call.function.name
                message["tool_calls"].append([call.function.name, ""])
            assert call.function and call.function.arguments is not None
            message["tool_calls"][call.index][1] += call.function.arguments
        if choice.finish_reason is not None:
            message["finish_reason"] = choice.finish_reason
    return message


def whole(answer: ChatCompletion) -> dict[str, Any]:
    (choice,) = answer.choices
    calls = [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or []]  # type: ignore[union-attr]
    return {
        "content": choice.message.content or "",
        "reasoning_content": getattr(choice.message, "reasoning_content", ""),
        "tool_calls": calls,
        "finish_reason": choice.finish_reason,
    }


CASES = {
    "answer": ([], ["All done: the tool said so.", "", [], "stop"]),
    "exec_command": (
        ["exec_command"],
        ["", "I should run it.", [["exec_command", '{"cmd": "echo marker-7"}']], "tool_calls"],
    ),
    "Bash": (
        ["Bash"],
        [
            "Let me look.",
            "",
            [["Bash", '{"command": "echo marker-7", "description": "say it"}']],
            "tool_calls",
        ],
    ),
    "two_calls": (
        ["other"],
        ["", "", [["get_weather", '{"city": "A"}'], ["get_weather", '{"city": "B"}']], "tool_calls"],
    ),
    "unknown_tool": (["other"], ["", "", [["no_such_tool", "{}"]], "tool_calls"]),
    "bad_json": (
        ["other"],
        [
            'Hm. <tool_call>\n{"name": "get_weather", "arguments": {city: nope}}\n</tool_call>',
            "",
            [],
            "stop",
        ],
    ),
    "open_call": (
        ["other"],
        ["", "", [["get_weather", '{"city": "Par']], "tool_calls"],
    ),
    "not_a_tool": (["other"], ["Write a < b, then <tools> and <thinking>, never a call <tool_cal", "", [], "stop"]),
    "emoji": ([], ["\U0001f600", "", [], "stop"]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_taken_apart_and_its_stream_joins_to_it(name: str, client: openai.OpenAI) -> None:
    tools, expected = CASES[name]
    request: dict[str, Any] = {"messages": script(name), "tools": [tool(each) for each in tools] or openai.omit}
    answer = whole(client.chat.completions.create(model="scripted", **request))
    assert list(answer.values()) == expected
    assert joined(chunks_of(client, **request)) == answer


def test_without_tools_what_looks_like_a_call_is_text(client: openai.OpenAI) -> None:
    answer = whole(client.chat.completions.create(model="scripted", messages=script("two_calls")))
    assert answer["content"].count("</tool_call>") == 2 and not answer["tool_calls"]
    both = client.chat.completions.create(
        model="scripted", messages=script("two_calls"), tools=[tool("x")], tool_choice="none"
    )
    assert whole(both) == answer


def test_content_is_null_if_there_are_calls_alone_and_one_call_comes_if_only_one_may(url: str) -> None:
    body = {"messages": script("two_calls"), "tools": [tool("other")], "parallel_tool_calls": False}
    (choice,) = post(f"{url}/v1/chat/completions", body).json()["choices"]
    assert choice["message"]["content"] is None
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"city": "A"}']


def test_a_tool_loop_goes_on_with_the_result_and_finds_its_prefix(client: openai.OpenAI) -> None:
    system = {"role": "system", "content": "You are an agent. " * 20}
    messages: list[Any] = [system, *USER]
    tools = [tool("get_weather")]
    answer = client.chat.completions.create(model="scripted", messages=messages, tools=tools)
    assert answer.usage is not None and answer.usage.prompt_tokens > 100
    message = answer.choices[0].message
    assert message.tool_calls
    messages += [message.model_dump(exclude_none=True)]
    messages += [
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": [{"type": "text", "text": "7 C"}]}
    ]
    answer = client.chat.completions.create(model="scripted", messages=messages, tools=tools)
    assert answer.choices[0].message.content == "All done: the tool said so."
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    first = client.chat.completions.create(model="scripted", messages=messages[:2], tools=tools).usage
    assert first is not None  # all full blocks of the turn before are hit
    assert usage.prompt_tokens_details.cached_tokens is not None
    assert usage.prompt_tokens_details.cached_tokens >= (first.prompt_tokens - 8) // 16 * 16


def test_a_stream_begins_with_the_role_and_tells_usage_in_a_chunk_of_its_own_if_asked(client: openai.OpenAI) -> None:
    chunks = chunks_of(client, messages=USER, n=2, stream_options={"include_usage": True})
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    for index in range(2):
        deltas = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert deltas[0].delta.role == "assistant" and deltas[0].delta.content == ""
        assert [delta.finish_reason for delta in deltas].count("stop") == 1 and deltas[-1].finish_reason == "stop"
        assert deltas[-1].delta.content is None
    *others, last = chunks
    assert last.choices == [] and last.usage is not None and all(chunk.usage is None for chunk in others)
    whole = client.chat.completions.create(model="scripted", messages=USER, n=2).usage
    assert whole is not None and last.usage.completion_tokens == whole.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks_of(client, messages=USER))


def test_thinking_is_counted_apart(client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(model="scripted", messages=script("exec_command")).usage
    assert usage is not None and usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 4  # two pieces between two markers


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_bytes_that_join_to_the_text(stream: bool, client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"messages": script("emoji"), "logprobs": True, "top_logprobs": 3}
    if stream:
        choices = [choice for chunk in chunks_of(client, **request) for choice in chunk.choices]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    else:
        answer = client.chat.completions.create(model="scripted", **request)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        entries = logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == "\U0001f600"
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] == entry.logprob


def test_max_tokens_cut_an_answer_and_more_than_fits_is_cut_to_what_fits(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=script("endless"), max_completion_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "tick tack tick tack tick "
    cut = client.chat.completions.create(
        model="scripted", messages=script("open_call"), tools=[tool("x")], max_tokens=2
    )
    assert whole(cut) == {
        "content": "",
        "reasoning_content": "",
        "tool_calls": [["get_weather", '{"ci']],
        "finish_reason": "length",
    }
    huge = client.chat.completions.create(model="scripted", messages=USER, max_tokens=10**12)
    assert huge.choices[0].finish_reason == "stop"


def test_stop_strings_seeds_biases_and_vllms_own_parameters_are_kept(client: openai.OpenAI) -> None:
    def text(**request: Any) -> str:
        answer = client.chat.completions.create(model="scripted", messages=USER, **request)
        return answer.choices[0].message.content or ""

    assert text(stop=[" said"]) == text(stop=" said") == "All done: the tool"
    assert text(max_tokens=20, extra_body={"ignore_eos": True, "min_p": 0.1, "top_k": -1}).startswith("All done")
    assert text(extra_body={"structured_outputs": {"regex": "All"}}) == "All"


def test_an_answer_is_exactly_one_of_the_choices(client: openai.OpenAI) -> None:
    choices = ["a+b (c)", "x-y\n#z", "\u00e9|"]
    for body in ({"guided_choice": choices}, {"structured_outputs": {"choice": choices}}):
        answer = client.chat.completions.create(model="scripted", messages=USER, n=8, temperature=2, extra_body=body)
        assert {choice.message.content for choice in answer.choices} <= set(choices)
    for choice in choices:
        answer = client.chat.completions.create(model="scripted", messages=USER, extra_body={"guided_choice": [choice]})
        assert answer.choices[0].message.content == choice


def test_the_prompt_may_end_with_the_last_message(url: str) -> None:
    def tokens(**more: Any) -> list[int]:
        return post(f"{url}/tokenize", {"messages": USER, **more}).json()["tokens"]  # type: ignore[no-any-return]

    with_prompt, without = tokens(), tokens(add_generation_prompt=False)
    assert with_prompt[: len(without)] == without and len(without) < len(with_prompt)
    assert tokens(add_generation_prompt=True) == with_prompt
    said = [*USER, {"role": "assistant", "content": "All"}]
    usual = {"continue_final_message": True, "add_generation_prompt": False}  # as vLLM wants both
    both, one = (
        post(f"{url}/tokenize", {"messages": said, **each}).json()
        for each in (usual, {**usual, "add_generation_prompt": None})
    )
    assert both == one and "tokens" in both


def test_fields_whose_value_asks_for_nothing_are_no_error(url: str) -> None:
    neutral = {"min_tokens": 0, "bad_words": [], "use_beam_search": False, "prompt_logprobs": None, "echo": False}
    assert post(f"{url}/v1/chat/completions", {"messages": USER, **neutral}).status_code == 200


def test_a_conversation_whose_later_system_message_the_template_refuses_keeps_its_head(client: openai.OpenAI) -> None:
    tokens = [
        {"role": "system", "content": "First."},
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "Later."},
    ]
    assert client.chat.completions.create(model="scripted", messages=tokens).choices[0].finish_reason == "stop"  # type: ignore[arg-type]


def test_arguments_of_earlier_calls_are_not_quoted_twice(url: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": "\u00e9"})}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokens = post(f"{url}/tokenize", {"messages": messages}).json()["tokens"]
    text = post(f"{url}/detokenize", {"tokens": tokens}).json()["prompt"]
    assert '<tool_call>f {"a": "\u00e9"}</tool_call>' in text


def test_an_image_that_a_tool_returns_is_named_in_its_place(url: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "Seen: "}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    messages = [*USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": parts}]
    tokens = post(f"{url}/tokenize", {"messages": messages}).json()["tokens"]
    text = post(f"{url}/detokenize", {"tokens": tokens}).json()["prompt"]
    assert "<|im_start|>tool\nSeen: [image omitted: only text can be read]<|im_end|>" in text


NO_CHOICES: list[Any] = ["", [], {}, False, 0]
REFUSED = [
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
    ({"messages": USER, "n": 10**9}, 400, "n"),
    ({"messages": USER, "n": True}, 400, "n"),
    ({"messages": USER, "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": USER, "temperature": -1}, 400, "temperature"),
    ({"messages": USER, "logprobs": True, "top_logprobs": 10**6}, 400, "top_logprobs"),
    ({"messages": USER, "stop": ["x"] * 10_000}, 400, "stop"),
    ({"messages": USER, "stop": "x" * 1_000_000}, 400, "stop"),
    ({"messages": USER, "logit_bias": {str(i): 1 for i in range(200_000)}}, 400, "logit_bias"),
    ({"messages": USER, "logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"messages": USER, "tools": [{"type": "function"}]}, 400, "tools[0].function"),
    *(({"messages": USER, "tool_choice": choice}, 400, "tool_choice") for choice in NO_CHOICES),
    *(
        (
            {"messages": USER, "tools": [{"type": "function", "function": {"name": "f", name: 5}}]},
            400,
            f"tools[0].function.{name}",
        )
        for name in ("description", "parameters")
    ),
    ({"messages": [{"role": "user", "content": "x y " * 40_000}]}, 400, "messages"),
    ({"messages": USER, "functions": []}, 400, "functions"),
    ({"messages": USER, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
    ({"messages": USER, "chat_template_kwargs": {"tokenize": False}}, 400, "chat_template_kwargs"),
    ({"messages": USER, "response_format": {"type": "xml"}}, 400, "response_format.type"),
    ({"messages": USER, "guided_regex": "("}, 400, "regex"),
    ({"messages": USER, "guided_regex": "a", "guided_choice": ["a"]}, 400, "response_format"),
    ({"messages": USER, "guided_choice": "a"}, 400, "guided_choice"),
    ({"messages": USER, "structured_outputs": {"choice": [1]}}, 400, "structured_outputs.choice"),
    ({"messages": USER, "structured_outputs": {"structural_tag": "x"}}, 400, "structured_outputs.structural_tag"),
    ({"messages": USER, "echo": True}, 400, "echo"),
    ({"messages": USER, "allowed_token_ids": [5]}, 400, "allowed_token_ids"),
    ({"messages": USER, "include_stop_str_in_output": True}, 400, "include_stop_str_in_output"),
    ({"messages": USER, "guided_json": {"type": "nothing"}}, 400, "json_schema"),
    ({"model": "gpt-9", "messages": USER}, 404, "model"),
]


@pytest.mark.parametrize("body, status, param", REFUSED, ids=[f"{i}-{case[2]}" for i, case in enumerate(REFUSED)])
def test_what_can_not_be_done_is_refused_by_name_and_the_next_request_is_answered(
    body: Any, status: int, param: str, url: str
) -> None:
    for stream in (False, True):
        response = post(f"{url}/v1/chat/completions", body | {"stream": stream})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["param"] == param and error["type"] == "invalid_request_error" and len(error["message"]) < 400
    good = post(f"{url}/v1/chat/completions", {"messages": USER})
    assert good.json()["choices"][0]["message"]["content"] == "All done: the tool said so."


def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "x y " * 40_000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="scripted", messages=long)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"
    assert re.search(r"This model's maximum context length is \d+ tokens: the prompt has \d+ tokens", str(caught.value))


def test_null_means_that_a_field_is_not_given(url: str) -> None:
    names = ("tools", "stop", "n", "temperature", "response_format", "logit_bias", "tool_choice", "stream_options")
    body = {"messages": USER} | dict.fromkeys(names)
    assert post(f"{url}/v1/chat/completions", body).status_code == 200
