"""A progress bar for many prompts: how many are done, and how many tokens per second they gave."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from mlx_paged.outputs import Output


class ProgressBar:
    """Show progress in a line at the bottom of stderr while prompts run; nothing of it stays behind.

    Nothing at all is written if `shown` is False or stderr is not a terminal.
    """

    def __init__(self, num_prompts: int, *, shown: bool = True) -> None:
        self._num_prompts = num_prompts
        self._shown = shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._num_done = self._num_tokens = 0
        self._started = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.hide()

    def count(self, output: Output) -> None:
        """Count a finished prompt and its output tokens."""
        self._num_done += 1
        self._num_tokens += output.num_output_tokens

    def show(self) -> None:
        """Draw the bar, or bring it up to date."""
        if not self._shown:
            return
        if self._progress is None:
            self._progress = _make_progress(self._num_prompts)
            self._progress.start()
        speed = self._num_tokens / max(time.monotonic() - self._started, 1e-9)
        self._progress.update(
            self._progress.task_ids[0], completed=self._num_done, tokens=self._num_tokens, speed=f"{speed:.1f}"
        )

    def hide(self) -> None:
        """Take the bar away, until the next `show`."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _make_progress(num_prompts: int) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    progress = Progress(
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts, {task.fields[tokens]} tokens, {task.fields[speed]} tokens/s"),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    progress.add_task("", total=num_prompts, tokens=0, speed="0.0")
    return progress
