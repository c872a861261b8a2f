"""The families of which some code is replaced: it takes a position for one number, or looks at keys or scores itself.

What is here runs where a module is given a paged cache, and does what mlx-lm's code does there with packed tokens,
x [num_tokens, 1, dim]. Anywhere else mlx-lm's own code runs, as before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_paged.errors import ModelError
from mlx_paged.models.layer_cache import PagedKV, PagedLayerCache
from mlx_paged.models.recurrent import StateLayerCache


def replace_code(family: str) -> None:
    """Replace what has to be of a family's code, once."""
    for class_name, call in _REPLACED.get(family, {}).items():
        cls = getattr(importlib.import_module(f"mlx_lm.models.{family}"), class_name)
        if not hasattr(cls.__call__, "is_replaced"):
            cls.__call__ = _either(cls.__call__, call)


def _either(original: Callable[..., mx.array], call: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A call of `call` if it is given a paged cache, some, or keys of one; otherwise of `original`."""

    @functools.wraps(original)
    def either(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        given = (value[0] if isinstance(value, list) and value else value for value in (*args, *kwargs.values()))
        is_paged = any(isinstance(value, PagedLayerCache | PagedKV | StateLayerCache) for value in given)
        return (call if is_paged else original)(self, *args, **kwargs)

    either.is_replaced = True  # type: ignore[attr-defined]
    return either


def fix_dynamic_ropes(model: nn.Module, max_model_len: int | None) -> None:
    """Let dynamic rope scaling take the positions of many sequences: as far as it does not scale, which is all it may.

    Raises ModelError for a context, in tokens, that is longer, or not known.
    """
    ropes: list[Any] = [module for module in model.modules() if type(module).__name__ == "DynamicNTKScalingRoPE"]
    for rope in ropes:
        most = rope.max_position_embeddings
        if max_model_len is None or max_model_len > most:
            raise ModelError(
                f"dynamic rope scaling turns keys by how long the sequence is once that is more than {most} tokens, "
                f"which can't be paged: give max_model_len={most}, or less"
            )
        cls: Any = type(rope)
        if not hasattr(cls.__call__, "is_replaced"):
            cls.__call__ = _unscaled(cls.__call__)


def _unscaled(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A rope's call that does not scale where it is given many positions, and otherwise is `original`."""

    @functools.wraps(original)
    def call(self: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if not isinstance(offset, mx.array):
            return original(self, x, offset)
        base = self.original_base if hasattr(self, "original_base") else self.base
        scale = getattr(self, "scale", 1.0)
        return mx.fast.rope(x, self.dims, traditional=self.traditional, base=base, scale=scale, offset=offset)

    call.is_replaced = True  # type: ignore[attr-defined]
    return call


def _by_head(x: mx.array, num_heads: int) -> mx.array:
    """[num_tokens, 1, num_heads * dim] as [num_tokens, num_heads, 1, dim]."""
    return x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)


def _joined(x: mx.array) -> mx.array:
    """[num_tokens, num_heads, 1, dim] as [num_tokens, 1, num_heads * dim]."""
    return x.swapaxes(1, 2).flatten(2)


def _afm7_reuse(self: Any, x: mx.array, keys: PagedKV, values: PagedKV, mask: Any = None) -> mx.array:
    """AFM's layers without keys of their own, which take the position from the number of another's."""
    cache = keys.layer_cache
    queries = self.q_norm(self.rope(_by_head(self.q_proj(x), self.n_heads), offset=cache.offset))
    return self.out_proj(_joined(cache.attend(queries, self.scale, mask, None)))


def _baichuan_attention(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Baichuan M1's attention, which mixes each key and value with those of the token before: that is its state."""
    states, kv_cache = cache

    def mix(keys: mx.array, values: mx.array, state: Any) -> tuple[mx.array, ...]:
        mixed = []
        for entry, (new, weights) in enumerate(((keys, self.conv_k), (values, self.conv_v))):
            new = new.reshape(*new.shape[:2], self.num_kv_heads, -1)
            last = mx.zeros_like(new[:, :1]) if state[entry] is None else state[entry]
            of_last, of_new = mx.split(weights.reshape(self.num_kv_heads, -1), 2, axis=-1)
            mixed.append((mx.concatenate([last, new[:, :-1]], axis=1) * of_last + new * of_new).flatten(2))
            state[entry] = new[:, -1:]
        return tuple(mixed)

    ends = [self.hidden_size, self.hidden_size + self.num_kv_heads * self.head_dim]
    queries, keys, values = mx.split(self.W_pack(x), ends, axis=-1)
    keys, values = states.run(mix, (keys, values, states), {})
    keys = self.rope(_by_head(keys, self.num_kv_heads), offset=kv_cache.offset)
    kv_cache.update_and_fetch(keys, _by_head(values, self.num_kv_heads))
    queries = self.rope(_by_head(queries, self.num_heads), offset=kv_cache.offset)
    return self.o_proj(_joined(kv_cache.attend(queries, self.scale, mask, None)))


def _gemma2_attention(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Gemma 2's attention, which caps its scores."""
    queries = self.rope(_by_head(self.q_proj(x), self.n_heads), offset=cache.offset)
    keys = self.rope(_by_head(self.k_proj(x), self.n_kv_heads), offset=cache.offset)
    cache.update_and_fetch(keys, _by_head(self.v_proj(x), self.n_kv_heads))
    return self.o_proj(_joined(cache.attend(queries, self.scale, mask, None, softcap=self.attn_logit_softcapping)))


def _gpt_bigcode_model(self: Any, inputs: mx.array, cache: list[Any]) -> mx.array:
    """StarCoder's layers, whose positions are a range of numbers."""
    hidden = self.wte(inputs) + self.wpe(cache[0].offset)[:, None]
    for layer, each in zip(self.h, cache, strict=True):
        hidden = layer(hidden, each.make_mask(1), cache=each)
    return self.ln_f(hidden)


def _llama4_model(self: Any, inputs: mx.array, cache: list[Any]) -> mx.array:
    """Llama 4's layers, whose mask of chunks is made of numbers: here the chunks are cut before (`PatchedModel`)."""
    hidden = self.embed_tokens(inputs)
    for layer, each in zip(self.layers, cache, strict=True):
        hidden = layer(hidden, None, cache=each)
    return self.norm(hidden)


def _llama4_attention(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """Llama 4's attention, which scales queries by a range of positions in layers without rope."""
    queries, keys = _by_head(self.q_proj(x), self.n_heads), _by_head(self.k_proj(x), self.n_kv_heads)
    if self.use_rope:
        queries, keys = (self.rope(each, offset=cache.offset) for each in (queries, keys))
    if self.use_qk_norm:
        queries, keys = (mx.fast.rms_norm(each, weight=None, eps=1e-6) for each in (queries, keys))
    if self.attn_temperature_tuning and not self.use_rope:
        scales = mx.log(mx.floor((cache.offset + 1) / self.floor_scale) + 1.0) * self.attn_scale + 1.0
        queries = (queries * scales[:, None, None, None]).astype(queries.dtype)
    cache.update_and_fetch(keys, _by_head(self.v_proj(x), self.n_kv_heads))
    return self.o_proj(_joined(cache.attend(queries, self.scale, mask, None)))


def _longcat_ngrams(self: Any, input_ids: mx.array, cache: Any = None) -> mx.array:
    """LongCat's embedding of tokens with those before, which are its state: as if zeros came before the first ones."""

    def embed(input_ids: mx.array, state: Any) -> mx.array:
        if state[0] is None:
            state[0] = mx.zeros((input_ids.shape[0], self.n - 1), mx.int64)
        return self(input_ids, cache=state)

    return cache.run(embed, (input_ids, cache), {})


def _plamo_attention(self: Any, hidden_states: mx.array, attention_mask: Any = None, cache: Any = None) -> mx.array:
    """PLaMo's attention, which repeats its keys: query head i attends to KV head i modulo their number."""
    queries = self.rotary_emb(_by_head(self.q_proj(hidden_states), self.q_num_heads), offset=cache.offset)
    keys = self.rotary_emb(_by_head(self.k_proj(hidden_states), self.k_num_heads), offset=cache.offset)
    cache.update_and_fetch(keys, _by_head(self.v_proj(hidden_states), self.v_num_heads))
    num_tokens, num_heads, _, dim = queries.shape
    groups = num_tokens, -1, self.k_num_heads, dim
    queries = queries.reshape(groups).swapaxes(1, 2).reshape(queries.shape)
    out = cache.attend(queries, self.scale, attention_mask, None)
    out = out.reshape(num_tokens, self.k_num_heads, -1, dim).swapaxes(1, 2)
    return self.o_proj(out.reshape(num_tokens, 1, num_heads * dim))


def _plamo2_attention(self: Any, hidden_states: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """PLaMo 2's attention, which calls MLX's function and not mlx-lm's."""
    ends = [self.q_proj_dim, self.q_proj_dim + self.k_proj_dim]
    num_heads = (self.q_num_heads, self.k_num_heads, self.v_num_heads)
    q, k, values = map(_by_head, mx.split(self.qkv_proj(hidden_states), ends, axis=-1), num_heads)
    queries, keys = (
        self.rope(mx.fast.rms_norm(each, weight=None, eps=1e-6) * weight[:, None], offset=cache.offset)
        for each, weight in ((q, self.q_weight), (k, self.k_weight))
    )
    cache.update_and_fetch(keys, values)
    return self.o_proj(_joined(cache.attend(queries, self.scale, mask, None)))


_REPLACED: dict[str, dict[str, Callable[..., mx.array]]] = {
    "afm7": {"KVReuseAttention": _afm7_reuse},
    "baichuan_m1": {"Attention": _baichuan_attention},
    "gemma2": {"Attention": _gemma2_attention},
    "gpt_bigcode": {"GPTBigCodeModel": _gpt_bigcode_model},
    "llama4": {"LlamaModel": _llama4_model, "Attention": _llama4_attention},
    "longcat_flash_ngram": {"NgramEmbedding": _longcat_ngrams},
    "plamo": {"Attention": _plamo_attention},
    "plamo2": {"Attention": _plamo2_attention},
}
