"""What clients of Anthropic's messages send, made into what chat templates and `SamplingParams` take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mlx_paged.server.answer import Asked
from mlx_paged.server.body import Fields
from mlx_paged.server.chat import read_template, read_tool_choice, read_tools
from mlx_paged.server.conversation import Messages, Omit, make_call, read_part, read_texts
from mlx_paged.server.errors import bad_request
from mlx_paged.server.sampling_fields import make_params, read_output_form, read_sampling, read_stop
from mlx_paged.server.service import Service

_ROLES = ("user", "assistant", "system")
_BETWEEN = "\n\n"  # blocks of text that a person or a program has written
_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
_IGNORED = ("metadata", "context_management", "cache_control", "service_tier", "container", "inference_geo")
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}


def read_message_request(service: Service, body: dict[str, Any], salt: str | None) -> Asked:
    """Read a request's body. salt: as for `read_sampling`. Raises ApiError."""
    fields = Fields(body)
    model = service.require_model(fields.take("model", str))
    values = fields.take("messages", list, [])
    if not values:
        raise bad_request("messages is empty: give it at least one message", param="messages")
    messages = _read_system(fields.take_any("system"), "system")
    for i, value in enumerate(values):
        messages += _read_message(Fields(value, f"messages[{i}]"), service.note_omitted)
    if not messages:
        raise bad_request("messages has nothing but system messages without a text: give it another", param="messages")
    settings = read_sampling(fields, salt, max_samples=1)
    stops = fields.take_with("stop_sequences", read_stop)
    if stops is not None:
        settings["stop"] = stops
    settings["max_tokens"] = fields.take("max_tokens", int, service.options.default_max_tokens)
    config = Fields(fields.take("output_config", dict, {}), "output_config")
    form = config.take("format", dict) or fields.take("output_format", dict, {"type": "text"})
    settings |= read_output_form(fields, Fields(form, "output_config.format"))
    choice = Fields(fields.take("tool_choice", dict, {"type": "auto"}), "tool_choice")
    offered = Fields({"tools": list(_read_tools(fields)), "tool_choice": _read_choice(choice)})
    tools = read_tools(offered)
    thinking = Fields(fields.take("thinking", dict, {}), "thinking")
    settings["max_thinking_tokens"] = thinking.take("budget_tokens", int)
    template = _read_thinking(thinking, config) | read_template(fields)
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        template["continue_final_message"] = True
    asked = Asked(
        model=model,
        messages=messages,
        params=make_params(settings, [("json_schema", "output_config.format")]),
        tools=tools,
        tool_choice=read_tool_choice(offered, tools),
        parallel_calls=not choice.take("disable_parallel_tool_use", bool, False),
        stream=fields.take("stream", bool, False),
        template=template,
    )
    service.note_unknown(fields.left - set(_IGNORED))
    return asked


def _read_thinking(thinking: Fields, config: Fields) -> dict[str, Any]:
    """What the chat template is told of thinking."""
    kind, effort = thinking.take("type", str), config.take("effort", str)
    template = {} if kind is None else {"enable_thinking": kind != "disabled"}
    return template | ({} if effort is None else {"reasoning_effort": effort})


def _read_tools(fields: Fields) -> Iterator[dict[str, Any]]:
    """The tools as chat completions have them, but for those that only Anthropic's servers can run."""
    for i, value in enumerate(fields.take("tools", list, [])):
        tool = Fields(value, f"tools[{i}]")
        name, schema = tool.take("name", str), tool.take("input_schema", dict)
        if schema is None:
            continue
        if not name:
            raise tool.error("name", "must be text that is not empty")
        function = {"name": name, "description": tool.take("description", str, ""), "parameters": schema}
        yield {"type": "function", "function": function}


def _read_choice(choice: Fields) -> Any:
    kind = choice.take("type", str, "")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.take("name", str, "")}}
    if kind not in _CHOICES:
        raise choice.error("type", "must be auto, any, tool or none")
    return _CHOICES[kind]


def _read_system(content: Any, where: str) -> Messages:
    """The system message, without the lines that differ from one request to the next and are for Anthropic alone."""
    texts = [_BILLING.sub("", text) for text in read_texts(content, where)]
    text = _BETWEEN.join(filter(None, texts))
    return [{"role": "system", "content": text}] if text else []


def _read_message(fields: Fields, omit: Omit) -> Messages:
    """Read a message, which stands for several where it has the results of tools. Those come before its text.

    omit: as for `read_part`, of what tools have returned: agents send documents beside the result that they belong to.
    """
    role = fields.take("role", str, "")
    if role not in _ROLES:
        raise fields.error("role", f"must be one of {', '.join(_ROLES)}")
    content, where = fields.take_any("content"), fields.path("content")
    if role == "system":
        return _read_system(content, where)
    blocks = (
        content
        if isinstance(content, list)
        else [{"type": "text", "text": text} for text in read_texts(content, where)]
    )
    message: dict[str, Any] = {"role": role}
    results: Messages = []
    texts, thoughts, calls = [], [], []
    fields_of = [Fields(value, f"{where}[{i}]") for i, value in enumerate(blocks)]
    has_results = any(block.take_any("type") == "tool_result" for block in fields_of)
    for block in fields_of:
        kind = block.take("type", str, "")
        if kind == "tool_result" and role == "user":
            text = _BETWEEN.join(read_texts(block.take_any("content"), block.path("content"), omit))
            results.append({"role": "tool", "tool_call_id": block.take("tool_use_id", str, ""), "content": text})
        elif kind == "tool_use" and role == "assistant":
            name = block.take("name", str, "")
            calls.append(make_call(name, block.take("input", dict, {}), block.take("id", str)))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(block.take("thinking", str, ""))
        elif kind != "redacted_thinking":
            texts.append(read_part(block, where, omit if has_results or role == "assistant" else None))
    message["content"] = (_BETWEEN if role == "user" else "").join(texts)
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [*results, message] if texts or not results else results
