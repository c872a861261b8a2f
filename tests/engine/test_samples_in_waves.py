"""More samples of a prompt than can run at once: each starts when there is a row, from the blocks of the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from helpers.llms import MakeLLM, all_free, samples

from mlx_paged import LLM, SamplingParams

PROMPT = [(7 * i + i * i) % 97 for i in range(41)]


def random(n: int, max_tokens: int = 6, **values: Any) -> SamplingParams:
    return SamplingParams(n=n, seed=3, max_tokens=max_tokens, **values)


def count_computed(llm: LLM) -> Callable[[], int]:
    """How many tokens the model computes from here on."""
    run, total = llm._runner.run, 0

    def counting(inputs: Any) -> Any:
        nonlocal total
        total += inputs.token_ids.size
        return run(inputs)

    llm._runner.run = counting  # type: ignore[method-assign]
    return lambda: total


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_they_are_those_of_an_engine_in_which_all_run_at_once(
    family: str, prefix_caching: bool, tiny_model: Callable[..., nn.Module]
) -> None:
    config: dict[str, Any] = {"block_size": 8, "num_kv_blocks": 200, "check_invariants": True}
    together = LLM.from_model(tiny_model(family), **config)
    in_waves = LLM.from_model(tiny_model(family), **config, max_num_seqs=3, prefix_caching=prefix_caching)
    prompts = [PROMPT[:length] for length in (1, 2, 8, 9, 25, 41)]
    expected = together.generate(prompts, random(8))
    found = in_waves.generate(prompts, random(8))
    assert [samples(output) for output in found] == [samples(output) for output in expected]
    assert len({tuple(one) for output in found for one in samples(output)}) > 40
    assert all_free(in_waves)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("length", [40, 41])
def test_the_prompt_is_computed_once_and_its_last_token_for_each_sample(
    length: int, prefix_caching: bool, make_llm: MakeLLM
) -> None:
    llm = make_llm(max_num_seqs=2, prefix_caching=prefix_caching)
    num_computed = count_computed(llm)
    llm.generate([PROMPT[:length]], random(9))
    assert num_computed() == length + 8 + 9 * 5


def test_the_blocks_of_the_prompt_are_kept_from_those_who_wait_behind_it(make_llm: MakeLLM) -> None:
    llm = make_llm(max_num_seqs=2, num_kv_blocks=32)
    num_computed = count_computed(llm)
    others = [[i + 1] * 41 for i in range(4)]
    llm.generate([PROMPT, *others], [random(7), *[SamplingParams(temperature=0, max_tokens=2)] * 4])
    assert num_computed() == 41 + 6 + 7 * 5 + 4 * 42
    assert all_free(llm)


def test_a_prompt_is_given_up_where_a_sample_could_not_go_on_otherwise(make_llm: MakeLLM) -> None:
    expected = samples(make_llm(max_num_seqs=8).generate([PROMPT[:10]], random(7, 8))[0])
    llm = make_llm(max_num_seqs=3, num_kv_blocks=5)  # one sample fills it
    assert samples(llm.generate([PROMPT[:10]], random(7, 8))[0]) == expected
    assert all_free(llm)


def test_a_prompt_is_given_up_for_a_request_that_is_served_before_it(make_llm: MakeLLM) -> None:
    expected = samples(make_llm(max_num_seqs=8).generate([PROMPT[:10]], random(3, 4))[0])
    llm = make_llm(max_num_seqs=1, num_kv_blocks=5)
    request_id = llm.engine.add_request(PROMPT[:10], random(3, 4))
    for _ in range(3):
        llm.engine.step()
    (output,) = llm.generate([[5] * 17], SamplingParams(max_tokens=4, priority=1))  # needs all blocks
    assert len(output.outputs[0].token_ids) == 4
    finished: list[Any] = []
    while not finished:
        finished = llm.engine.step((request_id,))
    assert samples(finished[0]) == expected
    assert all_free(llm)


def test_what_comes_of_each_sample_is_streamed(make_llm: MakeLLM) -> None:
    llm = make_llm(max_num_seqs=2)
    expected = samples(make_llm(max_num_seqs=8).generate([PROMPT], random(5))[0])
    tokens: dict[int, list[int]] = {}
    for output in llm.stream(PROMPT, random(5)):
        for one in output.outputs:
            tokens.setdefault(one.index, []).extend(one.token_ids)
    assert [tokens[index] for index in range(5)] == expected


def test_a_run_can_be_closed_at_any_moment(make_llm: MakeLLM) -> None:
    llm = make_llm(max_num_seqs=2)
    for num_steps in range(1, 20):
        request_id = llm.engine.add_request(PROMPT, random(5))
        for _ in range(num_steps):
            llm.engine.step()
        output = llm.engine.abort(request_id)
        assert output is None or output.finished
        assert all_free(llm), num_steps
