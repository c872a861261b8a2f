"""Models with random weights in the shapes of known ones: what a benchmark needs, without a download."""

from __future__ import annotations

import importlib
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-tiny": {  # only to see something run
        "model_type": "qwen2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "qwen2-20m": {
        "model_type": "qwen2",
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
}
_CONTEXT = 32768


def make_random_model(shape: str, dtype: str | None = None) -> Any:
    """Make an mlx-lm model of a shape in SHAPES with random weights, always the same.

    Returns a LoadedModel without a tokenizer. dtype: of the weights; None: bfloat16, and float32 on a CPU.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_paged.models import loading

    config = {"rms_norm_eps": 1e-6, "max_position_embeddings": _CONTEXT} | SHAPES[shape]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    loading.set_dtype(model, dtype or ("float32" if mx.default_device() == mx.cpu else "bfloat16"))
    for weight in dict(tree_flatten(model.parameters())).values():
        mx.eval(weight)  # one after the other, so that no more than one is held in float32 too
    return loading.LoadedModel(model, None, _CONTEXT)
