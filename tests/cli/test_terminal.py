"""What is written where: notes, headings, progress, and the summary of a run."""

import io
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.stub_llm import StubLLM

from mlx_paged.cli.generate import answer_prompts
from mlx_paged.cli.loading import Requests
from mlx_paged.cli.options import PromptArguments
from mlx_paged.cli.terminal import RunSummary, Terminal, describe_drafts, excerpt
from mlx_paged.outputs import CompletionOutput, RequestMetrics, RequestOutput
from mlx_paged.sampling_params import SamplingParams


class Screen(io.StringIO):
    """A terminal that remembers what was written to it."""

    def isatty(self) -> bool:
        return True


def screens(monkeypatch: pytest.MonkeyPatch) -> tuple[Screen, Screen]:
    """stdout and stderr as terminals, from here to the end of the test."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out, err = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def test_a_terminal_gets_notes_and_colour_and_no_color_takes_the_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = screens(monkeypatch)
    Terminal().heading("one")
    Terminal().note("two")
    assert out.getvalue() == "\x1b[1m==> one\x1b[0m\n" and err.getvalue() == "\x1b[2mtwo\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal().heading("one")
    Terminal().note("two")
    Terminal(quiet=True).note("three")
    assert out.getvalue().endswith("m\n==> one\n") and err.getvalue().endswith("m\ntwo\n")


def test_progress_is_one_line_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = screens(monkeypatch)
    terminal = Terminal()
    terminal.progress("10 of 12")
    terminal.progress("11 of 12")
    terminal.failure("done")
    assert err.getvalue() == "\r10 of 12\r11 of 12\r        \rmlx-paged: done\n"


def test_many_prompts_have_a_progress_bar_on_a_terminal_that_answers_push_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, err = screens(monkeypatch)
    monkeypatch.setenv("COLUMNS", "100")
    llm: Any = StubLLM(None)
    params = SamplingParams(max_tokens=9)
    prompts = PromptArguments(["one", "two three", "four"], system=None, raw=True, as_json=False)

    def load(requests: Requests) -> Any:
        requests(llm)
        return llm

    code = answer_prompts(prompts, load, params, Terminal())
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    assert code == 0 and "0/3 prompts, 0 tokens" in plain
    assert re.search(r"2/3 prompts, 17 tokens, \d+\.\d tokens/s", plain)
    assert "prompts" not in out.getvalue() and out.getvalue().endswith("re: four \n")
    err.truncate(0)
    answer_prompts(prompts, load, params, Terminal(quiet=True))
    assert err.getvalue() == ""


def test_an_excerpt_is_one_short_line_without_control_characters() -> None:
    assert excerpt("two\nlines\x1b[31m") == "two lines [31m"
    assert excerpt("word " * 40, limit=20) == "word word word wo..."


def test_tokens_per_second_count_what_was_computed() -> None:
    llm: Any = StubLLM(None)
    summary = RunSummary()
    metrics = RequestMetrics(arrival_time=0, first_scheduled_time=1, first_token_time=3, finished_time=8)
    sample = CompletionOutput(0, "", [1] * 11, 0.0)
    summary.count(RequestOutput(0, None, [1] * 50, [sample], True, num_cached_tokens=30, metrics=metrics))
    assert "prompt 50 tokens, 10.0 tokens/s (30 cached); generation 11 tokens, 2.0 tokens/s" in summary.lines(llm)[0]


@pytest.mark.parametrize(
    ("asked", "counts", "expected"),
    [
        (None, (0, 0, 0), []),
        ({}, (0, 0, 0), ["speculation: no guess was worth its time"]),
        (
            {},
            (4, 14, 7),
            ["speculation: 7 of 14 guesses were right, 3.5 at a time, for 2.75 tokens a time; 20 tokens in 13 steps"],
        ),
    ],
)
def test_what_became_of_guesses_is_one_line(
    asked: dict[str, int] | None, counts: tuple[int, int, int], expected: list[str]
) -> None:
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    stats = SimpleNamespace(num_output_tokens=20, num_steps=13, **dict(zip(names, counts, strict=True)))
    engine = SimpleNamespace(config=SimpleNamespace(speculative_config=asked))
    assert describe_drafts(SimpleNamespace(engine=engine, stats=lambda: stats)) == expected  # type: ignore[arg-type]
