"""The server's paths: which endpoint answers what, and what becomes of an error."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_paged.server.body import ClientDisconnected, read_object
from mlx_paged.server.chat import chat_completions
from mlx_paged.server.completions import completions
from mlx_paged.server.debug import Debug
from mlx_paged.server.errors import ApiError
from mlx_paged.server.event_stream import unless_gone
from mlx_paged.server.guard import Access, Guard
from mlx_paged.server.messages import count_tokens, messages
from mlx_paged.server.page import Page
from mlx_paged.server.responses import responses
from mlx_paged.server.service import Service
from mlx_paged.server.tokens import detokenize, tokenize

LOG = logging.getLogger("mlx_paged.server")

Answer = Callable[[Service, dict[str, Any], dict[str, Any]], Coroutine[Any, Any, ASGIApp]]


class Post:
    """An endpoint that takes a JSON object. Its work ends when its client goes."""

    def __init__(self, service: Service, answer: Answer) -> None:
        self._service = service
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI has it."""
        service = self._service
        service.num_clients += 1
        service.metrics.clients.set(service.num_clients)
        try:
            await self._respond(scope, receive, send)
        finally:
            service.num_clients -= 1
            service.metrics.clients.set(service.num_clients)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        options, state = self._service.options, scope["state"]
        try:
            body = await read_object(scope, receive, options.max_body, options.body_timeout_s)
            if options.log_prompts:
                LOG.info("id=%s asks %s", state["request_id"], json.dumps(body, ensure_ascii=False))
            response = await unless_gone(scope, receive, self._answer(self._service, body, state))
        except ClientDisconnected:
            state["notes"]["closed"] = True
            return
        except asyncio.CancelledError:
            if not self._service.is_draining:
                raise
            return  # its body did not come before the end
        except Exception as error:
            response = refuse(error, scope)
            self._service.metrics.refused(response.status_code)
        if response is not None:
            await response(scope, receive, send)


def refuse(error: Exception, scope: Scope) -> Response:
    """The response to an error, whose text goes to the log alone if nobody has foreseen it."""
    if isinstance(error, ExceptionGroup):  # of several prompts
        error = error.exceptions[0]
    if not isinstance(error, ApiError):
        LOG.exception("an answer failed", exc_info=error)
        error = ApiError(500, "the server could not answer this request")
    return error.response(scope["path"], scope["state"]["request_id"])


def make_app(service: Service, access: Access) -> Guard:
    """Make the ASGI application that serves a model."""
    options = service.options
    page = Page(f"mlx-paged serves {options.names[0]} at /v1\n")

    def health(request: Request) -> Response:
        status = "draining" if service.is_draining else "ok" if service.failure is None else "engine ended"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    def model_card(name: str) -> dict[str, Any]:
        most = service.llm.max_model_len
        card = {"id": name, "object": "model", "created": service.created, "owned_by": "mlx-paged"}
        created = datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")
        anthropics = {"type": "model", "display_name": name, "created_at": created, "lifecycle": "active"}
        return card | anthropics | {"max_model_len": most, "max_input_tokens": most, "max_tokens": most}

    def models(request: Request) -> Response:
        cards = [model_card(name) for name in options.names]
        page = {"has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}  # as Anthropic's clients ask
        return JSONResponse({"object": "list", "data": cards} | page)

    def model(request: Request) -> Response:
        try:
            return JSONResponse(model_card(service.require_model(request.path_params["name"])))
        except ApiError as error:
            return refuse(error, request.scope)

    def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    def not_found(request: Request, error: Exception) -> Response:
        path = request.url.path
        hint = "; give clients a base URL with one /v1" if path.startswith("/v1/v1") else ""
        return refuse(ApiError(404, f"there is nothing at {path}{hint}"), request.scope)

    def wrong_method(request: Request, error: Exception) -> Response:
        return refuse(ApiError(405, f"{request.url.path} does not take {request.method}"), request.scope)

    def failed(request: Request, error: Exception) -> Response:
        return refuse(error, request.scope)

    debug = Debug(service)
    posts: dict[str, Answer] = {
        "/v1/chat/completions": chat_completions,
        "/v1/completions": completions,
        "/v1/responses": responses,
        "/v1/messages": messages,
        "/v1/messages/count_tokens": count_tokens,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
        "/debug/abort": debug.abort,
        "/debug/prefix": debug.match,
    }
    routes = [Route(path, Post(service, answer), methods=["POST"]) for path, answer in posts.items()]
    routes += [
        Route("/", page.respond),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/metrics", metrics),
        Route("/debug/blocks", debug.blocks),
        Route("/debug/prefix", debug.matches, methods=["GET"]),
    ]

    app = Starlette(routes=routes, exception_handlers={404: not_found, 405: wrong_method, ApiError: failed})
    app.router.redirect_slashes = False
    return Guard(app, access)
