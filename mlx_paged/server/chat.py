"""OpenAI's chat completions: from the request to parameters, and from outputs to the answer or its chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from mlx_paged.outputs import CompletionOutput, RequestOutput
from mlx_paged.request import Request
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.server.answer_parts import AnswerParts, Part, count_thinking, starts_thinking
from mlx_paged.server.body import Fields
from mlx_paged.server.conversation import Messages, read_messages
from mlx_paged.server.errors import ApiError, bad_request
from mlx_paged.server.event_stream import EventStream, event
from mlx_paged.server.sampling_fields import make_params, read_output_form, read_sampling
from mlx_paged.server.service import Service
from mlx_paged.server.token_logprobs import chat_logprobs

_NAMES = (("json_schema", "response_format"),)
_FORBIDDEN_TEMPLATE = {"messages", "conversation", "tools", "tokenize", "add_generation_prompt", "chat_template"}
_REFUSED = {  # they change what an answer means
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model writes text",
}
_MAX_TOP_LOGPROBS = 20


@dataclass
class ChatRequest:
    """What a client asks for."""

    model: str
    messages: Messages
    params: SamplingParams
    tools: list[dict[str, Any]]
    parallel_calls: bool
    stream: bool
    include_usage: bool
    template: dict[str, Any]
    """Arguments of the chat template."""

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
        messages = read_messages(fields.take("messages", list, []))
        settings = read_sampling(fields) | read_output_form(fields)
        most, completion = fields.take("max_tokens", int), fields.take("max_completion_tokens", int)
        settings["max_tokens"] = completion if completion is not None else most
        if settings["max_tokens"] is None:
            settings["max_tokens"] = service.options.default_max_tokens
        top = fields.take("top_logprobs", int)
        if top is not None and not 0 <= top <= _MAX_TOP_LOGPROBS:
            raise fields.error("top_logprobs", f"must be between 0 and {_MAX_TOP_LOGPROBS}")
        if fields.take("logprobs", bool, False):
            settings["logprobs"] = top or 0
        elif top is not None:
            raise fields.error("top_logprobs", "needs logprobs: true")
        settings["cache_salt"] = _salted(settings.get("cache_salt"), salt)
        tools = read_tools(fields)
        options = Fields(fields.take("stream_options", dict, {}), "stream_options")
        request = cls(
            model=model,
            messages=messages,
            params=make_params(settings, _NAMES),
            tools=tools,
            parallel_calls=fields.take("parallel_tool_calls", bool, True),
            stream=fields.take("stream", bool, False),
            include_usage=options.take("include_usage", bool, False),
            template=read_template(fields),
        )
        service.note_unknown(fields.left)
        return request


def _salted(salt: str | None, key_salt: str | None) -> str | None:
    return salt if key_salt is None else f"{key_salt}:{salt or ''}"


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """Read the tools that may be called; none if tool_choice says so. Raises ApiError."""
    tools = []
    for i, tool in enumerate(fields.take("tools", list, [])):
        each = Fields(tool, f"tools[{i}]")
        if each.take("type", str, "") != "function":
            raise each.error("type", 'must be "function"')
        function = Fields(each.take_any("function"), each.path("function"))
        if not function.take("name", str):
            raise function.error("name", "must be text that is not empty")
        tools.append(dict(tool))
    choice = fields.take_any("tool_choice") or "auto"
    if choice in ("auto", "none"):
        return tools if choice == "auto" else []
    raise fields.error("tool_choice", 'must be "auto" or "none"')


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


@dataclass
class _Choice:
    """What has come of one sample."""

    parts: AnswerParts
    is_thinking: bool
    end_ids: Collection[int]
    token_ids: list[int] = field(default_factory=list)
    shown: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    """Tokens, with their log-probabilities if they are asked for, whose text has not gone out."""
    has_started: bool = False
    finish_reason: str | None = None
    num_calls: int = 0

    def take(self, sample: CompletionOutput) -> list[Part]:
        """Take what is new of the sample. Returns its parts."""
        self.token_ids += sample.token_ids
        self.shown += zip(sample.token_ids, sample.logprobs or (), strict=False)
        if sample.finish_reason == "stop" and self.shown and self.shown[-1][0] in (*self.end_ids, sample.stop_reason):
            self.shown.pop()  # a token that ends an answer is none of its text
        parts = self.parts.feed(sample.text)
        if sample.finish_reason is not None:
            parts += self.parts.finish(cut=sample.finish_reason != "stop")
            called = self.parts.num_calls and sample.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else sample.finish_reason
        return parts


class ChatAnswer:
    """The answer to a chat request, whole or in chunks."""

    def __init__(self, service: Service, asked: ChatRequest, request: Request) -> None:
        self._service = service
        self._asked = asked
        self._request = request
        tokenizer = service.tokenizer
        is_thinking = starts_thinking(tokenizer, request.prompt_token_ids)
        self._choices = [
            _Choice(AnswerParts(tokenizer, asked.tools, is_thinking=is_thinking), is_thinking, tokenizer.eos_token_ids)
            for _ in range(asked.params.n)
        ]
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        self._num_cached = 0

    async def whole(self) -> dict[str, Any]:
        """Wait for the whole answer."""
        async with aclosing(self._service.run(self._request)) as outputs:
            output = [output async for output in outputs][-1]
        self._num_cached = output.num_cached_tokens
        choices = [self._whole_choice(sample) for sample in output.outputs]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _whole_choice(self, sample: CompletionOutput) -> dict[str, Any]:
        choice = self._choices[sample.index]
        parts = choice.take(sample)
        texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("text", "thinking")}
        calls = [_call(part) for part in parts if part.kind == "call"]
        calls = calls if self._asked.parallel_calls else calls[:1]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": texts["text"] if texts["text"] or not calls else None,
        }
        if texts["thinking"]:
            message["reasoning_content"] = texts["thinking"]
        if calls:
            message["tool_calls"] = calls
        answer = {"index": sample.index, "message": message, "finish_reason": choice.finish_reason}
        return answer | {"logprobs": self._take_logprobs(choice)}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        try:
            async with aclosing(self._service.run(self._request)) as outputs:
                async for output in outputs:
                    self._num_cached = output.num_cached_tokens
                    for chunk in self._chunks_of(output):
                        yield event(chunk)
            if self._asked.include_usage:
                yield event(self._chunk([], usage=self.usage()))
        except ApiError as error:
            yield event(error.openai())
            return
        yield event("[DONE]")

    def _chunks_of(self, output: RequestOutput) -> list[dict[str, Any]]:
        chunks = []
        for sample in output.outputs:
            choice = self._choices[sample.index]
            if choice.finish_reason is not None:
                continue
            parts = choice.take(sample)
            deltas = [delta for part in parts for delta in self._deltas(choice, part)]
            if not choice.has_started:
                choice.has_started = True
                deltas.insert(0, {"role": "assistant", "content": ""})
            for delta in deltas:
                logprobs = self._take_logprobs(choice) if delta.get("content") else None
                chunks.append(self._chunk([_delta(sample.index, delta, None, logprobs)]))
            if choice.finish_reason is not None:
                last = _delta(sample.index, {}, choice.finish_reason, self._take_logprobs(choice))
                chunks.append(self._chunk([last]))
        return chunks

    def _deltas(self, choice: _Choice, part: Part) -> list[dict[str, Any]]:
        if part.kind == "text":
            return [{"content": part.text}]
        if part.kind == "thinking":
            return [{"reasoning_content": part.text}]
        if choice.num_calls and not self._asked.parallel_calls:
            return []
        call, index = _call(part), choice.num_calls
        choice.num_calls += 1
        arguments = call["function"].pop("arguments")
        first = call | {"index": index, "function": call["function"] | {"arguments": ""}}
        return [{"tool_calls": [first]}, {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}]

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self._asked.include_usage else {}
        return self._head | {"object": "chat.completion.chunk", "choices": choices} | usage | more

    def _take_logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        """What is known of tokens whose text goes out now."""
        if self._asked.params.logprobs is None or not choice.shown:
            return None
        shown, choice.shown = choice.shown, []
        return {"content": chat_logprobs(self._service.tokenizer, shown, self._asked.params.logprobs)}

    def usage(self) -> dict[str, Any]:
        """Count the tokens of prompt and answer."""
        num_prompt = len(self._request.prompt_token_ids)
        num_output = sum(len(choice.token_ids) for choice in self._choices)
        thinking = sum(
            count_thinking(self._service.tokenizer, choice.token_ids, is_thinking=choice.is_thinking)
            for choice in self._choices
        )
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
            "completion_tokens_details": {"reasoning_tokens": thinking},
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
    request = await service.prepare_chat(
        asked.messages, asked.params, tools=asked.tools, template=asked.template, stream=asked.stream
    )
    state["notes"]["prompt_tokens"] = len(request.prompt_token_ids)
    answer = ChatAnswer(service, asked, request)
    if asked.stream:
        return EventStream(answer.chunks(), keepalive_s=service.options.keepalive_s)
    return JSONResponse(await answer.whole())
