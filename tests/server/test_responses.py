"""Responses, as OpenAI's client reads them: reasoning, text, function calls, whole and in events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from helpers.servers import engine_broken, engine_held, events_of, post, prompt_of, serving
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from mlx_paged.async_llm import AsyncLLM

URL = "/v1/responses"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def tool(name: str) -> Any:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "name": name, "description": "x", "parameters": schema, "strict": False}


def script(name: str, *tools: str, **more: Any) -> Any:
    """A request whose answer is a chain of the scripted model."""
    request = {"model": "scripted", "instructions": f"SCRIPT:{name}", "input": "hi"}
    return request | ({"tools": [tool(each) for each in tools]} if tools else {}) | more


def told(response: Response) -> Any:
    """What a response says, without the ids that are drawn for it."""
    items = []
    for item in response.output:
        if item.type == "message":
            items.append(("message", "".join(part.text for part in item.content if part.type == "output_text")))
        elif item.type == "reasoning":
            items.append(("reasoning", "".join(part.text for part in item.content or [])))
        else:
            assert item.type == "function_call" and item.call_id and item.id
            items.append((item.name, item.arguments))
    return items, response.status


CASES = {
    "answer": (script("answer"), [("message", "All done: the tool said so.")], "completed"),
    "exec_command": (
        script("exec_command", "exec_command"),
        [("reasoning", "I should run it."), ("exec_command", '{"cmd": "echo marker-7"}')],
        "completed",
    ),
    "Bash": (
        script("Bash", "Bash"),
        [("message", "Let me look."), ("Bash", '{"command": "echo marker-7", "description": "say it"}')],
        "completed",
    ),
    "two_calls": (
        script("two_calls", "x"),
        [("get_weather", '{"city": "A"}'), ("get_weather", '{"city": "B"}')],
        "completed",
    ),
    "one_call": (
        script("two_calls", "x", parallel_tool_calls=False),
        [("get_weather", '{"city": "A"}')],
        "completed",
    ),
    "open_call": (script("open_call", "x"), [("get_weather", '{"city": "Par')], "completed"),
    "emoji": (script("emoji"), [("message", "\U0001f600")], "completed"),
    "cut": (script("endless", max_output_tokens=3), [("message", "tick tack tick ")], "incomplete"),
    "nothing": (script("no_such_chain"), [], "completed"),
}


def checked_events(url: str, request: Any) -> Iterator[dict[str, Any]]:
    """The events of a stream, each checked to be one that the client knows, and their numbers to have no gap."""
    for number, event in enumerate(events_of(url + URL, request)):
        assert event["sequence_number"] == number
        EVENTS.validate_python(event)
        yield event


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_made_of_items_and_its_events_make_up_the_same_response(
    name: str, url: str, client: openai.OpenAI
) -> None:
    request, items, status = CASES[name]
    whole = client.responses.create(**request)
    assert told(whole) == (items, status)
    *events, last = checked_events(url, request)
    assert last["type"] == f"response.{status}"
    streamed = Response.model_validate(last["response"])
    Response.model_validate(whole.to_dict())
    assert told(streamed) == told(whole) and streamed.usage is not None and whole.usage is not None
    for count in ("input_tokens", "output_tokens", "output_tokens_details", "total_tokens"):
        assert getattr(streamed.usage, count) == getattr(whole.usage, count)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["response"]["output"]
    parts = [event for event in events if event["type"].startswith("response.content_part.")]
    assert all(part["text"] == "" for part in (event["part"] for event in parts[::2]))
    contents = [content for item in done for content in item.get("content", ())]
    assert [event["part"] for event in parts[1::2]] == contents  # what is added is what is done, and nothing else
    deltas = ["".join(event["delta"] for event in events if event.get("item_id") == item["id"] and "delta" in event)
              for item in done]  # fmt: skip
    assert deltas == [text for _, text in items]
    assert all(item["status"] == "completed" for item in done[:-1]) and (not done or done[-1]["status"] == status)
    if name == "cut":
        assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"


def test_events_come_in_their_order(url: str) -> None:
    def kinds(request: Any) -> str:
        names = [event["type"].removeprefix("response.") for event in checked_events(url, request)]
        found = names[:2] + [name for name in names[2:] if name != "in_progress"]  # which keeps it alive
        return " ".join(kind for i, kind in enumerate(found) if i == 0 or kind != found[i - 1])

    def part(kind: str) -> str:
        return f"output_item.added content_part.added {kind}.delta {kind}.done content_part.done output_item.done"

    reasoning, text = part("reasoning_text"), part("output_text")
    call = "output_item.added function_call_arguments.delta function_call_arguments.done output_item.done"
    first, last = "created in_progress", "completed"
    assert kinds(script("exec_command", "x")) == f"{first} {reasoning} {call} {last}"
    assert kinds(script("answer")) == f"{first} {text} {last}"


def test_the_clients_own_accumulation_comes_to_the_same(client: openai.OpenAI) -> None:
    for name in ("answer", "exec_command", "Bash", "two_calls"):
        with client.responses.stream(**script(name, "x")) as stream:
            for _ in stream:
                pass
            assert told(stream.get_final_response())[0] == CASES[name][1]


def test_a_tool_loop_goes_on_with_the_result_and_its_prefix_is_told(client: openai.OpenAI) -> None:
    request = script("", "get_weather", instructions="You help with the weather. " * 20)
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    first = client.responses.create(**request | {"input": items})
    (call,) = first.output
    assert call.type == "function_call" and first.usage is not None
    items += [call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "7 C"}]
    answer = client.responses.create(**request | {"input": items})
    assert answer.output_text == "All done: the tool said so." and answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens >= (first.usage.input_tokens - 8) // 16 * 16


def test_items_of_one_turn_are_written_as_one_message(llm: AsyncLLM, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        {"type": "message", "role": "developer", "content": "D"},
        {"role": "user", "content": "A"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "B"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "g", "namespace": "mcp__x", "arguments": "{"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "R"}]},
        {"type": "function_call_output", "call_id": "2", "output": "S"},
        {"type": "web_search_call", "status": "completed"},
    ]
    written, _ = prompt_of(llm, lambda: post(url + URL, {"input": items}))
    calls = '<tool_call>f {"a": 1}</tool_call><tool_call>mcp__x__g "{"</tool_call>'
    assert written == (
        "<|im_start|>system\nD<|im_end|>\n<|im_start|>user\nA<|im_end|>\n"
        f"<|im_start|>assistant\nB{calls}<|im_end|>\n"
        "<|im_start|>tool\nR<|im_end|>\n<|im_start|>tool\nS<|im_end|>\n<|im_start|>assistant\n<|run_answer|>"
    )


def test_functions_of_a_namespace_are_offered_and_their_calls_say_where_they_are(
    llm: AsyncLLM, url: str, client: openai.OpenAI
) -> None:
    inner = [tool("read"), {"type": "custom", "name": "patch"}]
    tools = [
        {"type": "namespace", "name": "mcp__files", "description": "Files.", "tools": inner},
        {"type": "namespace", "name": "functions", "description": "Own.", "tools": [tool("exec_command")]},
        {"type": "web_search"},
        {"type": "custom", "name": "apply_patch"},
    ]
    prompt, _ = prompt_of(llm, lambda: post(url + URL, script("answer", tools=tools)))
    lines = [line.removesuffix("<|im_end|>") for line in prompt.split("\n") if line.startswith("{")]
    assert [json.loads(line)["function"]["name"] for line in lines] == ["mcp__files__read", "exec_command"]
    (_, call) = client.responses.create(**script("exec_command", tools=tools)).output
    assert call.type == "function_call" and (call.namespace, call.name) == ("functions", "exec_command")


def test_only_allowed_tools_are_offered(llm: AsyncLLM, url: str) -> None:
    inner = {"type": "namespace", "name": "mcp__files", "tools": [tool("read"), tool("write")]}
    allowed = [{"type": "function", "name": "write", "namespace": "mcp__files"}, {"type": "mcp", "server_label": "x"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": allowed}
    request = script("answer", tools=[tool("exec_command"), inner], tool_choice=choice)
    prompt, answer = prompt_of(llm, lambda: post(url + URL, request))
    assert "mcp__files__write" in prompt and "mcp__files__read" not in prompt and "exec_command" not in prompt
    assert answer["tool_choice"] == choice


def test_an_image_that_a_tool_returns_is_named_in_its_place(llm: AsyncLLM, url: str) -> None:
    parts = [{"type": "input_text", "text": "Seen: "}, {"type": "input_image", "image_url": "data:image/png;base64,"}]
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = [{"role": "user", "content": "A"}, call, {"type": "function_call_output", "call_id": "1", "output": parts}]
    written, _ = prompt_of(llm, lambda: post(url + URL, {"input": items}))
    assert "<|im_start|>tool\nSeen: [image omitted: only text can be read]<|im_end|>" in written


def test_what_another_model_has_written_in_earlier_turns_is_no_error(llm: AsyncLLM, url: str) -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    call = {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": "*** Begin"}
    result = {"type": "custom_tool_call_output", "call_id": "1", "output": "Done"}
    items = [{"role": "user", "content": "A"}, said, call, result]
    written, _ = prompt_of(llm, lambda: post(url + URL, {"input": items}))
    assert (
        "assistant\n[refusal omitted: only text can be read]"
        '<tool_call>apply_patch {"input": "*** Begin"}</tool_call><|im_end|>\n<|im_start|>tool\nDone<|im_end|>'
    ) in written


def test_calls_of_a_namespace_have_the_name_that_clients_know() -> None:
    from mlx_paged.server.responses_fields import ResponseRequest

    asked = ResponseRequest.__new__(ResponseRequest)
    asked.namespaces = {"mcp__files__read": ("mcp__files", "read")}
    assert asked.called("mcp__files__read") == {"name": "read", "namespace": "mcp__files"}
    assert asked.called("other") == {"name": "other"}


def test_what_agents_send_beside_is_taken_and_a_form_is_kept(client: openai.OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "boolean"}}}
    more: Any = {
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "reasoning": {"effort": "high", "summary": "auto"},
        "extra_body": {"client_metadata": {"a": "b"}, "of_next_month": 1},
        "metadata": {"a": "b"},
    }
    response = client.responses.create(**script("answer", text=form, **more))
    assert response.output_text in ("true", "false") and response.metadata == {"a": "b"}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_bytes_that_join_to_the_text(stream: bool, url: str, client: openai.OpenAI) -> None:
    request = script("emoji", top_logprobs=2, include=["message.output_text.logprobs"])
    if stream:
        events = list(checked_events(url, request))
        entries = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    else:
        (item,) = client.responses.create(**request).to_dict()["output"]
        entries = item["content"][0]["logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "\U0001f600"
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_a_silent_stream_begins_at_once_and_says_again_that_it_goes_on(llm: AsyncLLM) -> None:
    kinds = []
    with serving(llm, keepalive_s=0.05) as url, engine_held(llm) as go_on:
        for event in checked_events(url, script("answer")):
            kinds.append(event["type"])
            if len(kinds) == 4:
                go_on.set()
    assert kinds[:4] == ["response.created", *["response.in_progress"] * 3] and kinds[-1] == "response.completed"


REFUSED: Any = [
    ({"input": []}, 400, "input"),
    ({"input": None}, 400, "input"),
    ({"input": [{"type": "web_search_call"}], "instructions": None}, 400, "input"),
    ({"input": [{"role": "tool", "content": "x"}]}, 400, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type"),
    ({"input": "x y " * 40_000}, 400, "input"),
    ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ({"conversation": "c"}, 400, "conversation"),
    ({"conversation": {"id": "conv_1"}}, 400, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, 400, "prompt"),
    ({"tool_choice": {"type": "hosted"}}, 400, "tool_choice.type"),
    ({"background": True}, 400, "background"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"n": 2}, 400, "n"),
    ({"top_logprobs": 10**6}, 400, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].name"),
    ({"tools": [{"type": "namespace", "name": "x", "tools": [{"type": "function"}]}]}, 400, "tools[0].tools[0].name"),
    ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type"),
    ({"model": "gpt-9"}, 404, "model"),
]


@pytest.mark.parametrize("change, status, param", REFUSED, ids=[f"{i}-{case[2]}" for i, case in enumerate(REFUSED)])
def test_what_can_not_be_done_is_refused_by_name(change: Any, status: int, param: str, url: str) -> None:
    for stream in (False, True):
        response = post(url + URL, script("answer") | change | {"stream": stream})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error["param"] == param and error["type"] == "invalid_request_error" and len(error["message"]) < 400


def test_an_engine_that_breaks_ends_a_stream_with_a_failed_response(url: str, client: openai.OpenAI) -> None:
    with engine_broken():
        *_, last = checked_events(url, script("endless"))
        assert post(url + URL, script("endless")).status_code == 500
    assert last["type"] == "response.failed" and "device" not in json.dumps(last)
    assert last["response"]["status"] == "failed" and last["response"]["error"]["code"] == "server_error"
    assert client.responses.create(**script("answer")).status == "completed"


def test_a_tool_that_has_to_be_called_is_called(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": schema}]
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        answer = client.responses.create(model="scripted", input="hi", tools=tools, tool_choice=choice)  # type: ignore[call-overload]
        assert [item.name for item in answer.output if item.type == "function_call"] == ["get_weather"]
