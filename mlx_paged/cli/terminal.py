"""What a command writes, and where: answers to stdout, the rest to stderr if somebody reads it there."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from mlx_paged.progress import ProgressBar

if TYPE_CHECKING:
    from mlx_paged.llm import LLM
    from mlx_paged.outputs import BeamSearchOutput, RequestOutput

_PLAIN = "plain MLX operations"
_BACKENDS = {"metal": "Metal kernels", "cuda": "CUDA kernels", "cpu": _PLAIN, "reference": _PLAIN}


class Terminal:
    """The two streams of a command.

    talks: whether notes are shown: stderr is a terminal or `verbose` asked for them, and `quiet` didn't forbid it.
    """

    def __init__(self, *, verbose: bool = False, quiet: bool = False) -> None:
        self.verbose = verbose
        self.quiet = quiet
        self.talks = not quiet and (verbose or sys.stderr.isatty())
        self._wrote = False
        self._line_open = False  # stdout stands in the middle of a line
        self._progress = ""
        self._bar: ProgressBar | None = None

    def answer(self, text: str) -> None:
        """A piece of an answer, shown at once."""
        self._clear()
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            self._wrote = True
            self._line_open = not text.endswith("\n")

    def end_answer(self) -> None:
        """An answer is over: the next thing begins on a line of its own."""
        if self._line_open:
            self.answer("\n")

    def heading(self, text: str) -> None:
        """Names the answer that follows; a blank line parts it from the one before."""
        self.answer("\n" * self._wrote + _styled(f"==> {text}", "1", sys.stdout) + "\n")

    def note(self, text: str) -> None:
        """A word aside, for those who read it."""
        if self.talks:
            self.say(_styled(text, "2", sys.stderr))

    def failure(self, text: str) -> None:
        """One line about what went wrong, whoever reads."""
        self.say(f"mlx-paged: {one_line(text)}")

    def progress(self, text: str) -> None:
        """A line that the next one replaces; shown on terminals only."""
        if self.talks and sys.stderr.isatty() and text != self._progress:
            sys.stderr.write(f"\r{text}{' ' * (len(self._progress) - len(text))}{'' if text else chr(13)}")
            sys.stderr.flush()
            self._progress = text

    def progress_bar(self, num_prompts: int) -> ProgressBar:
        """A bar for those who see notes; it steps aside for whatever else is written."""
        self._bar = ProgressBar(num_prompts, shown=self.talks)
        return self._bar

    def _clear(self) -> None:
        self.progress("")
        if self._bar is not None:
            self._bar.hide()

    def say(self, text: str) -> None:
        """Something that was asked for, beside the answers: on stderr in any case."""
        self._clear()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Tally:
    """Counts what requests took and gave, for the lines after an answer."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.samples = 0
        self.used_blocks = self.num_blocks = 0
        self.backends: list[str] = []
        self.waste = 0.0
        self._scheduled: list[float] = []
        self._first_token: list[float] = []
        self._finished: list[float] = []
        self._waits: list[float] = []  # seconds until the first token
        self._paces: list[float] = []  # seconds per token after it
        self._lengths: Counter[tuple[int, int]] = Counter()  # tokens of a request's sample so far

    def count(self, output: RequestOutput | BeamSearchOutput) -> None:
        """A whole output, or one delta of a stream."""
        self.generated_tokens += output.num_output_tokens
        samples = output.sequences if hasattr(output, "sequences") else output.outputs
        for number, sample in enumerate(samples):
            self._lengths[output.request_id, number] += len(sample.token_ids)
        if not output.finished:
            return
        self.samples += max(1, len(samples))
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        metrics = output.metrics
        if metrics and metrics.first_scheduled_time and metrics.first_token_time and metrics.finished_time:
            self._scheduled.append(metrics.first_scheduled_time)
            self._first_token.append(metrics.first_token_time)
            self._finished.append(metrics.finished_time)
            self._waits.append(metrics.first_token_time - metrics.arrival_time)
            longest = max((self._lengths[output.request_id, number] for number in range(len(samples))), default=0)
            pace = metrics.time_per_output_token(longest)
            if pace is not None:
                self._paces.append(pace)

    def look_at_pool(self, llm: LLM) -> None:
        """Remember the pool at its fullest."""
        stats = llm.stats()
        used = stats.num_blocks - stats.num_free_blocks
        if used >= self.used_blocks:
            self.used_blocks, self.waste = used, stats.kv_waste
        self.num_blocks = stats.num_blocks
        self.backends = llm.attention_backends

    def lines(self) -> list[str]:
        prompt = f"prompt {self.prompt_tokens} tokens"
        generation = f"generation {self.generated_tokens} tokens"
        if self._finished:
            computed = self.prompt_tokens - self.cached_tokens
            prompt += _rate(computed, max(self._first_token) - min(self._scheduled))
            generation += _rate(self.generated_tokens - self.samples, max(self._finished) - min(self._first_token))
        if self.cached_tokens:
            prompt += f" ({self.cached_tokens} cached)"
        mlx = sys.modules.get("mlx.core")  # loaded by then, unless there is no model behind this
        memory = f"; peak memory {mlx.get_peak_memory() / 1e6:.0f} MB" if mlx else ""
        latency = []
        if self._waits:
            latency = [f"first token {_mean(self._waits):.2f} s"]
            latency += [f"{_mean(self._paces) * 1e3:.1f} ms per token"] if self._paces else []
            latency += [f"mean of {len(self._waits)} prompts"] if len(self._waits) > 1 else []
        return [
            f"{prompt}; {generation}{memory}",
            *filter(None, [", ".join(latency)]),
            f"blocks {self.used_blocks}/{self.num_blocks}, waste {self.waste:.1%}",
            f"attention: {', '.join(map(_BACKENDS.__getitem__, self.backends))}",
        ]


def excerpt(text: str, limit: int = 60) -> str:
    """The beginning of `text` on one line, without control characters."""
    line = one_line("".join(char if char.isprintable() else " " for char in text))
    return line if len(line) <= limit else line[: limit - 3].rstrip() + "..."


def one_line(text: str) -> str:
    return " ".join(text.split())


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else ""


def _styled(text: str, code: str, stream: TextIO) -> str:
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"
