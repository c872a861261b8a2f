"""A model being served: its names, its limits, and the way from a request to the engine's outputs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.errors import PromptTooLong, QueueFull
from mlx_paged.outputs import RequestOutput
from mlx_paged.request import Request
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.server.conversation import Messages, variants
from mlx_paged.server.errors import ApiError, PromptRefused, bad_request
from mlx_paged.server.event_stream import EventStream
from mlx_paged.server.matches import Matches, is_of_key
from mlx_paged.server.metrics import Metrics
from mlx_paged.server.sampling_fields import refusal

LOG = logging.getLogger("mlx_paged.server")

T = TypeVar("T")


@dataclass
class ServerOptions:
    """What the server does beside its engine."""

    names: list[str]
    """Names of the model; the first one is its id."""
    default_max_tokens: int | None = None
    """Of an answer whose client does not say; None: what fits."""
    max_thinking_tokens: int | None = None
    """Most tokens of thinking in an answer; None: any number, unless its client says."""
    max_body: int = 32 << 20
    """Bytes of a request."""
    body_timeout_s: float = 30.0
    """Seconds in which all of a body must have come."""
    drain_timeout_s: float = 30.0
    """Seconds that running requests get to end at shutdown."""
    keepalive_s: float = 10.0
    """Seconds of silence in a stream after which something is sent."""
    idle_unload_s: float | None = None
    """Seconds without a request after which the model is unloaded; None: never."""
    log_prompts: bool = False
    """Whether what clients write may be logged."""
    log_matches: bool = False
    """Whether to log of each request what the cache had of its prompt."""


@dataclass
class Service:
    """What the endpoints share."""

    llm: AsyncLLM
    options: ServerOptions
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    load: Callable[[], AsyncLLM] | None = None
    """Loads the model again after it was unloaded."""
    num_clients: int = 0
    """Clients that are being answered."""
    is_unloaded: bool = False
    metrics: Metrics = field(init=False)
    seen_unknown: set[str] = field(default_factory=set)
    """Names of fields that clients send and nobody reads: each is logged once."""
    seen_omitted: set[str] = field(default_factory=set)
    """Types of what tools or other models have put into conversations and nobody reads: each is logged once."""

    def __post_init__(self) -> None:
        self.metrics = Metrics(lambda: self.llm.snapshot, self.options.names[0])
        self._last_used = time.monotonic()
        self.matches = Matches(log=self.options.log_matches)
        self._loading: asyncio.Task[None] | None = None
        self._running: set[Request] = set()
        self._aborted: set[Request] = set()

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's TokenizerWrapper, as `AsyncLLM.tokenizer`."""
        return self.llm.tokenizer

    @property
    def tell_text(self) -> Callable[[Sequence[int]], str] | None:
        """Turns tokens of prompts into text for the log and whoever looks; None where that may not be told."""
        return self.tokenizer.decode if self.options.log_prompts else None

    def require_model(self, name: str | None) -> str:
        """Return the name that an answer bears. Raises ApiError for a model that is not served."""
        if name is not None and name not in self.options.names:
            served = ", ".join(self.options.names)
            raise ApiError(404, f"the model {name!r} is not served here; there is: {served}", param="model",
                           code="model_not_found")  # fmt: skip
        return name or self.options.names[0]

    def note_unknown(self, names: set[str]) -> None:
        """Log fields that are not read, each name once."""
        for name in sorted(islice(names - self.seen_unknown, 10)):
            if len(self.seen_unknown) < 1000:
                self.seen_unknown.add(name)
                LOG.info("the field %.60r of a request is not known here, and is not read", name)

    def note_omitted(self, kind: str) -> None:
        """Log that conversations have parts that are not read, each kind once."""
        if kind not in self.seen_omitted and len(self.seen_omitted) < 100:
            self.seen_omitted.add(kind)
            LOG.warning("a conversation has parts of type %.60r: they are named in the text, and not read", kind)

    async def prepare(self, work: Awaitable[T], prompt: str | None = None) -> T:
        """Await what templates, tokenisers or grammars make of a request. Raises ApiError for what they refuse.

        prompt: as for `refusal`.
        """
        try:
            return await work
        except PromptTooLong as error:
            raise PromptRefused(str(error), error.num_tokens, error.most, prompt) from None
        except (ValueError, TypeError) as error:
            raise refusal(error, prompt=prompt) from None
        except ImportError as error:
            raise bad_request(str(error)) from None
        except RuntimeError as error:
            LOG.error("the engine refuses: %s", error)
            raise _engine_ended() from None

    @property
    def failure(self) -> str | None:
        """Why the engine has ended; None while it runs, or rests."""
        return None if self.is_unloaded else self.llm.failure

    def require_running(self) -> None:
        """Raise ApiError while no new request is taken."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", retry_after=10)
        if self.failure is not None:
            raise _engine_ended()

    async def become_ready(self) -> None:
        """Load the model if it was unloaded. Raises ApiError while no new request is taken."""
        self.require_running()
        if self.is_unloaded:
            self._loading = self._loading or asyncio.ensure_future(self._load())
            await asyncio.shield(self._loading)  # who waits may go; the model is loaded for the next one

    async def _load(self) -> None:
        assert self.load is not None
        try:
            LOG.info("loading the model again")
            self.llm = await asyncio.to_thread(self.load)
            self.is_unloaded = False
        except (ValueError, OSError) as error:
            LOG.error("the model can't be loaded again: %s", error)
            raise ApiError(503, "the model can't be loaded again", retry_after=30) from None
        finally:
            self._loading = None

    async def unload_if_idle(self) -> None:
        """Give back the model's memory if nobody has asked for anything for some time."""
        now, idle = time.monotonic(), self.options.idle_unload_s
        if self.num_clients or self.llm.num_requests:
            self._last_used = now
        elif idle is not None and now - self._last_used >= idle and not self.is_unloaded and not self.is_draining:
            LOG.info("unloading the model: nobody has asked for %g seconds", idle)
            self.is_unloaded = True
            await self.llm.aclose()

    async def prepare_chat(
        self,
        messages: Messages,
        params: SamplingParams,
        *,
        tools: Sequence[dict[str, Any]] = (),
        template: dict[str, Any] | None = None,
        stream: bool,
        came_in: str = "messages",
    ) -> Request:
        """Make a conversation's request. template: arguments of the chat template. Raises ApiError."""
        token_ids = await self.encode_chat(messages, tools, template or {}, came_in)
        return await self.make_request(token_ids, params, stream=stream, came_in=came_in)

    async def make_request(
        self, prompt: str | list[int], params: SamplingParams, *, stream: bool, came_in: str = "prompt"
    ) -> Request:
        """Make a prompt's request. came_in: the field that the prompt came in. Raises ApiError."""
        await self.become_ready()
        return await self.prepare(self.llm.make_request(prompt, params, stream=stream, clamp_max_tokens=True), came_in)

    async def encode_chat(
        self,
        messages: Messages,
        tools: Sequence[dict[str, Any]],
        template: dict[str, Any],
        came_in: str = "messages",
    ) -> list[int]:
        """Write a conversation as the chat template has it, or as near as it comes. Raises ApiError."""
        await self.become_ready()
        first_error: ApiError | None = None
        for variant in variants(messages):
            encoding = self.llm.encode_chat(variant, tools=tools or None, chat_template_kwargs=template)
            try:
                return await self.prepare(encoding, came_in)
            except ApiError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def require_room(self, count: int = 1) -> None:
        """Raise ApiError if the requests of a number of prompts can't be taken now, or ever."""
        try:
            self.llm.require_room(count)
        except ValueError as error:
            raise bad_request(f"prompt has {count} prompts in it: {error}", param="prompt") from None
        except QueueFull as error:
            raise _too_many(error) from None

    def stream(self, events: AsyncGenerator[bytes, None], keepalive: Callable[[], bytes]) -> EventStream:
        """Make a response of events. Raises ApiError if too many requests wait: once it has begun, that comes late."""
        self.require_room()
        return EventStream(events, keepalive, self.options.keepalive_s)

    async def run(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run a request. Yields its outputs. Raises ApiError if it is refused, or ends by an error."""
        num_tokens = 0
        self._running.add(request)
        try:
            async with aclosing(self.llm.run(request, match_prefix=self.matches.wanted)) as outputs:
                async for output in outputs:
                    self.matches.note(request, output.num_cached_tokens, self.tell_text)
                    num_tokens += output.num_output_tokens
                    if output.finished:
                        self.metrics.finished(output, num_tokens)
                    for sample in output.outputs:
                        if sample.finish_reason == "error" and request.has_dead_end:
                            raise bad_request(str(sample.stop_reason))
                        if sample.finish_reason == "error":
                            LOG.error("request %d ended by an error: %s", output.request_id, sample.stop_reason)
                            raise ApiError(500, "the engine could not complete this request")
                        if sample.finish_reason == "abort" and request in self._aborted:
                            raise ApiError(410, "this request was aborted", code="aborted")  # clients don't try again
                        if sample.finish_reason == "abort":
                            raise ApiError(503, "the server is shutting down", retry_after=10)
                    yield output
        except QueueFull as error:
            raise _too_many(error) from None
        except RuntimeError as error:
            LOG.error("the engine refuses: %s", error)
            raise _engine_ended() from None
        finally:
            self._running.discard(request)
            self._aborted.discard(request)

    async def abort(self, number: int, salt: str | None) -> bool:
        """End a request by its number in the engine. Returns whether it ran. salt: its key's, if there are several."""
        asked = {request.request_id: request for request in self._running}.get(number)
        if asked is None or number < 0 or not is_of_key(asked.params.cache_salt, salt):
            return False
        self._aborted.add(asked)
        return await self.prepare(self.llm.abort(number))

    async def drain(self) -> None:
        """Take no new requests, and wait until the running ones have ended, or time is up."""
        self.is_draining = True
        end = time.monotonic() + self.options.drain_timeout_s
        while self.llm.num_requests and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await self.llm.aclose()


def _too_many(error: QueueFull) -> ApiError:
    return ApiError(429, str(error), code="queue_full", retry_after=1)


def _engine_ended() -> ApiError:
    return ApiError(503, "the engine has ended", retry_after=30)
