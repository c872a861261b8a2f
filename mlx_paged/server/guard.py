"""Who may speak to the server, and what is noted of it: hosts, origins, keys, request ids, the access log.

Pure ASGI, since what wraps `receive` in a task of its own hides that a client has gone.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_paged.server.errors import ApiError

LOG = logging.getLogger("mlx_paged.server")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/", "/health")  # need no key: they tell nothing of anybody
_SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_CLIENT_CLOSED = 499
_MAX_PATH = 200  # characters that the log has
_MAX_HEADERS = 100
_MAX_HEADER_BYTES = 64 << 10


@dataclass(frozen=True)
class Access:
    """Who may speak to the server."""

    hosts: Sequence[str] = LOOPBACK
    """Names that a request may have in its Host header: a web page of another name, which leads to this address all
    the same, gets nothing."""
    origins: Sequence[str] = ()
    """Web pages that may ask beside the server's own: "https://example.org", or "*" for all."""
    keys: Sequence[bytes] = ()
    """One of them must come with a request; none: everybody may ask."""


class Guard:
    """Lets through what `Access` allows, gives each request an id, and logs how it ended."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "notes": {}}
        origin = headers.get(b"origin")
        started, status, gone = time.monotonic(), _CLIENT_CLOSED, False

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                if origin is not None and self._allows_origin(origin, headers):
                    extra += [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        async def receive_noted() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        try:
            response = None
            try:
                self._check(scope, headers)
                if scope["method"] == "OPTIONS":
                    response = _preflight()
            except ApiError as error:
                response = error.response(scope["path"], request_id)
            await (response or self._app)(scope, receive_noted, send_noted)
        finally:
            shown = _CLIENT_CLOSED if scope["state"]["notes"].pop("closed", False) else status
            notes = "".join(f" {name}={value}" for name, value in scope["state"]["notes"].items())
            seconds = time.monotonic() - started
            path = scope["path"][:_MAX_PATH].encode("unicode_escape").decode()  # a line of the log stays one
            LOG.info("%s %s %d %.3fs id=%s%s", scope["method"], path, shown, seconds, request_id, notes)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        num_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > _MAX_HEADERS or num_bytes > _MAX_HEADER_BYTES:
            raise ApiError(431, f"more than {_MAX_HEADERS} headers, or {_MAX_HEADER_BYTES} bytes of them, are not read")
        host = _name(headers.get(b"host", b""))
        if host not in self._access.hosts and "*" not in self._access.hosts:
            raise ApiError(403, f"this server does not answer to the host {host!r}; --allowed-host lets it")
        origin = headers.get(b"origin")
        if origin is not None and not self._allows_origin(origin, headers):
            raise ApiError(403, "this server does not answer pages of that origin; --cors-origin lets it")
        if scope["method"] == "OPTIONS" or not self._access.keys or scope["path"] in _OPEN:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = headers.get(b"x-api-key") or (token.strip() if scheme.lower() == b"bearer" else b"")
        found = [key for key in self._access.keys if hmac.compare_digest(key, given)]
        if not found:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        if len(self._access.keys) > 1:  # nobody learns from a cache hit what another has asked
            scope["state"]["cache_salt"] = hashlib.sha256(found[0]).hexdigest()

    def _allows_origin(self, origin: bytes, headers: dict[bytes, bytes]) -> bool:
        """Whether a page may ask: the server's own may, behind a proxy that encrypts as well."""
        scheme, _, host = origin.partition(b"://")
        is_own = scheme in (b"http", b"https") and host == headers.get(b"host")
        return is_own or "*" in self._access.origins or origin.decode("latin-1") in self._access.origins


def _name(host: bytes) -> str:
    """The name in a Host header, without port and brackets."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _preflight() -> ASGIApp:
    from starlette.responses import Response

    allowed = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "authorization, content-type, x-api-key, x-request-id, anthropic-version, "
        "anthropic-beta",
        "Access-Control-Max-Age": "600",
    }
    return Response(status_code=204, headers=allowed)
