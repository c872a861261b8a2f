"""Models with random weights in the shapes of known ones: what a benchmark needs, without a download."""

import importlib
from typing import Any


def _shape(
    model_type: str, hidden: int, layers: int, mlp: int, heads: tuple[int, int], vocab: int, **others: Any
) -> dict[str, Any]:
    """Write the configuration of a shape. heads: of queries, of K and V. others: entries of config.json."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        **others,
    }


_CONTEXT = 32768
SHAPES = {
    "qwen2-tiny": _shape("qwen2", hidden=32, layers=2, mlp=48, heads=(4, 2), vocab=1024),  # only to see something run
    "qwen2-20m": _shape("qwen2", hidden=512, layers=6, mlp=1408, heads=(8, 2), vocab=8192),
    "qwen2-0.5b": _shape("qwen2", hidden=896, layers=24, mlp=4864, heads=(14, 2), vocab=151936),
    "qwen3-4b": _shape("qwen3", hidden=2560, layers=36, mlp=9728, heads=(32, 8), vocab=151936, head_dim=128),
    "llama-8b": _shape(
        "llama",
        hidden=4096,
        layers=32,
        mlp=14336,
        heads=(32, 8),
        vocab=128256,
        rope_theta=5e5,
        tie_word_embeddings=False,
    ),
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
    return loading.LoadedModel(model, None, _CONTEXT)
