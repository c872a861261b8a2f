"""Tiny random mlx-lm models, and what mlx-lm's own cache gives for them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache

VOCAB_SIZE = 97

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32, "rope_theta": 1e6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"head_dim": 32, "sliding_window": 24, "sliding_window_pattern": 3},
    "gpt_oss": {"num_hidden_layers": 4, "head_dim": 32, "sliding_window": 24, "num_local_experts": 4},
}


def make_model(family: str, *, seed: int = 0, dtype: mx.Dtype = mx.float32, **changes: Any) -> nn.Module:
    """A tiny random mlx-lm model of a family. Its weights are spread so that the best token stands out."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {"model_type": family} | COMMON | TINY_CONFIGS.get(family, {}) | changes
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    spread = {2: 2.5, 3: 2.5}

    def enlarge(path: str, weight: Any) -> Any:
        if path.endswith("sinks"):
            return mx.random.normal(weight.shape)
        is_packed = not mx.issubdtype(weight.dtype, mx.floating)
        return weight if is_packed else weight * spread.get(weight.ndim, 1.0)

    model.update(tree_map_with_path(enlarge, model.parameters()))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


class Unpaged(NamedTuple):
    """What mlx-lm's own cache gives, greedily: tokens, their log-probabilities, and how far the second best was."""

    token_ids: list[int]
    logprobs: list[float]
    margins: list[float]


def unpaged_greedy(model: nn.Module, prompt: Sequence[int], max_tokens: int, *, with_cache: bool = True) -> Unpaged:
    """mlx-lm's unpaged loop over one prompt; without a cache it computes all tokens anew for each."""
    cache = make_prompt_cache(model) if with_cache else None
    inputs = mx.array(prompt)[None]
    result = Unpaged([], [], [])
    for _ in range(max_tokens):
        logits = model(inputs, cache=cache)[0, -1].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits)
        best_two = mx.sort(logprobs)[-2:].tolist()
        token = int(mx.argmax(logprobs).item())
        result.token_ids.append(token)
        result.logprobs.append(best_two[1])
        result.margins.append(best_two[1] - best_two[0])
        inputs = mx.array([[token]]) if with_cache else mx.concatenate([inputs, mx.array([[token]])], axis=1)
    return result
