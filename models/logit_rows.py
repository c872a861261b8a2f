"""Models that compute no more than the rows that need logits, in a step on paged caches.

In a step that computes parts of prompts few tokens do. Of the others the last layer has to store K and V, and that is
all: its code runs twice, for what it stores of all tokens and for what it returns of those few. The rest of both is
never used, so MLX never computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_paged.models.layer_cache import PagedLayerCache
from mlx_paged.models.replace import replace_method


def pick(cls: type) -> None:
    """Let the inner model `cls` return only the rows that need logits, when it runs on paged caches."""
    replace_method(cls, "__call__", _picking)


def divide(cls: type) -> None:
    """Let a layer of type `cls` run twice if its cache asks for that: to store, then for what needs logits."""
    replace_method(cls, "__call__", _dividing)


def _picking(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = original(self, *args, **kwargs)
        cache = _last_cache([*args, *kwargs.values()])
        if cache is None or cache.of_logit_rows is not None or cache.step.logit_rows is None:
            return hidden
        return hidden[cache.step.logit_rows]

    return call


def _last_cache(arguments: Sequence[Any]) -> PagedLayerCache | None:
    """That of the last layer, if a list of paged caches is among a model's arguments."""
    for argument in arguments:
        if isinstance(argument, list) and argument and isinstance(argument[-1], PagedLayerCache):
            return argument[-1]
    return None


def _dividing(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, PagedLayerCache)), None)
        if cache is None or cache.of_logit_rows is None:
            return original(self, *args, **kwargs)
        cache.attends = False
        original(self, *args, **kwargs)
        per_token = (cache.step.token_ids.shape[0], 1)

        def of_logit_rows(argument: Any) -> Any:
            if isinstance(argument, mx.array) and argument.shape[:2] == per_token:
                return argument[cache.step.logit_rows]
            return cache.of_logit_rows if argument is cache else argument

        kwargs = {name: of_logit_rows(argument) for name, argument in kwargs.items()}
        return original(self, *map(of_logit_rows, args), **kwargs)

    return call
