"""Messages, as Anthropic's client reads them: thinking, text, tool use, whole and in events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from helpers.servers import engine_broken, engine_held, events_of, post, prompt_of, serving
from pydantic import TypeAdapter

from mlx_paged.async_llm import AsyncLLM

URL = "/v1/messages"
USER: list[Any] = [{"role": "user", "content": "hi"}]
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def tool(name: str) -> Any:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"name": name, "description": "x", "input_schema": schema}


def script(name: str, *tools: str, **more: Any) -> Any:
    """A request whose answer is a chain of the scripted model."""
    request = {"model": "scripted", "max_tokens": 500, "messages": USER, "system": f"SCRIPT:{name}"}
    return request | ({"tools": [tool(each) for each in tools]} if tools else {}) | more


def told(message: Message) -> Any:
    """What a message says, without the ids that are drawn for it."""
    blocks = [block.to_dict() for block in message.content]
    for block in blocks:
        block.pop("id", None)
    return blocks, message.stop_reason, message.stop_sequence


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def use(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "name": name, "input": arguments}


THOUGHT = {"type": "thinking", "thinking": "I should run it.", "signature": "unsigned"}
CASES = {
    "answer": (script("answer"), [text("All done: the tool said so.")], "end_turn"),
    "exec_command": (
        script("exec_command", "exec_command"),
        [THOUGHT, use("exec_command", cmd="echo marker-7")],
        "tool_use",
    ),
    "Bash": (
        script("Bash", "Bash"),
        [text("Let me look."), use("Bash", command="echo marker-7", description="say it")],
        "tool_use",
    ),
    "two_calls": (
        script("two_calls", "x"),
        [use("get_weather", city="A"), use("get_weather", city="B")],
        "tool_use",
    ),
    "one_call": (
        script("two_calls", "x", tool_choice={"type": "auto", "disable_parallel_tool_use": True}),
        [use("get_weather", city="A")],
        "tool_use",
    ),
    "emoji": (script("emoji"), [text("\U0001f600")], "end_turn"),
    "cut": (script("endless", max_tokens=3), [text("tick tack tick ")], "max_tokens"),
    "stopped": (script("answer", stop_sequences=["the"]), [text("All done: ")], "stop_sequence"),
    "nothing": (script("no_such_chain"), [], "end_turn"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_made_of_blocks_and_its_events_make_up_the_same_message(
    name: str, claude: anthropic.Anthropic
) -> None:
    request, blocks, reason = CASES[name]
    message = claude.messages.create(**request)
    assert told(message) == (blocks, reason, "the" if name == "stopped" else None)
    with claude.messages.stream(**request) as stream:
        streamed = stream.get_final_message()
    assert told(streamed) == told(message)
    assert streamed.usage.output_tokens == message.usage.output_tokens > 0
    assert streamed.usage.output_tokens_details == message.usage.output_tokens_details


def checked_events(url: str, request: Any) -> Iterator[dict[str, Any]]:
    """The events of a stream, each checked to be one that the client knows."""
    for event in events_of(url + URL, request):
        if event["type"] not in ("ping", "error"):
            EVENTS.validate_python(event)
        yield event


def test_events_come_in_their_order_and_each_is_one_that_the_client_knows(url: str) -> None:
    events = list(checked_events(url, script("exec_command", "exec_command")))
    kinds = [event["type"].removeprefix("content_block_") for event in events if event["type"] != "ping"]
    joined = " ".join(kind for i, kind in enumerate(kinds) if kind != kinds[i - 1])
    assert joined == "message_start start delta stop start delta stop message_delta message_stop"
    assert events[1]["type"] == "ping"
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1]
    deltas = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert sorted(set(deltas)) == ["input_json_delta", "signature_delta", "thinking_delta"]


def test_a_tool_loop_goes_on_with_the_result_and_its_prefix_is_told_apart(claude: anthropic.Anthropic) -> None:
    request = script("", "get_weather", system="You help with the weather. " * 20)
    message = claude.messages.create(**request)
    (call,) = message.content
    assert call.type == "tool_use" and message.usage.cache_read_input_tokens is not None
    before = message.usage.input_tokens + message.usage.cache_read_input_tokens
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [text("7 C")]}
    turns = [*USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    request["messages"] = turns
    with claude.messages.stream(**request) as stream:
        answer = stream.get_final_message()
    assert told(answer)[0] == [text("All done: the tool said so.")]
    cached = answer.usage.cache_read_input_tokens
    counted = claude.messages.count_tokens(**{name: request[name] for name in ("model", "messages", "system", "tools")})
    assert cached is not None and answer.usage.input_tokens + cached == counted.input_tokens
    assert cached >= (before - 8) // 16 * 16  # all full blocks of the turn before


def counted_prompt(llm: AsyncLLM, url: str, **request: Any) -> str:
    """What a request's conversation is written as, whose tokens are counted right."""
    prompt, counted = prompt_of(llm, lambda: post(f"{url}{URL}/count_tokens", {"model": "scripted"} | request))
    assert counted == {"input_tokens": len(llm.tokenizer.encode(prompt))}
    return prompt


def test_a_conversation_is_written_as_the_template_has_it(llm: AsyncLLM, url: str) -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "R", "is_error": True}
    messages = [
        {"role": "user", "content": [text("A") | {"cache_control": {"type": "ephemeral"}}, text("B")]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": ""}, text("C"), call]},
        {"role": "user", "content": [text("D"), result]},
    ]
    written = counted_prompt(llm, url, messages=messages)
    assert written == (
        "<|im_start|>user\nA\n\nB<|im_end|>\n"
        '<|im_start|>assistant\nC<tool_call>f {"a": 1}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nR<|im_end|>\n<|im_start|>user\nD<|im_end|>\n<|im_start|>assistant\n<|run_answer|>"
    )


def test_what_the_user_has_not_chosen_and_is_no_text_is_named_in_its_place(
    llm: AsyncLLM, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [text("Seen:"), image, image]}
    document = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result, document]}]
    with serving(llm) as new_url:
        for _ in range(2):
            written = counted_prompt(llm, new_url, messages=[*USER, *turns])
    omitted = "[image omitted: only text can be read]"
    assert f"<|im_start|>tool\nSeen:\n\n{omitted}\n\n{omitted}<|im_end|>" in written
    assert "<|im_start|>user\n[document omitted: only text can be read]<|im_end|>" in written
    search = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    turns = [{"role": "assistant", "content": [text("C"), search]}, *USER]
    written = counted_prompt(llm, url, messages=[*USER, *turns])
    assert "assistant\nC[server_tool_use omitted: only text can be read]<|im_end|>" in written
    assert [caplog.text.count(f"of type '{kind}'") for kind in ("image", "document")] == [1, 1]


def test_system_texts_are_the_same_in_each_form_and_without_billing_lines(llm: AsyncLLM, url: str) -> None:
    def written(system: Any, later: Any) -> str:
        messages = [*USER, {"role": "system", "content": later}]
        return counted_prompt(llm, url, messages=messages, system=system)

    plain = written("Be brief.", "Later.")
    assert "system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>system\nLater." in plain
    blocks = [text("x-anthropic-billing-header: cc_version=2; cch=0f3a;"), text("Be brief.")]
    assert written(blocks, [text("Later.") | {"cache_control": {"type": "ephemeral"}}]) == plain


def test_a_message_that_the_client_has_begun_is_continued(llm: AsyncLLM, url: str) -> None:
    begun = [*USER, {"role": "assistant", "content": "The best answer is ("}]
    assert counted_prompt(llm, url, messages=begun).endswith("<|im_start|>assistant\nThe best answer is (")


def test_what_agents_send_beside_is_taken(claude: anthropic.Anthropic) -> None:
    more: Any = {
        "metadata": {"user_id": "u"},
        "thinking": {"type": "adaptive"},
        "service_tier": "auto",
        "extra_body": {"context_management": {"edits": []}, "output_config": {"effort": "high"}, "of_next_month": 1},
    }
    tools = [{"type": "web_search_20250305", "name": "web_search"}, tool("x")]
    message = claude.beta.messages.create(**script("answer", tools=tools, **more), betas=["any-beta"])
    assert message.stop_reason == "end_turn"


def test_an_output_format_is_kept(claude: anthropic.Anthropic) -> None:
    form = {"type": "json_schema", "schema": {"type": "boolean"}}
    message = claude.messages.create(**script("answer", output_config={"format": form}))
    *_, block = message.content  # it may think first
    assert block.type == "text" and block.text in ("true", "false")


def test_a_silent_stream_begins_at_once_and_pings(llm: AsyncLLM) -> None:
    kinds = []
    with serving(llm, keepalive_s=0.05) as url, engine_held(llm) as go_on:
        for event in checked_events(url, script("answer")):
            kinds.append(event["type"])
            if len(kinds) == 4:
                go_on.set()
    assert kinds[:4] == ["message_start", "ping", "ping", "ping"] and kinds[-1] == "message_stop"


NO_CONTENTS: list[Any] = ["", [], None, "x-anthropic-billing-header: a"]
REFUSED = [
    ({"messages": []}, 400, "messages is empty"),
    *(
        ({"system": None, "messages": [{"role": "system", "content": content}]}, 400, "nothing but system messages")
        for content in NO_CONTENTS
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role must be one of"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        400,
        "messages[0].content[0] is of type 'image'",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, 400, "'tool_use'"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content must be text or a list"),
    ({"system": [{"type": "image"}]}, 400, "system[0] is of type 'image'"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"n": 2}, 400, "n must be at most 1"),
    ({"stop_sequences": ["x"] * 10_000}, 400, "stop_sequences must be"),
    ({"tool_choice": {"type": "some"}}, 400, "tool_choice.type must be"),
    ({"tool_choice": {}}, 400, "tool_choice.type must be"),
    ({"tools": [{"input_schema": {}}]}, 400, "tools[0].name must be"),
    ({"output_config": {"format": {"type": "xml"}}}, 400, "output_config.format.type must be"),
    ({"model": "claude-9"}, 404, "claude-9"),
]


@pytest.mark.parametrize("change, status, message", REFUSED, ids=range(len(REFUSED)))
def test_what_can_not_be_done_is_refused_in_anthropics_form(change: Any, status: int, message: str, url: str) -> None:
    for stream in (False, True):
        response = post(url + URL, script("answer") | change | {"stream": stream}, headers={"x-request-id": "r-1"})
        body = response.json()
        assert response.status_code == status and body["type"] == "error" and body["request_id"] == "r-1"
        assert body["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
        assert message in body["error"]["message"] and len(body["error"]["message"]) < 400


def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_look_for(claude: anthropic.Anthropic) -> None:
    request = script("answer", messages=[{"role": "user", "content": "x y " * 40_000}])
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**request)
    counted = claude.messages.count_tokens(model="scripted", messages=request["messages"], system=request["system"])
    error: Any = caught.value.body
    limit = 2000 * 16  # tokens of the pool
    assert error["error"]["message"] == f"prompt is too long: {counted.input_tokens} tokens > {limit} maximum"


def test_an_engine_that_breaks_ends_a_stream_with_an_error_event(url: str, claude: anthropic.Anthropic) -> None:
    with engine_broken():
        *_, last = checked_events(url, script("endless"))
        assert post(url + URL, script("endless")).json()["error"]["type"] == "api_error"
    assert last["type"] == "error" and last["error"]["type"] == "api_error" and "device" not in json.dumps(last)
    assert told(claude.messages.create(**script("answer")))[1] == "end_turn"


def test_a_tool_that_has_to_be_called_is_called(claude: anthropic.Anthropic) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        request = script("answer", "get_weather", tool_choice=choice)
        request["tools"][0]["input_schema"] = {"type": "object", "properties": {}, "additionalProperties": False}
        message = claude.messages.create(**request)
        assert message.stop_reason == "tool_use"
        assert [block.name for block in message.content if block.type == "tool_use"] == ["get_weather"]


def test_thinking_ends_with_its_budget(claude: anthropic.Anthropic) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1}
    message = claude.messages.create(**script("exec_command", "exec_command", thinking=thinking))
    assert message.content[0].type == "thinking"
    assert message.content[0].thinking in ("I should", "I should ")


def test_a_call_that_is_cut_is_text_in_a_whole_answer(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(**script("get_weather", "get_weather", max_tokens=3))
    assert message.stop_reason == "max_tokens"
    assert "get_weather" in str(told(message)) and not any(block.type == "tool_use" for block in message.content)
    by_itself = claude.messages.create(**script("open_call", "x"))
    assert told(by_itself) == ([text('get_weather {"city": "Par')], "end_turn", None)
