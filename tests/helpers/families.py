"""A tiny random model of each family of mlx-lm's that the registry lists."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from helpers.tiny_models import VOCAB_SIZE, make_model

# fmt: off
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_PER_TYPE = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
_SCALED_ROPE = _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
_YARN = {"type": "yarn", "factor": 4, "mscale_all_dim": 0.7, "original_max_position_embeddings": 512}
_DYNAMIC = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
_INDEX = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 16}
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_proj_bias": False, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_n_groups": 1, "mamba_conv_bias": True, "mamba_expand": 2, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "ssm_state_size": 16, "state_size": 16, "conv_kernel": 4, "n_groups": 1, "use_conv_bias": True,
}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "linear_allow_neg_eigval": True,
}
_LONGCAT = {
    "attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 96, "attention_bias": False,
    "expert_ffn_hidden_size": 32, "zero_expert_num": 1, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
}
_CONV = {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": False, "conv_L_cache": 3}

# Every name that some family gives a dimension; each takes those it knows.
_BASE: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim"], 64),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers"], 3),
    **dict.fromkeys(["intermediate_size", "n_inner", "mlp_hidden_size", "ff_intermediate_size"], 96),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_heads", "n_head"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_kv_heads"], 2),
    **dict.fromkeys(["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"], 1e-5),
    **dict.fromkeys(["vocab_size", "num_vocab", "embedding_size", "vocab_size_per_layer_input"], VOCAB_SIZE),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"], 2048),
    **dict.fromkeys(["sliding_window", "window_size", "sliding_window_size", "attention_window_size"], 24),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "num_shared_expert", "first_k_dense_replace"], 1),
    **dict.fromkeys(["moe_layer_freq", "n_group", "topk_group", "decoder_sparse_step"], 1),
    **dict.fromkeys(["attention_bias", "use_qkv_bias", "bias", "use_qk_norm", "qk_norm", "post_norm"], True),
    **dict.fromkeys(["mlp_bias", "use_bias", "norm_head", "tie_word_embeddings"], False),
    "layernorm_epsilon": 1e-5, "head_dim": 32, "rope_theta": 10000.0, "share_expert_dim": 32,
    "routed_scaling_factor": 1.0, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 16, "v_head_dim": 24, "qk_nope_head_dim": 16,
    "mlp_only_layers": [], "sliding_window_pattern": 3, "loop_window_size": 24, "partial_rotary_factor": 0.5,
    "embedding_multiplier": 1.5, "attention_multiplier": 0.2, "logits_scaling": 2.0, "residual_multiplier": 0.8,
    "dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0, "rotary_dim": 8, "rotary_emb_base": 10000,
    "rotary_pct": 0.5, "rope_scaling": None, "layer_types": _SLIDING,
}

MATCHING: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afm7": {"num_kv_reuse_layers": 1},
    "afmoe": {},
    "apertus": {},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 3, "group_norm_size": 2},
    "bailing_moe": {"partial_rotary_factor": 1.0},
    "bailing_moe_linear": {"layer_group_size": 3, "group_norm_size": 2},
    "bailing_moe_v3": {"layer_group_size": 3},
    "bitnet": {"head_dim": 16},
    "cohere": {},
    "cohere2": {"head_dim": 16},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek": {},
    "deepseek_v2": {"num_key_value_heads": 4, "topk_method": "gready", "rope_scaling": _YARN},
    "deepseek_v3": {"num_key_value_heads": 4},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone": {"head_dim": 16},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True]},
    "falcon_h1": {},
    "gear": {"layer_types": ["conv_mixer", "full_attention", "sliding_attention"]},
    "gemma": {},
    "gemma2": {},
    "gemma3": {"text_config": "gemma3_text"},
    "gemma3_text": {},
    "gemma3n": {"text_config": "gemma3n_text"},
    "gemma4": {"text_config": "gemma4_text"},
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "global_head_dim": 32,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {"layer_types": None},
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": None} | _MAMBA,
    "helium": {},
    "hunyuan": {
        "num_hidden_layers": 4, "use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2,
        "rope_scaling": _DYNAMIC,
    },
    "hunyuan_v1_dense": {"rope_scaling": _DYNAMIC},
    "internlm2": {},
    "internlm3": {},
    "iquestloopcoder": {},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        **_MAMBA,
    },
    "kimi_k25": {"text_config": "deepseek_v3"},
    "kimi_k3": {"text_config": "kimi_linear"},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 4, "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    },
    "kimi_vl": {"text_config": "deepseek_v3"},
    "laguna": {
        "num_attention_heads_per_layer": [4, 4, 4], "mlp_layer_types": ["dense", "sparse", "sparse"],
        "partial_rotary_factor": None, "rope_parameters": _ROPE_PER_TYPE,
    },
    "lfm2": _CONV
    | {"block_dim": 64, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False},
    "lfm2-vl": {"text_config": "lfm2"},
    "lfm2_moe": _CONV | {"use_expert_bias": True, "num_dense_layers": 1},
    "lille-130m": {},
    "llama": {},
    "llama4": {"text_config": "llama4_chunked"},
    "llama4_text": {"intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 0]},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": _LONGCAT,
    "mamba": {"time_step_rank": 4} | _MAMBA,
    "mamba2": {
        "num_heads": 8, "head_dim": 16, "intermediate_size": 128, "time_step_limit": (0.0, 100.0),
        **({"time_step_rank": 4} | _MAMBA),
    },
    "mellum": {"rope_parameters": _ROPE_PER_TYPE},
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0], "moe_layer_freq": [0, 1, 1], "n_shared_experts": None,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32, "swa_v_head_dim": 24,
    },
    "minicpm": {},
    "minicpm3": {
        "num_key_value_heads": 4,
        "rope_scaling": _LONG_ROPE | {"original_max_position_embeddings": 16},
    },
    "minimax": {},
    "minimax_m3_vl": {"text_config": "minimax_m3"},
    "ministral3": {"rope_parameters": _SCALED_ROPE},
    "mistral3": {"text_config": "llama"},
    "mistral4": {"num_key_value_heads": 4, "rope_parameters": _SCALED_ROPE},
    "mixtral": {},
    "muse_glimmer": {},
    "muse_spark": {"text_config": "muse_spark_text"},
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {
                "attention": {"n_heads_in_group": heads, "no_op": heads is None, "replace_with_linear": False},
                "ffn": {"ffn_mult": 1.5, "no_op": False, "replace_with_linear": False},
            }
            for heads in (2, None, 4)
        ]
    },
    "nemotron_h": {"layer_types": None, "hybrid_override_pattern": "M*-"} | _MAMBA,
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]} | _LINEAR,
    "olmoe": {},
    "openelm": {
        "ffn_dim_divisor": 16, "num_query_heads": [4, 4, 8], "num_kv_heads": [1, 2, 2],
        "ffn_multipliers": [1.0, 1.5, 2.0],
    },
    "phi": {},
    "phi3": {"partial_rotary_factor": 1.0},
    "phimoe": {"rope_scaling": _LONG_ROPE | {"short_mscale": 1.1, "long_mscale": 1.2}},
    "phixtral": {},
    "pixtral": {"text_config": "llama"},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16} | _MAMBA,
    "plamo3": {},
    "prism_hadamard_qwen35": {
        "text_config": "qwen3_next_wide", "schema_version": 1, "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": f"model.layers.{path}", "embedding": False, "dtype": "float16", "block": block}
            for path, block in (("0.linear_attn.in_proj_z", 512), ("1.mlp.shared_expert.up_proj", 0))
        ],
    },
    "qwen": {"kv_channels": 16, "intermediate_size": 192},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": {"text_config": "qwen2"},
    "qwen3": {},
    "qwen3_5": {"text_config": "qwen3_next"},
    "qwen3_5_moe": {"text_config": "qwen3_next"},
    "qwen3_moe": {},
    "qwen3_next": _LINEAR,
    "qwen3_vl": {"text_config": "qwen3"},
    "qwen3_vl_moe": {"text_config": "qwen3_moe"},
    "recurrent_gemma": {
        "conv1d_width": 4, "logits_soft_cap": 30.0, "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": dict.fromkeys(["a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"], 8),
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "spark2_5": {"rope_parameters": _ROPE_PER_TYPE},
    "stablelm": {"qk_layernorm": True},
    "starcoder2": {},
    "step3p5": {
        "num_attention_groups": 2, "moe_layers_enum": "1,2",
        "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    },
    "talkie": {"head_dim": 16},
    "telechat3": {},
    "youtu_llm": {"num_key_value_heads": 4},
}

OTHER_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoehybrid-attention": ("granitemoehybrid", {"layer_types": ["attention"] * 3}),
    "internlm2-dynamic": ("internlm2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "internlm3-dynamic": ("internlm3", {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 1.1}}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    "llama-yarn": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}),
    "llama-longrope": ("llama", {
        "rope_scaling": _LONG_ROPE | {"original_max_position_embeddings": 16, "long_factor": [1.5] * 16},
    }),
    "llama-proportional": ("llama", {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}),
    "llama-mrope": ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}),
    "gpt_bigcode-heads": ("gpt_bigcode", {"multi_query": False}),
    "plamo2-attention": ("plamo2", {"mamba_enabled": False}),
}
"""By name, a family and what is changed: rope scaling of every type, and layers of another kind."""

COMPARED_WITHOUT_CACHE = ("plamo3",)
"""Its windows are of one key more than mlx-lm's cache of a window keeps, so that mlx-lm's own decodes see one less."""

REFUSED: dict[str, dict[str, Any]] = {
    "deepseek_v32": {"num_key_value_heads": 4} | _INDEX,
    "deepseek_v41": {},
    "glm_moe_dsa": {"num_key_value_heads": 4, "rope_parameters": _ROPE} | _INDEX,
    "phi3small": {
        "dense_attention_every_n_layers": 2, "gegelu_limit": 20.0, "blocksparse_block_size": 32,
    },
}
NOT_BUILT = {"olmo": "needs another package"}

_TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2, "intermediate_size": [96] * 4, "rope_local_base_freq": 1000.0,
        "final_logit_softcapping": 30.0, "activation_sparsity_pattern": [0.5, 0, 0, 0], "laurel_rank": 8,
        "hidden_size_per_layer_input": 16, "altup_num_inputs": 2, "altup_coef_clip": 120.0,
        "altup_correct_scale": True, "altup_active_idx": 0,
    },
    "llama4_chunked": {
        "num_hidden_layers": 4, "num_experts_per_tok": 1, "attention_chunk_size": 24, "floor_scale": 3,
        "attn_scale": 0.5,
        "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96,
    },
    "muse_spark_text": {
        "post_norm_eps": 1e-5, "rope_parameters": _ROPE, "layer_rope_theta": [10000.0, 0, 10000.0],
        "final_logit_softcapping": 30.0, "output_multiplier": 0.5, "moe_hidden_size": 48, "num_shared_experts": 0,
    },
    "minimax_m3": {"moe_layer_freq": [0, 1, 1], "dense_intermediate_size": 96, "layer_types": None},
    "qwen3_next_wide": {"hidden_size": 512} | _LINEAR,
    "minimax_m3_sparse": {
        "moe_layer_freq": [0, 1, 1], "dense_intermediate_size": 96, "layer_types": None, "index_n_heads": 2,
        "index_head_dim": 32, "index_topk_blocks": 2, "index_block_size": 8, "sparse_attention_freq": [0, 1, 1],
    },
}
# fmt: on


def config_of(family: str) -> dict[str, Any]:
    """The changes to `make_model`'s configuration for a family; a wrapped text model's, where it names one."""
    configs = MATCHING | REFUSED | _TEXT_CONFIGS
    config = {"model_type": family} | _BASE | configs[family]
    if isinstance(config.get("text_config"), str):
        config["text_config"] = config_of(config["text_config"])
    return config


def family_model(family: str, **changes: Any) -> nn.Module:
    """A tiny random model of a family, with something to see a difference by where mlx-lm leaves zeros to be loaded."""
    model = make_model(family, **(config_of(family) | changes))
    model.update(tree_map(_unless_zero, model.parameters()))
    return model


def _unless_zero(weight: mx.array) -> mx.array:
    if weight.dtype == mx.uint32:  # sixteen numbers of two bits
        return mx.random.randint(0, 1 << 31, weight.shape, mx.uint32)
    if weight.dtype == mx.uint8:  # four numbers of -1, 0 and 1, kept as 0, 1 and 2
        return (mx.random.randint(0, 3, (*weight.shape, 4)) << mx.array([0, 2, 4, 6])).sum(axis=-1).astype(mx.uint8)
    return weight if weight.ndim < 2 or weight.any() else mx.random.normal(weight.shape)
