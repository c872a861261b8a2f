"""A look inside: the pool and its requests while they run, an end for one of them, and why a prompt was not cached.

Numbers only: texts of prompts, and tokens of others' prompts, are told with --log-prompts alone. With several keys
nobody sees texts, or what other clients call their requests.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from mlx_paged.outputs import EngineStats, Snapshot
from mlx_paged.server.body import Fields
from mlx_paged.server.errors import ApiError, bad_request
from mlx_paged.server.event_stream import EventStream, event, keepalive
from mlx_paged.server.matches import in_json
from mlx_paged.server.sampling_fields import salt_of
from mlx_paged.server.service import Service
from mlx_paged.server.tokens import read_prompt

_INTERVAL_S = 0.25  # from one snapshot to the next
_MAX_SHARE = 0.05  # of the engine's time that they may take
_POLL_S = 0.05
_MAX_TEXT = 200  # characters


class Debug:
    """The endpoints under /debug. All who look see the same snapshots, and without them none is made."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._making: asyncio.Task[None] | None = None
        self._snapshot: Snapshot | None = None
        self._of_unloaded = False
        self._counters: EngineStats | None = None  # as they were published when it was asked for
        self._made = 0.0
        self._next = 0.0  # when another may be made
        self._written: dict[bool, str] = {}  # the snapshot in JSON, by whether several keys share the server

    async def blocks(self, request: Request) -> ASGIApp:
        """Answer GET /debug/blocks: one snapshot, or a stream of them. Raises ApiError."""
        service, many_keys = self._service, "cache_salt" in request.scope["state"]
        service.require_running()
        if request.query_params.get("stream", "").lower() in ("1", "true"):
            return EventStream(self._events(many_keys), lambda: keepalive(1), service.options.keepalive_s)
        await self._renew()
        return Response(self._write(many_keys), media_type="application/json")

    async def _events(self, many_keys: bool) -> AsyncGenerator[bytes, None]:
        """Write a snapshot whenever something has changed. Ends with the server, and with its engine."""
        service, shown = self._service, None
        while service.failure is None and not service.is_draining:
            has_news = service.is_unloaded != self._of_unloaded or service.llm.snapshot != self._counters
            if shown is None or has_news:
                try:
                    await self._renew()
                except ApiError:
                    return
            if shown is not self._snapshot:
                shown = self._snapshot
                yield event(self._write(many_keys))
            await asyncio.sleep(_POLL_S)

    async def _renew(self) -> None:
        """Have a snapshot of this quarter of a second, or a little older where the pool is large. Raises ApiError."""
        service = self._service
        if service.is_unloaded and not self._of_unloaded:
            self._keep(Snapshot(service.llm.snapshot, [], [], 0, [], 0, 0.0))
        elif not service.is_unloaded and (self._of_unloaded or time.monotonic() >= self._next):
            self._making = self._making or asyncio.ensure_future(self._make())
            await asyncio.shield(self._making)  # whoever asked first may go

    async def _make(self) -> None:
        service = self._service
        try:
            self._counters = service.llm.snapshot
            self._keep(await service.prepare(service.llm.look()))
        finally:
            self._making = None

    def _keep(self, snapshot: Snapshot) -> None:
        self._snapshot, self._of_unloaded, self._written = snapshot, self._service.is_unloaded, {}
        self._made = time.time()
        self._next = time.monotonic() + max(_INTERVAL_S, snapshot.took_s / _MAX_SHARE)

    def _write(self, many_keys: bool) -> str:
        """Return the snapshot in JSON."""
        if many_keys not in self._written:
            self._written[many_keys] = json.dumps(self._describe(many_keys), separators=(",", ":"))
        return self._written[many_keys]

    def _describe(self, many_keys: bool) -> dict[str, Any]:
        service, snapshot = self._service, self._snapshot
        assert snapshot is not None
        tell_text = None if many_keys else service.tell_text
        requests = [vars(each) | {"request_id": None if many_keys else each.client_id} for each in snapshot.requests]
        prefixes = [dict(vars(each)) for each in snapshot.prefixes]
        for entry in (*requests, *prefixes):
            first_tokens = entry.pop("first_tokens")
            entry.pop("client_id", None)
            if tell_text is not None:
                entry["text"] = tell_text(first_tokens)[:_MAX_TEXT]
        return vars(snapshot) | {
            "model": service.options.names[0],
            "time": self._made,
            "unloaded": self._of_unloaded,
            "page": {"log_prompts": tell_text is not None},
            "stats": asdict(snapshot.stats),
            "pools": [vars(pool) for pool in snapshot.pools],
            "requests": requests,
            "prefixes": prefixes,
        }

    async def abort(self, service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
        """Answer POST /debug/abort: end a request by its number. Raises ApiError."""
        fields = Fields(body)
        number = fields.take("id", int)
        if number is None:
            raise bad_request("id is missing: give the number of a request", param="id")
        return JSONResponse({"aborted": await service.abort(number, state.get("cache_salt"))})

    async def match(self, service: Service, body: dict[str, Any], state: dict[str, Any]) -> ASGIApp:
        """Answer POST /debug/prefix: how much of a prompt is cached, and why no more. Raises ApiError."""
        fields = Fields(body)
        salt = salt_of(fields.take("cache_salt", str), state.get("cache_salt"))
        token_ids = await read_prompt(service, fields)
        found = await service.prepare(service.llm.match_prefix(token_ids, salt))
        return JSONResponse(in_json(found, service.tell_text))

    def matches(self, request: Request) -> Response:
        """Answer GET /debug/prefix: the same of the last requests, newest first, from the first such question on."""
        service = self._service
        newest = service.matches.newest(request.scope["state"].get("cache_salt"))
        return JSONResponse({"requests": [{"request_id": n} | in_json(m, service.tell_text) for n, m in newest]})
