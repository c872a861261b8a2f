"""What the engine does with memory between and inside steps: hits within a step, compaction, steps that break off."""

from __future__ import annotations

import random
from collections.abc import Callable

import mlx.nn as nn
import pytest
from helpers.tiny_models import unpaged_greedy

from mlx_paged import LLM, SamplingParams
from mlx_paged.outputs import RequestOutput

PROMPT = [(5 * i + i * i) % 97 for i in range(50)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def assert_unpaged(model: nn.Module, outputs: list[RequestOutput]) -> None:
    for output in outputs:
        for completion in output.outputs:
            expected = unpaged_greedy(model, output.prompt_token_ids, len(completion.token_ids))
            assert completion.token_ids == expected.token_ids


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_requests_that_start_in_one_step_share_what_the_first_of_them_computes(
    family: str, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model(family)
    llm = LLM.from_model(model, block_size=8, num_kv_blocks=64, check_invariants=True)
    prompts = [PROMPT, PROMPT, PROMPT[:30], [*PROMPT[:17], 3, 4, 5]]
    outputs = llm.generate(prompts, greedy(6))
    assert [output.num_cached_tokens for output in outputs] == [0, 48, 24, 16]
    assert llm.stats().num_steps == 6
    assert_unpaged(model, outputs)


def test_the_buddy_policy_compacts_when_a_long_prompt_needs_a_run(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    llm = LLM.from_model(
        model, block_size=4, num_kv_blocks=64, allocator="buddy", check_invariants=True, max_num_batched_tokens=16
    )
    manager = llm.engine.block_manager
    compactions: list[int] = []
    compact = manager.compact

    def counting() -> list[tuple[int, int]]:
        moves = compact()
        compactions.append(len(moves))
        return moves

    manager.compact = counting  # type: ignore[method-assign]
    generator = random.Random(2)
    prompts = [[generator.randrange(97) for _ in range(generator.choice([3, 9, 40, 90]))] for _ in range(40)]
    outputs = llm.generate(prompts, [greedy(generator.choice([2, 15, 30])) for _ in prompts])
    assert sum(compactions) > 0
    assert_unpaged(model, outputs)


@pytest.mark.parametrize("allocator", ["lru", "fifo", "buddy"])
def test_compacting_between_steps_changes_no_result(allocator: str, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("gemma3_text")
    llm = LLM.from_model(
        model, block_size=4, num_kv_blocks=120, allocator=allocator, check_invariants=True, max_staging="1KB"
    )
    for length, max_tokens in ((50, 4), (20, 14), (33, 9), (45, 20)):
        llm.engine.add_request(PROMPT[:length][::-1], SamplingParams(temperature=0, max_tokens=max_tokens, n=2))
    outputs, num_moved = [], 0
    while llm.engine.has_unfinished():
        outputs += llm.engine.step()
        num_moved += llm.engine.compact()
        used = 120 - llm.stats().num_free_blocks
        assert all(llm.engine.block_manager.ref_count(block_id) > 0 for block_id in range(used))
    assert num_moved > 0
    assert len(outputs) == 4
    assert_unpaged(model, outputs)


def test_a_windowed_pool_that_runs_out_is_a_scheduling_event(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("gemma3_text", sliding_window=3)
    llm = LLM.from_model(
        model, block_size=2, num_kv_blocks=6, max_num_seqs=2, max_num_batched_tokens=11, check_invariants=True
    )
    engine = llm.engine
    engine.add_request([1, 2, 3], greedy(7))
    outputs = engine.step() + engine.step()
    engine.add_request(list(range(50, 54)), greedy(3))
    engine.add_request(list(range(50, 59)), greedy(1))
    while engine.has_unfinished():
        outputs += engine.step()
    assert len(outputs) == 3
    assert_unpaged(model, outputs)


def test_a_broken_step_that_compacted_after_publishing_leaves_nothing_to_hit(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    llm = LLM.from_model(
        model, block_size=1, num_kv_blocks=8, allocator="buddy", max_num_batched_tokens=30, check_invariants=True
    )
    engine = llm.engine
    for i, max_tokens in enumerate((1, 6, 1)):
        engine.add_request([i], greedy(max_tokens))
    outputs = engine.step()
    prompts = [[10, 11], [20, 21, 22], [30]]
    for prompt in prompts:
        engine.add_request(prompt, greedy(2))

    def failing(_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", failing)
        failed = engine.step()
    assert {output.outputs[0].finish_reason for output in failed} == {"error"}
    assert [engine.block_manager.num_cached_tokens([*prompt, 0]) for prompt in prompts] == [0, 0, 0]
    while engine.has_unfinished():
        outputs += engine.step()
    assert len(outputs) + len(failed) == 6
    assert_unpaged(model, outputs)
