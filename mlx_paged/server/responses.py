"""OpenAI's responses: the answer as items of reasoning, text and function calls, whole or in numbered events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp

from mlx_paged.request import Request
from mlx_paged.server.answer import EventAnswer, respond
from mlx_paged.server.answer_parts import Part
from mlx_paged.server.errors import ApiError
from mlx_paged.server.responses_fields import ResponseRequest
from mlx_paged.server.service import Service

_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}  # with the first, clients don't try again

Event = dict[str, Any]


class ResponseAnswer(EventAnswer):
    """The answer to a request for a response. Nothing of it is stored."""

    asked: ResponseRequest

    def __init__(self, service: Service, asked: ResponseRequest, request: Request, request_id: str) -> None:
        super().__init__(service, asked, request, request_id)
        self._head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._output: list[dict[str, Any]] = []
        self._open = ""  # the kind of part that the last item goes on with
        self._written = ""
        self._logprobs: list[dict[str, Any]] = []
        self._num_events = 0

    def begin(self) -> Event:
        """The response as it begins."""
        return self._about_response("created")

    def wait(self) -> Event:
        """The response so far: an event, since there are clients that count no comments."""
        return self._about_response("in_progress")

    def fail(self, error: ApiError) -> Event:
        """The response that has failed."""
        code = _CODES.get(error.status) or error.code or "server_error"
        self._status, self._error = "failed", {"code": code, "message": error.message}
        return self._about_response("failed")

    def end(self) -> Iterator[Event]:
        """Take the end of the response."""
        status = "incomplete" if self.samples[0].finish_reason == "length" else "completed"
        yield from self._close(status)
        self._status = status
        yield self._about_response(status)

    def add(self, part: Part) -> Iterator[Event]:
        """Take the next part."""
        if part.kind != self._open or part.name:
            yield from self._close("completed")
            yield from self._begin(part)
        self._written += part.text
        if part.kind == "text":
            logprobs = self.take_logprobs(self.samples[0]) or []
            self._logprobs += logprobs
            yield self._about_part("output_text.delta", delta=part.text, logprobs=logprobs)
        elif part.kind == "thinking":
            yield self._about_part("reasoning_text.delta", delta=part.text)
        else:
            yield self._about_item("function_call_arguments.delta", delta=part.text)

    def _begin(self, part: Part) -> Iterator[Event]:
        self._open, self._written, self._logprobs = part.kind, "", []
        if part.kind == "text":
            item = _item("message", "msg", role="assistant", content=[])
        elif part.kind == "thinking":
            item = _item("reasoning", "rs", summary=[], content=[])
        else:
            call_id = f"call_{uuid.uuid4().hex[:24]}"
            item = _item("function_call", "fc", call_id=call_id, arguments="", **self.asked.called(part.name))
        self._output.append(item)
        yield self._event("output_item.added", output_index=len(self._output) - 1, item=dict(item))
        if part.kind != "call":
            yield self._about_part("content_part.added", part=self._content_part(part.kind))

    def _close(self, status: str) -> Iterator[Event]:
        """End the last item, if it is not ended."""
        kind, self._open, text = self._open, "", self._written
        if not kind:
            return
        item = self._output[-1]
        item["status"] = status
        if kind == "text":
            self._logprobs += self.take_logprobs(self.samples[0]) or []
            yield self._about_part("output_text.done", text=text, logprobs=self._logprobs)
        elif kind == "thinking":
            yield self._about_part("reasoning_text.done", text=text)
        if kind != "call":
            item["content"] = [self._content_part(kind)]
            yield self._about_part("content_part.done", part=item["content"][0])
        else:
            item["arguments"] = text
            yield self._about_item("function_call_arguments.done", arguments=text, name=item["name"])
        yield self._event("output_item.done", output_index=len(self._output) - 1, item=item)

    def _content_part(self, kind: str) -> dict[str, Any]:
        if kind == "thinking":
            return {"type": "reasoning_text", "text": self._written}
        return {"type": "output_text", "text": self._written, "annotations": [], "logprobs": self._logprobs}

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    def _about_item(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **fields)

    def _about_part(self, kind: str, **fields: Any) -> Event:
        return self._about_item(kind, content_index=0, **fields)

    def _about_response(self, kind: str) -> Event:
        return self._event(kind, response=self.result())

    def result(self) -> dict[str, Any]:
        """The response as far as it has come."""
        is_cut, has_ended = self._status == "incomplete", self._status in ("completed", "incomplete")
        return self._head | self.asked.echoed | {
            "model": self.asked.model,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output,
            "usage": self._usage() if has_ended else None,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.num_prompt,
            "input_tokens_details": {"cached_tokens": self.num_cached, "cache_write_tokens": 0},
            "output_tokens": self.num_output,
            "output_tokens_details": {"reasoning_tokens": self.num_thinking},
            "total_tokens": self.num_prompt + self.num_output,
        }


def _item(kind: str, prefix: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **fields}


async def responses(service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
    """Answer POST /v1/responses. Raises ApiError."""
    asked = ResponseRequest.read(service, body, state.get("cache_salt"))
    return await respond(service, asked, state, ResponseAnswer)
