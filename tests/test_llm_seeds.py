"""Seeds make samples repeatable, whatever else runs; without one, calls differ."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from helpers.llms import MakeLLM, all_free, samples

from mlx_paged import SamplingParams


def test_samples_of_a_seed_differ_from_each_other_and_repeat(make_llm: MakeLLM) -> None:
    llm = make_llm()
    params = SamplingParams(seed=7, n=4, max_tokens=12)
    first, again = (samples(llm.generate([3, 1, 4], params)[0]) for _ in range(2))
    assert first == again
    assert len({tuple(sample) for sample in first}) == 4
    other = samples(llm.generate([3, 1, 4], SamplingParams(seed=8, n=4, max_tokens=12))[0])
    assert not {tuple(sample) for sample in first} & {tuple(sample) for sample in other}


def test_fewer_samples_of_a_seed_are_the_first_ones(make_llm: MakeLLM) -> None:
    llm = make_llm()
    four, two = (samples(llm.generate([3, 1, 4], SamplingParams(seed=7, n=n, max_tokens=9))[0]) for n in (4, 2))
    assert two == four[:2]


@pytest.mark.parametrize(
    "config",
    [
        {"block_size": 1, "num_kv_blocks": 300},
        {"block_size": 3},
        {"block_size": 16},
        {"max_num_batched_tokens": 3},
        {"max_num_batched_tokens": 7, "block_size": 5},
        {"max_num_seqs": 3},
        {"num_kv_blocks": 7},
        {"num_kv_blocks": 7, "allocator": "fifo"},
        {"num_kv_blocks": 7, "allocator": "buddy"},
        {"num_kv_blocks": 7, "prefix_caching": False, "max_num_batched_tokens": 5},
        {"seed": 99},
    ],
    ids=str,
)
def test_seeded_tokens_do_not_depend_on_blocks_chunks_places_or_preemption(
    make_llm: MakeLLM, config: dict[str, Any]
) -> None:
    prompts = [[i + 1] * (2 + 3 * i) for i in range(5)]
    params = [SamplingParams(seed=i, n=1 + i % 3, max_tokens=6 + i) for i in range(5)]
    alone = [samples(make_llm().generate([prompt], p)[0]) for prompt, p in zip(prompts, params, strict=True)]
    llm = make_llm(**config)
    assert [samples(output) for output in llm.generate(prompts, params)] == alone
    if "num_kv_blocks" in config and config["num_kv_blocks"] == 7:
        assert llm.stats().num_preemptions > 0
    backwards = llm.generate(prompts[::-1], params[::-1])[::-1]
    assert [samples(output) for output in backwards] == alone
    assert all_free(llm)


def test_without_a_seed_successive_calls_differ_and_a_new_engine_repeats_them(make_llm: MakeLLM) -> None:
    params = SamplingParams(max_tokens=12)
    first, second = (
        [samples(llm.generate([2, 7], params)[0]) for _ in range(3)] for llm in (make_llm(seed=5), make_llm(seed=5))
    )
    assert first == second
    assert len({str(one) for one in first}) == 3
    assert samples(make_llm(seed=6).generate([2, 7], params)[0]) not in first


def test_equal_prompts_without_a_seed_are_sampled_apart(make_llm: MakeLLM) -> None:
    outputs = make_llm().generate([[2, 7]] * 6, SamplingParams(max_tokens=12))
    assert len({str(samples(output)) for output in outputs}) == 6


def test_mlx_own_random_state_is_neither_used_nor_changed(make_llm: MakeLLM) -> None:
    params = SamplingParams(seed=1, max_tokens=6)
    llm = make_llm()
    mx.random.seed(1)
    first, drawn = samples(llm.generate([2, 7], params)[0]), mx.random.uniform().item()
    mx.random.seed(1)
    assert mx.random.uniform().item() == drawn
    mx.random.seed(2)
    assert samples(llm.generate([2, 7], params)[0]) == first
