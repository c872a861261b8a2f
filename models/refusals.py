"""Why a model can't be paged, in the words of who loads it."""

from __future__ import annotations

import mlx.core as mx

from mlx_paged.errors import ModelError, one_line
from mlx_paged.models import registry


def refusal(name: str, error: Exception) -> ModelError:
    """What to raise for a model of the family `name`, whose code met a paged cache with an error."""
    family = registry.family_of(name)
    if family is not None and family.status == "refused":
        return ModelError(f"model family {name!r} can't be paged: {family.note}")
    if "metal_kernel" in str(error) and not mx.metal.is_available():
        return ModelError(f"model family {name!r} runs on Macs only: mlx-lm computes its layers with Metal kernels")
    what = "its code handles keys, values, masks, positions or states itself"
    return ModelError(f"model family {name!r} can't be paged: {what} ({one_line(error)})")
