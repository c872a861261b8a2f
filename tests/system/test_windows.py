"""Models with sliding windows in a whole engine: what it holds, and that results stay those of mlx-lm."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from helpers.block_contents import most_blocks
from helpers.near_ties import ends_in_near_tie
from helpers.tiny_models import VOCAB_SIZE, Unpaged, unpaged_greedy

from mlx_paged import LLM, SamplingParams
from mlx_paged.blocks.block_manager import NO_BLOCK
from mlx_paged.blocks.cache_groups import blocks_for_window
from mlx_paged.blocks.free_lists import POLICIES

TinyModel = Callable[..., nn.Module]
FAMILIES = ("gemma3_text", "gpt_oss")
WINDOW = 24
MAX_TOKENS = 30
LENGTHS = (70, 5, 33, 41)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def references(tiny_model: TinyModel, prompts: list[list[int]]) -> dict[str, list[Unpaged]]:
    return {family: [unpaged_greedy(tiny_model(family), p, MAX_TOKENS) for p in prompts] for family in FAMILIES}


@pytest.mark.parametrize("allocator", sorted(POLICIES))
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_holds_no_more_than_the_windows_and_gives_the_unpaged_results(
    family: str,
    block_size: int,
    allocator: str,
    tiny_model: TinyModel,
    prompts: list[list[int]],
    references: dict[str, list[Unpaged]],
) -> None:
    llm = LLM.from_model(
        tiny_model(family),
        block_size=block_size,
        num_kv_blocks=20 * 8 // block_size,  # of the 36 that all four would fill with blocks of 8
        max_num_batched_tokens=48,
        max_num_seqs=4,
        allocator=allocator,
        check_invariants=True,
    )
    full, windowed = llm.engine.cache_groups.managers
    assert (full.window, windowed.window) == (None, WINDOW)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0)
    request_ids = [llm.engine.add_request(prompt, params) for prompt in prompts]
    outputs = {}
    most_held = 0
    while llm.engine.has_unfinished():
        outputs |= {output.request_id: output for output in llm.engine.step()}
        for seq_id in windowed.seq_ids:
            num_held = sum(block_id != NO_BLOCK for block_id in windowed.block_table(seq_id))
            assert num_held <= most_blocks(WINDOW, block_size)
            most_held = max(most_held, num_held)
    assert most_held >= WINDOW // block_size
    assert llm.stats().num_preemptions > 0
    assert windowed.num_free_blocks == windowed.num_blocks
    near_ties = [
        ends_in_near_tie(reference, outputs[request_id])
        for reference, request_id in zip(references[family], request_ids, strict=True)
    ]
    assert sum(near_ties) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_compaction_between_steps_changes_no_result(
    family: str, tiny_model: TinyModel, prompts: list[list[int]], references: dict[str, list[Unpaged]]
) -> None:
    llm = LLM.from_model(
        tiny_model(family), block_size=8, num_kv_blocks=64, max_num_batched_tokens=48, check_invariants=True
    )
    windowed = llm.engine.cache_groups.managers[1]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0)
    request_ids = [llm.engine.add_request(prompt, params) for prompt in prompts]
    outputs = {}
    num_moved = 0
    while llm.engine.has_unfinished():
        outputs |= {output.request_id: output for output in llm.engine.step()}
        num_moved += llm.engine.compact()
        used = {block_id for seq_id in windowed.seq_ids for block_id in windowed.block_table(seq_id)} - {NO_BLOCK}
        assert used == set(range(len(used)))
    assert num_moved > 0
    near_ties = [
        ends_in_near_tie(reference, outputs[request_id])
        for reference, request_id in zip(references[family], request_ids, strict=True)
    ]
    assert sum(near_ties) <= 1


@pytest.mark.parametrize(("family", "num_full", "num_windowed"), [("gemma3_text", 1, 2), ("gpt_oss", 2, 2)])
def test_the_pools_of_windowed_layers_are_smaller_and_leave_room_for_more_blocks(
    family: str, num_full: int, num_windowed: int, tiny_model: TinyModel
) -> None:
    limits: dict[str, Any] = {"block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    layer_block_bytes = 8 * 2 * (32 + 32) * 4  # block_size x KV heads x (K + V) x float32
    cap = blocks_for_window(WINDOW, 8, 4, 64)
    llm = LLM.from_model(tiny_model(family), num_kv_blocks=200, **limits)
    assert [manager.num_blocks for manager in llm.engine.cache_groups.managers] == [200, cap]
    assert llm.stats().kv_bytes == layer_block_bytes * (num_full * 200 + num_windowed * cap)
    assert llm.stats().kv_bytes < layer_block_bytes * (num_full + num_windowed) * 200
    assert f"200 blocks and {cap} blocks for windows of {WINDOW}" in llm.describe_memory()

    small = LLM.from_model(tiny_model(family), num_kv_blocks=5, **limits)
    assert [manager.num_blocks for manager in small.engine.cache_groups.managers] == [5, 5]

    budget = 150 * layer_block_bytes * (num_full + num_windowed)  # without groups: 150 blocks
    in_bytes = LLM.from_model(tiny_model(family), kv_cache_memory=budget, **limits)
    assert in_bytes.stats().kv_bytes <= budget
    assert in_bytes.stats().num_blocks == (budget // layer_block_bytes - num_windowed * cap) // num_full > 150
