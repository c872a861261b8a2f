"""Why a model can't be loaded or paged, in the words of who loads it."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx

from mlx_paged.errors import ModelError, one_line
from mlx_paged.models import registry


def cannot_load(folder: Path, error: Exception) -> ModelError:
    """What to raise for a folder that mlx-lm could not make a model of."""
    if re.match(r"Expected shape|Missing \d+ parameters|Received \d+ parameters not in model", str(error)):
        what = f"the weights in {folder} are not those that its config.json describes"
        return ModelError(f"{what}: {one_line(error)}; fetch both again, from one place")
    return ModelError(f"{folder} can't be loaded by mlx-lm: {one_line(error)}")


def unknown_cache(name: str, kind: str) -> ModelError:
    """What to raise for a model of the family `name`, which keeps something in a `kind` of cache that is not known."""
    return _listed(name) or ModelError(
        f"model family {name!r} keeps state in {kind}, which can't be paged: caches of plain, sliding-window and "
        "latent attention can, and arrays of a recurrence's state"
    )


def refusal(name: str, error: Exception) -> ModelError:
    """What to raise for a model of the family `name`, whose code met a paged cache with an error."""
    if "metal_kernel" in str(error) and not mx.metal.is_available():
        return ModelError(f"model family {name!r} runs on Macs only: mlx-lm computes its layers with Metal kernels")
    family = registry.family_of(name)
    known = f"; of this family it is known: {family.note}" if family is not None and family.note else ""
    what = "its code handles keys, values, masks, positions or states itself"
    return _listed(name) or ModelError(f"model family {name!r} can't be paged: {what} ({one_line(error)}){known}")


def _listed(name: str) -> ModelError | None:
    """The error for a family that is listed as refused, with the list's reason."""
    try:
        registry.require_paged(name)
    except ModelError as error:
        return error
    return None
