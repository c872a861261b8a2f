"""`mlx-paged generate` and `mlx-paged beam-search`: many prompts at once, their answers in the prompts' order."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mlx_paged.cli.loading import complete_params
from mlx_paged.cli.options import DEFAULT_MAX_TOKENS, PromptArguments
from mlx_paged.cli.terminal import INTERRUPTED, RunSummary, Terminal, excerpt, samples_of
from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput, CompletionOutput, Output, RequestMetrics, RequestOutput
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM
    from mlx_paged.request import Request

Params = SamplingParams | BeamSearchParams


def answer_prompts(
    prompts: PromptArguments, load: Callable[[], LLM], params: Params, terminal: Terminal, given: Collection[str] = ()
) -> int:
    """Answer every prompt that can be answered. Returns the exit code: 1 if one could not.

    load: called if there is a prompt to answer. given: the names of the parameters that are not the model's to decide.
    A single text is shown as it comes. Raises click.UsageError as
    `prompts.read` does.
    """
    texts = prompts.read()
    answers = _Answers(texts, terminal, as_json=prompts.as_json)
    for position, text in enumerate(texts):
        if (reason := _invalid_prompt(text, prompts.raw)) is not None:
            answers.fail(position, reason)
    if None in answers.results:
        llm = load()
        params = complete_params(params, given, llm, terminal)
        stream = isinstance(params, SamplingParams) and params.n == len(texts) == 1 and not prompts.as_json
        if isinstance(params, SamplingParams) and params.n > 1 and params.is_greedy:
            terminal.note(f"the {params.n} samples will be equal: --temp 0.8 makes them differ")
        requests: dict[int, Request] = {}  # by the position of the prompt
        for position, text in enumerate(texts):
            if answers.results[position] is None:
                try:
                    prompt = _encode(llm, text, prompts.system, prompts.raw)
                    requests[position] = make_request(llm, prompt, params, stream=stream)
                except ValueError as error:
                    answers.fail(position, str(error))
        try:
            _run(llm, requests, answers, terminal, stream=stream)
        except KeyboardInterrupt:
            terminal.end_answer()
            return INTERRUPTED
    else:
        answers.show_ready()
    return 1 if any(isinstance(result, str) for result in answers.results) else 0


def make_request(llm: LLM, prompt: str | list[int], params: Params, *, stream: bool = False) -> Request:
    """Make a request; without max_tokens it gets DEFAULT_MAX_TOKENS, or what fits if that is less."""
    if params.max_tokens is None:
        try:
            limited = dataclasses.replace(params, max_tokens=DEFAULT_MAX_TOKENS)
            return llm.engine.make_request(prompt, limited, stream=stream)
        except ValueError:
            pass
    return llm.engine.make_request(prompt, params, stream=stream)


def _run(llm: LLM, requests: dict[int, Request], answers: _Answers, terminal: Terminal, *, stream: bool) -> None:
    """Run requests, show their outputs and what they took. stream: there is one, shown as it comes."""
    summary = RunSummary()
    positions: dict[int, int] = {}  # by request id
    with terminal.progress_bar(len(requests)) as bar, closing(llm.run(list(requests.values()))) as outputs:
        answers.show_ready()
        if requests and not stream:
            bar.show()
        for output in outputs:
            positions = positions or {request.request_id: position for position, request in requests.items()}
            summary.count(output)
            if stream and isinstance(output, RequestOutput):
                terminal.answer("".join(sample.text for sample in output.outputs))
            if output.finished:
                bar.count(output)
                answers.finish(positions[output.request_id], output)
            if not stream:
                answers.show_ready()
                if None in answers.results:
                    bar.show()
    terminal.end_answer()
    if requests and terminal.shows_notes:
        terminal.note(*summary.lines(llm))


class _Answers:
    """Shows the answers to prompts in the prompts' order, each as soon as it and those before it are there."""

    def __init__(self, prompts: Sequence[str], terminal: Terminal, *, as_json: bool) -> None:
        self.results: list[Output | str | None] = [None] * len(prompts)
        """Of each prompt its output, or why there is none; None while it is not known."""
        self._prompts = prompts
        self._terminal = terminal
        self._as_json = as_json
        self._num_shown = 0

    def fail(self, position: int, reason: str) -> None:
        """Say why a prompt has no answer."""
        self.results[position] = reason
        is_alone = len(self.results) == 1
        self._terminal.failure(reason if is_alone else f"prompt {position + 1}: {reason}")

    def finish(self, position: int, output: Output) -> None:
        """Take the output of a prompt, or what went wrong in the engine."""
        if (error := error_of(output)) is not None:
            self.fail(position, error)
        else:
            self.results[position] = output

    def show_ready(self) -> None:
        """Show the results that are next in order."""
        while self._num_shown < len(self.results) and (result := self.results[self._num_shown]) is not None:
            if self._as_json:
                content = {"error": result} if isinstance(result, str) else _record(result)
                line = json.dumps({"prompt": self._prompts[self._num_shown]} | content, allow_nan=False)
                self._terminal.answer(line + "\n")
            elif isinstance(result, BeamSearchOutput):
                self._show_hypotheses(result)
            elif isinstance(result, RequestOutput):
                self._show_samples(result)
            self._num_shown += 1

    def _show_samples(self, output: RequestOutput) -> None:
        number, title = self._number_and_title()
        for index, sample in enumerate(output.outputs, start=1):
            label = [number, f"sample {index}" if len(output.outputs) > 1 else ""]
            self._terminal.heading(", ".join(filter(None, label)) + title)
            self._terminal.answer(sample.text)
            self._terminal.end_answer()

    def _show_hypotheses(self, output: BeamSearchOutput) -> None:
        number, title = self._number_and_title()
        if number:
            self._terminal.heading(number + title)
        for index, one in enumerate(output.sequences, start=1):
            label = ", ".join(filter(None, [number, f"hypothesis {index}"]))
            self._terminal.heading(f"{label}: score {one.score:.4f}, log-probability {one.cum_logprob:.4f}")
            self._terminal.answer(one.text)
            self._terminal.end_answer()
        num_saved = output.num_unshared_blocks - output.num_blocks
        saving = f" ({num_saved / output.num_unshared_blocks:.0%} saved by sharing)" if num_saved > 0 else ""
        self._terminal.answer(f"\nblocks {output.num_blocks} instead of {output.num_unshared_blocks}{saving}\n")

    def _number_and_title(self) -> tuple[str, str]:
        """Say which prompt is shown, by its number and its beginning. Returns nothing if it is alone."""
        if len(self.results) == 1:
            return "", ""
        return f"{self._num_shown + 1}", f": {excerpt(self._prompts[self._num_shown])}"


def _record(output: Output) -> dict[str, Any]:
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


def _invalid_prompt(prompt: str, raw: bool) -> str | None:
    """Say what is wrong with a prompt before any model has seen it. Returns None if nothing is."""
    if not (prompt if raw else prompt.strip()):
        return "the prompt is empty"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt is not UTF-8 text"
    return None


def error_of(output: Output) -> str | None:
    """Say what went wrong in the engine. Returns None if nothing did."""
    if isinstance(output, BeamSearchOutput):
        return output.error
    errors = [sample.stop_reason for sample in output.outputs if sample.finish_reason == "error"]
    return str(errors[0]) if errors else None


def _encode(llm: LLM, prompt: str, system: str | None, raw: bool) -> str | list[int]:
    """Put a prompt as a model takes it: as a conversation in its chat template, or as it is."""
    if raw or not llm.has_chat_template:
        if system is not None:
            raise ValueError("--system needs a chat template, and this model has none")
        return prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    return llm.encode_chat([*messages, {"role": "user", "content": prompt}])
