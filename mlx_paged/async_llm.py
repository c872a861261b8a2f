"""AsyncLLM: an LLM for asyncio programs. Its engine runs in a thread of its own.

MLX's arrays and streams belong to the thread that made them, so that thread alone loads the model, runs it and
releases it. It tokenises as well, since tokenizers don't bear two threads at a time. Callers send it letters through
a queue; outputs and errors come back into an inbox in the caller's event loop.
"""

import asyncio
import atexit
import contextlib
import gc
import queue
import threading
import traceback
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_paged.llm import LLM, Message, Prompt
from mlx_paged.outputs import BeamSearchOutput, EngineStats, Output, RequestOutput
from mlx_paged.request import Request
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams


class AsyncLLM:
    """Serve a model with a paged KV cache to any number of tasks, in any number of event loops.

        async with AsyncLLM("qwen2") as llm:
            async for output in llm.generate("Once upon a time"):
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
        self._thread = _EngineThread(load)
        weakref.finalize(self, self._thread.request_stop).atexit = False  # at exit the thread closes itself
        self._thread.wait_until_loaded()

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt piece by piece, batched with all that runs meanwhile.

        Returns an iterator of deltas, as `LLM.stream` does. The request begins with the first `__anext__`, which raises
        ValueError or TypeError for a bad request, and RuntimeError if the engine is closed or broke. It ends, and its
        blocks are freed, when its task is cancelled, when the iterator is closed, or when nobody holds it any more, as
        after a `break` out of `async for`.
        """
        return self._outputs(lambda llm: llm.engine.make_request(prompt, params or SamplingParams(), stream=True))

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation through the model's chat template. Returns and raises as `generate` does."""
        return self._outputs(
            lambda llm: llm.engine.make_request(llm.encode_chat(messages), params or SamplingParams(), stream=True)
        )

    async def beam_search(self, prompt: Prompt, params: BeamSearchParams | None = None) -> BeamSearchOutput:
        """Search the best hypotheses for one prompt. Raises as `generate` does. Cancelling it frees its blocks."""
        outputs = self._outputs(lambda llm: llm.engine.make_request(prompt, params or BeamSearchParams()))
        return [output async for output in outputs][-1]

    async def stats(self) -> EngineStats:
        """Read the engine's counters and the state of its block pool, after all that was asked of it before."""
        inbox = _Inbox()
        self._thread.send(inbox, lambda llm: inbox.put(llm.stats()))
        return await inbox.take()

    def close(self) -> None:
        """End the engine and release the model. Returns when that is done, after at most one step.

        Iterators that still run get a last output with finish_reason "abort" (a beam search one with `aborted`).
        Later requests raise RuntimeError. Safe to call twice and from any thread. At the end of the process this
        happens by itself.
        """
        self._thread.close()

    async def aclose(self) -> None:
        """Close it as `close` does, without blocking the event loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _outputs(self, make_request: Callable[[LLM], Request]) -> AsyncGenerator[Any, None]:
        inbox = _Inbox()
        self._thread.submit(inbox, make_request)
        try:
            while not (output := await inbox.take()).finished:
                yield output
            yield output
        finally:
            self._thread.abort(inbox)  # of a request that has ended there is nothing left to abort


class _Inbox:
    """Hold what the engine thread has for one caller: outputs, or the exception that ends its waiting."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self.request_id: int | None = None  # read and written by the engine's thread alone

    def put(self, item: Any) -> None:
        _put_all(self.loop, [(self, item)])

    async def take(self) -> Any:
        """Wait for the next output. Raises an exception that was put in."""
        item = await self.items.get()
        if isinstance(item, BaseException):
            raise item
        return item


Letter = tuple[_Inbox, Callable[[LLM], None]]


class _EngineThread:
    """Run an LLM in a thread, and take what other threads ask of it.

    Letters are put into a SimpleQueue because finalizers send them too, at any moment and in any thread.
    """

    def __init__(self, load: Callable[[], LLM]) -> None:
        self._letters: queue.SimpleQueue[Letter | None] = queue.SimpleQueue()  # None: end
        self._inboxes: dict[int, _Inbox] = {}  # of the requests that run
        self._load_error: BaseException | None = None
        self._reason = "this AsyncLLM is closed"  # what callers are told after the end
        self._details = ""
        self._ready = threading.Event()  # loaded, or ended before that
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(load,), name="mlx-paged engine", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    # -- for other threads --------------------------------------------------------------------------------------

    def wait_until_loaded(self) -> None:
        """Raise what loading the model raised."""
        self._ready.wait()
        error, self._load_error = self._load_error, None
        if error is not None:
            self.close()
            raise error

    def submit(self, inbox: _Inbox, make_request: Callable[[LLM], Request]) -> None:
        """Have a request made and run. Its outputs, or why it could not be made, come into the inbox."""

        def begin(llm: LLM) -> None:
            request = make_request(llm)
            inbox.request_id = llm.engine.submit(request)
            self._inboxes[inbox.request_id] = inbox

        self.send(inbox, begin)

    def abort(self, inbox: _Inbox) -> None:
        """End the inbox's request, if it runs."""

        def end(llm: LLM) -> None:
            if inbox.request_id in self._inboxes:
                del self._inboxes[inbox.request_id]
                llm.engine.abort(inbox.request_id)

        self.send(inbox, end)

    def send(self, inbox: _Inbox, action: Callable[[LLM], None]) -> None:
        """Have something done between two steps, after what was sent before."""
        self._letters.put((inbox, action))
        if self._ended:  # it may have come too late to be seen by the thread
            self._refuse_letters()

    def request_stop(self) -> None:
        self._letters.put(None)

    def close(self) -> None:
        self.request_stop()
        self._thread.join()
        atexit.unregister(self.close)

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self, load: Callable[[], LLM]) -> None:
        try:
            self._load_and_serve(load)
        except BaseException as error:
            if self._ready.is_set():
                self._reason = f"the engine of this AsyncLLM broke: {type(error).__name__}: {error}"
                self._details = _details(error)
            else:
                self._load_error = _without_frames(error)
        try:
            del load
            gc.collect()  # model and engine refer to each other; their arrays have to go before this thread does
            mx.synchronize()
            mx.clear_cache()
            mx.clear_streams()  # what MLX would do later, at the thread's very end, aborts a process that is ending too
        finally:
            self._ended = True
            self._ready.set()
            for inbox in self._inboxes.values():
                inbox.put(self._refusal())
            self._inboxes.clear()
            self._refuse_letters()

    def _load_and_serve(self, load: Callable[[], LLM]) -> None:
        llm = load()
        self._ready.set()
        while self._read_letters(llm):
            self._hand_out(llm, llm.engine.step())
        aborted = [llm.engine.abort(request_id) for request_id in list(self._inboxes)]
        self._hand_out(llm, list(filter(None, aborted)))

    def _read_letters(self, llm: LLM) -> bool:
        """Do what was asked for, sleeping while there is nothing to do. Returns False when the thread has to end."""
        while True:
            try:
                letter = self._letters.get(block=not llm.engine.has_unfinished())
            except queue.Empty:
                return True
            if letter is None:
                return False
            inbox, action = letter
            try:
                action(llm)
            except Exception as error:
                inbox.put(_without_frames(error))
            except BaseException:
                self._letters.put(letter)  # to be refused with the others
                raise

    def _hand_out(self, llm: LLM, outputs: Sequence[Output]) -> None:
        """Put outputs into their inboxes, waking each event loop once. The requests of a loop that is gone end."""
        by_loop = defaultdict(list)
        for output in outputs:
            if (inbox := self._inboxes.get(output.request_id)) is not None:
                by_loop[inbox.loop].append((inbox, output))
                if output.finished:
                    del self._inboxes[output.request_id]
        for loop, items in by_loop.items():
            if not _put_all(loop, items):
                for _, output in items:
                    if self._inboxes.pop(output.request_id, None) is not None:
                        llm.engine.abort(output.request_id)

    def _refuse_letters(self) -> None:
        """Answer all letters with why there is no engine any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (letter := self._letters.get(block=False)) is not None:
                    letter[0].put(self._refusal())

    def _refusal(self) -> RuntimeError:
        error = RuntimeError(self._reason)
        if self._details:
            error.add_note(self._details)
        return error


def _put_all(loop: asyncio.AbstractEventLoop, items: list[tuple[_Inbox, Any]]) -> bool:
    """Put things into inboxes of an event loop, from any thread. Returns False if the loop is closed."""

    def put() -> None:
        for inbox, item in items:
            inbox.items.put_nowait(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        return False
    return True


def _without_frames(error: BaseException) -> BaseException:
    """Drop the frames that an exception came through: in another thread they would keep the model alive."""
    if not isinstance(error, ValueError | TypeError | ImportError | OSError):  # those speak for themselves
        error.add_note(_details(error))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _details(error: BaseException) -> str:
    return "In the engine's thread:\n" + "".join(traceback.format_exception(error)).rstrip()
