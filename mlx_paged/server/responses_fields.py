"""What clients of OpenAI's responses send, made into what chat templates and `SamplingParams` take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_paged.server.answer import Asked
from mlx_paged.server.body import Fields
from mlx_paged.server.chat import read_template, read_tool_choice, read_tools
from mlx_paged.server.conversation import Messages, Omit, make_call, read_text
from mlx_paged.server.errors import bad_request
from mlx_paged.server.sampling_fields import make_params, read_output_form, read_sampling, read_top_logprobs
from mlx_paged.server.service import Service

_REFUSED = {  # they change what an answer means
    "previous_response_id": "nothing is stored: send the whole conversation",
    "conversation": "nothing is stored: send the whole conversation",
    "prompt": "nothing is stored: send the whole conversation",
    "background": "keep the connection open until the answer has come",
}
_IGNORED = {
    "store", "prompt_cache_key", "prompt_cache_retention", "client_metadata", "safety_identifier", "user",
    "service_tier", "stream_options", "max_tool_calls",
}  # fmt: skip
_ECHOED: dict[str, Any] = {
    "instructions": None, "metadata": {}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
    "temperature": None, "top_p": None, "max_output_tokens": None, "reasoning": None,
    "text": {"format": {"type": "text"}}, "truncation": "disabled",
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant")
_OWN_NAMESPACE = "functions"  # of tools that are the client's own: their names stand alone


@dataclass
class ResponseRequest(Asked):
    """What a client asks for."""

    came_in: ClassVar = "input"
    namespaces: dict[str, tuple[str, str]]
    """Of a tool within a namespace, by the name that the model knows: the namespace, and its name there."""
    echoed: dict[str, Any]
    """What a response says of the request."""

    @classmethod
    def read(cls, service: Service, body: dict[str, Any], salt: str | None) -> ResponseRequest:
        """Read a request's body. Raises ApiError."""
        fields = Fields(body)
        for name, instead in _REFUSED.items():
            if fields.take_any(name):
                raise bad_request(f"{name} is not supported: {instead}", param=name)
        model = service.require_model(fields.take("model", str))
        messages = _read_input(fields, service.note_omitted)
        text = Fields(fields.take("text", dict, {}), "text")
        form = Fields(text.take("format", dict, {"type": "text"}), "text.format")
        settings = read_sampling(fields, salt, max_samples=1) | read_output_form(fields, form)
        settings["max_tokens"] = fields.take("max_output_tokens", int, service.options.default_max_tokens)
        top, included = read_top_logprobs(fields), fields.take("include", list, [])
        if top or "message.output_text.logprobs" in included:
            settings["logprobs"] = top or 0
        namespaces: dict[str, tuple[str, str]] = {}
        offered = Fields({"tools": list(_read_tools(fields, namespaces)), "tool_choice": _read_choice(fields)})
        tools = read_tools(offered)
        reasoning = Fields(fields.take("reasoning", dict, {}), "reasoning")
        effort = Fields({"reasoning_effort": reasoning.take("effort", str)})
        request = cls(
            model=model,
            messages=messages,
            params=make_params(settings, [("json_schema", "text.format"), ("max_tokens", "max_output_tokens")]),
            tools=tools,
            tool_choice=read_tool_choice(offered, tools),
            parallel_calls=fields.take("parallel_tool_calls", bool, True),
            stream=fields.take("stream", bool, False),
            template=read_template(effort) | read_template(fields),
            namespaces=namespaces,
            echoed={name: default if body.get(name) is None else body[name] for name, default in _ECHOED.items()},
        )
        service.note_unknown(fields.left - _IGNORED - _ECHOED.keys())
        return request

    def called(self, name: str) -> dict[str, str]:
        """What a call of a tool says of it: its name, and its namespace, without which clients do not find it."""
        if name not in self.namespaces:
            return {"name": name}
        namespace, own_name = self.namespaces[name]
        return {"name": own_name, "namespace": namespace}


def _name_in(namespace: str | None, name: str) -> str:
    """The name by which the model knows a tool."""
    if namespace in (None, _OWN_NAMESPACE):
        return name
    return f"{namespace}{name}" if str(namespace).endswith("__") else f"{namespace}__{name}"


def _read_tools(fields: Fields, namespaces: dict[str, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The functions as chat completions have them, those of namespaces too. Notes what is in a namespace.

    Tools of other kinds run in OpenAI's servers alone, or take no JSON.
    """
    for i, value in enumerate(fields.take("tools", list, [])):
        tool = Fields(value, f"tools[{i}]")
        kind = tool.take("type", str, "")
        if kind == "function":
            yield _function(tool, None)
        elif kind == "namespace":
            namespace = tool.take("name", str, "")
            for j, inner in enumerate(tool.take("tools", list, [])):
                each = Fields(inner, f"tools[{i}].tools[{j}]")
                if each.take("type", str, "") == "function":
                    function = _function(each, namespace)
                    namespaces[function["function"]["name"]] = (namespace, each.take("name", str, ""))
                    yield function


def _function(tool: Fields, namespace: str | None) -> dict[str, Any]:
    name = tool.take("name", str)
    if not name:
        raise tool.error("name", "must be text that is not empty")
    function: dict[str, Any] = {"name": _name_in(namespace, name), "description": tool.take("description", str, "")}
    function["parameters"] = tool.take("parameters", dict, {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _read_choice(fields: Fields) -> Any:
    choice = fields.take_any("tool_choice")
    if not isinstance(choice, dict):
        return choice
    named = Fields(choice, "tool_choice")
    kind = named.take("type", str)
    if kind == "allowed_tools":
        each = [Fields(value, "tool_choice.tools") for value in named.take("tools", list, [])]
        functions = [_named(tool) for tool in each if tool.take("type", str) == "function"]
        return {"type": kind, kind: {"mode": named.take("mode", str), "tools": functions}}
    if kind != "function":
        raise named.error("type", 'must be "function" or "allowed_tools"')
    return _named(named)


def _named(tool: Fields) -> dict[str, Any]:
    """A tool that is named, as chat completions have it."""
    return {"type": "function", "function": {"name": _name_in(tool.take("namespace", str), tool.take("name", str, ""))}}


def _read_input(fields: Fields, omit: Omit) -> Messages:
    instructions = fields.take("instructions", str)
    messages: Messages = [{"role": "system", "content": instructions}] if instructions else []
    given = fields.take_any("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise fields.error("input", "must be text or a list of items")
    for i, value in enumerate(given):
        _add_item(messages, Fields(value, f"input[{i}]"), omit)
    if not messages:
        raise fields.error("input", "has no message in it")
    return messages


def _add_item(messages: Messages, item: Fields, omit: Omit) -> None:
    """Add an item to a conversation. Reasoning, text and calls that follow each other are one message."""
    kind = item.take("type", str, "message")
    if kind == "message":
        role = item.take("role", str, "")
        if role not in _ROLES:
            raise item.error("role", f"must be one of {', '.join(_ROLES)}")
        content = read_text(item.take_any("content"), item.path("content"), omit if role == "assistant" else None)
        last = messages[-1] if messages else {}
        if role == "assistant" and last.get("role") == role and not last["content"] and "tool_calls" not in last:
            last["content"] = content
        else:
            messages.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind == "reasoning":
        parts = [Fields(part, item.path("content")) for part in item.take("content", list, [])]
        text = "".join(part.take("text", str, "") for part in parts)
        if text:
            messages.append({"role": "assistant", "content": "", "reasoning_content": text})
    elif kind in ("function_call", "custom_tool_call"):  # the latter is another model's, of an earlier turn
        name = _name_in(item.take("namespace", str), item.take("name", str, ""))
        written = item.take("input", str)
        arguments = item.take("arguments", str, "") if written is None else {"input": written}
        call = make_call(name, arguments, item.take("call_id", str))
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind in ("function_call_output", "custom_tool_call_output"):
        output = read_text(item.take_any("output"), item.path("output"), omit)
        messages.append({"role": "tool", "tool_call_id": item.take("call_id", str, ""), "content": output})
    elif kind == "item_reference":
        raise item.error("type", "can't be had: nothing is stored, send the item itself")
