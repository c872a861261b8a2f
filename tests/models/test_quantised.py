"""mlx-lm's quantised weights run through the paged cache and give what they give unpaged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.tiny_models import make_model, unpaged_greedy
from mlx_lm.utils import load_tokenizer, quantize_model, save_config, save_model

from mlx_paged import LLM, ModelError, SamplingParams

GROUP_SIZE = 32
VOCAB_SIZE = 96
LENGTHS = (1, 20, 45)
MAX_TOKENS = 6


def assert_as_unpaged(llm: LLM, model: nn.Module, vocab_size: int) -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        expected = unpaged_greedy(model, prompt, MAX_TOKENS)
        (found,) = output.outputs
        assert found.token_ids == expected.token_ids
        logprobs = [step[token] for step, token in zip(found.logprobs or [], found.token_ids, strict=True)]
        assert logprobs == pytest.approx(expected.logprobs, abs=1e-4 if mx.default_device() == mx.cpu else 1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral", "gemma3_text"])
def test_a_quantised_model_gives_its_unpaged_results(family: str, bits: int) -> None:
    model = make_model(family, vocab_size=VOCAB_SIZE)
    nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
    llm = LLM.from_model(model, block_size=8, num_kv_blocks=16, max_num_batched_tokens=16, check_invariants=True)
    assert_as_unpaged(llm, model, VOCAB_SIZE)


@pytest.fixture
def quantised_folder(tmp_path: Path, demo_folder: Path, request: pytest.FixtureRequest) -> Path:
    """A tiny random Qwen2 in mlx-lm's format, with the demo model's tokenizer."""
    vocab_size = json.loads((demo_folder / "config.json").read_text())["vocab_size"]
    model = make_model("qwen2", vocab_size=vocab_size, dtype=mx.float16)
    config: dict[str, Any] = {key: value for key, value in vars(model.args).items() if value is not None}
    model, config = quantize_model(model, config, GROUP_SIZE, request.param)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    for file in demo_folder.glob("*token*"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("quantised_folder", [4, 8], indirect=True)
def test_a_folder_of_quantised_weights_is_loaded_and_gives_its_unpaged_results(quantised_folder: Path) -> None:
    llm = LLM(quantised_folder, block_size=8, num_kv_blocks=16, max_num_batched_tokens=16, dtype="float32")
    model = llm._runner._model.model
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert_as_unpaged(llm, model, model.args.vocab_size)
    assert llm.generate(["Once"], SamplingParams(max_tokens=4))[0].outputs[0].token_ids


@pytest.mark.parametrize("quantised_folder", [4], indirect=True)
def test_a_refused_family_is_named_before_its_weights_are_read(quantised_folder: Path) -> None:
    config = json.loads((quantised_folder / "config.json").read_text())
    (quantised_folder / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v41_text"}))
    with pytest.raises(ModelError, match="family 'deepseek_v41_text' can't be paged: an index beside the cache"):
        LLM(quantised_folder)


@pytest.mark.parametrize("quantised_folder", [4], indirect=True)
def test_mlx_lm_reads_the_folder_that_these_tests_write(quantised_folder: Path) -> None:
    assert load_tokenizer(quantised_folder).vocab_size > 100
