"""What a command writes, and where: answers to stdout, the rest to stderr if somebody reads it there."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, TextIO

from mlx_paged.cli.options import in_options
from mlx_paged.progress import ProgressBar

if TYPE_CHECKING:
    from mlx_paged.llm import LLM
    from mlx_paged.outputs import BeamHypothesis, CompletionOutput, Output
    from mlx_paged.request import Request

INTERRUPTED = 130  # the exit code after Ctrl-C

_PLAIN = "plain MLX operations"
BACKEND_TITLES = {"metal": "Metal kernels", "cuda": "CUDA kernels", "cpu": _PLAIN, "reference": _PLAIN}


class Terminal:
    """The two streams of a command.

    option_names: how the settings that messages name are written on the command line.
    """

    def __init__(
        self, *, verbose: bool = False, quiet: bool = False, option_names: Mapping[str, str] | None = None
    ) -> None:
        self.option_names = option_names or {}
        self.verbose = verbose
        self.quiet = quiet
        self.shows_notes = not quiet and (verbose or sys.stderr.isatty())
        """Whether notes are shown: somebody reads stderr or asked for them, and nobody asked for silence."""
        self._wrote = False
        self._line_open = False  # stdout stands in the middle of a line
        self._progress = ""
        self._bar: ProgressBar | None = None

    def keep_names(self, settings: Collection[str]) -> None:
        """Call these settings as they are called in Python, from here on: that is how they were given."""
        self.option_names = {name: each for name, each in self.option_names.items() if name not in settings}

    def answer(self, text: str) -> None:
        """Show a piece of an answer at once."""
        self._clear()
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            self._wrote = True
            self._line_open = not text.endswith("\n")

    def end_answer(self) -> None:
        """End an answer: the next thing begins on a line of its own."""
        if self._line_open:
            self.answer("\n")

    def heading(self, text: str) -> None:
        """Name the answer that follows, below a blank line if there was one before."""
        self.answer("\n" * self._wrote + _styled(f"==> {text}", "1", sys.stdout) + "\n")

    def note(self, *lines: str) -> None:
        """Say something beside the answers, to those who read it."""
        for line in lines if self.shows_notes else ():
            self.to_stderr(_styled(line, "2", sys.stderr))

    def warn(self, text: str) -> None:
        """Say in one line what is not as it might be expected, to all but those who asked for silence."""
        if not self.quiet:
            self.to_stderr(f"mlx-paged: {one_line(text)}")

    def warn_of_engine(self, text: str) -> None:
        """Say what an EngineWarning does, to the same people. Settings that it names become options."""
        if not self.quiet:
            self.to_stderr(f"mlx-paged: {in_options(text, self.option_names)}")

    def failure(self, text: str) -> None:
        """Say in one line what went wrong, whoever reads. Settings that it names become options."""
        self.to_stderr(f"mlx-paged: {in_options(one_line(text), self.option_names)}")

    def progress(self, text: str) -> None:
        """Show a line that the next one replaces, on terminals only; "" takes it away."""
        if self.shows_notes and sys.stderr.isatty() and text != self._progress:
            sys.stderr.write(f"\r{text}{' ' * (len(self._progress) - len(text))}{'' if text else chr(13)}")
            sys.stderr.flush()
            self._progress = text

    def progress_bar(self, requests: Sequence[Request]) -> ProgressBar:
        """Make a bar for those who see notes; it steps aside for whatever else is written."""
        self._bar = ProgressBar(requests, shown=self.shows_notes)
        return self._bar

    def _clear(self) -> None:
        self.progress("")
        if self._bar is not None:
            self._bar.hide()

    def to_stderr(self, text: str) -> None:
        """Write a line to stderr in any case."""
        self._clear()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class RunSummary:
    """Sums up what requests took and gave, for the lines after their answers."""

    def __init__(self) -> None:
        self.generated_tokens = 0
        self._ended: list[Output] = []
        self._lengths: Counter[tuple[int, int]] = Counter()  # tokens so far of a request's sample

    def count(self, output: Output) -> None:
        """Count a whole output, or one delta of a stream."""
        self.generated_tokens += output.num_output_tokens
        for number, sample in enumerate(samples_of(output)):
            self._lengths[output.request_id, number] += len(sample.token_ids)
        if output.finished:
            self._ended.append(output)

    def lines(self, llm: LLM) -> list[str]:
        """Say how much was computed, how fast and in how many blocks; `llm` is the engine that did it."""
        num_prompt = sum(len(output.prompt_token_ids) for output in self._ended)
        num_cached = sum(output.num_cached_tokens for output in self._ended)
        prompt, generation = f"prompt {num_prompt} tokens", f"generation {self.generated_tokens} tokens"
        begun = [
            (output, output.metrics)
            for output in self._ended
            if output.metrics is not None and output.metrics.first_token_time is not None
        ]
        latency = []
        if begun:
            scheduled = min(_known(metrics.first_scheduled_time for _, metrics in begun))
            first_tokens = _known(metrics.first_token_time for _, metrics in begun)
            finished = max(_known(metrics.finished_time for _, metrics in begun))
            num_samples = sum(max(1, len(samples_of(output))) for output, _ in begun)
            prompt += _rate(num_prompt - num_cached, max(first_tokens) - scheduled)
            generation += _rate(self.generated_tokens - num_samples, finished - min(first_tokens))
            latency.append(f"first token {mean(_known(metrics.time_to_first_token for _, metrics in begun)):.2f} s")
            paces = _known(metrics.time_per_output_token(self._longest_sample(output)) for output, metrics in begun)
            latency += [f"{mean(paces) * 1e3:.1f} ms per token"] if paces else []
            latency += [f"mean of {len(begun)} prompts"] if len(begun) > 1 else []
        if num_cached:
            prompt += f" ({num_cached} cached)"
        mlx = sys.modules.get("mlx.core")  # loaded by then, unless there is no model behind this
        memory = f"; peak memory {mlx.get_peak_memory() / 1e6:.0f} MB" if mlx else ""
        stats = llm.stats()
        return [
            f"{prompt}; {generation}{memory}",
            *filter(None, [", ".join(latency)]),
            f"blocks {stats.peak_used_blocks}/{stats.num_blocks} at the most",
            *describe_drafts(llm),
            f"attention: {', '.join(map(BACKEND_TITLES.__getitem__, llm.attention_backends))}"
            + (f"; matrices: {stats.blas}" if stats.blas else ""),
        ]

    def _longest_sample(self, output: Output) -> int:
        return max((self._lengths[output.request_id, number] for number in range(len(samples_of(output)))), default=0)


def describe_drafts(llm: LLM) -> list[str]:
    """Say what became of guessed tokens, in a line if any were asked for."""
    if llm.engine.config.speculative_config is None:
        return []
    stats = llm.stats()
    if not stats.num_drafts:
        return ["speculation: no guess was worth its time"]
    right = f"{stats.num_accepted_tokens} of {stats.num_draft_tokens} guesses were right"
    tried, each = stats.num_drafts, stats.num_draft_tokens / stats.num_drafts
    length = f"{each:.1f} at a time, for {1 + stats.num_accepted_tokens / tried:.2f} tokens a time"
    return [f"speculation: {right}, {length}; {stats.num_output_tokens} tokens in {stats.num_steps} steps"]


def excerpt(text: str, limit: int = 60) -> str:
    """Cut `text` to the beginning of one line, without control characters."""
    line = one_line("".join(char if char.isprintable() else " " for char in text))
    return line if len(line) <= limit else line[: limit - 3].rstrip() + "..."


def one_line(text: str) -> str:
    return " ".join(text.split())


def samples_of(output: Output) -> Sequence[CompletionOutput | BeamHypothesis]:
    """Return the samples of a request, or the hypotheses of a search."""
    return output.sequences if hasattr(output, "sequences") else output.outputs


def _known(numbers: Iterable[float | None]) -> list[float]:
    return [number for number in numbers if number is not None]


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else ""


def _styled(text: str, code: str, stream: TextIO) -> str:
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"
