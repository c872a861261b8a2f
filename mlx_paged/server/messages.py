"""Anthropic's messages: the answer as blocks of thinking, text and tool use, whole or in events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from mlx_paged.request import Request
from mlx_paged.server.answer import Asked, EventAnswer, respond
from mlx_paged.server.answer_parts import Part
from mlx_paged.server.errors import ApiError
from mlx_paged.server.messages_fields import read_message_request
from mlx_paged.server.service import Service

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_SIGNATURE = "unsigned"  # clients keep thinking only if there is one

Event = dict[str, Any]


class MessageAnswer(EventAnswer):
    """The answer to a request for a message."""

    def __init__(self, service: Service, asked: Asked, request: Request, request_id: str) -> None:
        super().__init__(service, asked, request, request_id)
        self._content: list[dict[str, Any]] = []
        self._written = ""  # of the last block, which is open
        self._is_open = False
        self._id = f"msg_{uuid.uuid4().hex}"

    def begin(self) -> Event:
        """The message as it begins."""
        return {"type": "message_start", "message": self.result()}

    def wait(self) -> Event:
        """A ping."""
        return {"type": "ping"}

    def fail(self, error: ApiError) -> Event:
        """The error."""
        return error.anthropic(self.request_id)

    def end(self) -> Iterator[Event]:
        """Take the end of the message."""
        yield from self._close()
        yield {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def add(self, part: Part) -> Iterator[Event]:
        """Take the next part."""
        kind = "tool_use" if part.kind == "call" else part.kind
        if not self._is_open or kind != self._content[-1]["type"] or part.name:
            yield from self._close()
            yield from self._open(kind, part.name)
        self._written += part.text
        field = {"tool_use": "partial_json"}.get(kind, kind)
        yield self._delta({"tool_use": "input_json_delta"}.get(kind, f"{kind}_delta"), field, part.text)

    def _open(self, kind: str, name: str) -> Iterator[Event]:
        block: dict[str, Any] = {"type": kind}
        if kind == "tool_use":
            block |= {"id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
        else:
            block |= {kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        self._content.append(block)
        self._is_open, self._written = True, ""
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": dict(block)}

    def _close(self) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open, block = False, self._content[-1]
        if block["type"] == "tool_use":
            try:
                block["input"] = json.loads(self._written)
            except ValueError:  # max_tokens has cut it: in a whole answer its text is all that can be told
                self._content[-1] = {"type": "text", "text": f"{block['name']} {self._written}"}
        else:
            block[block["type"]] = self._written
        if block["type"] == "thinking":
            block["signature"] = _SIGNATURE
            yield self._delta("signature_delta", "signature", _SIGNATURE)
        yield {"type": "content_block_stop", "index": len(self._content) - 1}

    def _delta(self, kind: str, field: str, value: str) -> Event:
        delta = {"type": kind, field: value}
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def result(self) -> dict[str, Any]:
        """The message as far as it has come."""
        message = {"id": self._id, "type": "message", "role": "assistant", "model": self.asked.model}
        return message | {"content": self._content} | self._ending() | {"usage": self._usage()}

    def _ending(self) -> dict[str, Any]:
        (sample,) = self.samples
        if sample.stop_string is not None and sample.finish_reason == "stop":
            return {"stop_reason": "stop_sequence", "stop_sequence": sample.stop_string}
        reason = _STOP_REASONS.get(sample.finish_reason or "")
        if reason == "tool_use" and not any(block["type"] == "tool_use" for block in self._content):
            reason = "end_turn"  # its call was never finished
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Count tokens: those of the prompt that came from the cache apart. That is known once there is an output."""
        return {
            "input_tokens": self.num_prompt - self.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.num_cached,
            "output_tokens": self.num_output,
            "output_tokens_details": {"thinking_tokens": self.num_thinking},
        }


async def messages(service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
    """Answer POST /v1/messages. Raises ApiError."""
    return await respond(service, read_message_request(service, body, state.get("cache_salt")), state, MessageAnswer)


async def count_tokens(service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
    """Answer POST /v1/messages/count_tokens: what /v1/messages would compute. Raises ApiError."""
    asked = read_message_request(service, body, state.get("cache_salt"))
    token_ids = await service.encode_chat(asked.messages, asked.tools, asked.template)
    return JSONResponse({"input_tokens": len(token_ids)})
