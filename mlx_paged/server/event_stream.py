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

KEEPALIVE = b": keepalive\n\n"  # a comment, which clients skip


def event(data: Any, name: str | None = None) -> bytes:
    """Write one server-sent event: its data in JSON, and its name, if it has one."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + b"data: " + text.encode() + b"\n\n"


class EventStream:
    """A response of events, as they come. When its client goes, `events` is closed."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keepalive: Callable[[], bytes] = lambda: KEEPALIVE,
        keepalive_s: float = 10.0,
    ) -> None:
        """keepalive: makes what is sent whenever nothing else came for `keepalive_s` seconds."""
        self._events = events
        self._keepalive = keepalive
        self._keepalive_s = keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as ASGI has it."""
        gone = asyncio.ensure_future(_disconnect(receive))
        coming: asyncio.Future[bytes] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events))
                pending: set[asyncio.Future[Any]] = {gone, coming}
                await asyncio.wait(pending, timeout=self._keepalive_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    scope["state"]["notes"]["closed"] = True
                    return
                if not coming.done():
                    chunk = self._keepalive()
                else:
                    try:
                        chunk, coming = coming.result(), None
                    except StopAsyncIteration:
                        break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _cancel(gone, coming)
            await self._events.aclose()


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
