"""Layers that keep a state instead of keys and values: convolutions, state spaces, linear attention.

A recurrence needs a sequence's tokens in a row. So the module that keeps the state, and nothing around it, is called
once for all decodes of a step, as [num_decodes, 1], and once for each prompt, as [1, num_tokens], with mlx-lm's own
cache of such a layer. Nothing is padded: with many families padding would enter the state.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.cache.states import States, Stretch

Cache = TypeVar("Cache")
TRACED_STRETCHES = [
    Stretch(slice(start, end), [i], is_first=True) for i, (start, end) in enumerate(((0, 1), (1, 4), (4, 11)))
]
"""Of the step that a model is traced with: 11 tokens, unlike any number of heads, so that code which mixes up axes
can't pass by chance, in stretches of which none tells another's shape."""


class StateLayerCache:
    """Takes the place of mlx-lm's ArraysCache in a step, for the module that `call_by_stretch` has wrapped."""

    lengths = left_padding = None

    def __init__(self, states: States, layer: int, num_entries: int, inputs: ModelInputs) -> None:
        self.inputs = inputs
        self._states = states
        self._layer = layer
        self._num_entries = num_entries

    def make_mask(self, N: int, **_: Any) -> None:
        """None: there is no padding."""

    def __getitem__(self, index: int) -> NoReturn:
        raise TypeError("a state is looked at outside of the module that keeps it")

    def run(self, call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call a module once per stretch. Returns what it returns, an array or several, for all tokens."""
        outputs: list[tuple[mx.array | None, ...]] = []
        out: Any = None
        for number, stretch in enumerate(self.inputs.stretches):
            num_seqs = len(stretch.seq_ids)
            shape = num_seqs, (stretch.tokens.stop - stretch.tokens.start) // num_seqs
            given, inner = self._states.take(number, self._layer), ArraysCache(self._num_entries)
            inner.cache = list(given)  # type: ignore[arg-type]
            lay_out = functools.partial(self._laid_out, inner=inner, tokens=stretch.tokens, shape=shape)
            out = call(*map(lay_out, args), **{name: lay_out(value) for name, value in kwargs.items()})
            self._states.put(number, self._layer, given, inner.cache)
            outputs.append(tuple(_by_token(each, shape) for each in (out if isinstance(out, tuple) else (out,))))
        joined = tuple(map(_joined, *outputs))
        return joined if isinstance(out, tuple) else joined[0]

    def _laid_out(self, value: Any, inner: ArraysCache, tokens: slice, shape: tuple[int, int]) -> Any:
        """A module's argument, for one stretch: of an array of tokens its rows, of positions each row's first."""
        num_tokens = self.inputs.token_ids.shape[0]
        if value is self:
            return inner
        if isinstance(value, mx.array) and value.shape[:2] == (num_tokens, 1):
            return value[tokens].reshape(*shape, *value.shape[2:])
        if isinstance(value, mx.array) and value.shape == (num_tokens,):
            return value[tokens][:: shape[1]]
        return value


def _by_token(array: mx.array | None, shape: tuple[int, int]) -> mx.array | None:
    """What a module returns for [num_seqs, num_tokens], as [num_seqs * num_tokens, 1]."""
    if array is not None and array.shape[:2] != shape:
        raise ValueError(f"a module that keeps a state returns {list(array.shape)} for {list(shape)} tokens")
    return None if array is None else array.reshape(-1, 1, *array.shape[2:])


def _joined(*parts: mx.array | None) -> mx.array | None:
    arrays = [part for part in parts if part is not None]
    return mx.concatenate(arrays) if len(arrays) > 1 else next(iter(arrays), None)


class StateSeeker(StateLayerCache):
    """Takes the place of a layer's cache to find the module that looks into it, which raises `Found`."""

    def __getitem__(self, index: int) -> NoReturn:
        self._find()

    def __setitem__(self, index: int, value: Any) -> None:
        self._find()

    def __iter__(self) -> Any:
        self._find()

    @property
    def lengths(self) -> Any:  # type: ignore[override]
        self._find()

    def _find(self) -> NoReturn:
        """The innermost module whose call this is part of is the one."""
        frame = sys._getframe(2)
        while frame is not None:
            module = frame.f_locals.get("self")
            if frame.f_code.co_name == "__call__" and isinstance(module, nn.Module):
                raise Found(type(module))
            frame = frame.f_back  # type: ignore[assignment]
        raise TypeError("a state is looked at outside of any module")


class Found(Exception):
    """A module that looks into a state, and is not called by stretch yet."""


def call_by_stretch(cls: Any) -> None:
    """Have modules of a class called once per stretch of a step, if they are given a StateLayerCache."""
    original = cls.__call__
    if hasattr(original, "calls_by_stretch"):
        raise TypeError(f"{cls.__name__} looks into its state outside of its call")

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, StateLayerCache)), None)
        if cache is None:
            return original(self, *args, **kwargs)
        return cache.run(functools.partial(original, self), args, kwargs)

    call.calls_by_stretch = True  # type: ignore[attr-defined]
    cls.__call__ = call


def kind_of(cache: Any) -> Any:
    """What an mlx-lm cache keeps: the number of entries of a state, a list of kinds, or None for keys and values."""
    if type(cache) is CacheList:
        return list(map(kind_of, cache.caches))
    return len(cache.cache) if type(cache) is ArraysCache else None


def leaves(tree: Any) -> Iterator[Any]:
    """What is in a list of caches, or of their kinds, the lists in it apart."""
    for each in getattr(tree, "caches", tree):
        if isinstance(each, list | CacheList):
            yield from leaves(each)
        else:
            yield each


def run(
    model: nn.Module, inputs: ModelInputs, kinds: list[Any], caches: Sequence[Any], states: States, *,
    state_cache: type[StateLayerCache] = StateLayerCache,
) -> mx.array:  # fmt: skip
    """Run a model on the caches of its attention layers and the states of the others. Returns its logits."""
    counts = [kind for kind in leaves(kinds) if kind is not None]
    state_caches = [state_cache(states, layer, count, inputs) for layer, count in enumerate(counts)]
    states.begin(inputs.stretches if counts else ())
    logits: mx.array = model(inputs.token_ids[:, None], cache=_arranged(kinds, iter(caches), iter(state_caches)))
    states.end()
    return logits


def _arranged(kinds: list[Any], caches: Iterator[Any], state_caches: Iterator[Any]) -> list[Any]:
    return [
        _arranged(kind, caches, state_caches)
        if isinstance(kind, list)
        else next(caches if kind is None else state_caches)
        for kind in kinds
    ]


def trace(
    model: nn.Module, make_caches: Callable[[], list[Cache]], inputs: ModelInputs, kinds: list[Any]
) -> tuple[list[Cache], mx.array, list[tuple[tuple[int, ...], mx.Dtype]]]:
    """Build the graph of a step of `TRACED_STRETCHES`, and find out which modules keep states.

    Returns the caches, the logits, and what the state of one sequence consists of. Raises what the model does.
    """
    while True:
        caches, states = make_caches(), States([kind for kind in leaves(kinds) if kind is not None])
        try:
            logits = run(model, inputs, kinds, caches, states, state_cache=StateSeeker)
            break
        except Found as found:
            call_by_stretch(found.args[0])
    shapes = [states.shapes(seq_id) if seq_id in states else [] for seq_id in range(len(inputs.stretches))]
    if any(each != shapes[0] for each in shapes):
        raise ValueError("a state whose shape depends on the number of tokens")
    return caches, logits, shapes[0]
