"""Latent attention: one row per token for all heads, found by what a model does, with mlx-lm's unpaged results."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.tiny_models import VOCAB_SIZE, make_model, unpaged_greedy

from mlx_paged import LLM, BeamSearchParams, ModelError, SamplingParams
from mlx_paged.models.latent_attention import RotaryKeys, join_queries
from mlx_paged.models.patch import patch_model

LATENT, ROTARY = 16, 8
SHAPE: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": LATENT, "qk_rope_head_dim": ROTARY, "qk_nope_head_dim": 12,
    "v_head_dim": 20, "q_lora_rank": None, "first_k_dense_replace": 3, "n_routed_experts": 4,
    "moe_intermediate_size": 32, "rope_theta": 10000.0, "rope_scaling": None, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_layer_freq": 1, "attention_bias": False,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model("deepseek_v3", **SHAPE)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    start = [rng.randrange(VOCAB_SIZE) for _ in range(70)]
    return [start[:n] + [rng.randrange(VOCAB_SIZE) for _ in range(m)] for n, m in ((0, 1), (64, 5), (70, 9), (40, 30))]


def test_a_token_takes_one_row_of_latent_and_rotated_key_in_each_layer(model: nn.Module) -> None:
    (spec, *_), windows = (patched := patch_model(model)).layers, patched.windows
    assert spec is not None and spec.value_in_key and windows == [None] * 3
    assert (spec.num_kv_heads, spec.key_dim, spec.value_dim) == (1, LATENT + ROTARY, LATENT)
    llm = LLM.from_model(model, num_kv_blocks=10, block_size=8)
    assert llm._runner.kv_cache.nbytes == 10 * 8 * 3 * (LATENT + ROTARY) * 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_blocks": 60, "max_num_batched_tokens": 16},
        {"num_kv_blocks": 15, "swap_space": "1GB", "block_size": 8},
        {"num_kv_blocks": 60, "block_size": 64, "pipelining": "off"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_batches_with_shared_prefixes_give_the_unpaged_results(
    settings: dict[str, Any], backend: str, model: nn.Module, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_PAGED_BACKEND", backend)
    monkeypatch.setattr("mlx_paged.attention.cpu.MIN_SAVED", 1)
    monkeypatch.setattr("mlx_paged.attention.cpu._MIN_KEYS_IN_PLACE", 1)
    llm = LLM.from_model(model, check_invariants=True, **settings)
    outputs = [*llm.generate(prompts, GREEDY), *llm.generate(prompts[::-1], GREEDY)[::-1]]  # then from the cache
    for prompt, output in zip(prompts * 2, outputs, strict=True):
        expected, found = unpaged_greedy(model, prompt, 12), output.outputs[0]
        assert found.token_ids == expected.token_ids
        logprobs = [step[token] for step, token in zip(found.logprobs or [], found.token_ids, strict=True)]
        assert logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert outputs[-2].num_cached_tokens > 0


def test_a_beam_of_one_and_samples_go_the_greedy_way(model: nn.Module, prompts: list[list[int]]) -> None:
    expected = unpaged_greedy(model, prompts[1], 8).token_ids
    llm = LLM.from_model(model, num_kv_blocks=60, check_invariants=True)
    (beams,) = llm.beam_search([prompts[1]], BeamSearchParams(beam_width=1, max_tokens=8))
    assert beams.sequences[0].token_ids == expected
    (output,) = llm.generate([prompts[1]], SamplingParams(temperature=0, max_tokens=8, n=3))
    assert [sample.token_ids for sample in output.outputs] == [expected] * 3


def test_what_is_no_latent_attention_is_refused_by_name(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="swaps the axes 0 and 1"):
        RotaryKeys(SimpleNamespace(), mx.float32, 4).swapaxes(0, 1)  # type: ignore[arg-type]
    queries = mx.zeros((3, 2, 1, 4))
    for rotary in (None, mx.zeros((3, 1, 1, 4))):
        with pytest.raises(ValueError, match="rotated keys"):
            join_queries(queries, 1.0, rotary)
    attention = type(model.layers[0].self_attn)
    original = attention.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        cache.update_and_fetch(mx.zeros((11, 1, 1, 4)), mx.zeros((11, 1, 1, 4)))[0].swapaxes(-1, -2)
        return original(self, x, mask, cache)

    monkeypatch.setattr(attention, "__call__", call)
    with pytest.raises(ModelError, match=r"'deepseek_v3' can't be paged.*swapaxes"):
        patch_model(model)
