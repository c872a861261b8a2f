"""Let a model compute logits only for the tokens that need them: rows are picked before its output head.

The model's own code after that, such as a family's scaling or capping of logits, stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from mlx_paged.models.layer_cache import PagedLayerCache

Method = Callable[..., Any]


def select_logits(cls: type) -> None:
    """Let the inner model `cls` return only the rows of `ModelInputs.logits_indices` when it runs on paged caches."""
    wrap_method(cls, "__call__", _selecting)


def wrap_method(cls: type, name: str, make: Callable[[Method], Method]) -> None:
    """Put `make(method)` in the place of a method, once: the class may be that of several models."""
    original = getattr(cls, name)
    made_by = getattr(original, "made_by", ())
    if make not in made_by:
        method = functools.wraps(original)(make(original))
        method.made_by = (*made_by, make)  # type: ignore[attr-defined]
        setattr(cls, name, method)


def _selecting(original: Method) -> Method:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = original(self, *args, **kwargs)
        cache = _paged_cache([*args, *kwargs.values()])
        indices = None if cache is None else cache.inputs.logits_indices
        return hidden if indices is None else hidden[indices]

    return call


def _paged_cache(arguments: Sequence[Any]) -> PagedLayerCache | None:
    """A layer's cache, if a list of paged ones is among a model's arguments."""
    for argument in arguments:
        if isinstance(argument, list) and argument and isinstance(argument[-1], PagedLayerCache):
            return argument[-1]
    return None
