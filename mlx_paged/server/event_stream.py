"""Answers that end when their client goes: streams of server-sent events, and whole answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

T = TypeVar("T")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx holds events back
]

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each event


def event(data: Any, name: str | None = None) -> bytes:
    """Write one server-sent event: its data in JSON, and its name, if it has one."""
    text = data if isinstance(data, str) else _ENCODER.encode(data)
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode() + b"\n\n"


def keepalive(progress: float | None) -> bytes:
    """Write a comment, which clients skip. progress: the share of the prompt that is computed; None: it waits."""
    state = " waiting" if progress is None else f" {progress:.0%} of the prompt" if progress < 1 else ""
    return f": keepalive{state}\n\n".encode()


class EventStream:
    """A response of events, as they come. When its client goes, `events` is closed."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keepalive: Callable[[], bytes],
        keepalive_s: float,
    ) -> None:
        """keepalive: makes what is sent whenever nothing else came for `keepalive_s` seconds."""
        self._events = events
        self._keepalive = keepalive
        self._keepalive_s = keepalive_s
        self._writing = asyncio.Lock()
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as ASGI has it."""
        now = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        self._last_sent = now()
        gone, sending = asyncio.ensure_future(_disconnect(receive)), asyncio.ensure_future(self._send_all(send, now))
        try:
            while not sending.done():
                left = self._last_sent + self._keepalive_s - now()
                if left <= 0 and not self._writing.locked():
                    await self._write(send, self._keepalive(), now)
                    continue
                if left <= 0:  # the client does not read
                    left = self._keepalive_s
                await asyncio.wait({gone, sending}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if gone.done() and not sending.done():
                    scope["state"]["notes"]["closed"] = True
                    return
            sending.result()
        finally:
            await _cancel(gone, sending)
            await self._events.aclose()

    async def _send_all(self, send: Send, now: Callable[[], float]) -> None:
        """Send all events, without a task or a timer for each of them."""
        async for chunk in self._events:
            await self._write(send, chunk, now)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, chunk: bytes, now: Callable[[], float]) -> None:
        async with self._writing:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._last_sent = now()


async def unless_gone(scope: Scope, receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` does; None, and `work` is cancelled, if the client goes before."""
    gone, task = asyncio.ensure_future(_disconnect(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        scope["state"]["notes"]["closed"] = True
        return None
    finally:
        await _cancel(gone, task)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel tasks, and wait until they have ended."""
    pending = [task for task in tasks if task is not None and not task.done()]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
