"""What is asked of an LLM over a tiny model, and how its answers are looked at."""

from __future__ import annotations

from collections.abc import Callable

from mlx_paged import LLM, SamplingParams
from mlx_paged.outputs import RequestOutput

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
MakeLLM = Callable[..., LLM]


def samples(output: RequestOutput) -> list[list[int]]:
    return [one.token_ids for one in output.outputs]


def all_free(llm: LLM) -> bool:
    stats = llm.stats()
    return stats.num_free_blocks == stats.num_blocks and not llm.engine.has_unfinished() and not llm._outputs
