"""Cut a model over ranks with mlx-lm's own code, each rank keeping its part: heads (tensors) or layers (a pipeline)."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_paged.distributed.ranks import Ranks
from mlx_paged.errors import ModelError, one_line

_HEADS = ("n_heads", "num_heads", "num_attention_heads")
_KV_HEADS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")


def shard_tensors(model: nn.Module, ranks: Ranks) -> None:
    """Keep this rank's heads and its part of the other matrices. Raises ModelError if they can't be divided.

    Where there are fewer KV heads than ranks, each is kept by several.
    """
    name, size = getattr(model, "model_type", type(model).__name__), ranks.size
    if not hasattr(model, "shard"):
        raise ModelError(f"mlx-lm does not divide {name} by heads: leave tensor_parallel_size out")
    for attention in _attentions(model):
        heads, kv_heads = (getattr(attention, _name_of(attention, names)) for names in (_HEADS, _KV_HEADS))
        if not _divides(size, heads, kv_heads):
            sizes = [n for n in range(2, heads + 1) if _divides(n, heads, kv_heads)]
            possible = f"{' or '.join(map(str, sizes))} would do" if sizes else "it has to run on one"
            raise ModelError(
                f"{name} has {heads} query heads and {kv_heads} KV heads, which {size} ranks can't share evenly: for "
                f"tensor_parallel_size {possible}"
            )
        _replicate_kv_heads(attention, size)
    try:
        model.shard(ranks.group)
    except ValueError as error:
        raise ModelError(f"mlx-lm can't divide this {name} over {size} ranks: {one_line(error)}") from error
    keep(model)


def shard_layers(model: nn.Module, ranks: Ranks) -> None:
    """Keep this rank's layers: rank 0 has the last ones. Raises ModelError if mlx-lm does not divide the model so."""
    name, inner = getattr(model, "model_type", type(model).__name__), cast(Any, getattr(model, "model", None))
    if not hasattr(inner, "pipeline"):
        raise ModelError(f"mlx-lm does not divide {name} by layers: leave pipeline_parallel_size out")
    if ranks.size > len(inner.layers):
        raise ModelError(f"pipeline_parallel_size={ranks.size} is more than the {len(inner.layers)} layers of {name}")
    inner.pipeline(ranks.group)
    keep(model)


def keep(model: nn.Module) -> None:
    """Read what this rank has of the weights: one after the other, so that no more than one is there as a whole."""
    for weight in dict(tree_flatten(model.parameters())).values():
        mx.eval(weight)


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The modules that project keys for several heads."""
    found = [module for module in model.modules() if "k_proj" in module and "v_proj" in module]
    return [module for module in found if _name_of(module, _HEADS) and _name_of(module, _KV_HEADS)]


def _name_of(module: nn.Module, names: tuple[str, ...]) -> str:
    """What a module calls a number that has one of several names; empty if it has none."""
    return next((name for name in names if isinstance(getattr(module, name, None), int)), "")


def _divides(size: int, heads: int, kv_heads: int) -> bool:
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def _replicate_kv_heads(attention: Any, size: int) -> None:
    """Let a module have as many KV heads as there are ranks, if it has fewer: each of them several times."""
    name = _name_of(attention, _KV_HEADS)
    kv_heads = getattr(attention, name)
    if kv_heads >= size:
        return
    for projection in (attention.k_proj, attention.v_proj):
        for key, weight in projection.parameters().items():  # rows are outputs, in codes too
            by_head = weight.reshape(kv_heads, -1, *weight.shape[1:])
            projection[key] = mx.repeat(by_head, size // kv_heads, axis=0).reshape(-1, *weight.shape[1:])
    setattr(attention, name, math.lcm(kv_heads, size))
