"""Ctrl-C while MLX computes: Python handles it between two of its own instructions, which may be a minute later."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_paged.cli.terminal import INTERRUPTED

GRACE_S = 1.5


@contextmanager
def ends_soon() -> Iterator[None]:
    """End the process GRACE_S seconds after Ctrl-C if it has not ended by itself, whatever it is doing."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    is_over = threading.Event()

    def watch() -> None:
        while signals := os.read(readable, 1):  # nothing: the other end is closed
            if signals[0] == signal.SIGINT and not is_over.wait(GRACE_S):
                os.write(2, b"\n")
                os._exit(INTERRUPTED)
        os.close(readable)

    threading.Thread(target=watch, name="mlx-paged Ctrl-C", daemon=True).start()
    previous = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield
        is_over.set()  # not after a KeyboardInterrupt: at its end the process waits for what is still being computed
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writable)
