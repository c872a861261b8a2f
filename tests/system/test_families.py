"""Each family that the registry lists: a tiny random model of it gives its unpaged results, or is refused by name."""

from __future__ import annotations

import pathlib
import random
from typing import Any

import mlx_lm.models
import mlx_lm.utils
import pytest
from helpers.families import COMPARED_WITHOUT_CACHE, MATCHING, NOT_BUILT, OTHER_FORMS, REFUSED, family_model
from helpers.metal_families import use_plain_kernels
from helpers.tiny_models import VOCAB_SIZE, unpaged_greedy

from mlx_paged import LLM, ModelError, SamplingParams
from mlx_paged.models import registry
from mlx_paged.models.patch import patch_model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(pytest.param(family, {}, id=family) for family in MATCHING),
        *(pytest.param(*form, id=name) for name, form in OTHER_FORMS.items()),
    ],
)
def test_a_listed_family_gives_its_unpaged_results(
    family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_plain_kernels(family, monkeypatch)
    model = family_model(family, **changes)
    random.seed(1)
    prompts = [[random.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 17, 41)]
    with_cache = family not in COMPARED_WITHOUT_CACHE
    references = [unpaged_greedy(model, prompt, 4, with_cache=with_cache) for prompt in prompts]
    assert len({round(logprob, 3) for reference in references for logprob in reference.logprobs}) > 6

    llm = LLM.from_model(
        model, block_size=8, num_kv_blocks=16, max_num_batched_tokens=16, check_invariants=True, prefix_caching=False
    )
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, logprobs=0))
    for reference, output in zip(references, outputs, strict=True):
        found = output.outputs[0]
        assert found.token_ids == reference.token_ids
        logprobs = [step[token] for step, token in zip(found.logprobs or [], found.token_ids, strict=True)]
        assert logprobs == pytest.approx(reference.logprobs, abs=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_what_can_not_be_paged_is_refused_by_name_even_if_no_list_names_it(family: str) -> None:
    model = family_model(family)
    with pytest.raises(ModelError, match=f"model family '{family}' "):
        patch_model(model)


def test_the_registry_lists_what_these_tests_cover() -> None:
    by_status: dict[str, set[str]] = {"verified": set(), "tested": set(), "refused": set()}
    for family in registry.FAMILIES.values():
        by_status[family.status].add(family.name)
    assert by_status["verified"] | by_status["tested"] == set(MATCHING)
    assert by_status["refused"] == set(REFUSED) | set(NOT_BUILT)


def test_the_registry_names_families_as_mlx_lm_does() -> None:
    modules = {path.stem for path in pathlib.Path(mlx_lm.models.__file__ or "").parent.glob("*.py")}
    assert set(registry.FAMILIES) <= modules
    assert registry.SAME_CODE == mlx_lm.utils.MODEL_REMAPPING


def test_a_family_is_found_by_the_names_it_goes_by() -> None:
    assert registry.family_of("mistral") == registry.Family("llama", "verified")
    assert not registry.is_untested("gemma4_unified")
    assert registry.family_of("falcon_mamba") == registry.Family("mamba", "tested")
    assert registry.is_untested("deepseek_v41_text")
    assert registry.family_of("a-family-of-tomorrow") is None
    assert registry.is_untested("a-family-of-tomorrow")
