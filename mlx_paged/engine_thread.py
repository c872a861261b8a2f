"""The thread that an AsyncLLM's engine runs in, and the letters and inboxes by which others speak with it.

MLX's arrays and streams belong to the thread that made them, so that thread alone loads the model, runs it and
releases it. Callers send it letters through a queue; outputs and errors come back into an inbox in the caller's event
loop.
"""

import asyncio
import atexit
import gc
import queue
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_paged.engine.input_processor import InputProcessor
from mlx_paged.engine.own_process import OwnProcess
from mlx_paged.llm import LLM
from mlx_paged.outputs import EngineStats, Output, RequestOutput
from mlx_paged.request import Request

_SNAPSHOT_S = 0.25


class Inbox:
    """Hold what the engine thread has for one caller: one output, or the exception that ends its waiting.

    Deltas that nobody has taken yet become one, so that a slow reader has no more waiting for it than its answer.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.request_id: int | None = None  # read and written by the engine's thread alone
        self._item: Any = None
        self._error: BaseException | None = None
        self._arrived = asyncio.Event()

    def put(self, item: Any) -> None:
        """Put something in, from any thread."""
        _put_all(self.loop, [(self, item)])

    def add(self, item: Any) -> None:
        """Put something in, in the event loop."""
        if isinstance(item, BaseException):
            self._error = item
        else:
            self._item = item if self._item is None else _joined(self._item, item)
        self._arrived.set()

    async def take(self) -> Any:
        """Wait for the next output. Raises an exception that was put in, once what came before it is taken."""
        await self._arrived.wait()
        item, self._item = self._item, None
        if item is None:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._arrived.clear()
        return item


def _joined(first: RequestOutput, then: RequestOutput) -> RequestOutput:
    """Two deltas of a stream, one after the other, as one."""
    samples = {sample.index: sample for sample in first.outputs}
    for sample in then.outputs:
        if (before := samples.get(sample.index)) is not None:
            sample.text = before.text + sample.text
            sample.token_ids = before.token_ids + sample.token_ids
            if sample.logprobs is not None:
                sample.logprobs = (before.logprobs or []) + sample.logprobs
    return then


Letter = tuple[Inbox, Callable[[LLM], None]]


class EngineThread:
    """Run an LLM in a thread, and take what other threads ask of it.

    Letters are put into a SimpleQueue because finalizers send them too, at any moment and in any thread.
    """

    inputs: InputProcessor
    """Makes requests, in any thread. Holds nothing of MLX."""
    max_num_seqs: int
    """Sequences that run at once."""
    snapshot: EngineStats
    """The engine's counters, a quarter of a second old at most while it works, and of now while it does not."""

    def __init__(self, load: Callable[[], LLM]) -> None:
        self._letters: queue.SimpleQueue[Letter | None] = queue.SimpleQueue()  # None: end
        self._inboxes: dict[int, Inbox] = {}  # of the requests that run
        self._load_error: BaseException | None = None
        self._reason = "this AsyncLLM is closed"  # what callers are told after the end
        self._details = ""
        self._ready = threading.Event()  # loaded, or ended before that
        self._ended = False
        self._process = OwnProcess()
        self._thread = threading.Thread(target=self._run, args=(load,), name="mlx-paged engine", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    # -- for other threads --------------------------------------------------------------------------------------

    def wait_until_loaded(self) -> None:
        """Wait for the model. Raises what loading it raised."""
        self._ready.wait()
        error, self._load_error = self._load_error, None
        if error is not None:
            self.close()
            raise error

    @property
    def failure(self) -> str | None:
        """Why there is no engine any more; None while there is."""
        return self._reason if self._ended else None

    def require_running(self) -> None:
        """Raise RuntimeError in a fork, and if there is no engine any more."""
        self._process.require_own()
        if self._ended:
            raise self._refusal()

    def submit(self, inbox: Inbox, request: Request) -> None:
        """Have a request run. Its outputs come into the inbox."""

        def begin(llm: LLM) -> None:
            if request.wants_prefix_match:  # while its own blocks are not in the tree
                salt, limit = request.params.cache_salt, request.max_cached_tokens
                request.prefix_match = llm.engine.match_prefix(request.prompt_token_ids, salt, limit)
            inbox.request_id = llm.engine.submit(request)
            self._inboxes[inbox.request_id] = inbox

        self.send(inbox, begin)

    def abort_with_output(self, inbox: Inbox, request_id: int) -> None:
        """End a request. Its own inbox gets its last output, and `inbox` whether it ran."""

        def end(llm: LLM) -> None:
            runs = request_id in self._inboxes
            if runs and (output := llm.engine.abort(request_id)) is not None:
                self._hand_out(llm, [output])
            inbox.put(runs)

        self.send(inbox, end)

    def abort(self, inbox: Inbox) -> None:
        """End the inbox's request, if it runs."""

        def end(llm: LLM) -> None:
            if inbox.request_id in self._inboxes:
                del self._inboxes[inbox.request_id]
                llm.engine.abort(inbox.request_id)

        if not self._process.is_fork:  # where an iterator that was inherited is closed
            self.send(inbox, end)

    def send(self, inbox: Inbox, action: Callable[[LLM], None]) -> None:
        """Have something done between two steps, after what was sent before. Raises RuntimeError in a fork."""
        self._process.require_own()
        self._letters.put((inbox, action))
        if self._ended:  # it may have come too late to be seen by the thread
            self._refuse_letters()

    def request_stop(self) -> None:
        """Let the thread end when it can."""
        self._letters.put(None)

    def close(self) -> None:
        """End the thread and wait for that."""
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
        self.inputs, self.tokenizer, self.vocab_size = llm.engine.input_processor, llm.tokenizer, llm.vocab_size
        self.max_num_seqs, self.sampling_defaults = llm.engine.config.max_num_seqs, llm.sampling_defaults
        self.memory = llm.describe_memory()
        self._publish(llm)
        room = self.snapshot.num_blocks * self.snapshot.block_size
        self.max_model_len = min(room, llm.engine.max_model_len or room)
        self._ready.set()
        while self._read_letters(llm):
            self._hand_out(llm, llm.engine.step())
            if time.monotonic() > self._published + _SNAPSHOT_S:
                self._publish(llm)
        aborted = [llm.engine.abort(request_id) for request_id in list(self._inboxes)]
        self._hand_out(llm, list(filter(None, aborted)))

    def _publish(self, llm: LLM) -> None:
        self.snapshot, self._published = llm.stats(), time.monotonic()

    def _read_letters(self, llm: LLM) -> bool:
        """Do what was asked for, sleeping while there is nothing to do. Returns False when the thread has to end."""
        while True:
            is_idle = not llm.engine.has_unfinished()
            if is_idle and self._letters.empty():
                self._publish(llm)  # no step may follow the abort of what ran
            try:
                letter = self._letters.get(block=is_idle)
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
        while True:
            try:
                letter = self._letters.get(block=False)
            except queue.Empty:
                return
            if letter is not None:
                letter[0].put(self._refusal())

    def _refusal(self) -> RuntimeError:
        error = RuntimeError(self._reason)
        if self._details:
            error.add_note(self._details)
        return error


def _put_all(loop: asyncio.AbstractEventLoop, items: list[tuple[Inbox, Any]]) -> bool:
    """Put things into inboxes of an event loop, from any thread. Returns False if the loop is closed."""

    def put() -> None:
        for inbox, item in items:
            inbox.add(item)

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
