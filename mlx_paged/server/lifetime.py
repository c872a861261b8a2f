"""From the first request to the last: the server's loop, its signals, its end."""

from __future__ import annotations

import asyncio
import enum
import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.server.app import make_app
from mlx_paged.server.guard import Access
from mlx_paged.server.service import ServerOptions, Service

LOG = logging.getLogger("mlx_paged.server")

_MAX_HEADER_BYTES = 64 << 10
_ONE_SIGNAL_S = 1.0


class Ending(enum.Enum):
    """How a server ended."""

    DRAINED = "its running requests had time to end"
    CUT = "a second signal ended it at once"
    BROKEN = "its engine broke"


class _Server(uvicorn.Server):
    """Goes on answering while it drains: that it does, and to come back later."""

    def __init__(self, config: uvicorn.Config, service: Service, when_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._when_ready = when_ready
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_to_end = 0.0  # by a signal, at this time of the monotonic clock
        self.end = Ending.DRAINED

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; end at once at the second.

        A service manager has each process of a unit get a SIGTERM, and one that runs ranks passes its own on to the
        first of them: two at a time are one.
        """
        since, self._asked_to_end = time.monotonic() - self._asked_to_end, time.monotonic()
        if sig == signal.SIGTERM and self._service.is_draining and since < _ONE_SIGNAL_S:
            return
        if self._loop is None or self._service.is_draining:
            self.end, self.should_exit, self.force_exit = Ending.CUT, True, True
            return
        self._service.is_draining = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            LOG.info("ending: %d requests are still running", self._service.llm.num_requests)
            await self._service.drain()
            self.should_exit = True

        self._ending = asyncio.ensure_future(drain())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._when_ready()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, or the engine, ends that."""
        self._loop = asyncio.get_running_loop()
        watching = asyncio.ensure_future(self._watch())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        """End when the engine does; unload a model that nobody asks."""
        while self._service.failure is None or self._service.is_draining:
            await asyncio.sleep(0.5)
            await self._service.unload_if_idle()
        LOG.error("%s", self._service.failure)
        self.end, self.should_exit = Ending.BROKEN, True


def configure(app: ASGIApp) -> uvicorn.Config:
    """Say how uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http="h11",  # whose limits are set here
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=2,
    )


def serve(
    llm: AsyncLLM,
    load: Callable[[], AsyncLLM],
    options: ServerOptions,
    access: Access,
    listener: socket.socket,
    when_ready: Callable[[], None],
) -> Ending:
    """Serve a model until a signal, or the end of its engine, ends that.

    load: loads it again, if it was unloaded. when_ready: called once the socket listens.
    """
    service = Service(llm, options, load=load)
    server = _Server(configure(make_app(service, access)), service, when_ready)
    try:
        server.run([listener])
    finally:
        service.llm.close()
    return server.end
