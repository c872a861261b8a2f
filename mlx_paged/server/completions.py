"""OpenAI's completions: a text, or several, continued as they are."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from mlx_paged.outputs import CompletionOutput, RequestOutput
from mlx_paged.request import Request
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.server.body import Fields
from mlx_paged.server.errors import ApiError, bad_request
from mlx_paged.server.event_stream import event, keepalive
from mlx_paged.server.sampling_fields import (
    MAX_SAMPLES,
    make_params,
    read_output_form,
    read_prompt_logprobs,
    read_sampling,
)
from mlx_paged.server.service import Service
from mlx_paged.server.token_logprobs import completion_logprobs, prompt_logprobs, prompt_offsets

_DEFAULT_MAX_TOKENS = 16
_MAX_LOGPROBS = 5


@dataclass
class CompletionRequest:
    """What a client asks for."""

    model: str
    prompts: list[str | list[int]]
    params: SamplingParams
    echo: bool
    only_echo: bool
    """max_tokens is 0: nothing is to be written."""
    prompt_logprobs: int | None
    """vLLM's: how many of the likeliest tokens to report per token of the prompts."""
    stream: bool
    include_usage: bool

    @classmethod
    def read(cls, service: Service, body: dict[str, Any], salt: str | None) -> CompletionRequest:
        """Read a request's body. Raises ApiError."""
        fields = Fields(body)
        model = service.require_model(fields.take("model", str))
        prompts = fields.take_with("prompt", _read_prompts)
        if prompts is None:
            raise bad_request("prompt is missing", param="prompt")
        if "suffix" in fields:
            raise bad_request("suffix is not supported", param="suffix")
        settings = read_sampling(fields, salt) | read_output_form(fields)
        if fields.take("best_of", int, 1) > settings.get("n", 1):
            raise fields.error("best_of", "must be at most n: of more samples none would be thrown away")
        most = fields.take("max_tokens", int, service.options.default_max_tokens or _DEFAULT_MAX_TOKENS)
        echo = fields.take("echo", bool, False)
        if most == 0 and not echo:
            raise fields.error("max_tokens", "must be at least 1, or 0 together with echo")
        count = fields.take("logprobs", int)
        if count is not None and not 0 <= count <= _MAX_LOGPROBS:
            raise fields.error("logprobs", f"must be between 0 and {_MAX_LOGPROBS}")
        stream = fields.take("stream", bool, False)
        of_prompt = read_prompt_logprobs(fields, stream=stream)
        settings |= {"max_tokens": most or 1, "logprobs": count}
        echoed = [count] if echo and count is not None else []
        settings["prompt_logprobs"] = max(filter(None, [of_prompt, *echoed]), default=of_prompt if not echoed else 0)
        options = Fields(fields.take("stream_options", dict, {}), "stream_options")
        if len(prompts) * settings.get("n", 1) > MAX_SAMPLES * 8:
            raise fields.error("prompt", f"and n ask for more than {MAX_SAMPLES * 8} completions")
        request = cls(
            model,
            prompts,
            make_params(settings),
            echo,
            most == 0,
            of_prompt,
            stream,
            options.take("include_usage", bool, False),
        )
        fields.take_any("user")
        service.note_unknown(fields.left)
        return request


def _read_prompts(value: Any) -> list[str | list[int]]:
    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)

    if isinstance(value, str) or is_ids(value):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(each, str) or is_ids(each) for each in value):
        raise ValueError("must be a text, a list of token ids, or a list of these")
    return value


class _Places:
    """Where in the text of a choice each of its tokens begins, in characters.

    The tokens of one character begin where it does; one that is no text begins where the next one does.
    """

    def __init__(self, service: Service, params: SamplingParams) -> None:
        self._stream = service.llm.decode_stream(params.skip_special_tokens)
        self._length = 0

    def of(self, token_ids: Sequence[int], num_echoed: int) -> list[int]:
        """Take in the tokens that come next, after so many characters of the prompt. Returns the place of each."""
        places: list[int] = []
        self._length += num_echoed
        for token in token_ids:
            places.append(self._length)
            self._length += len(self._stream.add(token))
        return places


class CompletionAnswer:
    """The completions of all prompts, whole or in chunks. The index of a choice is prompt * n + sample."""

    def __init__(self, service: Service, asked: CompletionRequest, requests: Sequence[Request]) -> None:
        self._service = service
        self._asked = asked
        self._requests = requests
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                      "model": asked.model}  # fmt: skip
        self._num_output = self._num_cached = 0
        num_choices = len(requests) * asked.params.n if asked.params.logprobs is not None else 0
        self._places = [_Places(service, asked.params) for _ in range(num_choices)]
        self._begun: set[int] = set()
        self._ended: set[int] = set()

    async def whole(self) -> dict[str, Any]:
        """Wait for the whole answer."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._last_output(request)) for request in self._requests]
        outputs = [task.result() for task in tasks]
        choices = [choice for i, output in enumerate(outputs) for choice in self._choices(i, output)]
        return self._head | {"choices": choices, "usage": self.usage()}

    async def _last_output(self, request: Request) -> RequestOutput:
        async with aclosing(self._service.run(request)) as outputs:
            return [output async for output in outputs][-1]

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, those of all prompts as they come."""
        arrived: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue(16)
        readers = [asyncio.ensure_future(self._read(i, arrived)) for i in range(len(self._requests))]
        try:
            unread = len(readers)
            while unread:
                i, item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    unread -= 1
                    continue
                for choice in self._choices(i, item):
                    yield event(self._chunk([choice]))
            if self._asked.include_usage:
                yield event(self._chunk([], usage=self.usage()))
        except ApiError as error:
            yield event(error.openai())
            return
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        yield event("[DONE]")

    def keepalive(self) -> bytes:
        """What is sent when nothing else came for a while: how far the prompt is that is least done."""
        shares = [self._service.llm.progress(request) for request in self._requests]
        return keepalive(min((share for share in shares if share is not None), default=None))

    async def _read(self, i: int, arrived: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]]) -> None:
        try:
            async with aclosing(self._service.run(self._requests[i])) as outputs:
                async for output in outputs:
                    await arrived.put((i, output))
            await arrived.put((i, None))
        except Exception as error:
            await arrived.put((i, error))

    def _choices(self, prompt: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What is new of the samples of a prompt."""
        choices = []
        for sample in output.outputs:
            index = prompt * self._asked.params.n + sample.index
            has_news = sample.text or sample.token_ids or sample.finish_reason
            if index in self._ended or (self._asked.stream and not has_news):
                continue
            if sample.finish_reason is not None:
                self._ended.add(index)
            choices.append(self._choice(index, prompt, sample, output.prompt_logprobs))
        if output.finished:
            self._num_cached += output.num_cached_tokens
        return choices

    def _choice(
        self, index: int, prompt: int, sample: CompletionOutput, of_prompt: list[dict[int, float] | None] | None
    ) -> dict[str, Any]:
        """What is new of a sample. of_prompt: log-probabilities of its prompt, if they were asked for."""
        asked, tokenizer = self._asked, self._service.tokenizer
        text, token_ids = sample.text, sample.token_ids
        entries: list[dict[int, float] | None] = list(sample.logprobs or [])
        if asked.only_echo:
            text, token_ids, entries = "", [], []
        self._num_output += len(token_ids)
        is_first = index not in self._begun
        self._begun.add(index)
        echoed = self._prompt_text(prompt) if asked.echo and is_first else ""
        logprobs = None
        if asked.params.logprobs is not None:
            places = self._places[index]
            logprobs = completion_logprobs(
                tokenizer, token_ids, entries, asked.params.logprobs, places.of(token_ids, len(echoed))
            )
            if asked.echo and is_first:
                ids = self._requests[prompt].prompt_token_ids
                offsets = prompt_offsets(tokenizer, ids, echoed)
                before = completion_logprobs(tokenizer, ids, of_prompt or [], asked.params.logprobs, offsets)
                logprobs = {name: before[name] + values for name, values in logprobs.items()}
        reason = "length" if asked.only_echo else sample.finish_reason
        choice = {"index": index, "text": echoed + text, "logprobs": logprobs, "finish_reason": reason}
        if asked.prompt_logprobs is not None and of_prompt is not None:
            found = asked.params.prompt_logprobs or 0
            choice["prompt_logprobs"] = prompt_logprobs(tokenizer, of_prompt, asked.prompt_logprobs, found)
        return choice

    def _prompt_text(self, prompt: int) -> str:
        given = self._asked.prompts[prompt]
        return given if isinstance(given, str) else str(self._service.tokenizer.decode(given))

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self._asked.include_usage else {}
        return self._head | {"choices": choices} | usage | more

    def usage(self) -> dict[str, Any]:
        """Count the tokens of prompts and completions."""
        num_prompt = sum(len(request.prompt_token_ids) for request in self._requests)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
        }


async def completions(service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
    """Answer POST /v1/completions. Raises ApiError."""
    asked = CompletionRequest.read(service, body, state.get("cache_salt"))
    service.require_room(len(asked.prompts))
    requests = [await service.make_request(prompt, asked.params, stream=asked.stream) for prompt in asked.prompts]
    for request in requests:
        request.client_id = state["request_id"]
    state["notes"]["prompt_tokens"] = sum(len(request.prompt_token_ids) for request in requests)
    service.require_room(len(requests))  # once it has begun, that comes late
    answer = CompletionAnswer(service, asked, requests)
    if asked.stream:
        return service.stream(answer.chunks(), answer.keepalive)
    return JSONResponse(await answer.whole())
