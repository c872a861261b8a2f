"""A look inside: the pool and its requests while they run, an end for one of them, and why a prompt was not cached.

Numbers only: text of prompts, and tokens of other prompts, are told with --log-prompts alone, and with several keys to
nobody, as are the names that clients give to requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from mlx_paged.outputs import EngineStats, Snapshot
from mlx_paged.server.body import Fields
from mlx_paged.server.errors import ApiError
from mlx_paged.server.event_stream import EventStream, event
from mlx_paged.server.matches import in_json
from mlx_paged.server.service import Service
from mlx_paged.server.tokens import read_prompt

_INTERVAL_S = 0.25
_MAX_SHARE = 0.05  # of the engine's time that snapshots may take
_MAX_TEXT = 200  # characters


class Debug:
    """The endpoints under /debug. All who look at once see the same snapshots."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._making: asyncio.Task[Snapshot] | None = None
        self._made = 0.0  # when the last snapshot was there
        self._last: Snapshot | None = None

    async def blocks(self, request: HttpRequest) -> ASGIApp:
        """Answer GET /debug/blocks: one snapshot, or a stream of them. Raises ApiError."""
        private = "cache_salt" in request.scope["state"]
        self._require_running()
        if request.query_params.get("stream") in (None, "", "0"):
            return JSONResponse(await self._look(private))
        return EventStream(self._events(private), keepalive_s=self._service.options.keepalive_s)

    async def _events(self, private: bool) -> AsyncGenerator[bytes, None]:
        """Snapshots, as long as there is something new to see."""
        shown: EngineStats | None = None
        was_unloaded = False
        while self._service.failure is None and not self._service.is_draining:
            service = self._service
            if service.is_unloaded != was_unloaded or (not service.is_unloaded and service.llm.snapshot != shown):
                was_unloaded, shown = service.is_unloaded, service.llm.snapshot
                try:
                    yield event(await self._look(private))
                except ApiError:
                    return
            await asyncio.sleep(_INTERVAL_S)

    async def _look(self, private: bool) -> dict[str, Any]:
        """Describe the server in JSON's terms. private: tell nobody's names or texts."""
        service = self._service
        tell_text = None if private else service.tell_text
        about = {
            "model": service.options.names[0],
            "time": time.time(),
            "unloaded": service.is_unloaded,
            "page": {"log_prompts": tell_text is not None},
        }
        if service.is_unloaded:
            nothing: dict[str, Any] = {"pools": [], "requests": [], "prefixes": []}
            return (
                about
                | nothing
                | {"stats": asdict(service.llm.snapshot), "num_more_requests": 0, "num_more_prefixes": 0, "took_s": 0.0}
            )
        snapshot = await self._snapshot()
        requests = [
            vars(each) | ({"request_id": None} if private else {"request_id": each.client_id})
            for each in snapshot.requests
        ]
        prefixes = [dict(vars(each)) for each in snapshot.prefixes]
        for entry in (*requests, *prefixes):
            first_tokens = entry.pop("first_tokens")
            entry.pop("client_id", None)
            if tell_text is not None:
                entry["text"] = tell_text(first_tokens)[:_MAX_TEXT]
        return about | {
            "stats": asdict(snapshot.stats),
            "pools": [vars(pool) for pool in snapshot.pools],
            "requests": requests,
            "num_more_requests": snapshot.num_more_requests,
            "prefixes": prefixes,
            "num_more_prefixes": snapshot.num_more_prefixes,
            "took_s": snapshot.took_s,
        }

    async def _snapshot(self) -> Snapshot:
        """Return the snapshot of this quarter of a second; of a large pool they are rarer."""
        pause = _INTERVAL_S if self._last is None else max(_INTERVAL_S, self._last.took_s / _MAX_SHARE)
        if self._last is None or time.monotonic() >= self._made + pause:
            self._making = self._making or asyncio.ensure_future(self._make())
            await asyncio.shield(self._making)
        assert self._last is not None
        return self._last

    async def _make(self) -> Snapshot:
        try:
            self._last = await self._service.prepare(self._service.llm.look())
            self._made = time.monotonic()
            return self._last
        finally:
            self._making = None

    def _require_running(self) -> None:
        if self._service.is_draining:
            raise ApiError(503, "the server is shutting down", retry_after=10)
        if self._service.failure is not None:
            raise ApiError(503, "the engine has ended", retry_after=30)

    async def abort(self, service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
        """Answer POST /debug/abort: end a request by its number. Raises ApiError."""
        fields = Fields(body)
        number = fields.take("id", int)
        if number is None:
            raise fields.error("id", "must be the number of a request")
        return JSONResponse({"aborted": await service.abort(number, state.get("cache_salt"))})

    async def match(self, service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
        """Answer POST /debug/prefix: how much of a prompt is cached, and why no more. Raises ApiError."""
        fields = Fields(body)
        salt = fields.take("cache_salt", str)
        if (of_key := state.get("cache_salt")) is not None:
            salt = f"{of_key}:{salt or ''}"
        token_ids = await read_prompt(service, fields)
        found = await service.prepare(service.llm.match_prefix(token_ids, salt))
        return JSONResponse(in_json(found, service.tell_text))

    def matches(self, request: HttpRequest) -> Response:
        """Answer GET /debug/prefix: the same of the last requests, newest first, of ten minutes after it was asked."""
        service = self._service
        newest = service.matches.newest(request.scope["state"].get("cache_salt"))
        return JSONResponse({"requests": [{"request_id": n} | in_json(m, service.tell_text) for n, m in newest]})
