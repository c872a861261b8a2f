"""A name for all that keys, values and states depend on beside the tokens: the model as it is, not as it is called."""

import re
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np

from mlx_paged.models.patch import PatchedModel

_CHECKSUM_PIECE = 1 << 24  # words
_OF_TRAINING = {"_no_grad", "_training"}  # what a module keeps for that alone


def fingerprint(model: PatchedModel, block_size: int) -> str:
    """Name a model's family, and in a digest its weights, settings and types, and the layout of a block and a state.

    Settings are whatever numbers, texts and arguments its modules keep, so that models without arguments have them too.
    The version of mlx-lm is among them, whose code may compute the same layers otherwise; that of this package is told
    apart by whoever keeps what the name is for.
    """
    layout = (
        mlx_lm.__version__,
        block_size,
        model.groups,
        model.stored_layers,
        model.state_shapes,
    )
    digest = sha256(repr(layout).encode())
    for name, module in sorted(model.model.named_modules()):
        digest.update(f"{name} {type(module).__qualname__}".encode())
        for part in _describe({**vars(module), **module}, set()):
            digest.update(part.encode())
    family = re.sub(r"\W", "_", str(getattr(model.model, "model_type", "model")))
    return f"{family}-{digest.hexdigest()[:32]}"


def _describe(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield parts of a text that two equal values have in common, in any process. Modules are left to the caller."""
    if isinstance(value, mx.array):
        yield f"{value.shape} {value.dtype} {_checksums(value)};"
    elif value is None or isinstance(value, str | int | float | mx.Dtype):
        yield f"{value!r};"
    elif isinstance(value, list | tuple):
        yield f"{len(value)}["
        for each in value:
            yield from _describe(each, seen)
    elif isinstance(value, dict):
        yield f"{len(value)}{{"
        for key in sorted(value.keys() - _OF_TRAINING, key=repr):
            yield f"{key!r}:"
            yield from _describe(value[key], seen)
    elif not isinstance(value, nn.Module) and id(value) not in seen:
        seen.add(id(value))
        yield getattr(value, "__qualname__", type(value).__qualname__)
        yield from _describe(getattr(value, "__dict__", {}), seen)


def _checksums(array: mx.array) -> list[int]:
    """Two sums of an array's bits, the second one sensitive to their order, at the speed of memory."""
    bits = mx.contiguous(array).flatten()
    bits = bits.view(mx.uint32) if array.nbytes % 4 == 0 else bits.view(mx.uint8)
    total = mx.zeros(2, mx.uint32)
    for start in range(0, bits.size, _CHECKSUM_PIECE):
        piece = bits[start : start + _CHECKSUM_PIECE].astype(mx.uint32)
        weights = (mx.arange(piece.size, dtype=mx.uint32) + start) * 2654435761 + 1
        total = total + mx.stack([piece.sum(), (piece * weights).sum()])
        mx.eval(total)
    return np.array(total).tolist()
