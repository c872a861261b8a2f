"""Signals at chosen moments, as if somebody pressed Ctrl-C."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Pressed:
    happened = False


@contextmanager
def ctrl_c(owner: Any, name: str, number: int = 0, *, times: int = 1, after: bool = False) -> Iterator[Pressed]:
    """SIGINT comes in the `number`-th call of a method, before or after it does what it does."""
    original, count, pressed = getattr(owner, name), itertools.count(), Pressed()

    def interrupted(*arguments: Any, **values: Any) -> Any:
        is_the_moment = next(count) == number
        result = original(*arguments, **values) if after else None
        if is_the_moment:
            pressed.happened = True
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return result if after else original(*arguments, **values)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
