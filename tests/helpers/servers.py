"""A server of the scripted model on a port of the loopback, and what tests ask it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.engine_thread import Inbox
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.server.app import make_app
from mlx_paged.server.guard import Access
from mlx_paged.server.lifetime import configure
from mlx_paged.server.service import ServerOptions, Service


@contextmanager
def running_server(llm: AsyncLLM, access: Access | None = None, **options: Any) -> Iterator[uvicorn.Server]:
    """Serve a model, which stays open, in a thread. Yields what serves it."""
    served = ServerOptions(**{"names": ["scripted"], "drain_timeout_s": 0, **options})
    config = configure(make_app(Service(llm, served), access or Access()))
    config.port, config.timeout_graceful_shutdown = 0, 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join(20)


def url_of(server: uvicorn.Server) -> str:
    """The address that a server listens at."""
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@contextmanager
def serving(llm: AsyncLLM, access: Access | None = None, **options: Any) -> Iterator[str]:
    """Serve a model, which stays open. Yields the server's address."""
    with running_server(llm, access, **options) as server:
        yield url_of(server)


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def post(url: str, body: Any, **more: Any) -> httpx.Response:
    """POST a JSON object."""
    return httpx.post(url, json=body, timeout=30, **more)


def events_of(url: str, body: Any) -> Iterator[dict[str, Any]]:
    """Ask for a stream whose events have names. Yields their data, whose type is the name."""
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=30) as response:
        lines = response.iter_lines()
        for line in lines:
            assert line.startswith("event: "), line
            data = json.loads(next(lines).removeprefix("data: "))
            assert next(lines) == "" and data["type"] == line.removeprefix("event: ")
            yield data


@contextmanager
def engine_broken() -> Iterator[None]:
    """Let every step fail."""

    def broken(self: ModelRunner, *arguments: Any) -> Any:
        raise RuntimeError("the device is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "run", broken)
        yield


@contextmanager
def engine_held(llm: AsyncLLM) -> Iterator[threading.Event]:
    """Keep the engine's thread from its next step. Yields what lets it go on once it is set."""
    go_on = threading.Event()

    def wait(_: Any) -> None:
        go_on.wait(5)

    async def send() -> None:
        llm._thread.send(Inbox(), wait)

    asyncio.run(send())
    try:
        yield go_on
    finally:
        go_on.set()


def prompt_of(llm: AsyncLLM, ask: Callable[[], httpx.Response]) -> tuple[str, Any]:
    """Ask for something. Returns what its conversation was written as, and the answer."""
    prompts: list[list[int]] = []
    encode = AsyncLLM.encode_chat

    async def noted(self: AsyncLLM, *arguments: Any, **options: Any) -> list[int]:
        prompts.append(await encode(self, *arguments, **options))
        return prompts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncLLM, "encode_chat", noted)
        answer = ask()
    assert answer.status_code == 200, answer.text
    return str(llm.tokenizer.decode(prompts[-1])), answer.json()
