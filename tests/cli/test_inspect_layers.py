"""`mlx-paged inspect` of models whose layers store something else than keys and values per head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.stub_llm import assert_one_line, invoke

CONFIG = {
    "hidden_size": 64, "num_hidden_layers": 5, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 97, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip


def inspect(folder: Path, config: dict[str, Any], *options: str) -> tuple[dict[str, Any], str]:
    """What it says of a folder with this configuration and no weights: as JSON, and as text."""
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    command = ("inspect", str(folder), "--dtype", "bfloat16", *options)
    report, text = invoke(*command, "--json"), invoke(*command)
    assert (report.exit_code, text.exit_code) == (0, 0), report.output + text.output
    return json.loads(report.stdout), text.output


def test_latent_attention_stores_one_row_of_deepseek_v3s_published_size(tmp_path: Path) -> None:
    shape = {
        "model_type": "deepseek_v3", "num_hidden_layers": 2, "kv_lora_rank": 512, "q_lora_rank": 24, "rope_theta": 1e4,
        "qk_rope_head_dim": 64, "v_head_dim": 16, "qk_nope_head_dim": 16, "moe_intermediate_size": 32,
        "n_routed_experts": 2, "first_k_dense_replace": 2, "topk_group": 1, "num_experts_per_tok": 1,
    }  # fmt: skip
    _, text = inspect(tmp_path, shape)
    assert "2 layers x 1 KV head x (576 K, V in it) x 2 bytes = 2,304 bytes" in text


def test_layers_that_attend_in_chunks_are_said_to_and_hold_what_is_left_of_the_last_one(tmp_path: Path) -> None:
    shape = CONFIG | {
        "attention_chunk_size": 64, "head_dim": 16, "interleave_moe_layer_step": 9, "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1, "num_local_experts": 1, "rope_scaling": None, "rope_theta": 1e4, "use_qk_norm": True,
        "model_type": "llama4_text",
    }  # fmt: skip
    found, text = inspect(
        tmp_path, {"model_type": "llama4", "text_config": shape}, "--lengths", "150", "--context", "256"
    )
    assert "one token   4 layers in chunks of 64 tokens x 2 KV heads x (16 K + 16 V)" in text
    assert found["needed_bytes"] == 2 * 2 * 16 * 2 * (1 * 150 + 4 * (150 - 128))
    assert [layers["chunked"] for layers in found["layers"]] == [False, True]
    refused = invoke("inspect", str(tmp_path), "--block-size", "48")
    assert_one_line(refused, 1, "take a --block-size that divides 64, got 48")


def test_a_family_that_mlx_lm_can_not_even_import_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "olmo"}))
    result = invoke("inspect", str(tmp_path))
    assert result.exit_code != 0
    assert "'olmo' can't be paged: it computes attention itself, and mlx-lm needs the package ai2-olmo" in result.output


MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_proj_bias": False, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_n_groups": 1, "mamba_conv_bias": True, "embedding_multiplier": 1, "attention_multiplier": 1,
    "logits_scaling": 1, "residual_multiplier": 1,
}  # fmt: skip
STATE = 4 * 8 * 16 * 16 + 2 * 3 * (8 * 16 + 2 * 16)  # a sum in float32, and three tokens of a convolution in bfloat16


@pytest.mark.parametrize("num_attentions", [2, 0])
def test_a_hybrids_state_is_said_beside_its_blocks_and_counted_for_every_request(
    num_attentions: int, tmp_path: Path
) -> None:
    kinds = ["mamba"] * (5 - num_attentions) + ["attention"] * num_attentions
    config = MAMBA | {"model_type": "granitemoehybrid", "layer_types": kinds}
    found, text = inspect(tmp_path, config, "--lengths", "17,33", "--context", "64")
    per_token, state = num_attentions * 2 * 2 * 16 * 2, (5 - num_attentions) * STATE
    assert (found["state_bytes"], found["bytes_per_token"]) == (state, per_token)
    assert found["ways"]["blocks"]["bytes"] == 2 * state + (32 + 48) * per_token
    assert found["needed_bytes"] == 2 * state + 50 * per_token
    worth = f", as much as {state / per_token:,.0f} tokens" if num_attentions else ""
    assert f"one state   {state:,} bytes for a sequence of any length{worth}\n" in text
    assert ("no K and V" in text) == (num_attentions == 0)


def test_a_model_that_is_not_there_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    for args in (["qwen22"], [str(tmp_path)], ["--model", str(tmp_path / "nowhere")]):
        assert_one_line(invoke("inspect", *args), 1)


@pytest.mark.parametrize(
    ("kind", "text", "codes", "per_token"),
    [
        ("int8", "(64 K x 8 bits + 64 V x 8 bits + 8 bytes of scales)", [(8, 64, 2)] * 2, 136),
        ("k8v4", "(64 K x 8 bits + 64 V x 4 bits + 12 bytes of scales)", [(8, 64, 2), (4, 32, 2)], 108),
        ("fp8", "(64 K x 8 bits + 64 V x 8 bits + 4 bytes of scales)", [(8, 64, 1)] * 2, 132),
    ],
)
def test_codes_and_scales_of_a_quantised_cache_are_counted_to_the_byte(
    kind: str, text: str, codes: list[tuple[int, int, int]], per_token: int, tmp_path: Path
) -> None:
    found, words = inspect(tmp_path, {"model_type": "llama", "head_dim": 64}, "--kv-cache-dtype", kind)
    assert f"llama, K and V in {kind}" in words
    assert f"5 layers x 2 KV heads x {text} = {10 * per_token:,} bytes" in words
    assert (found["kv_cache_dtype"], found["bytes_per_token"]) == (kind, 10 * per_token)
    named = [dict(zip(("bits", "group_size", "num_params"), each, strict=True)) for each in codes]
    assert found["layers"][0]["codes"] == named


def test_a_cache_that_can_not_be_quantised_and_a_kind_that_is_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    refused = invoke("inspect", str(tmp_path), "--kv-cache-dtype", "int8")
    assert_one_line(refused, 1, "--kv-cache-dtype 'int8': a head_dim must be a multiple of 32", "has one of 16")
    unknown = "--kv-cache-dtype must be one of int8, k8v4, fp8, got 'int4'"
    assert_one_line(invoke("inspect", str(tmp_path), "--kv-cache-dtype", "int4"), 2, unknown)
    assert_one_line(invoke("inspect", "--blocks", "--kv-cache-dtype", "int8"), 2, "takes no --kv-cache-dtype")
