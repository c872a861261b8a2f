"""How large pools become where no size is given: a share of the memory, or what requests that are known need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from helpers.stub_llm import invoke

from mlx_paged import LLM, BeamSearchParams, EngineConfig, SamplingParams
from mlx_paged.runner import memory_plan
from mlx_paged.runner.memory_plan import blocks_for_requests

Requests = Sequence[tuple[int, SamplingParams | BeamSearchParams]]


def blocks_needed(requests: Requests, max_model_len: int | None = None, **config: int) -> int | None:
    return blocks_for_requests(requests, EngineConfig(block_size=512, **config), max_model_len)


@pytest.mark.parametrize(
    ("requests", "num_blocks"),
    [
        ([(512, SamplingParams(max_tokens=512))], 2 + 1),
        ([(513, SamplingParams(max_tokens=512))], 3 + 1),
        ([(1024, SamplingParams(max_tokens=512, n=3))], 2 + 3 * (1 + 1)),
        ([(1024, BeamSearchParams(max_tokens=1024, beam_width=3))], 2 + 3 * (2 + 1)),
        ([(512, SamplingParams(max_tokens=512)), (1024, SamplingParams(max_tokens=512))], 2 + 1 + 3 + 1),
    ],
)
def test_requests_need_their_prompts_and_outputs_and_a_block_for_each_sequence(
    requests: Requests, num_blocks: int
) -> None:
    assert blocks_needed(requests) == num_blocks + num_blocks % 2  # 1024 tokens are the step


def test_only_the_largest_that_run_at_once_are_counted() -> None:
    small, large = (1, SamplingParams(max_tokens=100)), (512, SamplingParams(max_tokens=512))
    assert blocks_needed([small, large, small, large], max_num_seqs=2) == 2 * 3
    assert blocks_needed([small] * 1000, max_num_seqs=4) == 4 * 2


def test_no_request_is_longer_than_the_context() -> None:
    endless = [(512, SamplingParams(max_tokens=None)), (512, SamplingParams(max_tokens=10**6))]
    assert blocks_needed(endless, max_model_len=1024) == 2 * 3
    assert blocks_needed(endless) is None


def test_known_requests_run_without_preemption_in_a_pool_of_their_size() -> None:
    prompts = [f"{start} there was a" for start in ("Once", "Long ago", "Yesterday")] * 5
    params = [SamplingParams(temperature=0, max_tokens=4 + 5 * i, n=1 + i % 2, ignore_eos=True) for i in range(15)]
    llm = LLM.for_requests(None, lambda llm: zip(prompts, params, strict=True), check_invariants=True)
    assert llm.stats().num_blocks < LLM().stats().num_blocks
    outputs = llm.generate(prompts, params)
    assert [len(output.outputs[-1].token_ids) for output in outputs] == [each.max_tokens for each in params]
    assert llm.stats().num_preemptions == 0


def test_a_size_that_is_given_and_a_share_that_is_smaller_go_before_the_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def requests(llm: LLM) -> list[tuple[str, SamplingParams]]:
        return [("Once", SamplingParams(max_tokens=9))]

    assert LLM.for_requests(None, requests).stats().num_blocks == 64
    assert LLM.for_requests(None, requests, num_kv_blocks=99).stats().num_blocks == 99
    assert LLM.for_requests(None, lambda llm: None).stats().num_blocks == LLM().stats().num_blocks
    monkeypatch.setattr(memory_plan, "CPU_SHARE", 1e-6)
    monkeypatch.setattr(memory_plan, "device_limit", lambda: (10**10, "RAM"))
    assert LLM.for_requests(None, requests).stats().num_blocks < 64


def test_one_shot_commands_take_the_memory_that_their_prompts_need() -> None:
    for command in (["generate", "-m", "9"], ["generate"], ["beam-search", "-m", "9"]):
        assert "KV cache: 64 blocks of 16 tokens" in invoke(*command, "-v", "Once").stderr
    many = invoke("generate", "-v", "-m", "9", "-n", "64", "--temp", "1", "Once").stderr
    (num_blocks,) = re.findall(r"KV cache: (\d+) blocks", many)
    assert 64 < int(num_blocks) < 64 * 4


@pytest.mark.parametrize("size", [{"num_kv_blocks": 1 << 20}, {"kv_cache_memory": "50MB"}])
def test_the_setting_that_is_to_be_lowered_is_the_one_that_was_given(
    size: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "device_limit", lambda: (60_000_000, "RAM"))
    with pytest.raises(ValueError, match=f"; lower {next(iter(size))}, or max_num_batched_tokens, which sets"):
        LLM(**size)


def test_starting_takes_no_more_memory_than_the_pool_and_the_weights() -> None:
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    llm = LLM.for_requests(None, lambda llm: [("Once", SamplingParams(max_tokens=9))])
    plan = llm._runner.plan
    assert mx.get_peak_memory() - before < 2 * (plan.kv_bytes + plan.weight_bytes) + (16 << 20)
