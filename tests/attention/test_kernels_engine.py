"""Whole models through the engine, their attention computed by the kernels of either kind of GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.attention_cases import split
from helpers.families import family_model
from helpers.gpu import Gpu
from helpers.tiny_models import VOCAB_SIZE
from metalsim.fixture import Metal

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention import kernel_backend as kernel_backend
from mlx_paged.attention import paged_attention as attention
from mlx_paged.cli.main import cli
from mlx_paged.errors import EngineWarning


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Which kernels the steps needed, in order."""
    split, steps = kernel_backend.split_by_kernel, []

    def recorded(*arguments: Any) -> Any:
        parts = split(*arguments)
        steps.append({name for name in ("decodes", "prefills") if getattr(parts, name) is not None})
        return parts

    monkeypatch.setattr(kernel_backend, "split_by_kernel", recorded)
    return steps


def generate(model: Any, **settings: Any) -> list[list[int]]:
    """Greedy tokens of three requests; the second one's prompt takes several steps, beside the first one's decodes."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCAB_SIZE, length).tolist() for length in (3, 45, 20)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm = LLM.from_model(model, **{"num_kv_blocks": 32, "max_num_batched_tokens": 24, "pipelining": "off"} | settings)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_a_model_generates_the_same_tokens_through_the_kernels(
    family: str, gpu: Gpu, steps: list[set[str]], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32; gpt_oss has windows and sinks."""
    model = tiny_model(family, num_hidden_layers=2)
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "reference")
    expected = generate(model)
    assert not steps
    monkeypatch.setenv(attention.BACKEND_VARIABLE, gpu.name)
    split(monkeypatch, 32)
    assert generate(model) == expected
    assert {"decodes"} in steps and {"prefills"} in steps and {"decodes", "prefills"} in steps
    assert set(gpu.kernels_run) == {"write", "decode", "prefill", "merge"}


def test_a_model_of_latent_attention_generates_the_same_tokens_through_its_kernel(
    gpu: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, or in float16, which alone CUDA's kernel takes."""
    family, dtype = {"metal": ("glm4_moe_lite", mx.float32), "cuda": ("deepseek_v3", mx.float16)}[gpu.name]
    sizes = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20, "q_lora_rank": None}
    model = tiny_model(family, num_hidden_layers=2, dtype=dtype, **sizes)
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "reference")
    expected = generate(model)
    monkeypatch.setenv(attention.BACKEND_VARIABLE, gpu.name)
    split(monkeypatch, 32)
    assert generate(model) == expected
    assert set(gpu.kernels_run) == {"latent", "merge", "write"}


def test_gemma_4_with_heads_of_512_generates_the_same_tokens_through_the_kernels(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers with windows have heads of 16 here, those that see everything of 512; in float16, as is needed."""
    model = family_model("gemma4_text", global_head_dim=512)
    model.set_dtype(mx.float16)
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "reference")
    expected = generate(model)
    monkeypatch.setenv(attention.BACKEND_VARIABLE, gpu.name)
    assert generate(model) == expected
    assert set(gpu.kernels_run) >= {"decode", "prefill", "write"} | ({"latent"} if gpu.name == "cuda" else set())


def test_a_model_that_attends_in_chunks_generates_the_same_tokens_through_the_kernels(
    gpu: Gpu, steps: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("llama4")
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "reference")
    expected = generate(model, block_size=8)
    monkeypatch.setenv(attention.BACKEND_VARIABLE, gpu.name)
    split(monkeypatch, 32)
    assert generate(model, block_size=8) == expected
    assert {"decodes"} in steps and {"decodes", "prefills"} in steps


def test_the_kernels_are_the_default_where_there_is_a_device(
    gpu: Gpu, steps: list[set[str]], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(attention.BACKEND_VARIABLE, raising=False)
    llm = LLM.from_model(tiny_model("llama", num_hidden_layers=2), num_kv_blocks=8, pipelining="off")
    assert llm.attention_backends == [gpu.name]
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert steps


def test_the_command_line_generates_the_same_text_through_the_kernels(
    metal: Metal, steps: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(backend: str) -> str:
        monkeypatch.setenv(attention.BACKEND_VARIABLE, backend)
        options = {"--max-tokens": 3, "--temperature": 0, "--num-kv-blocks": 16, "--dtype": "float32"}
        arguments = ["generate", *(str(word) for option in options.items() for word in option), "Tell me a story."]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    expected = run("reference")
    assert not steps
    assert run("metal") == expected
    assert {"decodes"} in steps and {"prefills"} in steps


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"block_size": 12}, "no Metal kernel for block_size 12: 8, 16, 32, 64 have one"),
        (
            {"head_dim": 20},
            {},
            "no Metal kernel for head_dim 20 of 32 bits: multiples of 8 up to 256, in 16 bits of 16 up to 512, "
            "have one",
        ),
    ],
)
def test_a_model_without_a_kernel_is_refused_at_once_if_kernels_are_asked_for_and_otherwise_runs_without(
    changes: dict[str, Any],
    settings: dict[str, Any],
    message: str,
    metal: Metal,
    steps: list[set[str]],
    tiny_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3", num_hidden_layers=2, **changes)
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "metal")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LLM.from_model(model, num_kv_blocks=32, **settings)
    monkeypatch.delenv(attention.BACKEND_VARIABLE)
    attention._warn_once.cache_clear()
    with pytest.warns(EngineWarning, match=re.escape(message)) as notices:
        generate(model, **settings)
    assert len(notices) == 1
    assert not steps


def test_a_backend_that_is_not_there_is_refused_at_once(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "abacus")
    with pytest.raises(ValueError, match=r"^backend 'abacus' \(MLX_PAGED_BACKEND\) is not available here; there is: "):
        LLM.from_model(tiny_model("llama"), num_kv_blocks=8)


def test_the_command_line_says_in_one_line_that_there_is_no_kernel(
    metal: Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "metal")
    result = CliRunner().invoke(cli, ["generate", "--block-size", "12", "Hello"])
    assert result.exit_code != 0
    (line,) = result.stderr.strip().splitlines()
    assert "no Metal kernel for --block-size 12" in line
