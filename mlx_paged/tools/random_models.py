"""Models with random weights in the shapes of known ones: what a benchmark needs, without a download."""

import importlib
from typing import Any

_SIZES = ["hidden_size", "num_hidden_layers", "intermediate_size"]
_SIZES += ["num_attention_heads", "num_key_value_heads", "vocab_size"]


def _shape(model_type: str, *sizes: int, **others: Any) -> dict[str, Any]:
    """Write the configuration of a shape. sizes: in the order of _SIZES. others: entries of config.json."""
    entries = {"model_type": model_type, "rope_theta": 1e6, "tie_word_embeddings": True}
    return entries | dict(zip(_SIZES, sizes, strict=True)) | others


_CONTEXT = 32768
SHAPES = {
    "qwen2-tiny": _shape("qwen2", 32, 2, 48, 4, 2, 1024),  # only to see something run
    "qwen2-20m": _shape("qwen2", 512, 6, 1408, 8, 2, 8192),
    "qwen2-0.5b": _shape("qwen2", 896, 24, 4864, 14, 2, 151936),
    "qwen3-4b": _shape("qwen3", 2560, 36, 9728, 32, 8, 151936, head_dim=128),
    "llama-8b": _shape("llama", 4096, 32, 14336, 32, 8, 128256, rope_theta=5e5, tie_word_embeddings=False),
}


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
    return loading.LoadedModel(model, None, _CONTEXT, {})
