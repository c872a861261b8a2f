"""A server of the scripted model on a port of the loopback, and what tests ask it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.server.app import make_app
from mlx_paged.server.guard import Access
from mlx_paged.server.service import ServerOptions, Service


@contextmanager
def serving(llm: AsyncLLM, access: Access | None = None, **options: Any) -> Iterator[str]:
    """Serve a model, which stays open. Yields the server's address."""
    served = ServerOptions(**{"names": ["scripted"], "drain_timeout_s": 0, **options})
    app = make_app(Service(llm, served, llm.tokenizer), access or Access())
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def post(url: str, body: Any, **more: Any) -> httpx.Response:
    """POST a JSON object."""
    return httpx.post(url, json=body, timeout=30, **more)
