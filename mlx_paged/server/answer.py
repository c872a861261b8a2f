"""What the dialects of chat share: what is asked, and an answer whose samples are taken apart while they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from mlx_paged.outputs import CompletionOutput, RequestOutput
from mlx_paged.request import Request
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.server.answer_form import with_form
from mlx_paged.server.answer_parts import AnswerParts, Part, count_thinking, starts_thinking
from mlx_paged.server.conversation import Messages, with_tools
from mlx_paged.server.errors import ApiError, bad_request
from mlx_paged.server.event_stream import event, keepalive
from mlx_paged.server.service import Service
from mlx_paged.server.token_logprobs import chat_logprobs
from mlx_paged.server.tool_grammar import calls_are_plain


@dataclass
class Asked:
    """What a client asks for."""

    came_in: ClassVar = "messages"
    """The field that the conversation came in."""
    model: str
    messages: Messages
    params: SamplingParams
    tools: list[dict[str, Any]]
    parallel_calls: bool
    stream: bool
    template: dict[str, Any]
    """Arguments of the chat template."""
    tool_choice: str | None = field(default=None, kw_only=True)
    """"required", or the name of the tool that has to be called; None: none has to."""


@dataclass
class Sample:
    """What has come of one sample."""

    parts: AnswerParts
    is_thinking: bool
    """Whether its prompt has begun to think."""
    end_ids: Collection[int]
    parallel_calls: bool
    token_ids: list[int] = field(default_factory=list)
    shown: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    """Tokens, with their log-probabilities if they are asked for, whose text has not gone out."""
    num_calls: int = 0
    finish_reason: str | None = None
    """As OpenAI has it: "stop", "length" or "tool_calls"; None while it is written."""
    stop_string: str | None = None
    """The one that ended it, if one did."""

    def take(self, output: CompletionOutput) -> list[Part]:
        """Take what is new of the sample. Returns its parts; with one call at most, if more may not be made at once."""
        self.token_ids += output.token_ids
        self.shown += zip(output.token_ids, output.logprobs or (), strict=False)
        if output.finish_reason == "stop" and self.shown and self.shown[-1][0] in (*self.end_ids, output.stop_reason):
            self.shown.pop()  # a token that ends an answer is none of its text
        parts = self.parts.feed(output.text)
        if output.finish_reason is not None:
            parts += self.parts.finish(cut=output.finish_reason != "stop")
            called = self.parts.num_calls and output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called else output.finish_reason
            self.stop_string = output.stop_reason if isinstance(output.stop_reason, str) else None
        return [part for part in parts if self._may_show(part)]

    def _may_show(self, part: Part) -> bool:
        if part.kind != "call":
            return True
        self.num_calls += bool(part.name)
        return self.parallel_calls or self.num_calls == 1


class Answer(ABC):
    """An answer to a conversation in some dialect, whole or in events."""

    def __init__(self, service: Service, asked: Asked, request: Request, request_id: str) -> None:
        self.asked = asked
        self.request_id = request_id
        self.num_prompt = len(request.prompt_token_ids)
        self.num_cached = 0
        self._service = service
        self._request = request
        self._tokenizer = tokenizer = service.tokenizer
        thinks = starts_thinking(tokenizer, request.prompt_token_ids)
        is_plain = asked.tool_choice is not None and calls_are_plain(tokenizer)
        self.samples = [
            Sample(
                AnswerParts(tokenizer, asked.tools, is_thinking=thinks, is_plain_call=is_plain),
                thinks,
                tokenizer.eos_token_ids,
                asked.parallel_calls,
            )
            for _ in range(asked.params.n)
        ]

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """Wait for the whole answer. Raises ApiError."""

    @abstractmethod
    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, the last of which tells an error, if there is one."""

    def keepalive(self) -> bytes:
        """What is sent when nothing else came for a while."""
        return keepalive(self.progress)

    @property
    def progress(self) -> float | None:
        """As `AsyncLLM.progress`."""
        return self._service.llm.progress(self._request)

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """Run the request. Yields what is new. Raises ApiError."""
        async with aclosing(self._service.run(self._request)) as outputs:
            async for output in outputs:
                self.num_cached = output.num_cached_tokens
                yield output

    def take_logprobs(self, sample: Sample) -> list[dict[str, Any]] | None:
        """What is known of tokens whose text goes out now; None if nobody has asked for it."""
        if self.asked.params.logprobs is None or not sample.shown:
            return None
        shown, sample.shown = sample.shown, []
        return chat_logprobs(self._tokenizer, shown, self.asked.params.logprobs)

    @property
    def num_output(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)

    @property
    def num_thinking(self) -> int:
        """How many of them are thinking."""
        return sum(
            count_thinking(self._tokenizer, sample.token_ids, is_thinking=sample.is_thinking) for sample in self.samples
        )


class EventAnswer(Answer):
    """An answer of one sample, which as a whole is what its events make up. An event's data has its name for a type."""

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. The first ones come before anything is computed."""
        yield _write(self.begin())
        yield self.keepalive()
        try:
            async with aclosing(self.answer()) as events:
                async for each in events:
                    yield _write(each)
        except ApiError as error:
            yield _write(self.fail(error))

    def keepalive(self) -> bytes:
        """What is sent when nothing else came for a while, with a field of ours, which clients do not read."""
        return _write(self.wait() | {"prompt_progress": self.progress or 0.0})

    async def whole(self) -> dict[str, Any]:
        """Wait for the whole answer. Raises ApiError."""
        async with aclosing(self.answer()) as events:
            async for _ in events:
                pass
        return self.result()

    async def answer(self) -> AsyncGenerator[dict[str, Any], None]:
        """Run the request. Yields the data of the events that come of it. Raises ApiError."""
        (sample,) = self.samples
        async with aclosing(self.outputs()) as outputs:
            async for output in outputs:
                for part in sample.take(output.outputs[0]) if output.outputs else ():
                    for each in self.add(part):
                        yield each
        for each in self.end():
            yield each

    @abstractmethod
    def begin(self) -> dict[str, Any]:
        """The first event."""

    @abstractmethod
    def wait(self) -> dict[str, Any]:
        """The event that says that the answer is still coming."""

    @abstractmethod
    def fail(self, error: ApiError) -> dict[str, Any]:
        """The event with which an answer ends that an error ends."""

    @abstractmethod
    def add(self, part: Part) -> Iterator[dict[str, Any]]:
        """Take the next part. Yields what it means for the client."""

    @abstractmethod
    def end(self) -> Iterator[dict[str, Any]]:
        """Take the end of the answer. Yields what it means for the client."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The answer as far as it has come."""


def _write(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


async def _prepare(service: Service, asked: Asked) -> Request:
    messages, choice = asked.messages, asked.tool_choice
    params = with_form(
        asked.params,
        service.tokenizer,
        asked.tools,
        choice,
        parallel=asked.parallel_calls,
        max_thinking_tokens=service.options.max_thinking_tokens,
        max_model_len=service.llm.max_model_len,
    )
    if choice is not None and not service.llm.knows_tools:
        messages = with_tools(messages, asked.tools)
    try:
        return await service.prepare_chat(
            messages,
            params,
            tools=asked.tools,
            template=asked.template,
            stream=asked.stream,
            came_in=asked.came_in,
        )
    except ApiError as error:
        if error.param != "grammar" or params.grammar == asked.params.grammar:
            raise
        raise bad_request(error.message.replace("grammar", "what the tools take", 1), param="tools") from None


async def respond(
    service: Service,
    asked: Asked,
    state: dict[str, Any],
    make: Callable[[Service, Any, Request, str], Answer],
) -> ASGIApp:
    """Make the response to what is asked, in the dialect of the answer that `make` returns. Raises ApiError."""
    request = await _prepare(service, asked)
    request.client_id = state["request_id"]
    state["notes"]["prompt_tokens"] = len(request.prompt_token_ids)
    answer = make(service, asked, request, state["request_id"])
    if asked.stream:
        return service.stream(answer.events(), answer.keepalive)
    return JSONResponse(await answer.whole())
