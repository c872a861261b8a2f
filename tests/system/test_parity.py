"""Greedy tokens and their log-probabilities are those of mlx-lm's unpaged loop, whatever the engine does on the way.

Where the unpaged model's two best tokens are closer than the tolerance, either may come first; from there on the two
texts differ, so the comparison of that prompt ends, and such ends are counted.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.nn as nn
import pytest
from helpers.budget import LONG
from helpers.near_ties import ends_in_near_tie
from helpers.tiny_models import VOCAB_SIZE, Unpaged, unpaged_greedy

from mlx_paged import LLM, SamplingParams

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "gemma3_text", "gpt_oss")
LENGTHS = (40, 300, 1, 129, 17, 63, 62, 8, 61, 33)
MAX_TOKENS = 12
MAX_NEAR_TIES = 1

TinyModel = Callable[..., nn.Module]


class Case(NamedTuple):
    """How an engine is set up and asked; `tight`: the pool has one block more than the longest request needs."""

    block_size: int
    chunk: int
    tight: bool
    asked: str

    def __str__(self) -> str:
        pool = "tight" if self.tight else "ample"
        return f"block{self.block_size}-chunk{self.chunk}-{pool}-{self.asked}"


# Every pair of settings occurs in the nine, and every setting in each three of them.
CASES = (
    (Case(8, 7, True, "together"), Case(16, 64, True, "shuffled"), Case(64, 64, False, "alone")),
    (Case(8, 64, False, "shuffled"), Case(16, 7, False, "alone"), Case(64, 64, True, "together")),
    (Case(8, 64, True, "alone"), Case(16, 64, False, "together"), Case(64, 7, True, "shuffled")),
)
# Each family meets every setting; with MLX_PAGED_LONG_TESTS=1 every pair of them.
POINTS = [
    (family, case)
    for number, family in enumerate(FAMILIES)
    for case in (itertools.chain(*CASES) if LONG else CASES[number % len(CASES)])
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(11)  # a seed with which no router of mixtral is undecided: its experts may not be near ties
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def references(tiny_model: TinyModel, prompts: list[list[int]]) -> Callable[[str], list[Unpaged]]:
    """A family's unpaged results for `prompts`, computed once."""
    known: dict[str, list[Unpaged]] = {}

    def get(family: str) -> list[Unpaged]:
        if family not in known:
            known[family] = [unpaged_greedy(tiny_model(family), prompt, MAX_TOKENS) for prompt in prompts]
        return known[family]

    return get


def make_llm(model: nn.Module, case: Case, **changes: Any) -> LLM:
    longest = -(-(max(LENGTHS) + MAX_TOKENS - 1) // case.block_size)
    num_blocks = longest + 1 if case.tight else 2 * sum(LENGTHS) // case.block_size
    config = {
        "block_size": case.block_size,
        "num_kv_blocks": num_blocks,
        "max_num_batched_tokens": case.chunk,
        "check_invariants": True,
    }
    return LLM.from_model(model, **(config | changes))


@pytest.mark.parametrize(("family", "case"), POINTS, ids=str)
def test_greedy_results_are_the_unpaged_ones(
    family: str,
    case: Case,
    tiny_model: TinyModel,
    prompts: list[list[int]],
    references: Callable[[str], list[Unpaged]],
) -> None:
    llm = make_llm(tiny_model(family), case)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0)
    order = list(range(len(prompts)))
    if case.asked == "shuffled":
        random.Random(case.block_size).shuffle(order)
    if case.asked == "alone":
        outputs = [llm.generate([prompts[i]], params)[0] for i in order]
    else:
        outputs = llm.generate([prompts[i] for i in order], params)

    expected = references(family)
    near_ties = [ends_in_near_tie(expected[i], output) for i, output in zip(order, outputs, strict=True)]
    assert sum(near_ties) <= MAX_NEAR_TIES
    stats = llm.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert (stats.num_preemptions > 0) == (case.tight and case.asked != "alone")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_hit_in_the_prefix_cache_changes_no_result(
    family: str, tiny_model: TinyModel, prompts: list[list[int]], references: Callable[[str], list[Unpaged]]
) -> None:
    llm = make_llm(tiny_model(family), Case(8, 64, tight=False, asked="alone"))
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0)
    for expect_hit in (False, True):
        output = llm.generate([prompts[1]], params)[0]
        assert (output.num_cached_tokens > 200) == expect_hit
        assert not ends_in_near_tie(references(family)[1], output)
