"""OpenAI's chat completions: from the request to parameters, and from outputs to the answer or its chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp

from mlx_paged.outputs import CompletionOutput, RequestOutput
from mlx_paged.request import Request
from mlx_paged.server.answer import Answer, Asked, Sample, respond
from mlx_paged.server.answer_parts import Part, join_parts
from mlx_paged.server.body import Fields, show
from mlx_paged.server.conversation import read_messages
from mlx_paged.server.errors import ApiError, bad_request
from mlx_paged.server.event_stream import event
from mlx_paged.server.sampling_fields import (
    make_params,
    read_output_form,
    read_prompt_logprobs,
    read_sampling,
    read_top_logprobs,
)
from mlx_paged.server.service import Service
from mlx_paged.server.token_logprobs import prompt_logprobs

_NAMES = (("json_schema", "response_format"),)
_FORBIDDEN_TEMPLATE = {"messages", "conversation", "tools", "tokenize", "add_generation_prompt", "chat_template"}
_REFUSED = {  # they change what an answer means
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model writes text",
}


@dataclass
class ChatRequest(Asked):
    """What a client asks for."""

    include_usage: bool

    @classmethod
    def read(cls, service: Service, body: dict[str, Any], salt: str | None) -> ChatRequest:
        """Read a request's body. Raises ApiError."""
        fields = Fields(body)
        for name, instead in _REFUSED.items():
            if name in fields:
                raise bad_request(f"{name} is not supported: {instead}", param=name)
        if fields.take("echo", bool, False):
            raise fields.error("echo", "is not supported: use completions, or continue_final_message")
        model = service.require_model(fields.take("model", str))
        if not (modalities := fields.take("modalities", list, ["text"])) == ["text"]:
            raise fields.error("modalities", f"{modalities} can't be had: this model writes text")
        messages = read_messages(fields.take("messages", list, []), service.note_omitted)
        settings = read_sampling(fields, salt) | read_output_form(fields)
        most, completion = fields.take("max_tokens", int), fields.take("max_completion_tokens", int)
        settings["max_tokens"] = completion if completion is not None else most
        if settings["max_tokens"] is None:
            settings["max_tokens"] = service.options.default_max_tokens
        top = read_top_logprobs(fields)
        if fields.take("logprobs", bool, False):
            settings["logprobs"] = top or 0
        elif top is not None:
            raise fields.error("top_logprobs", "needs logprobs: true")
        tools = read_tools(fields)
        stream = fields.take("stream", bool, False)
        settings["prompt_logprobs"] = read_prompt_logprobs(fields, stream=stream)
        options = Fields(fields.take("stream_options", dict, {}), "stream_options")
        request = cls(
            model=model,
            messages=messages,
            params=make_params(settings, _NAMES),
            tools=tools,
            tool_choice=read_tool_choice(fields, tools),
            parallel_calls=fields.take("parallel_tool_calls", bool, True),
            stream=stream,
            include_usage=options.take("include_usage", bool, False),
            template=read_template(fields),
        )
        service.note_unknown(fields.left)
        return request


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """Read the tools that may be called: all, some or none, as tool_choice says. Raises ApiError."""
    tools = []
    for i, tool in enumerate(fields.take("tools", list, [])):
        each = Fields(tool, f"tools[{i}]")
        if each.take("type", str, "") != "function":
            raise each.error("type", 'must be "function"')
        function = Fields(each.take_any("function"), each.path("function"))
        if not function.take("name", str):
            raise function.error("name", "must be text that is not empty")
        function.take("description", str)
        function.take("parameters", dict)
        tools.append(dict(tool))
    if (allowed := _read_allowed(fields)) is not None:
        names = [_require_tool(fields, each, tools) for each in allowed.take("tools", list, [])]
        tools = [tool for tool in tools if tool["function"]["name"] in names]
    return [] if fields.take_any("tool_choice") == "none" else tools


def _read_allowed(fields: Fields) -> Fields | None:
    """Which tools may be called, and whether one has to be; None if tool_choice is of another kind."""
    choice = fields.take_any("tool_choice")
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return None
    return Fields(choice.get("allowed_tools"), "tool_choice.allowed_tools")


def read_tool_choice(fields: Fields, tools: Sequence[dict[str, Any]]) -> str | None:
    """Read what has to be called, as `Asked.tool_choice` has it. Raises ApiError."""
    choice = fields.take_any("tool_choice")
    choice = "auto" if choice is None else choice
    if (allowed := _read_allowed(fields)) is not None:
        choice = allowed.take("mode", str, "auto")
        if choice not in ("auto", "required"):
            raise allowed.error("mode", 'must be "auto" or "required"')
    if choice in ("auto", "none"):
        return None
    if choice == "required":
        if not tools:
            raise fields.error("tool_choice", "needs tools")
        return "required"
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise fields.error("tool_choice", 'must be "auto", "none", "required", a function or allowed_tools')
    return _require_tool(fields, choice, tools)


def _require_tool(fields: Fields, choice: Any, tools: Sequence[dict[str, Any]]) -> str:
    """Return the name of a tool that is among those that there are. Raises ApiError."""
    function = Fields(choice, "tool_choice").take_any("function")
    name = Fields(function, "tool_choice.function").take("name", str, "")
    if name not in [tool["function"]["name"] for tool in tools]:
        raise fields.error("tool_choice", f"{show(name)} is none of the tools")
    return name


def read_template(fields: Fields) -> dict[str, Any]:
    """Read the arguments of the chat template. Raises ApiError for those that are the server's own."""
    template = dict(fields.take("chat_template_kwargs", dict, {}))
    if "chat_template" in fields:
        raise bad_request("chat_template can't be sent: the model's own is used", param="chat_template")
    for name in template.keys() & _FORBIDDEN_TEMPLATE:
        raise bad_request(f"chat_template_kwargs can't set {name}", param="chat_template_kwargs")
    effort = fields.take("reasoning_effort", str)
    if effort is not None:
        template = {"enable_thinking": effort != "none", "reasoning_effort": effort} | template
    if fields.take("continue_final_message", bool, False):
        template["continue_final_message"] = True
    if (begins_answer := fields.take("add_generation_prompt", bool)) is not None:
        template["add_generation_prompt"] = begins_answer
    return template


class ChatAnswer(Answer):
    """The answer to a chat request, whole or in chunks."""

    asked: ChatRequest

    def __init__(self, service: Service, asked: ChatRequest, request: Request, request_id: str) -> None:
        super().__init__(service, asked, request, request_id)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        self._started: set[int] = set()  # samples whose first chunk has gone out
        self._num_calls = [0] * asked.params.n

    async def whole(self) -> dict[str, Any]:
        """Wait for the whole answer."""
        async with aclosing(self.outputs()) as outputs:
            output = [output async for output in outputs][-1]
        choices = [self._whole_choice(sample) for sample in output.outputs]
        answer = self._head | {"object": "chat.completion", "choices": choices, "usage": self.usage()}
        if output.prompt_logprobs is not None:
            count = self.asked.params.prompt_logprobs or 0
            answer["prompt_logprobs"] = prompt_logprobs(self._service.tokenizer, output.prompt_logprobs, count, count)
        return answer

    def _whole_choice(self, output: CompletionOutput) -> dict[str, Any]:
        sample = self.samples[output.index]
        parts = join_parts(sample.take(output))
        texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("text", "thinking")}
        calls = [_call(part) for part in parts if part.kind == "call"]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": texts["text"] if texts["text"] or not calls else None,
        }
        if texts["thinking"]:
            message["reasoning_content"] = texts["thinking"]
        if calls:
            message["tool_calls"] = calls
        answer = {"index": output.index, "message": message, "finish_reason": sample.finish_reason}
        return answer | {"logprobs": self._take_logprobs(sample)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        try:
            async with aclosing(self.outputs()) as outputs:
                async for output in outputs:
                    for chunk in self._chunks_of(output):
                        yield event(chunk)
            if self.asked.include_usage:
                yield event(self._chunk([], usage=self.usage()))
        except ApiError as error:
            yield event(error.openai())
            return
        yield event("[DONE]")

    def _chunks_of(self, output: RequestOutput) -> list[dict[str, Any]]:
        chunks = []
        for each in output.outputs:
            sample = self.samples[each.index]
            if sample.finish_reason is not None:
                continue
            deltas = [delta for part in sample.take(each) for delta in self._deltas(each.index, part)]
            if each.index not in self._started:
                self._started.add(each.index)
                deltas.insert(0, {"role": "assistant", "content": ""})
            for delta in deltas:
                logprobs = self._take_logprobs(sample) if delta.get("content") else None
                chunks.append(self._chunk([_delta(each.index, delta, None, logprobs)]))
            if sample.finish_reason is not None:
                last = _delta(each.index, {}, sample.finish_reason, self._take_logprobs(sample))
                chunks.append(self._chunk([last]))
        return chunks

    def _deltas(self, sample: int, part: Part) -> list[dict[str, Any]]:
        if part.kind == "text":
            return [{"content": part.text}]
        if part.kind == "thinking":
            return [{"reasoning_content": part.text}]
        self._num_calls[sample] += bool(part.name)
        index = self._num_calls[sample] - 1
        arguments = [{"tool_calls": [{"index": index, "function": {"arguments": part.text}}]}]
        if not part.name:
            return arguments
        call = _call(part._replace(text=""))
        return [{"tool_calls": [call | {"index": index}]}, *(arguments if part.text else [])]

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self.asked.include_usage else {}
        return self._head | {"object": "chat.completion.chunk", "choices": choices} | usage | more

    def _take_logprobs(self, sample: Sample) -> dict[str, Any] | None:
        entries = self.take_logprobs(sample)
        return None if entries is None else {"content": entries}

    def usage(self) -> dict[str, Any]:
        """Count the tokens of prompt and answer."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_output,
            "total_tokens": self.num_prompt + self.num_output,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
            "completion_tokens_details": {"reasoning_tokens": self.num_thinking},
        }


def _call(part: Part) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.text}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None, logprobs: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": finish_reason}
    return choice if logprobs is None else choice | {"logprobs": logprobs}


async def chat_completions(service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
    """Answer POST /v1/chat/completions. Raises ApiError."""
    asked = ChatRequest.read(service, body, state.get("cache_salt"))
    return await respond(service, asked, state, ChatAnswer)
