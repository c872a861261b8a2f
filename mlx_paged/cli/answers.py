"""The answers to many prompts as they come: text in the prompts' order, or a line of JSON for each when it ends."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from mlx_paged.cli.options import DEFAULT_MAX_TOKENS
from mlx_paged.cli.terminal import Terminal, excerpt, samples_of
from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput, CompletionOutput, Output, RequestMetrics, RequestOutput
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams


@dataclass(frozen=True)
class Question:
    """A prompt as it was given."""

    id: int | str
    """Which one it is: from 1 on, or what the line of a batch says."""
    prompt: str | Sequence[Mapping[str, Any]]
    """A text, or the messages of a conversation."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of its own, by their names in Python."""
    error: str | None = None
    """What is wrong with it, seen without a model; None if nothing is."""
    params: SamplingParams | BeamSearchParams | None = None
    """All of its parameters, once the model has been asked for those that nobody gave."""


class Answers(ABC):
    """Takes what became of questions, counts it, and has subclasses show it."""

    def __init__(self, questions: Sequence[Question], terminal: Terminal) -> None:
        self.questions = questions
        self.terminal = terminal
        self.failed: set[int | str] = set()
        """The ids of those that have no answer."""
        self._num_samples = 0
        self._cut: list[str] = []  # where each sample ended that did not come to its end
        self._unfinished: list[str] = []  # what each of those was to be that has a form and does not have it

    @property
    def exit_code(self) -> int:
        """0; 1 if a question has no answer; else 3 if an answer has not the form that was asked for."""
        return 1 if self.failed else 3 if self._unfinished else 0

    def fail(self, question: Question, reason: str) -> None:
        """Say why a question has no answer."""
        self.failed.add(question.id)
        is_alone = len(self.questions) == 1
        self.terminal.failure(reason if is_alone else f"prompt {question.id}: {reason}")
        self.show(question, reason)

    def finish(self, question: Question, output: Output) -> None:
        """Take the output of a question, or what went wrong in the engine."""
        if (error := error_of(output)) is not None:
            self.fail(question, error)
            return
        for sample in samples_of(output):
            self._num_samples += 1
            if isinstance(sample, CompletionOutput):
                self._look_at_end(question, sample)
        self.show(question, output)

    @abstractmethod
    def show(self, question: Question, result: Output | str) -> None:
        """Show the output of a question, or why there is none, now or later."""

    def end(self) -> None:
        """Show what has not been shown yet, and say how many answers were cut."""
        self.terminal.end_answer()
        cut = self._cut[0] if self._cut else "by a stop string or token"
        if self._unfinished:
            which = self._count(self._unfinished, "is", "are")
            self.terminal.failure(f"{which} not the whole {self._unfinished[0]} that was asked for, cut {cut}")
        elif self._cut:
            self.terminal.warn(f"{self._count(self._cut, 'was', 'were')} cut {cut}")

    def _count(self, some: Sequence[str], one: str, many: str) -> str:
        """Say how many answers are meant, with a verb."""
        which = f"{len(some)} of {self._num_samples} answers" if self._num_samples > 1 else "the answer"
        return f"{which} {one if len(some) == 1 else many}"

    def _look_at_end(self, question: Question, sample: CompletionOutput) -> None:
        params = question.params
        assert isinstance(params, SamplingParams)
        cut_by_stop = sample.finish_reason == "stop" and sample.stop_reason is not None
        if sample.finish_reason == "length":
            num_tokens = len(sample.token_ids)
            by_option = num_tokens >= (params.max_tokens or DEFAULT_MAX_TOKENS)
            why = "--max-tokens allows more" if by_option else "the context, or the KV cache, holds no more"
            self._cut.append(f"after {num_tokens} tokens: {why}")
        if params.is_constrained and (cut_by_stop or sample.finish_reason == "length"):
            from mlx_paged.sampling.grammar import is_whole

            if not is_whole(params, sample.text):
                self._unfinished.append("JSON" if params.json_schema is not None else "text")


class TextAnswers(Answers):
    """Shows answers in the prompts' order, each as soon as it and those before it are there."""

    def __init__(self, questions: Sequence[Question], terminal: Terminal, *, streamed: bool = False) -> None:
        """streamed: there is one, which has been shown when it ends."""
        super().__init__(questions, terminal)
        self._streamed = streamed
        self._results: dict[int | str, Output | str] = {}
        self._waiting = list(questions)

    def show(self, question: Question, result: Output | str) -> None:
        self._results[question.id] = result
        while self._waiting and self._waiting[0].id in self._results:
            self._show_next(self._waiting.pop(0))

    def end(self) -> None:
        for question in self._waiting:  # it was interrupted, or nothing is left to wait for
            if question.id in self._results:
                self._show_next(question)
        super().end()

    def _show_next(self, question: Question) -> None:
        result = self._results.pop(question.id)
        if isinstance(result, BeamSearchOutput):
            self._show_hypotheses(question, result)
        elif isinstance(result, RequestOutput) and not self._streamed:
            self._show_samples(question, result)

    def _show_samples(self, question: Question, output: RequestOutput) -> None:
        number, title = self._number_and_title(question)
        for index, sample in enumerate(output.outputs, start=1):
            label = [number, f"sample {index}" if len(output.outputs) > 1 else ""]
            self.terminal.heading(", ".join(filter(None, label)) + title)
            self.terminal.answer(sample.text)
            self.terminal.end_answer()

    def _show_hypotheses(self, question: Question, output: BeamSearchOutput) -> None:
        number, title = self._number_and_title(question)
        if number:
            self.terminal.heading(number + title)
        for index, one in enumerate(output.sequences, start=1):
            label = ", ".join(filter(None, [number, f"hypothesis {index}"]))
            self.terminal.heading(f"{label}: score {one.score:.4f}, log-probability {one.cum_logprob:.4f}")
            self.terminal.answer(one.text)
            self.terminal.end_answer()
        num_saved = output.num_unshared_blocks - output.num_blocks
        saving = f" ({num_saved / output.num_unshared_blocks:.0%} saved by sharing)" if num_saved > 0 else ""
        self.terminal.answer(f"\nblocks {output.num_blocks} instead of {output.num_unshared_blocks}{saving}\n")

    def _number_and_title(self, question: Question) -> tuple[str, str]:
        """Say which question is answered, by its number and its beginning. Returns nothing if it is alone."""
        if len(self.questions) == 1:
            return "", ""
        return f"{question.id}", f": {excerpt(str(question.prompt))}"


class JsonAnswers(Answers):
    """Writes a line of JSON for each question as soon as it has ended."""

    def __init__(self, questions: Sequence[Question], terminal: Terminal, file: TextIO | None = None) -> None:
        """file: where the lines go; None: to stdout."""
        super().__init__(questions, terminal)
        self._file = file

    def show(self, question: Question, result: Output | str) -> None:
        asked = {"prompt" if isinstance(question.prompt, str) else "messages": question.prompt}
        content = {"error": result} if isinstance(result, str) else record_of(result)
        line = json.dumps({"id": question.id} | asked | content, allow_nan=False) + "\n"
        if self._file is None:
            self.terminal.answer(line)
        else:
            self._file.write(line)
            self._file.flush()


def error_of(output: Output) -> str | None:
    """Say what went wrong in the engine. Returns None if nothing did."""
    if isinstance(output, BeamSearchOutput):
        return output.error
    errors = [sample.stop_reason for sample in output.outputs if sample.finish_reason == "error"]
    return str(errors[0]) if errors else None


def record_of(output: Output) -> dict[str, Any]:
    """Describe an output for JSON. Times are seconds, the first three since the request arrived."""
    num_tokens = max((len(sample.token_ids) for sample in samples_of(output)), default=0)
    metrics = {"metrics": _durations(output.metrics, num_tokens)}
    counts = {"num_prompt_tokens": len(output.prompt_token_ids), "num_cached_tokens": output.num_cached_tokens}
    if isinstance(output, RequestOutput):
        return {"outputs": [_sample_record(sample) for sample in output.outputs], **counts, **metrics}
    blocks = {"num_blocks": output.num_blocks, "num_unshared_blocks": output.num_unshared_blocks}
    return {"sequences": [_hypothesis_record(one) for one in output.sequences], **counts, **blocks, **metrics}


def _sample_record(sample: CompletionOutput) -> dict[str, Any]:
    record = {
        "index": sample.index,
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "cumulative_logprob": _finite(sample.cumulative_logprob),
    }
    if sample.logprobs is not None:
        record["logprobs"] = [
            {str(token): _finite(logprob) for token, logprob in best.items()} for best in sample.logprobs
        ]
    return record


def _hypothesis_record(hypothesis: BeamHypothesis) -> dict[str, Any]:
    scores = {"cum_logprob": _finite(hypothesis.cum_logprob), "score": _finite(hypothesis.score)}
    return {"text": hypothesis.text, "token_ids": hypothesis.token_ids} | scores


def _durations(metrics: RequestMetrics | None, num_tokens: int) -> dict[str, float | None]:
    if metrics is None:
        return {}
    times = {
        "scheduled_s": metrics.queue_time,
        "first_token_s": metrics.time_to_first_token,
        "finished_s": metrics.total_time,
        "per_token_s": metrics.time_per_output_token(num_tokens),
    }
    return {name: None if seconds is None else round(seconds, 6) for name, seconds in times.items()}


def _finite(number: float) -> float | None:
    """Make a number fit for JSON, which has no infinity."""
    return float(number) if math.isfinite(number) else None
