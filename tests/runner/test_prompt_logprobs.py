"""Log-probabilities of prompts, against mlx-lm's unpaged model in float64: in chunks, after hits, after preemption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.llms import SMALL, MakeLLM, all_free

from mlx_paged import SamplingParams
from mlx_paged.outputs import RequestOutput
from mlx_paged.scheduler.schedule import MAX_PROMPT_LOGITS

TWO = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2)
PLAIN = replace(TWO, prompt_logprobs=None)
PROMPTS = [[(i * 7 + number) % 90 for i in range(length)] for number, length in enumerate((29, 13, 1, 40, 2))]


@pytest.fixture
def oracle(tiny_model: Callable[..., nn.Module]) -> Callable[[list[int]], np.ndarray]:
    """float64 [num_tokens, vocab_size]: log-probabilities of what follows each token of a prompt, by mlx-lm."""
    model: Any = tiny_model("llama", **SMALL)

    def logprobs(prompt: list[int]) -> np.ndarray:
        logits = np.array(model(mx.array(prompt)[None])[0].astype(mx.float32), np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))

    return logprobs


def check(output: RequestOutput, expected: np.ndarray, k: int) -> None:
    prompt, found = output.prompt_token_ids, output.prompt_logprobs
    assert found is not None and len(found) == len(prompt) and found[0] is None
    for i, entry in enumerate(found[1:]):
        assert entry is not None and next(iter(entry)) == prompt[i + 1]
        best = np.argsort(-expected[i], kind="stable")[:k].tolist()
        assert list(entry) == [prompt[i + 1], *(token_id for token_id in best if token_id != prompt[i + 1])]
        for token_id, logprob in entry.items():
            assert logprob == pytest.approx(expected[i, token_id], abs=2e-4)


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 8}, {"pipelining": "off"}, {"pipelining": "submit"}])
def test_they_are_those_of_the_unpaged_model_whole_or_in_chunks(
    make_llm: MakeLLM, oracle: Callable[[list[int]], np.ndarray], config: dict[str, Any]
) -> None:
    llm = make_llm(**config)
    others = [PLAIN if i % 2 else replace(TWO, prompt_logprobs=i) for i in range(len(PROMPTS))]
    for params in ([TWO] * len(PROMPTS), others):
        outputs = llm.generate(PROMPTS, params)
        assert [o.outputs[0].token_ids for o in outputs] == [
            o.outputs[0].token_ids for o in llm.generate(PROMPTS, PLAIN)
        ]
        for output, asked in zip(outputs, params, strict=True):
            if asked.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                check(output, oracle(output.prompt_token_ids), asked.prompt_logprobs)
    assert all_free(llm)


def test_a_prompt_that_is_cached_is_computed_anew_and_cached_for_others(
    make_llm: MakeLLM, oracle: Callable[[list[int]], np.ndarray]
) -> None:
    llm = make_llm()
    prompt = PROMPTS[3]
    llm.generate([prompt], PLAIN)
    (output,) = llm.generate([prompt], TWO)
    assert output.num_cached_tokens == 0
    check(output, oracle(prompt), 2)
    assert llm.generate([prompt], PLAIN)[0].num_cached_tokens == 36
    fresh = make_llm()
    fresh.generate([prompt], TWO)
    assert fresh.generate([prompt], PLAIN)[0].num_cached_tokens == 36


@pytest.mark.parametrize("n, rows", [(3, 8), (5, 2)])
def test_samples_and_streams_have_them_too(
    make_llm: MakeLLM, oracle: Callable[[list[int]], np.ndarray], n: int, rows: int
) -> None:
    llm = make_llm(max_num_seqs=rows, max_num_batched_tokens=8)
    prompt = PROMPTS[0]
    (output,) = llm.generate([prompt], replace(TWO, n=n, temperature=1, seed=3))
    check(output, oracle(prompt), 2)
    streamed = list(llm.stream(prompt, TWO))
    assert len(streamed) > 1
    for output in streamed:
        check(output, oracle(prompt), 2)
    assert all_free(llm)


@pytest.mark.parametrize("config", [{}, {"swap_space": "1MB"}])
def test_who_loses_its_blocks_in_the_middle_of_its_prompt_goes_on_with_what_is_missing(
    make_llm: MakeLLM, oracle: Callable[[list[int]], np.ndarray], config: dict[str, Any]
) -> None:
    llm = make_llm(num_kv_blocks=22, max_num_batched_tokens=6, **config)
    params = [replace(PLAIN, max_tokens=40)] * 2 + [replace(TWO, max_tokens=30)] * 3
    outputs = llm.generate([[1, 2], [3, 4], *[PROMPTS[i] for i in (0, 3, 0)]], params)
    assert llm.stats().num_preemptions > 0
    for output in outputs[2:]:
        check(output, oracle(output.prompt_token_ids), 2)
    assert all_free(llm)


def test_no_step_computes_more_rows_of_logits_than_there_is_memory_for(
    make_llm: MakeLLM, oracle: Callable[[list[int]], np.ndarray]
) -> None:
    llm = make_llm(num_kv_blocks=400)
    most, run = 0, llm._runner.run

    def watched(inputs: Any) -> mx.array:
        nonlocal most
        logits = run(inputs)
        most = max(most, logits.shape[0])
        return logits

    llm._runner.run = watched  # type: ignore[method-assign]
    prompts = [[(7 * i + number) % 90 for i in range(300)] for number in range(3)]
    for output in llm.generate(prompts, TWO):
        check(output, oracle(output.prompt_token_ids), 2)
    assert most <= MAX_PROMPT_LOGITS + 8


def test_nobody_else_pays_for_them(make_llm: MakeLLM) -> None:
    llm = make_llm()
    rows, run = [], llm._runner.run

    def watched(inputs: Any) -> mx.array:
        rows.append(len(logits := run(inputs)))
        return logits

    llm._runner.run = watched  # type: ignore[method-assign]
    llm.generate(PROMPTS, PLAIN)
    assert max(rows) <= len(PROMPTS)
