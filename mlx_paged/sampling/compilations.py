"""Compile what may take long, or recurse deep: each thing once, few at a time, apart, and within some seconds."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_AT_ONCE = 2
TIMEOUT_S = 10.0
_STACK_BYTES = 256 << 20  # of address space: what is not used is not taken
_STACK_LOCK = threading.Lock()


class Compilations(Generic[T]):
    """The results of compiling, by key. May be used from several threads.

    At most `MAX_AT_ONCE` run at a time. Nothing ends one but itself: who waits is told after `TIMEOUT_S` seconds, and
    who asks again gets what has come of it meanwhile.
    """

    def __init__(self, max_kept: int) -> None:
        """max_kept: how many results are kept, those that were asked for last."""
        self._max_kept = max_kept
        self._kept: OrderedDict[Hashable, Future[T]] = OrderedDict()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_AT_ONCE)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, compile_: Callable[[], T]) -> T:
        """Return what `compile_` makes for a key. Raises what it raises, and TimeoutError if that lasts too long."""
        with self._lock:
            is_new = key not in self._kept
            result = self._kept.setdefault(key, Future())
            self._kept.move_to_end(key)
            if len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        if is_new:
            self._begin(key, compile_, result)
        return result.result(TIMEOUT_S)

    def _begin(self, key: Hashable, compile_: Callable[[], T], result: Future[T]) -> None:
        def work() -> T:
            try:
                return compile_()
            except BaseException:
                self._forget(key)
                raise
            finally:
                self._slots.release()

        if self._slots.acquire(timeout=TIMEOUT_S):
            run_apart(work, result)
        else:
            self._forget(key)
            result.set_exception(TimeoutError())

    def _forget(self, key: Hashable) -> None:
        with self._lock:
            self._kept.pop(key, None)


def run_apart(work: Callable[[], T], result: Future[T] | None = None) -> Future[T]:
    """Begin some work in a thread with room to recurse, where the usual stack might end, and the process with it."""
    done = Future[T]() if result is None else result

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _STACK_LOCK:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="mlx-paged compiler", daemon=True).start()
        finally:
            threading.stack_size(usual)
    return done
