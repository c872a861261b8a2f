"""A progress bar for many prompts: how many are done, how fast tokens come, and how long the rest will take."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from rich.progress import Progress

    from mlx_paged.outputs import Output


_REFRESH_S = 0.1
_SLOW_S = 1.0


class Running(Protocol):
    """What a bar looks at of a request."""

    max_tokens: int
    sequences: list[Any]
    """Each has `num_output_tokens`."""
    params: SamplingParams | BeamSearchParams

    @property
    def finished(self) -> bool: ...


class LoadingLine:
    """Say in a line at the bottom of stderr how far something has come, if it takes more than a second.

    Nothing of it stays behind. Nothing is written if stderr is not a terminal, or the environment's
    HF_HUB_DISABLE_PROGRESS_BARS takes away the bars of downloads, too.
    """

    def __init__(self, text: str, total: int) -> None:
        self._text, self._total = text, total
        is_silenced = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
        self._shown = not is_silenced and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._num_done = self._length = 0
        self._started = time.monotonic()

    def __enter__(self) -> LoadingLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._length:
            self._write(" " * self._length)

    def advance(self) -> None:
        """Count one of the total as done."""
        self._num_done += 1
        if self._shown and time.monotonic() - self._started > _SLOW_S:
            line = f"{self._text}: {self._num_done} of {self._total}"
            self._length = max(self._length, len(line))
            self._write(line)

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r{line}\r")
        sys.stderr.flush()


class ProgressBar:
    """Show progress in a line at the bottom of stderr while requests run; nothing of it stays behind.

    Nothing at all is written if `shown` is False or stderr is not a terminal.
    """

    def __init__(self, requests: Sequence[Running], *, shown: bool = True) -> None:
        self._requests = requests
        self._shown = shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._num_done = self._num_tokens = 0  # of requests that have ended
        self._started = self._drawn = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def count(self, output: Output) -> None:
        """Count a finished prompt and its output tokens."""
        self._num_done += 1
        self._drawn = -math.inf
        self._num_tokens += output.num_output_tokens

    def show(self) -> None:
        """Draw the bar, or bring it up to date if it is not a moment old."""
        if not self._shown or (self._progress is None and self._num_done >= len(self._requests)):
            return
        now = time.monotonic()
        if self._progress is None:
            self._progress = _make_progress(len(self._requests))
            self._progress.start()
        elif now - self._drawn < _REFRESH_S:
            return
        self._drawn = now
        running = [sequence for request in self._requests if not request.finished for sequence in request.sequences]
        num_tokens = self._num_tokens + sum(sequence.num_output_tokens for sequence in running)
        speed = num_tokens / max(now - self._started, 1e-9)
        rate = f"{num_tokens} tokens, {speed:.1f} tokens/s"
        left = self._time_left(num_tokens, speed)
        (task,) = self._progress.task_ids
        self._progress.update(task, completed=self._num_done, rate=rate, left=left, refresh=True)

    def _time_left(self, num_tokens: int, speed: float) -> str:
        """Estimate the time left: as if all prompts got as many tokens as those that are done, or else the most."""
        if not num_tokens:
            return ""
        if self._num_done:
            total = self._num_tokens / self._num_done * len(self._requests)
        else:
            total = sum(request.max_tokens * _num_samples(request.params) for request in self._requests)
        seconds = max(0, total - num_tokens) / speed
        written = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        return f", {'about' if self._num_done else 'at most'} {written} left"

    def hide(self) -> None:
        """Take the bar away, until the next `show`."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _num_samples(params: SamplingParams | BeamSearchParams) -> int:
    return params.n if isinstance(params, SamplingParams) else params.beam_width


def _make_progress(num_prompts: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    progress = Progress(
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts, {task.fields[rate]}{task.fields[left]}"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    progress.add_task("", total=num_prompts, rate="0 tokens", left="")
    return progress
