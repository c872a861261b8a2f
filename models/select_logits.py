"""Let a model compute logits only for the tokens that need them: rows are picked before its output head.

The model's own code after that, such as a family's scaling or capping of logits, stays as it is.
"""

import functools
from typing import Any

import mlx.nn as nn

from mlx_paged.models.layer_cache import PagedLayerCache
from mlx_paged.models.recurrent import StateLayerCache, leaves


def select_logits(cls: Any) -> None:
    """Let the inner model `cls` return only the rows of `ModelInputs.logits_indices` when it runs on paged caches."""
    original = cls.__call__
    if hasattr(original, "selects_logits"):  # the class may be that of several models
        return

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = original(self, *args, **kwargs)
        caches = (cache for each in (*args, *kwargs.values()) if isinstance(each, list) for cache in leaves(each))
        cache = next((cache for cache in caches if isinstance(cache, PagedLayerCache | StateLayerCache)), None)
        indices = None if cache is None else cache.inputs.logits_indices
        return hidden if indices is None else hidden[indices]

    call.selects_logits = True  # type: ignore[attr-defined]
    cls.__call__ = call
