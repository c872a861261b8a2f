"""Signals that end a program wait until a step is over, so that no step is torn."""

import _signal  # what `signal` wraps: the enums that it makes cost 30 us in each step
import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = [int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_MAX_DELAY_S = 1.0


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Handle Ctrl-C, TERM and HUP when the block ends; a second one, or a block that lasts over a second, at once.

    Only in the main thread, the only one that Python handles signals in, and only where a handler is Python's own: a
    signal that ends the process without Python is not kept from it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in _SIGNALS if callable(handler := _signal.getsignal(number))}
    pending: list[tuple[int, FrameType | None]] = []
    timers: list[threading.Timer] = []

    def defer(number: int, frame: FrameType | None) -> None:
        if pending:
            pending.clear()
            handlers[number](number, frame)
            return
        pending.append((number, frame))
        timers.append(threading.Timer(_MAX_DELAY_S, _thread.interrupt_main, [number]))
        timers[0].daemon = True
        timers[0].start()

    for number in handlers:
        _signal.signal(number, defer)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            _signal.signal(number, handler)
        for timer in timers:
            timer.cancel()
        for number, frame in pending:
            handlers[number](number, frame)
