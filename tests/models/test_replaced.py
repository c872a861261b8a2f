"""Code of single families that is replaced: mlx-lm's own runs where no paged cache is, and limits are said."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.families import family_model
from helpers.tiny_models import VOCAB_SIZE, unpaged_greedy

from mlx_paged import LLM, ModelError, SamplingParams
from mlx_paged.models.patch import patch_model

DYNAMIC = {"type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    "family", ["afm7", "baichuan_m1", "gemma2", "gpt_bigcode", "llama4", "longcat_flash_ngram", "plamo", "plamo2"]
)
def test_a_family_with_replaced_code_gives_the_same_as_before_with_mlx_lms_own_cache(family: str) -> None:
    model, prompt = family_model(family), list(range(2, 40))
    before = unpaged_greedy(model, prompt, 3)
    patch_model(model)
    patch_model(model)
    assert unpaged_greedy(model, prompt, 3) == before
    assert model(mx.array([prompt])).shape == (1, len(prompt), VOCAB_SIZE)


@pytest.mark.parametrize(
    "family", ["afm7", "baichuan_m1", "gpt_bigcode", "llama4", "longcat_flash_ngram", "plamo", "plamo2"]
)
def test_a_family_with_replaced_code_goes_on_from_a_prefix(family: str) -> None:
    model, prompt = family_model(family), list(range(2, 55))
    reference = unpaged_greedy(model, prompt, 3)
    llm = LLM.from_model(model, block_size=8, num_kv_blocks=32, max_num_batched_tokens=16, check_invariants=True)
    params = SamplingParams(temperature=0, max_tokens=3)
    for least_cached in (0, 40):
        (output,) = llm.generate([prompt], params)
        assert output.num_cached_tokens >= least_cached
        assert output.outputs[0].token_ids == reference.token_ids


def test_dynamic_rope_scaling_still_scales_in_mlx_lm() -> None:
    model, prompt = family_model("internlm2", rope_scaling=DYNAMIC, max_position_embeddings=32), list(range(2, 60))
    before = unpaged_greedy(model, prompt, 3)
    patch_model(model, 32)
    assert unpaged_greedy(model, prompt, 3) == before


@pytest.mark.parametrize("max_model_len", [None, 33])
def test_dynamic_rope_scaling_is_refused_for_a_context_in_which_it_would_scale(max_model_len: int | None) -> None:
    model = family_model("llama", rope_scaling=DYNAMIC, max_position_embeddings=32)
    with pytest.raises(ModelError, match=r"more than 32 tokens, which can't be paged: give max_model_len=32, or less"):
        patch_model(model, max_model_len)


def test_a_context_that_a_model_with_dynamic_rope_scaling_names_is_its_limit() -> None:
    llm = LLM.from_model(family_model("llama", rope_scaling=DYNAMIC, max_position_embeddings=32), num_kv_blocks=8)
    assert llm.engine.max_model_len == 32
    (output,) = llm.generate([[5] * 30])
    assert len(output.outputs[0].token_ids) == 2


def test_a_block_size_that_does_not_divide_a_models_chunks_is_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"in chunks of 24 tokens, .* take a block_size that divides 24, got 16"):
        LLM.from_model(family_model("llama4"), block_size=16, num_kv_blocks=8)


def test_memory_is_described_by_chunks() -> None:
    llm = LLM.from_model(family_model("llama4"), block_size=8, num_kv_blocks=30, max_num_seqs=2)
    assert " blocks for chunks of 24 of 8 tokens" in llm.describe_memory()
