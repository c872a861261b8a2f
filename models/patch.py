"""The seam between mlx-lm's models and the paged cache: what is replaced, and how a model is found to fit.

A model is fed packed tokens, [num_tokens, 1], with the position of each as `cache.offset`, so its own code applies
projections and rope token by token. `PagedLayerCache` takes the place of mlx-lm's cache and hands the model opaque
objects, which only the attention function in `_dispatch` understands. A model that touches K, V or the mask in between
fails at load, in `_trace`, instead of computing something wrong.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_paged.attention.backend import AttentionOptions, Backend
from mlx_paged.attention.chunks import cut_into_chunks
from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.cache.states import States
from mlx_paged.errors import ModelError
from mlx_paged.models.latent_attention import LatentLayerCache, RotaryKeys, join_queries, latent_spec
from mlx_paged.models.layer_cache import PagedKV, PagedLayerCache, PagedMask
from mlx_paged.models.recurrent import TRACED_STRETCHES, kind_of, leaves, run, trace
from mlx_paged.models.refusals import refusal, unknown_cache
from mlx_paged.models.replaced import fix_dynamic_ropes, replace_code
from mlx_paged.models.select_logits import select_logits

SEAM: dict[Callable[..., Any], list[str]] = {
    base.scaled_dot_product_attention: ["queries", "keys", "values", "cache", "scale", "mask", "sinks"],
    base.create_attention_mask: ["h", "cache", "window_size", "return_array"],
    KVCache.update_and_fetch: ["self", "keys", "values"],
    RotatingKVCache.make_mask: ["self", "N", "window_size", "return_array"],
    ChunkedKVCache.__init__: ["self", "chunk_size"],
    ArraysCache.__init__: ["self", "size", "left_padding"],
    base.create_ssm_mask: ["h", "cache"],
}
_ATTENTION = "scaled_dot_product_attention"
_CHUNKED = "llama4"  # the family whose windows are chunks
_INNER_NAMES = ("model", "transformer", "backbone", "decoder")
_NUM_TRACED_TOKENS = TRACED_STRETCHES[-1].tokens.stop
_TRACED_ROWS = [4, 8, 10]  # those that need logits; several, so that they are not broadcast by chance


class ShapeRecorder(PagedLayerCache):
    """Takes the place of a layer's cache to learn what the layer would store. Computes nothing."""

    def __init__(self, inputs: ModelInputs, window: int | None) -> None:
        self.inputs = inputs
        self.offset = inputs.positions
        self._window = window
        self.shape: LayerSpec | None = None
        self.uses: list[tuple[int, AttentionOptions]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PagedKV, PagedKV]:
        self.shape = LayerSpec(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        for array in (keys, values):
            _expect_shape(array, (self._num_tokens, self.shape.num_kv_heads, 1))
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[PagedKV, PagedKV]:
        if self.shape is None:
            raise ValueError("a layer asks for what is stored before anything was")
        return PagedKV(self, self.shape.dtype), _TracedValues(self, self.shape.dtype, self.shape.value_dim)

    def use_latents(self) -> None:
        """Learn that this is latent attention: its values are transposed."""
        if self.shape is not None and not self.shape.value_in_key:
            self.shape, self.adds_scores = latent_spec(self.shape), True

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: Any, softcap: float | None = None) -> mx.array:
        assert self.shape is not None
        if self.shape.value_in_key:
            queries, mask = join_queries(queries, scale, mask), None
        window = mask.window if mask else self._window
        self.uses.append((queries.shape[1], AttentionOptions(scale, window, softcap, sinks)))
        _expect_shape(queries, (self._num_tokens, queries.shape[1], 1, self.shape.key_dim))
        if window and self._window and window > self._window:
            raise ValueError(f"a layer attends to {window} tokens and its cache keeps {self._window}")
        return mx.zeros((*queries.shape[:3], self.shape.value_dim), queries.dtype)

    @property
    def _num_tokens(self) -> int:
        return self.inputs.token_ids.shape[0]


class _TracedValues(RotaryKeys):
    """Stands for V, of which it is not known yet whether a model takes it for the rotated part of its keys."""

    def swapaxes(self, first: int, second: int) -> mx.array:
        self.layer_cache.use_latents()
        return super().swapaxes(first, second)


@dataclass(eq=False)
class PatchedModel:
    """A model that can run on a paged cache, and what is known about it."""

    model: nn.Module
    layers: list[LayerSpec | None]
    """One per cache that the model makes, those in a list apart, None where nothing is stored."""
    windows: list[int | None]
    """Likewise: the most keys that a cache keeps, None for all."""
    chunked: bool
    """Whether these windows do not move with each query, but begin at the last multiple of their size."""
    uses: list[list[tuple[int, AttentionOptions]]]
    """Likewise: with how many query heads layers attend to what a cache stores, and how."""
    vocab_size: int
    selects_logits: bool
    """Whether the model itself returns only the rows of `logits_indices`."""
    kinds: list[Any]
    """The caches that it makes for its layers: see `kind_of`."""
    state_shapes: list[tuple[tuple[int, ...], mx.Dtype]]
    """What the state of one sequence consists of."""
    _backends: dict[int, list[Backend | None]] = field(default_factory=dict)

    @property
    def num_entries(self) -> list[int]:
        """The entries of the state of each recurrent layer."""
        return [kind for kind in leaves(self.kinds) if kind]

    @property
    def state_bytes(self) -> int:
        """Of the states of one sequence."""
        return sum(math.prod(shape) * dtype.size for shape, dtype in self.state_shapes)

    @property
    def groups(self) -> list[int | None]:
        """The windows of the cache groups: first None, for the layers that keep everything, if any; then the others."""
        return [None, *sorted({window for window in self.windows if window is not None})]

    @property
    def stored_layers(self) -> list[tuple[LayerSpec, int]]:
        """What is stored, with the group it belongs to."""
        pairs = zip(self.layers, self.windows, strict=True)
        return [(shape, self.groups.index(window)) for shape, window in pairs if shape is not None]

    def quantised(self, kv_cache_dtype: str) -> Self:
        """The same with its K and V quantised: the states of recurrent layers are kept as they are.

        Raises ValueError if it has none, or such as are not quantised.
        """
        if not self.stored_layers:
            raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r}: this model keeps states and neither keys nor values")
        layers = [None if layer is None else layer.quantised(kv_cache_dtype) for layer in self.layers]
        return replace(self, layers=layers, _backends={})

    def backends(self, block_size: int) -> list[Backend | None]:
        """Choose, at the first call, what computes the attention to each cache: None where nothing is stored.

        Raises ValueError if the environment asks for a backend that can't be had.
        """
        if block_size not in self._backends:
            self._backends[block_size] = [
                None if layer is None else choose_backend(layer, max(dict(uses), default=0), block_size)
                for layer, uses in zip(self.layers, self.uses, strict=True)
            ]
        return self._backends[block_size]

    def max_decode_queries(self, block_size: int) -> int:
        """Query tokens of one sequence that every layer computes while it reads the sequence's blocks once."""
        layers = zip(self.backends(block_size), self.layers, self.uses, strict=True)
        stored = [(backend, layer, max(dict(uses))) for backend, layer, uses in layers if backend and layer and uses]
        return min((backend.max_decode_queries(layer, heads) for backend, layer, heads in stored), default=1)

    def __call__(self, kv_cache: PagedKVCache, inputs: ModelInputs, states: States | None = None) -> mx.array:
        """The logits of the tokens of `logits_indices`, [num_rows, vocab_size]. states: None if all start here."""
        caches: list[Any] = []
        pools = iter(kv_cache.pools)  # of the layers that store anything
        groups = {window: group for group, window in enumerate(self.groups)}
        if self.chunked:
            inputs = cut_into_chunks(inputs, self.groups, kv_cache.block_size)
        for backend, window in zip(self.backends(kv_cache.block_size), self.windows, strict=True):
            pool = None if backend is None else next(pools)
            kind = LatentLayerCache if pool is not None and pool.latent_dim else PagedLayerCache
            caches.append(kind(pool, backend, inputs, groups[window], None if self.chunked else window))
        logits = run(self.model, inputs, self.kinds, caches, states or States(self.num_entries))
        if not self.selects_logits and inputs.logits_indices is not None:
            logits = logits[inputs.logits_indices]
        return logits[:, 0]


def patch_model(model: nn.Module, max_model_len: int | None = None) -> PatchedModel:
    """Make `model`, an mlx-lm model, run on a paged cache; it goes on working with mlx-lm's own caches.

    max_model_len: the longest context that it will get, in tokens; None if that is not known. Raises ModelError if the
    model keeps other state than keys and values, or looks at them itself.
    """
    check_seam()
    name = getattr(model, "model_type", type(model).__name__)
    made = make_prompt_cache(model)
    kinds = list(map(kind_of, made))
    windows = [_window_of(cache, name) for cache in leaves(made) if kind_of(cache) is None]
    for source in {sys.modules[type(module).__module__] for module in model.modules()}:
        if getattr(source, _ATTENTION, None) is base.scaled_dot_product_attention:
            setattr(source, _ATTENTION, _dispatch)
    replace_code(name)
    fix_dynamic_ropes(model, max_model_len)
    inner = _inner_model(model)
    if inner is not None:
        select_logits(type(inner))
    return _trace(model, name, windows, kinds)


def check_seam() -> None:
    """Raise ModelError, by name, if the installed mlx-lm's functions no longer have the form relied on here."""
    for name, found, expected in changed_functions():
        raise ModelError(
            f"mlx-lm's {name} takes {found}, expected {expected}: "
            "install a version of mlx-lm that mlx-paged names as supported"
        )


def changed_functions() -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield mlx-lm's functions of another form than is relied on: the name, its parameters, those expected."""
    for function, expected in SEAM.items():
        if (found := list(inspect.signature(function).parameters)) != expected:
            yield function.__qualname__, found, expected


def _window_of(cache: Any, model_name: str) -> int | None:
    """The most keys that an mlx-lm cache keeps, None for all. Raises ModelError for other kinds of cache."""
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return cache.max_size + (model_name == "plamo3")  # its masks show one key more than its caches keep
    if type(cache) is ChunkedKVCache and model_name == _CHUNKED:
        return cache.chunk_size
    raise unknown_cache(model_name, type(cache).__name__)


@functools.wraps(base.scaled_dot_product_attention)
def _dispatch(
    queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None
) -> mx.array:
    # Everything but paged K and V is computed as before.
    if not isinstance(keys, PagedKV):
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    if not (mask is None or isinstance(mask, PagedMask) or keys.layer_cache.adds_scores):
        raise TypeError(f"the model passes a mask of its own, {type(mask).__name__}")
    return keys.layer_cache.attend(queries, scale, mask, sinks)


def _inner_model(model: nn.Module) -> nn.Module | None:
    """The part of a model that ends before its output head."""
    while isinstance(getattr(model, "language_model", None), nn.Module):
        model = model.language_model
    found = (getattr(model, name, None) for name in _INNER_NAMES)
    inner: Any = next((inner for inner in found if isinstance(inner, nn.Module)), None)
    return getattr(inner, "language_model", inner)


def _trace(model: nn.Module, name: str, windows: list[int | None], kinds: list[Any]) -> PatchedModel:
    """Build the graph of a step, without running it, to see what each layer stores and what the model returns.

    Raises ModelError if the model's code does not take what it is given for what it is.
    """
    tokens, rows = mx.arange(_NUM_TRACED_TOKENS, dtype=mx.int32), mx.array(_TRACED_ROWS, mx.int32)
    inputs = ModelInputs(tokens, tokens, rows, [], TRACED_STRETCHES)
    try:
        caches, logits, states = trace(model, lambda: [ShapeRecorder(inputs, each) for each in windows], inputs, kinds)
        selects_logits = logits.shape[0] == len(_TRACED_ROWS)
        _expect_shape(logits, (len(_TRACED_ROWS) if selects_logits else _NUM_TRACED_TOKENS, 1, logits.shape[-1]))
    except Exception as error:  # whatever a model's code does to an opaque object
        raise refusal(name, error) from error
    shapes, uses = [cache.shape for cache in caches], [cache.uses for cache in caches]
    return PatchedModel(model, shapes, windows, name == _CHUNKED, uses, logits.shape[-1], selects_logits, kinds, states)


def _expect_shape(array: mx.array, expected: tuple[int, ...]) -> None:
    """Raise ValueError if a model's array does not begin with these dimensions: it took tokens for something else."""
    if array.shape[: len(expected)] != expected:
        raise ValueError(f"an array of shape {list(array.shape)} where {list(expected)} was due")
