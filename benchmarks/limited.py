"""Run a command within a time limit, so that parts of a script can't take each other's time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GRACE_S = 5.0
"""The end of a limit, in which a command that was interrupted can write down what it has."""


class Ended(NamedTuple):
    """What has become of a command."""

    exit_code: int | None
    """None: its time was up."""
    seconds: float
    output: str
    """What it and its children have written."""

    @property
    def word(self) -> str:
        return "cut off" if self.exit_code is None else "failed" if self.exit_code else "whole"


def run_limited(
    command: Sequence[str | Path], limit_s: float, variables: Mapping[str, str] | None = None, *, echo: bool = True
) -> Ended:
    """Run a command, which is interrupted as by Ctrl-C before the limit, and ended with its children at the limit.

    limit_s: of wall time. variables: of its environment, beside this process's. echo: print what it writes, too.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell: children would have it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    began, written = time.monotonic(), []
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | (variables or {}),
        start_new_session=True,  # a group of its own, which has its children as well
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            written.append(line)
            if echo:
                sys.stdout.write(line)
                sys.stdout.flush()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    exit_code: int | None = None
    try:
        exit_code = process.wait(max(limit_s - GRACE_S, limit_s / 2))
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE_S, limit_s / 2))
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
        reader.join(1.0)  # not for what has left the group and still could write
    return Ended(exit_code, time.monotonic() - began, "".join(written))


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS names a group of none but zombies so
        os.killpg(process.pid, number)
