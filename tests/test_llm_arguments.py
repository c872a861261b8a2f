"""What the Python API is given by mistake, and what it says then, in the names of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.llms import GREEDY, MakeLLM, samples

from mlx_paged import LLM, BeamSearchParams, ModelError


@pytest.mark.parametrize("prompts", [None, 5, b"hello", {"prompt": "Hi"}, {"a"}, 1.5], ids=ascii)
def test_what_is_no_prompt_is_a_type_error_that_names_the_argument(make_llm: MakeLLM, prompts: Any) -> None:
    llm = make_llm()
    for call in (llm.generate, llm.beam_search):
        with pytest.raises(TypeError, match=r"^prompts must be texts or lists of token ids, or a single one, got "):
            call(prompts)
    with pytest.raises(TypeError, match=r"^a prompt is text or a list of token ids, got "):
        llm.stream(prompts)


def test_a_conversation_given_to_generate_is_sent_to_chat(make_llm: MakeLLM, tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="a conversation goes to chat"):
        make_llm(tokenizer).generate([{"role": "user", "content": "Hi"}])  # type: ignore[list-item]


@pytest.mark.parametrize("model", [5, True, ["qwen2"], b"qwen2", {}, nn.Linear(2, 2)], ids=ascii)
def test_what_is_no_models_name_is_told_in_a_line(model: Any) -> None:
    with pytest.raises(ModelError) as caught:
        LLM(model)
    said = str(caught.value)
    assert said.startswith("a model is an alias") and "\n" not in said
    assert ("LLM.from_model takes one that is already loaded" in said) == isinstance(model, nn.Module)


@pytest.mark.parametrize("model", [None, 5, "qwen2", nn.Linear(2, 2), (nn.Linear(2, 2), None)], ids=ascii)
def test_what_is_no_model_in_memory_is_told_in_a_line(model: Any) -> None:
    with pytest.raises(ModelError) as caught:
        LLM.from_model(model)
    said = str(caught.value)
    assert said.startswith("model must be an mlx-lm model that is already loaded, got ") and "\n" not in said


def test_a_tokenizer_that_mlx_lm_has_not_loaded_is_told_in_a_line(
    tiny_model: Callable[..., Any], tokenizer: Any
) -> None:
    for other in (5, "qwen2", tokenizer._tokenizer):
        with pytest.raises(ModelError, match=r"^tokenizer must be mlx-lm's TokenizerWrapper, as mlx_lm\.load"):
            LLM.from_model(tiny_model("llama"), other)


def test_prompts_and_parameters_may_come_from_arrays_and_iterators(make_llm: MakeLLM) -> None:
    llm = make_llm()
    expected = [samples(one) for one in llm.generate([[1, 2], [3, 4]], GREEDY)]
    for prompts in (iter([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]]), mx.array([[1, 2], [3, 4]])):
        params: Any = (GREEDY for _ in range(2))
        assert [samples(one) for one in llm.generate(prompts, params)] == expected  # type: ignore[arg-type]
    for single in (np.array([1, 2]), mx.array([1, 2]), iter([1, 2])):
        assert [samples(one) for one in llm.generate(single, GREEDY)] == expected[:1]  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [5, "greedy", {"temperature": 0}, [{"temperature": 0}], BeamSearchParams()], ids=str)
def test_parameters_of_another_kind_are_a_type_error_that_names_the_argument(make_llm: MakeLLM, params: Any) -> None:
    llm = make_llm()
    with pytest.raises((TypeError, ValueError), match=r"params must be SamplingParams|sampling parameters"):
        llm.generate([[1, 2]], params)
    assert llm.stats().num_steps == 0


def test_a_mistyped_setting_is_told_which_one_may_be_meant(make_llm: MakeLLM) -> None:
    for call in (lambda: LLM(blocksize=3), lambda: make_llm(blocksize=3)):
        with pytest.raises(TypeError, match=r"there is no argument 'blocksize': did you mean block_size\?"):
            call()
