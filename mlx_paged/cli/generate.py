"""`mlx-paged generate`: completions of one prompt or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlx_paged.cli.batch import durations, finite, run_batch
from mlx_paged.cli.terminal import Terminal, excerpt
from mlx_paged.outputs import CompletionOutput, RequestOutput
from mlx_paged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM


def run(
    prompts: Sequence[str],
    load: Callable[[], LLM],
    params: SamplingParams,
    *,
    system: str | None,
    raw: bool,
    as_json: bool,
    terminal: Terminal,
) -> int:
    """Answers the prompts and returns the exit code."""

    def show(position: int, result: RequestOutput) -> None:
        _show_text(terminal, position, prompts, result)

    stream = len(prompts) == 1 and params.n == 1 and not as_json
    return run_batch(
        prompts, load, params, show, _record, system=system, raw=raw, as_json=as_json, stream=stream, terminal=terminal
    )


def _show_text(terminal: Terminal, position: int, prompts: Sequence[str], result: RequestOutput) -> None:
    many = len(prompts) > 1
    for number, sample in enumerate(result.outputs, start=1):
        label = [f"{position + 1}"] if many else []
        label += [f"sample {number}"] if len(result.outputs) > 1 else []
        terminal.heading(", ".join(label) + (f": {excerpt(prompts[position])}" if many else ""))
        terminal.answer(sample.text)
        terminal.end_answer()


def _record(result: RequestOutput) -> dict[str, Any]:
    longest = max(len(sample.token_ids) for sample in result.outputs)
    return {
        "outputs": [_sample_record(sample) for sample in result.outputs],
        "num_prompt_tokens": len(result.prompt_token_ids),
        "num_cached_tokens": result.num_cached_tokens,
        "metrics": durations(result.metrics, longest),
    }


def _sample_record(sample: CompletionOutput) -> dict[str, Any]:
    record = {
        "index": sample.index,
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "cumulative_logprob": finite(sample.cumulative_logprob),
    }
    if sample.logprobs is not None:
        record["logprobs"] = [
            {str(token): finite(logprob) for token, logprob in best.items()} for best in sample.logprobs
        ]
    return record
