"""`mlx-paged beam-search`: the best hypotheses for one prompt or many, and the blocks that sharing saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mlx_paged.cli.batch import durations, finite, run_batch
from mlx_paged.cli.terminal import Terminal, excerpt
from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput
from mlx_paged.sampling_params import BeamSearchParams

if TYPE_CHECKING:
    from mlx_paged.llm import LLM


def run(
    prompts: Sequence[str],
    load: Callable[[], LLM],
    params: BeamSearchParams,
    *,
    system: str | None,
    raw: bool,
    as_json: bool,
    terminal: Terminal,
) -> int:
    """Searches for all prompts and returns the exit code."""

    def show(position: int, result: BeamSearchOutput) -> None:
        _show_text(terminal, position, prompts, result)

    return run_batch(prompts, load, params, show, _record, system=system, raw=raw, as_json=as_json, terminal=terminal)


def _show_text(terminal: Terminal, position: int, prompts: Sequence[str], result: BeamSearchOutput) -> None:
    many = len(prompts) > 1
    if many:
        terminal.heading(f"{position + 1}: {excerpt(prompts[position])}")
    for number, hypothesis in enumerate(result.sequences, start=1):
        label = f"{position + 1}, hypothesis {number}" if many else f"hypothesis {number}"
        terminal.heading(f"{label}: score {hypothesis.score:.4f}, log-probability {hypothesis.cum_logprob:.4f}")
        terminal.answer(hypothesis.text)
        terminal.end_answer()
    terminal.answer(f"\nblocks {result.num_blocks} instead of {result.num_unshared_blocks}{_saving(result)}\n")


def _saving(result: BeamSearchOutput) -> str:
    saved = result.num_unshared_blocks - result.num_blocks
    return f" ({saved / result.num_unshared_blocks:.0%} saved by sharing)" if saved > 0 else ""


def _record(result: BeamSearchOutput) -> dict[str, Any]:
    longest = max((len(hypothesis.token_ids) for hypothesis in result.sequences), default=0)
    return {
        "sequences": [_hypothesis_record(hypothesis) for hypothesis in result.sequences],
        "num_prompt_tokens": len(result.prompt_token_ids),
        "num_cached_tokens": result.num_cached_tokens,
        "num_blocks": result.num_blocks,
        "num_unshared_blocks": result.num_unshared_blocks,
        "metrics": durations(result.metrics, longest),
    }


def _hypothesis_record(hypothesis: BeamHypothesis) -> dict[str, Any]:
    return {
        "text": hypothesis.text,
        "token_ids": hypothesis.token_ids,
        "cum_logprob": finite(hypothesis.cum_logprob),
        "score": finite(hypothesis.score),
    }
