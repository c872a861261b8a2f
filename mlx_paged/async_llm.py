"""AsyncLLM: an LLM for asyncio programs. Its engine runs in a thread of its own, see `engine_thread`.

Templates, tokenising and grammars are worked out in other threads, so that no step waits for them.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast

from mlx_paged.engine.chat_template import Message, TemplateOptions
from mlx_paged.engine.detokenizer import DecodeStream
from mlx_paged.engine_thread import EngineThread, Inbox
from mlx_paged.errors import QueueFull
from mlx_paged.llm import LLM, Prompt
from mlx_paged.outputs import BeamSearchOutput, EngineStats, PrefixMatch, RequestOutput, Snapshot
from mlx_paged.request import Request
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

T = TypeVar("T")

_FORM_THREADS = 8


class AsyncLLM:
    """Serve a model with a paged KV cache to any number of tasks, in any number of event loops.

        async with AsyncLLM("qwen2") as llm:
            async for output in llm.chat([{"role": "user", "content": "Why is the sky blue?"}]):
                print(output.outputs[0].text, end="")

    Arguments and errors are those of `LLM`. The constructor returns once the model is loaded; within a running event
    loop, `await asyncio.to_thread(AsyncLLM, "qwen2")` leaves the loop free meanwhile.
    """

    def __init__(self, model: str | Path | None = None, **config: Any) -> None:
        self._start(lambda: LLM(model, **config))

    @classmethod
    def from_loader(cls, load: Callable[[], LLM]) -> "AsyncLLM":
        """Serve the LLM that `load` returns. `load` runs in the engine's thread and makes its arrays there."""
        llm = cls.__new__(cls)
        llm._start(load)
        return llm

    def _start(self, load: Callable[[], LLM]) -> None:
        self.max_waiting: int | None = None
        """How many requests may wait beside those that can run at once; None: any number."""
        self._running: set[Inbox] = set()
        # Who waits for a grammar takes none of the threads that prompts are tokenised in.
        self._forms = ThreadPoolExecutor(_FORM_THREADS, "mlx-paged form")
        self._thread = EngineThread(load)
        weakref.finalize(self, self._thread.request_stop).atexit = False  # at exit the thread closes itself
        self._thread.wait_until_loaded()
        self.tokenizer: Any = self._thread.tokenizer
        """mlx-lm's TokenizerWrapper, for looking things up; encode nothing with it, other threads do."""
        self.vocab_size: int = self._thread.vocab_size
        self.max_model_len: int = self._thread.max_model_len
        """The most tokens of prompt and output together."""
        self.sampling_defaults: dict[str, float] = self._thread.sampling_defaults
        """As `LLM.sampling_defaults`."""
        self.memory: str = self._thread.memory
        """As `LLM.describe_memory` says."""

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt piece by piece, batched with all that runs meanwhile.

        Returns an iterator of deltas, as `LLM.stream` does. The request begins with the first `__anext__`, which raises
        ValueError or TypeError for a bad request, and RuntimeError if the engine is closed or broke. It ends, and its
        blocks are freed, when its task is cancelled, when the iterator is closed, or when nobody holds it any more, as
        after a `break` out of `async for`.
        """
        return self._stream(lambda: self.make_request(prompt, params or SamplingParams(), stream=True))

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[TemplateOptions]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation through the model's chat template. Returns and raises as `generate` does.

        messages and options are those of `LLM.chat`.
        """

        async def make_request() -> Request:
            prompt = await self.encode_chat(messages, **options)
            return await self.make_request(prompt, params or SamplingParams(), stream=True)

        return self._stream(make_request)

    async def _stream(self, make_request: Callable[[], Awaitable[Request]]) -> AsyncGenerator[RequestOutput, None]:
        async with aclosing(self.run(await make_request())) as outputs:
            async for output in outputs:
                yield output

    async def beam_search(self, prompt: Prompt, params: BeamSearchParams | None = None) -> BeamSearchOutput:
        """Search the best hypotheses for one prompt. Raises as `generate` does. Cancelling it frees its blocks."""
        request = await self.make_request(prompt, params or BeamSearchParams())
        async with aclosing(self.run(request)) as outputs:
            return [output async for output in outputs][-1]

    async def encode_chat(self, messages: Sequence[Message], **options: Unpack[TemplateOptions]) -> list[int]:
        """Write a conversation as the model's chat template does. Returns its token ids; raises as the LLM's does."""
        return await self._prepare(lambda: self._thread.inputs.chat_template.encode(messages, **options))

    @property
    def knows_tools(self) -> bool:
        """Whether the model's chat template says anything about tool calls."""
        return self._thread.inputs.chat_template.knows_tools

    def decode_stream(self, skip_special_tokens: bool) -> DecodeStream:
        """Make what turns tokens into text as they come, as outputs have it. The model must have a tokenizer."""
        assert self._thread.inputs.detokenizer is not None
        return DecodeStream(self._thread.inputs.detokenizer, skip_special_tokens)

    async def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams,
        *,
        stream: bool = False,
        clamp_max_tokens: bool = False,
    ) -> Request:
        """Make a request for `run`. Raises ValueError or TypeError for a bad one.

        stream: its output comes piece by piece. clamp_max_tokens: where max_tokens is more than fits, take what fits.
        """
        make = self._thread.inputs.make_request
        threads = self._forms if isinstance(params, SamplingParams) and params.is_constrained else None
        return await self._prepare(
            lambda: make(prompt, params, stream=stream, clamp_max_tokens=clamp_max_tokens), threads
        )

    async def _prepare(self, work: Callable[[], T], threads: ThreadPoolExecutor | None = None) -> T:
        self._thread.require_running()
        try:
            working = asyncio.get_running_loop().run_in_executor(threads, work)
        except RuntimeError:  # the main thread has ended, after which no thread takes work
            return work()
        return await working

    async def run(self, request: Request, *, match_prefix: bool = False) -> AsyncGenerator[Any, None]:
        """Run a request that `make_request` made. Yields its outputs; closing the iterator frees its blocks.

        match_prefix: set `request.prefix_match` to what the cache has of its prompt as it comes.
        Raises QueueFull if too many requests wait, RuntimeError if the engine is closed or broke.
        """
        self.require_room()
        inbox = Inbox()
        self._running.add(inbox)
        finished = False
        try:
            self._thread.submit(inbox, request, match_prefix=match_prefix)
            while not finished:
                output = await inbox.take()
                finished = output.finished
                yield output
        finally:
            self._running.discard(inbox)
            if not finished:
                self._thread.abort(inbox)

    def require_room(self, count: int = 1) -> None:
        """Raise QueueFull if a number of requests are more than may run or wait beside those that do.

        Raises ValueError if they are more than may at any time.
        """
        if self.max_waiting is None:
            return
        running, most = self._thread.max_num_seqs, self._thread.max_num_seqs + self.max_waiting
        if count > most:
            raise ValueError(f"at most {most} can be taken at once, {running} to run and {self.max_waiting} to wait")
        if len(self._running) + count > most:
            more = "no" if len(self._running) >= most else f"at most {most - len(self._running)}"
            raise QueueFull(f"{len(self._running)} requests run or wait, and {more} more are taken")

    @property
    def num_requests(self) -> int:
        """How many requests run or wait."""
        return len(self._running)

    @property
    def snapshot(self) -> EngineStats:
        """The engine's counters as they were lately, at once and at no cost; `stats` waits for those of now."""
        return self._thread.snapshot

    def progress(self, request: Request) -> float | None:
        """The share of a request's prompt that was computed lately, from 0 to 1; None before it runs.

        It is known as `snapshot` is, and 1 from the first token on.
        """
        if request.metrics.first_token_time is not None:
            return 1.0
        num_computed = self._thread.num_computed.get(request.request_id)
        if num_computed is None:
            return None if request.metrics.first_scheduled_time is None else 0.0
        return min(1.0, num_computed / len(request.prompt_token_ids))

    @property
    def failure(self) -> str | None:
        """Why no request can be run any more; None while they can."""
        return self._thread.failure

    async def stats(self) -> EngineStats:
        """Read the engine's counters and the state of its block pool, after all that was asked of it before."""
        return await self._ask(lambda llm: llm.stats())

    async def look(self) -> Snapshot:
        """Describe the engine as it is between two steps: counters, pools, requests, prefixes."""
        snapshot = await self._ask(lambda llm: llm.engine.snapshot())
        snapshot.stats.blas = self.snapshot.blas
        return snapshot

    async def match_prefix(self, token_ids: list[int], salt: str | None = None) -> PrefixMatch:
        """Say how much of a prompt is cached, and where it differs from the cached prefix that is nearest to it."""
        return await self._ask(lambda llm: llm.engine.match_prefix(token_ids, salt))

    async def abort(self, request_id: int) -> bool:
        """End a request, whose iterator gets a last output with finish_reason "abort". Returns whether it ran."""
        inbox = Inbox()
        self._thread.abort_with_output(inbox, request_id)
        return bool(await inbox.take())

    async def _ask(self, question: Callable[[LLM], T]) -> T:
        """Return what the engine's thread answers between two steps, after all that was asked of it before."""
        inbox = Inbox()
        self._thread.send(inbox, lambda llm: inbox.put(question(llm)))
        return cast(T, await inbox.take())

    def close(self) -> None:
        """End the engine and release the model. Returns when that is done, after at most one step.

        Iterators that still run get a last output with finish_reason "abort" (a beam search one with `aborted`).
        Later requests raise RuntimeError. Safe to call twice and from any thread. At the end of the process this
        happens by itself.
        """
        self._thread.close()
        self._forms.shutdown(wait=False, cancel_futures=True)

    async def aclose(self) -> None:
        """Close it as `close` does, without blocking the event loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
