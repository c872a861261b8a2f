"""Engines of tiny random models: what is asked of them, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_paged import SamplingParams
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import RequestOutput

END = 4  # the demo tokenizer's end token
GREEDY = SamplingParams(temperature=0, max_tokens=6)
MakeEngine = Callable[..., Engine]


def run(engine: Engine, most_steps: int = 500) -> dict[int, RequestOutput]:
    """Step until nothing is left; the finished outputs by request id."""
    finished = {}
    for _ in range(most_steps):
        if not engine.has_unfinished():
            return finished
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    raise AssertionError("the engine does not come to an end")


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def complete(engine: Engine, prompt: Any, params: SamplingParams) -> RequestOutput:
    request_id = engine.add_request(prompt, params)
    return run(engine)[request_id]


def is_idle(engine: Engine) -> bool:
    """Nothing queued, nothing held: every block free and every row of the batch given back."""
    stats = engine.stats()
    return (
        not engine.has_unfinished()
        and stats.num_free_blocks == stats.num_blocks
        and stats.kv_tokens == 0
        and stats.kv_waste == 0
        and engine.step() == []
    )


def steered(*tokens: int, **values: Any) -> SamplingParams:
    """Greedy parameters that leave only `tokens` to choose among."""
    return SamplingParams(temperature=0, logit_bias=dict.fromkeys(tokens, 1e4), **values)
