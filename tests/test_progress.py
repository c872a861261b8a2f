"""The progress bar: what it says, that it leaves nothing behind, and that nobody but a terminal sees it."""

from __future__ import annotations

import io
import itertools
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_paged.cli.terminal import Terminal
from mlx_paged.outputs import CompletionOutput, RequestOutput
from mlx_paged.progress import LoadingLine, ProgressBar
from mlx_paged.sampling_params import SamplingParams


class Screen(io.StringIO):
    """A terminal that remembers what was written to it."""

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


def open_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """stderr as a terminal, with a clock that says how often it was asked."""
    screen = Screen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)  # which --quiet sets
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("mlx_paged.progress.time", SimpleNamespace(monotonic=itertools.count().__next__))
    return screen


def output(num_tokens: int) -> RequestOutput:
    return RequestOutput(0, None, [1], [CompletionOutput(0, "", [1] * num_tokens, 0.0)], True)


def requests(num_requests: int) -> list[Any]:
    """Requests of at most 10 tokens that have none yet."""
    made = ({"sequences": [SimpleNamespace(num_output_tokens=0)], "finished": False} for _ in range(num_requests))
    return [SimpleNamespace(max_tokens=10, params=SamplingParams(), **each) for each in made]


def test_without_requests_there_is_no_bar_beside_a_text_that_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    with ProgressBar([]) as bar:
        bar.show()
        bar.count(output(5))
        bar.show()
    assert screen.getvalue() == ""


def test_it_counts_prompts_and_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    with ProgressBar(requests(3)) as bar:
        bar.show()
        bar.count(output(5))
        bar.count(output(7))
        bar.show()
    assert "2/3 prompts, 12 tokens, 6.0 tokens/s, about 1 s left" in screen.text


def test_it_counts_the_tokens_of_prompts_that_still_run_and_estimates_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = open_screen(monkeypatch)
    running = requests(4)
    with ProgressBar(running) as bar:
        bar.show()
        assert "left" not in screen.text
        running[0].sequences[0].num_output_tokens = 4
        bar.show()  # 4 of at most 40 tokens in 2 s
        assert "0/4 prompts, 4 tokens, 2.0 tokens/s, at most 18 s left" in screen.text
        running[0].finished = True
        running[1].sequences[0].num_output_tokens = 2
        bar.count(output(4))
        bar.show()  # 6 of about 16 tokens in 3 s
        assert "1/4 prompts, 6 tokens, 2.0 tokens/s, about 5 s left" in screen.text
        running[1].sequences[0].num_output_tokens = 3
        monkeypatch.setattr("mlx_paged.progress.time", SimpleNamespace(monotonic=lambda: 3.05))
        bar.show()  # too soon to be drawn again
        assert "7 tokens" not in screen.text


def test_samples_that_have_not_begun_are_in_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    (request,) = requests(1)
    request.params = SamplingParams(n=3)
    with ProgressBar([request]) as bar:
        bar.show()
        request.sequences[0].num_output_tokens = 4
        bar.show()  # 4 of at most 30 tokens in 2 s
    assert "at most 13 s left" in screen.text


def test_it_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    with ProgressBar(requests(3)) as bar:
        bar.show()
    assert screen.getvalue().endswith("\x1b[2K")  # the line is erased
    assert "\x1b[?25h" in screen.getvalue()  # and the cursor is back


def test_an_exception_takes_it_away_too(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    with pytest.raises(KeyboardInterrupt), ProgressBar(requests(3)) as bar:
        bar.show()
        raise KeyboardInterrupt
    assert bar._progress is None and screen.getvalue().endswith("\x1b[2K")


def test_it_steps_aside_for_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    monkeypatch.setattr(sys, "stdout", screen)
    terminal = Terminal()
    with terminal.progress_bar(requests(3)) as bar:
        bar.show()
        terminal.answer("an answer\n")
        assert screen.getvalue().endswith("\x1b[2Kan answer\n")
        bar.show()
        assert "0/3" in screen.text.split("an answer")[1]
        terminal.failure("a failure")
        assert screen.getvalue().endswith("\x1b[2Kmlx-paged: a failure\n")


@pytest.mark.parametrize("why", ["not asked for", "not a terminal", "a dumb one", "quiet"])
def test_nothing_at_all_is_written_where_it_is_not_wanted(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    if why == "not a terminal":
        monkeypatch.setattr(Screen, "isatty", lambda self: False)
    if why == "a dumb one":
        monkeypatch.setenv("TERM", "dumb")
    shown = why != "not asked for"
    with (
        Terminal(quiet=True).progress_bar(requests(2))
        if why == "quiet"
        else ProgressBar(requests(2), shown=shown) as bar
    ):
        bar.show()
        bar.count(output(3))
        bar.show()
    assert screen.getvalue() == ""


# -- the line while a model is loaded --


def test_loading_that_takes_more_than_a_second_says_how_far_it_is_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = open_screen(monkeypatch)  # where each look at the clock takes a second
    with LoadingLine("preparing kernels", 4) as line:
        line.advance()
        assert screen.text == ""
        line.advance()
        line.advance()
        assert screen.text == "\rpreparing kernels: 2 of 4\r\rpreparing kernels: 3 of 4\r"
    assert screen.text.endswith("\r" + " " * len("preparing kernels: 3 of 4") + "\r")


@pytest.mark.parametrize("silence", [("TERM", "dumb"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), None])
def test_nobody_sees_it_who_sees_no_other_bars(
    silence: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = open_screen(monkeypatch)
    if silence is None:
        monkeypatch.setattr(screen, "isatty", lambda: False)
    else:
        monkeypatch.setenv(*silence)
    with LoadingLine("preparing kernels", 4) as line:
        for _ in range(4):
            line.advance()
    assert screen.text == ""
