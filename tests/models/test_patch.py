"""The seam between mlx-lm and the paged cache: fails, by name, when mlx-lm drifts away from what is relied on."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.tiny_models import TINY_CONFIGS, VOCAB_SIZE, make_model, unpaged_greedy
from mlx_lm.generate import generate_step
from mlx_lm.models import base
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_paged import LLM, ModelError, SamplingParams
from mlx_paged.attention.backend import AttentionOptions, Backend
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.models import layer_cache, patch

TinyModel = Callable[..., nn.Module]
GREEDY = SamplingParams(temperature=0, max_tokens=6)


def prompt_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize("function", patch.SEAM, ids=lambda function: function.__qualname__)
def test_mlx_lms_function_has_the_signature_relied_on(function: Callable[..., Any]) -> None:
    assert list(inspect.signature(function).parameters) == patch.SEAM[function]


def test_a_drifted_signature_is_refused_by_the_functions_name(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(patch.SEAM, base.create_attention_mask, ["h", "cache"])
    with pytest.raises(ModelError, match=r"create_attention_mask takes .*'window_size'.* install a version of mlx-lm"):
        patch.patch_model(tiny_model("llama"))


@pytest.mark.parametrize("cache", [KVCache(), RotatingKVCache(24)], ids=lambda cache: type(cache).__name__)
def test_mlx_lms_caches_have_what_the_paged_one_stands_in_for(cache: Any) -> None:
    assert cache.offset == 0
    keys = mx.random.normal((1, 2, 5, 8))
    cache.make_mask(5, window_size=None, return_array=False)
    assert [array.shape for array in cache.update_and_fetch(keys, keys)] == [keys.shape] * 2
    assert cache.offset == 5
    assert len(cache.keys_and_values()) == 2
    for name in ("update_and_fetch", "make_mask", "keys_and_values"):
        assert callable(getattr(layer_cache.PagedLayerCache, name))


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_a_models_windows_reach_the_attention_of_the_layers_that_have_them(
    family: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[int | None] = []
    chosen = choose_backend(LayerSpec(2, 16, 16, mx.float32), 4, 8)
    attend = type(chosen).attend

    def record(self: Backend, *args: Any) -> mx.array:
        windows.append(next(arg for arg in args if isinstance(arg, AttentionOptions)).window)
        return attend(self, *args)

    monkeypatch.setattr(type(chosen), "attend", record)
    llm = LLM.from_model(tiny_model(family), block_size=8, num_kv_blocks=16)
    windows.clear()
    llm.generate([prompt_of(9)], SamplingParams(temperature=0, max_tokens=1))
    caches = make_prompt_cache(tiny_model(family))
    assert windows == [cache.max_size if type(cache) is RotatingKVCache else None for cache in caches]


def test_patching_twice_changes_nothing_more(tiny_model: TinyModel) -> None:
    module = importlib.import_module("mlx_lm.models.llama")
    patch.patch_model(tiny_model("llama"))
    attention, inner = module.scaled_dot_product_attention, module.LlamaModel.__call__
    assert attention is patch._dispatch
    patch.patch_model(tiny_model("llama"))
    assert module.scaled_dot_product_attention is attention
    assert module.LlamaModel.__call__ is inner
    assert base.scaled_dot_product_attention is not attention


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_a_patched_model_gives_the_same_as_before_with_mlx_lms_own_cache(family: str) -> None:
    model = make_model(family, seed=1)
    before = unpaged_greedy(model, prompt_of(40), 6)
    patch.patch_model(model)
    assert unpaged_greedy(model, prompt_of(40), 6) == before
    assert model(mx.array([prompt_of(40)])).shape == (1, 40, VOCAB_SIZE)


def test_mlx_lm_generates_from_a_model_while_an_engine_is_in_the_middle_of_a_request(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    expected = unpaged_greedy(model, prompt_of(20), 6).token_ids
    llm = LLM.from_model(model, block_size=8, num_kv_blocks=16, max_num_batched_tokens=16)
    stream = llm.stream(prompt_of(20), GREEDY)
    found = list(next(stream).outputs[0].token_ids)
    steps = generate_step(mx.array(prompt_of(20)), model, max_tokens=6)
    assert [int(token) for token, _ in steps] == expected
    for output in stream:
        found += output.outputs[0].token_ids
    assert found == expected


def test_mlx_lms_quantised_cache_still_works_in_a_patched_model() -> None:
    model = make_model("llama", head_dim=32)
    inputs = mx.array([prompt_of(20)])
    before = model(inputs, cache=[QuantizedKVCache(group_size=32) for _ in model.layers])
    patch.patch_model(model)
    after = model(inputs, cache=[QuantizedKVCache(group_size=32) for _ in model.layers])
    assert mx.array_equal(before, after)


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (ChunkedKVCache(24), "'llama' keeps state in ChunkedKVCache, which can't be paged"),
        (CacheList(KVCache(), ChunkedKVCache(24)), "'llama' keeps state in ChunkedKVCache, which can't be paged"),
        (ArraysCache(2), "'llama' can't be paged: .*'StateSeeker'"),
        (ArraysCache(2, left_padding=[0]), "'llama' can't be paged: .*'StateSeeker'"),
    ],
    ids=["chunks", "list", "state", "padding"],
)
def test_a_cache_that_a_layer_can_not_have_here_is_refused_by_name(
    cache: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    monkeypatch.setattr(type(model), "make_cache", lambda self: [KVCache(), cache, KVCache()])
    with pytest.raises(ModelError, match=reason):
        LLM.from_model(model, num_kv_blocks=4)


def test_a_rotating_cache_that_keeps_its_first_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    monkeypatch.setattr(type(model), "make_cache", lambda self: [RotatingKVCache(24, keep=4) for _ in self.layers])
    with pytest.raises(ModelError, match="keeps state in RotatingKVCache"):
        LLM.from_model(model, num_kv_blocks=4)


def _sum_of_keys(attention: Callable[..., mx.array], *args: Any, **kwargs: Any) -> mx.array:
    queries, keys, *rest = args
    return attention(queries, keys * 2.0, *rest, **kwargs)


def _own_mask(attention: Callable[..., mx.array], *args: Any, **kwargs: Any) -> mx.array:
    return attention(*args, **(kwargs | {"mask": "causal"}))


def _mixed_axes(attention: Callable[..., mx.array], *args: Any, **kwargs: Any) -> mx.array:
    queries, *rest = args
    return attention(queries * kwargs["cache"].offset[:, None], *rest, **kwargs)


def _wide_window(attention: Callable[..., mx.array], *args: Any, **kwargs: Any) -> mx.array:
    return attention(*args, **(kwargs | {"mask": kwargs["cache"].make_mask(1, window_size=25)}))


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (_sum_of_keys, "unsupported operand"),
        (_own_mask, "mask of its own, str"),
        (_mixed_axes, "an array of shape"),
        (_wide_window, "attends to 25 tokens and its cache keeps 24"),
    ],
    ids=["keys", "mask", "positions", "window"],
)
def test_a_model_that_meddles_with_what_it_is_handed_is_refused_when_it_is_loaded(
    meddle: Callable[..., mx.array], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = make_model("llama", sliding_window=24, layer_types=kinds)
    patch.patch_model(model)
    module = importlib.import_module("mlx_lm.models.llama")
    attention = module.scaled_dot_product_attention
    monkeypatch.setattr(
        module, "scaled_dot_product_attention", lambda *args, **kwargs: meddle(attention, *args, **kwargs)
    )
    with pytest.raises(ModelError, match=f"'llama' can't be paged: .*{reason}"):
        patch.patch_model(model)


@pytest.mark.parametrize("tied", [False, True], ids=["lm_head", "tied"])
def test_only_rows_that_need_logits_reach_the_output_head(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    llm = LLM.from_model(model, block_size=8, num_kv_blocks=32, max_num_batched_tokens=16)
    shapes: list[tuple[int, ...]] = []
    cls, name = (nn.Embedding, "as_linear") if tied else (nn.Linear, "__call__")
    original = getattr(cls, name)

    def record(self: nn.Module, x: mx.array) -> mx.array:
        if self is (model.model.embed_tokens if tied else model.lm_head):
            shapes.append(x.shape[:-1])
        return original(self, x)

    monkeypatch.setattr(cls, name, record)
    llm.generate([prompt_of(40), prompt_of(3)], SamplingParams(temperature=0, max_tokens=3))
    # Chunks of 16, 16, then 8 with the second prompt's 3: the first two steps need no logits, so one row stands in.
    assert shapes == [(1, 1), (1, 1), (2, 1), (2, 1), (2, 1)]


def test_caches_of_mlx_lms_are_still_made_by_a_patched_model(tiny_model: TinyModel) -> None:
    patch.patch_model(tiny_model("gemma3_text"))
    assert {type(cache) for cache in make_prompt_cache(tiny_model("gemma3_text"))} == {KVCache, RotatingKVCache}
