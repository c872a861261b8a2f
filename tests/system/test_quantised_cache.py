"""Whole engines over quantised K and V: the answers of mlx-lm over rounded ones, whatever happens on the way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import tiny_models
from helpers.families import family_model
from helpers.llms import samples
from helpers.tiny_models import VOCAB_SIZE, Unpaged, make_model, unpaged_greedy
from mlx_lm.models.cache import make_prompt_cache

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.cache.block_mover import BlockMover
from mlx_paged.outputs import RequestOutput

LENGTHS = (40, 130, 1, 61, 17)
MAX_TOKENS = 10
TOLERANCE = 0.05  # of log-probabilities: another order of adding changes last bits, and one of those a code

TinyModel = Callable[..., nn.Module]

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "mixtral": {"hidden_size": 128},
    "gemma3_text": {},
    "gpt_oss": {},
}
KINDS = {"int8": (8, 8), "k8v4": (8, 4), "fp8": (0, 0)}
CASES = [
    ("qwen3", "int8", {"block_size": 8, "max_num_batched_tokens": 7}, True),
    ("qwen3", "k8v4", {"block_size": 8, "max_num_batched_tokens": 64}, True),
    ("mixtral", "int8", {"block_size": 16, "max_num_batched_tokens": 64}, False),
    ("gemma3_text", "k8v4", {"block_size": 8, "max_num_batched_tokens": 16}, True),
    ("gemma3_text", "fp8", {"block_size": 64, "max_num_batched_tokens": 256}, False),
    ("gpt_oss", "fp8", {"block_size": 8, "max_num_batched_tokens": 33}, True),
    ("gpt_oss", "int8", {"block_size": 32, "max_num_batched_tokens": 256}, False),
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def rounded(numbers: mx.array, bits: int) -> mx.array:
    """What K or V in heads of 32 numbers are once they were quantised."""
    if bits:
        return mx.dequantize(*mx.quantize(numbers, 32, bits), 32, bits)
    scales = mx.abs(numbers).max(axis=-1, keepdims=True) / 448
    return mx.from_fp8(mx.to_fp8(numbers / scales), numbers.dtype) * scales


def unpaged(model: nn.Module, prompt: list[int], kind: str, patches: pytest.MonkeyPatch) -> Unpaged:
    """mlx-lm's loop, over its own caches, which get rounded K and V."""

    def make_caches(model: nn.Module) -> list[Any]:
        caches = make_prompt_cache(model)
        for cache in caches:
            cache.update_and_fetch = lambda k, v, put=cache.update_and_fetch: put(
                *(rounded(each, bits) for each, bits in zip((k, v), KINDS[kind], strict=True))
            )
        return list(caches)

    patches.setattr(tiny_models, "make_prompt_cache", make_caches)
    return unpaged_greedy(model, prompt, MAX_TOKENS)


def check_against(reference: Unpaged, output: RequestOutput) -> bool:
    """Fails unless an output is the reference, up to a near tie at least. Returns whether it is to its end."""
    (sample,) = output.outputs
    for i, (token, logprobs) in enumerate(zip(sample.token_ids, sample.logprobs or [], strict=True)):
        assert logprobs[token] == pytest.approx(reference.logprobs[i], abs=TOLERANCE), f"token {i}"
        if token != reference.token_ids[i]:
            assert reference.margins[i] < TOLERANCE, f"token {i}"
            return False
    return True


@pytest.mark.parametrize(("family", "kind", "config", "tight"), CASES)
def test_greedy_results_are_those_over_rounded_keys_and_values(
    family: str,
    kind: str,
    config: dict[str, int],
    tight: bool,
    tiny_model: TinyModel,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(family, **FAMILIES[family])
    longest = -(-(max(LENGTHS) + MAX_TOKENS) // config["block_size"])
    num_blocks = longest + 1 if tight else 2 * sum(LENGTHS) // config["block_size"]
    llm = LLM.from_model(model, num_kv_blocks=num_blocks, kv_cache_dtype=kind, check_invariants=True, **config)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0))
    whole = [
        check_against(unpaged(model, prompt, kind, monkeypatch), output)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    assert sum(whole) >= len(prompts) - 1, "near ties are rare"
    assert llm.stats().num_preemptions > 0 or not tight


def test_weights_may_be_quantised_too(prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3")
    nn.quantize(model, group_size=32, bits=8)
    llm = LLM.from_model(model, num_kv_blocks=64, kv_cache_dtype="int8")
    output = llm.generate([prompts[0]], SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0))[0]
    assert check_against(unpaged(model, prompts[0], "int8", monkeypatch), output)


@pytest.mark.parametrize("family", ["qwen3_next", "llama4"])
def test_states_and_chunks_of_attention_are_as_they_were_beside_it(family: str, prompts: list[list[int]]) -> None:
    model = family_model(family)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    config: dict[str, Any] = {"num_kv_blocks": 96, "block_size": 8, "kv_cache_dtype": "fp8", "check_invariants": True}
    alone = [samples(LLM.from_model(model, **config).generate(prompt, params)[0]) for prompt in prompts]
    llm = LLM.from_model(model, max_num_batched_tokens=48, **config)
    assert list(map(samples, llm.generate(prompts, params))) == alone


def test_beams_and_samples_are_the_same_in_other_blocks_and_another_batch(
    tiny_model: TinyModel, prompts: list[list[int]]
) -> None:
    answers = []
    for block_size, others in ((8, []), (32, prompts[2:])):
        llm = LLM.from_model(
            tiny_model("qwen3"),
            num_kv_blocks=640 // block_size,
            block_size=block_size,
            kv_cache_dtype="k8v4",
            check_invariants=True,
        )
        beams = llm.beam_search([prompts[0], *others], BeamSearchParams(beam_width=3, max_tokens=8))[0]
        drawn = llm.generate([prompts[0], *others], SamplingParams(n=3, max_tokens=8, seed=4))[0]
        answers.append(([beam.token_ids for beam in beams.sequences], samples(drawn)))
        assert llm.stats().num_cow_copies > 0
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_swapped_comes_back_as_it_was(
    kind: str, tiny_model: TinyModel, tmp_path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockMover, "round_trip_s", None)  # however long it takes to move what is so small
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    config: dict[str, Any] = {"block_size": 4, "kv_cache_dtype": kind, "check_invariants": True}
    many = [prompt[:40] for prompt in prompts[:2]] + [prompts[3][:40], prompts[4]]
    expected = LLM.from_model(tiny_model("qwen3"), num_kv_blocks=200, **config).generate(many, params)
    llm = LLM.from_model(tiny_model("qwen3"), num_kv_blocks=42, swap_space=tmp_path / "swap", **config)
    assert list(map(samples, llm.generate(many, params))) == list(map(samples, expected))
    stats = llm.stats()
    assert stats.num_preemptions > 0 and stats.num_swapped_blocks > 0


def test_saved_prompts_are_found_by_the_next_run_with_the_same_kind_of_cache_alone(
    tiny_model: TinyModel, tmp_path: Path, prompts: list[list[int]]
) -> None:
    answers: dict[str | None, list[list[int]]] = {}
    for kind in ("int8", "k8v4", None, "int8", "k8v4", None):
        llm = LLM.from_model(tiny_model("qwen3"), num_kv_blocks=64, kv_cache_dtype=kind, prefix_cache_dir=tmp_path)
        answer = samples(llm.generate(prompts[1], SamplingParams(temperature=0, max_tokens=8))[0])
        hits = llm.stats().prefix_hit_tokens
        assert hits == (128 if kind in answers else 0)
        assert answers.setdefault(kind, answer) == answer
        del llm
    assert len(list(tmp_path.iterdir())) >= 3


def test_an_output_has_its_form(tiny_model: TinyModel, tokenizer: Any) -> None:
    model = tiny_model("qwen3", vocab_size=len(tokenizer))
    llm = LLM.from_model(model, tokenizer, num_kv_blocks=64, kv_cache_dtype="int8")
    schema = {"type": "object", "properties": {"name": {"enum": ["Mia", "Tom"]}}, "required": ["name"]}
    params = SamplingParams(max_tokens=60, json_schema=schema | {"additionalProperties": False}, seed=1)
    assert json.loads(llm.generate("A name:", params)[0].outputs[0].text)["name"] in ("Mia", "Tom")


def test_a_step_copies_no_pool_of_codes(tiny_model: TinyModel) -> None:
    llm = LLM.from_model(tiny_model("qwen3"), num_kv_blocks=16384, max_num_batched_tokens=32, kv_cache_dtype="int8")
    params = SamplingParams(temperature=0, max_tokens=10, n=2)
    llm.generate([[1, 2, 3], [4] * 40], params)
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before, pool_bytes = mx.get_active_memory(), llm.stats().kv_bytes // 12  # K's or V's codes of a layer, and more
    llm.generate([[5, 2, 3], [6] * 40], params)
    assert mx.get_peak_memory() - before < pool_bytes / 2


def test_the_line_of_the_start_and_the_arithmetic_count_every_byte(tiny_model: TinyModel) -> None:
    llm = LLM.from_model(tiny_model("qwen3"), num_kv_blocks=64, kv_cache_dtype="k8v4")
    per_token = 3 * 2 * (32 + 2 * 4 + 32 // 2 + 2 * 4)
    assert llm.stats().kv_bytes == 64 * 16 * per_token
    assert f"64 blocks of 16 tokens in k8v4, 393 KB ({per_token} B per token)" in llm.describe_memory()
