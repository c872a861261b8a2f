"""What `generate` and `beam-search` share: many prompts at once through the engine, their results shown in order."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlx_paged.cli.terminal import Tally, Terminal
from mlx_paged.outputs import BeamSearchOutput, RequestMetrics, RequestOutput
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

DEFAULT_MAX_TOKENS = 256
INTERRUPTED = 130  # the exit code after Ctrl-C

Output = RequestOutput | BeamSearchOutput


def run_batch(
    prompts: Sequence[str],
    load: Callable[[], LLM],
    params: SamplingParams | BeamSearchParams,
    show_text: Callable[[int, Any], None],
    record: Callable[[Any], dict[str, Any]],
    *,
    system: str | None,
    raw: bool,
    as_json: bool,
    stream: bool = False,
    terminal: Terminal,
) -> int:
    """Answers every prompt that can be answered and returns the exit code: 1 if one could not.

    show_text: shows the output of the prompt at a position; record: what JSON says of an output. They come in the
    prompts' order, each as soon as it and those before it are there. stream: show the text of a single prompt as it
    comes instead.
    """
    # A str is what went wrong.
    results: list[Output | str | None] = [_fault(prompt, raw) for prompt in prompts]
    tally = Tally()
    num_shown = 0

    def fail(position: int, reason: str) -> None:
        results[position] = reason
        terminal.failure(reason if len(prompts) == 1 else f"prompt {position + 1}: {reason}")

    def show(position: int, result: Output | str) -> None:
        if as_json:
            content = {"error": result} if isinstance(result, str) else record(result)
            terminal.answer(json.dumps({"prompt": prompts[position]} | content, allow_nan=False) + "\n")
        elif not isinstance(result, str):
            show_text(position, result)

    def show_ready() -> int:
        """Shows the results that are next in order, from `num_shown` on."""
        position = num_shown
        while position < len(prompts) and (result := results[position]) is not None:
            if not stream:
                show(position, result)
            position += 1
        return position

    for position, result in enumerate(results):
        if isinstance(result, str):
            fail(position, result)
    if None in results:
        llm = load()
        if isinstance(params, SamplingParams) and params.n > 1 and params.is_greedy:
            terminal.note(f"the {params.n} samples will be equal: --temp 0.8 makes them differ")
        requests: dict[int, int] = {}
        for position, prompt in enumerate(prompts):
            if results[position] is None:
                try:
                    requests[submit(llm, _encode(llm, prompt, system, raw), params, stream=stream)] = position
                except ValueError as error:
                    fail(position, str(error))
        try:
            with terminal.progress_bar(len(requests)) as bar:
                num_shown = show_ready()
                while llm.engine.has_unfinished():
                    for output in llm.engine.step():
                        tally.count(output)
                        if stream and isinstance(output, RequestOutput):
                            terminal.answer("".join(sample.text for sample in output.outputs))
                        if output.finished:
                            bar.count(output)
                            position = requests[output.request_id]
                            results[position] = output
                            error_text = _error(output)
                            if error_text is not None:
                                fail(position, error_text)
                    num_shown = show_ready()
                    if terminal.talks:
                        tally.look_at_pool(llm)
                        if not stream and llm.engine.has_unfinished():
                            bar.show()
        except KeyboardInterrupt:
            terminal.end_answer()
            return INTERRUPTED
        terminal.end_answer()
        if requests:
            for line in tally.lines():
                terminal.note(line)
    else:
        show_ready()
    return 1 if any(isinstance(result, str) for result in results) else 0


def submit(
    llm: LLM, prompt: str | list[int], params: SamplingParams | BeamSearchParams, *, stream: bool = False
) -> int:
    """Adds a request and returns its id; without max_tokens it gets DEFAULT_MAX_TOKENS, or what fits."""
    if params.max_tokens is None:
        try:
            limited = dataclasses.replace(params, max_tokens=DEFAULT_MAX_TOKENS)
            return llm.engine.add_request(prompt, limited, stream=stream)
        except ValueError:
            pass
    return llm.engine.add_request(prompt, params, stream=stream)


def encode_chat(llm: LLM, messages: list[dict[str, str]]) -> list[int]:
    """The conversation's tokens. Raises ValueError where the model's template refuses it, a system message say."""
    try:
        return llm.encode_chat(messages)
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        raise


def durations(metrics: RequestMetrics | None, num_tokens: int) -> dict[str, float | None]:
    """Times for JSON, in seconds, the first three since the request arrived; num_tokens: of the longest sample."""
    if metrics is None:
        return {}
    times = {
        "scheduled_s": metrics.queue_time,
        "first_token_s": metrics.time_to_first_token,
        "finished_s": metrics.total_time,
        "per_token_s": metrics.time_per_output_token(num_tokens),
    }
    return {name: None if seconds is None else round(seconds, 6) for name, seconds in times.items()}


def finite(number: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return float(number) if math.isfinite(number) else None


def _fault(prompt: str, raw: bool) -> str | None:
    """What is wrong with a prompt before any model has seen it."""
    if not (prompt if raw else prompt.strip()):
        return "the prompt is empty"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt is not UTF-8 text"
    return None


def _error(output: Output) -> str | None:
    """What went wrong in the engine, if something did."""
    if isinstance(output, BeamSearchOutput):
        return output.error
    errors = [sample.stop_reason for sample in output.outputs if sample.finish_reason == "error"]
    return str(errors[0]) if errors else None


def _encode(llm: LLM, prompt: str, system: str | None, raw: bool) -> str | list[int]:
    if raw or not llm.has_chat_template:
        if system is not None:
            raise ValueError("--system needs a chat template, and this model has none")
        return prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    return encode_chat(llm, [*messages, {"role": "user", "content": prompt}])
