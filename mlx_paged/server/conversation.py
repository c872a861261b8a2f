"""Conversations as clients send them, made into what chat templates take. Knows no HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlx_paged.server.body import Fields
from mlx_paged.server.errors import bad_request

Messages = list[dict[str, Any]]
Omit = Callable[[str], None]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(values: Sequence[Any], omit: Omit) -> Messages:
    """Read the messages of a chat completion. omit: as for `read_part`. Raises ApiError."""
    if not values:
        raise bad_request("messages is empty: give it at least one message", param="messages")
    return [_read_message(Fields(value, f"messages[{i}]"), omit) for i, value in enumerate(values)]


def _read_message(fields: Fields, omit: Omit) -> dict[str, Any]:
    role = fields.take("role", str, "")
    if role not in _ROLES:
        raise fields.error("role", f"must be one of {', '.join(_ROLES)}")
    is_chosen = role not in ("tool", "assistant")
    message: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": read_text(fields.take_any("content"), fields.path("content"), None if is_chosen else omit),
    }
    for name in ("name", "tool_call_id"):
        if (value := fields.take(name, str)) is not None:
            message[name] = value
    if role == "assistant":
        reasoning = fields.take("reasoning_content", str) or fields.take("reasoning", str)
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = fields.take("tool_calls", list, [])
        if calls:
            where = fields.path("tool_calls")
            message["tool_calls"] = [_read_call(Fields(call, f"{where}[{i}]")) for i, call in enumerate(calls)]
    return message


def read_text(content: Any, where: str, omit: Omit | None = None) -> str:
    """Return the text of a message: it may be text, a list of text parts, or nothing. Raises ApiError for others."""
    return "".join(read_texts(content, where, omit))


def read_texts(content: Any, where: str, omit: Omit | None = None) -> list[str]:
    """Return the texts of a message, one per part. omit: as for `read_part`. Raises ApiError for what is no text."""
    if content is None or isinstance(content, str):
        return [content or ""]
    if not isinstance(content, list):
        raise bad_request(f"{where} must be text or a list of parts", param=where)
    return [read_part(Fields(part, f"{where}[{i}]"), where, omit) for i, part in enumerate(content)]


def read_part(fields: Fields, where: str, omit: Omit | None = None) -> str:
    """Return the text of one part of the content at `where`. Raises ApiError if it is of another kind.

    omit: for what a tool has returned or another model has written, which nobody chose to send, and which comes again
    with each turn: a part of another kind is named in the text instead, and `omit` is told its kind.
    """
    kind = fields.take("type", str, "")
    if kind not in _TEXT_PARTS:
        if omit is not None and kind:
            kind = kind.removeprefix("input_").removesuffix("_url")[:60]
            omit(kind)
            return f"[{kind} omitted: only text can be read]"
        raise bad_request(f"{fields.where} is of type {kind!r}, and this model reads text only", param=where)
    return fields.take("text", str, "")


def _read_call(fields: Fields) -> dict[str, Any]:
    function = Fields(fields.take_any("function"), fields.path("function"))
    name = function.take("name", str, "")
    return make_call(name, function.take_any("arguments"), fields.take("id", str))


def make_call(name: str, arguments: Any, call_id: str | None) -> dict[str, Any]:
    """A tool call as chat templates take it. arguments: an object, or its JSON."""
    call = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    return call | ({"id": call_id} if call_id else {})


def variants(messages: Messages) -> Iterator[Messages]:
    """The conversation, and then what stands for it where a template refuses it.

    Some take a system message in the first place only: a later one becomes a user's, where it stands, since moving it
    to the front would change the prompt's head, and with it all that is cached. Some want user and assistant in turn.
    """
    yield messages
    as_user = messages[:1] + [
        {**message, "role": "user"} if message["role"] == "system" else message for message in messages[1:]
    ]
    yield as_user
    yield _join_neighbours(as_user)
    if messages[0]["role"] == "system":  # no system messages at all, as in Gemma's
        yield _join_neighbours([{**messages[0], "role": "user"}, *as_user[1:]])


def _join_neighbours(messages: Messages) -> Messages:
    joined: Messages = []
    for message in messages:
        if joined and message["role"] == joined[-1]["role"] == "user":
            joined[-1] = {**joined[-1], "content": joined[-1]["content"] + "\n\n" + message["content"]}
        else:
            joined.append(message)
    return joined


def with_tools(messages: Messages, tools: Sequence[dict[str, Any]]) -> Messages:
    """Write what may be called into the system message, for a template that knows nothing of it."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = f'Answer with a call of one of these functions, as {{"name": .., "arguments": {{..}}}}:\n{functions}'
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
