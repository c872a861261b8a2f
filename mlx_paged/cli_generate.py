"""`mlx-paged generate`: many prompts at once through the engine, their answers shown in order."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_paged.outputs import CompletionOutput, RequestMetrics, RequestOutput
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.terminal import Tally, Terminal, excerpt

if TYPE_CHECKING:
    from mlx_paged.llm import LLM

DEFAULT_MAX_TOKENS = 256
INTERRUPTED = 130  # the exit code after Ctrl-C


def run(
    prompts: list[str],
    load: Callable[[], LLM],
    params: SamplingParams,
    *,
    system: str | None,
    raw: bool,
    as_json: bool,
    terminal: Terminal,
) -> int:
    """Answers every prompt that can be answered and returns the exit code: 1 if one could not."""
    show = _show_json if as_json else _show_text
    stream = len(prompts) == 1 and params.n == 1 and not as_json
    results: list[RequestOutput | str | None] = [_fault(prompt, raw) for prompt in prompts]  # a str: what went wrong
    tally = Tally()
    num_shown = 0

    def fail(position: int, reason: str) -> None:
        results[position] = reason
        terminal.failure(reason if len(prompts) == 1 else f"prompt {position + 1}: {reason}")

    def show_ready() -> int:
        """Shows the results that are next in order, from `num_shown` on."""
        position = num_shown
        while position < len(prompts) and (result := results[position]) is not None:
            if not stream:
                show(terminal, position, prompts, result)
            position += 1
        return position

    for position, result in enumerate(results):
        if isinstance(result, str):
            fail(position, result)
    if None in results:
        llm = load()
        if params.n > 1 and params.is_greedy:
            terminal.note(f"the {params.n} samples will be equal: --temp 0.8 makes them differ")
        requests: dict[int, int] = {}
        for position, prompt in enumerate(prompts):
            if results[position] is None:
                try:
                    requests[submit(llm, _encode(llm, prompt, system, raw), params, stream=stream)] = position
                except ValueError as error:
                    fail(position, str(error))
        try:
            num_shown = show_ready()
            while llm.engine.has_unfinished():
                for output in llm.engine.step():
                    tally.count(output)
                    if stream:
                        terminal.answer("".join(sample.text for sample in output.outputs))
                    if output.finished:
                        position = requests[output.request_id]
                        results[position] = output
                        errors = [sample.stop_reason for sample in output.outputs if sample.finish_reason == "error"]
                        if errors:
                            fail(position, str(errors[0]))
                num_shown = show_ready()
                if terminal.talks:
                    tally.look_at_pool(llm)
                    if not stream:
                        done = sum(result is not None for result in results)
                        terminal.progress(f"{done} of {len(prompts)} prompts, {tally.generated_tokens} tokens")
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


def _fault(prompt: str, raw: bool) -> str | None:
    """What is wrong with a prompt before any model has seen it."""
    if not (prompt if raw else prompt.strip()):
        return "the prompt is empty"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return "the prompt is not UTF-8 text"
    return None


def _encode(llm: LLM, prompt: str, system: str | None, raw: bool) -> str | list[int]:
    if raw or not llm.has_chat_template:
        if system is not None:
            raise ValueError("--system needs a chat template, and this model has none")
        return prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    return encode_chat(llm, [*messages, {"role": "user", "content": prompt}])


def _show_text(terminal: Terminal, position: int, prompts: list[str], result: RequestOutput | str) -> None:
    if isinstance(result, str):
        return
    many = len(prompts) > 1
    for number, sample in enumerate(result.outputs, start=1):
        label = [f"{position + 1}"] if many else []
        label += [f"sample {number}"] if len(result.outputs) > 1 else []
        terminal.heading(", ".join(label) + (f": {excerpt(prompts[position])}" if many else ""))
        terminal.answer(sample.text)
        terminal.end_answer()


def _show_json(terminal: Terminal, position: int, prompts: list[str], result: RequestOutput | str) -> None:
    record: dict[str, Any] = {"prompt": prompts[position]}
    if isinstance(result, str):
        record["error"] = result
    else:
        record |= {
            "outputs": [_sample_record(sample) for sample in result.outputs],
            "num_prompt_tokens": len(result.prompt_token_ids),
            "num_cached_tokens": result.num_cached_tokens,
            "metrics": _durations(result.metrics),
        }
    terminal.answer(json.dumps(record, allow_nan=False) + "\n")


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


def _durations(metrics: RequestMetrics | None) -> dict[str, float | None]:
    """Seconds since the request arrived: the moments themselves mean nothing outside this process."""
    if metrics is None:
        return {}
    moments = {
        "scheduled_s": metrics.first_scheduled_time,
        "first_token_s": metrics.first_token_time,
        "finished_s": metrics.finished_time,
    }
    return {name: None if at is None else round(at - metrics.arrival_time, 6) for name, at in moments.items()}


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return float(number) if math.isfinite(number) else None


def submit(llm: LLM, prompt: str | list[int], params: SamplingParams, *, stream: bool = False) -> int:
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
