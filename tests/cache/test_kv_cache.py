"""The K/V pools: written in place, copied in pieces, sized with arithmetic."""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_paged import LLM, EngineConfig, SamplingParams
from mlx_paged.cache.kv_cache import PagedKVCache, independent_runs
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.models.patch import patch_model
from mlx_paged.runner import memory_plan as memory_plan

MEGABYTE = 1 << 20


def peak_growth(action: Callable[[], object]) -> int:
    """Bytes that `action` held at most beyond what was held before it."""
    gc.collect()  # what nobody needs any more is let go before, not meanwhile
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    action()
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("num_layers", [1, 3])
def test_steps_write_into_the_pool_without_copying_it(num_layers: int, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama", num_hidden_layers=num_layers)
    llm = LLM.from_model(model, num_kv_blocks=8192, max_num_batched_tokens=32)
    layer_bytes = llm.stats().kv_bytes // num_layers
    assert layer_bytes >= 32 * MEGABYTE
    prompts = [[i % 90] * length for i, length in enumerate((3, 40, 70))]
    params = SamplingParams(temperature=0, max_tokens=20, n=2)
    assert peak_growth(lambda: llm.generate(prompts, params)) < layer_bytes / 4
    assert llm.stats().num_cow_copies > 0


def test_a_copy_of_a_pool_would_be_seen() -> None:
    cache = PagedKVCache([LayerSpec(4, 64, 64, mx.float32)], [4096], 8, 1)
    where = mx.array([1], mx.int32)
    row = mx.ones((1, 4, 64))

    def write(hold: bool) -> None:
        view = cache.pools[0].keys[0] if hold else None
        cache.pools[0].keys[where, where], cache.pools[0].values[where, where] = row, row
        mx.eval(cache.pools[0].keys[1, 0, 0, 0], cache.pools[0].values[1, 0, 0, 0])
        del view

    write(hold=False)
    assert peak_growth(lambda: write(hold=False)) < MEGABYTE
    assert peak_growth(lambda: write(hold=True)) > cache.nbytes / 4


def test_memory_does_not_grow_with_the_number_of_requests(tiny_model: Callable[..., nn.Module]) -> None:
    llm = LLM.from_model(tiny_model("qwen2"), num_kv_blocks=64, max_num_batched_tokens=32, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=5)
    few = [[i, i + 1, i + 2] for i in range(8)]
    llm.generate(few, params)
    growth_of_few = peak_growth(lambda: llm.generate(few, params))  # may be next to nothing: buffers are held for it
    assert peak_growth(lambda: llm.generate(few * 10, params)) < 2 * growth_of_few + MEGABYTE / 4


def _filled(num_blocks: int, dtype: mx.Dtype, max_staging: int) -> tuple[PagedKVCache, list[np.ndarray]]:
    """A cache of two different layers with a value of its own in every element, and its content."""
    layers = [LayerSpec(2, 4, 4, dtype), LayerSpec(1, 6, 3, dtype)]
    cache = PagedKVCache(layers, [num_blocks] * 2, 2, max_staging)
    for pool in cache.pools:
        for name, array in pool.arrays.items():
            pool.arrays[name] = mx.arange(array.size).reshape(array.shape).astype(dtype)
    return cache, [np.array(array) for array in arrays_of(cache)]


def arrays_of(cache: PagedKVCache) -> list[mx.array]:
    return [array for pool in cache.pools for array in pool.arrays.values()]


@given(
    moves=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12),
    max_staging=st.sampled_from([1, 100, 10**6]),
)
def test_moves_mean_one_after_another_whatever_the_staging(moves: list[tuple[int, int]], max_staging: int) -> None:
    cache, expected = _filled(6, mx.float32, max_staging)
    cache.move_blocks(moves)
    for src, dst in moves:
        for pool in expected:
            pool[dst] = pool[src]
    for pool, content in zip(arrays_of(cache), expected, strict=True):
        np.testing.assert_array_equal(np.array(pool), content)


@pytest.mark.parametrize(
    ("moves", "num_runs"),
    [
        ([(0, 1), (0, 2), (3, 4)], 1),
        ([(0, 1), (1, 2)], 2),  # what is read has been written
        ([(0, 1), (2, 1)], 2),  # what is written has been written
        ([(0, 1), (2, 0)], 2),  # what is written has been read
        ([], 0),
    ],
)
def test_moves_that_meet_are_in_different_runs(moves: list[tuple[int, int]], num_runs: int) -> None:
    runs = list(independent_runs(moves))
    assert [move for run in runs for move in run] == moves
    assert len(runs) == num_runs


def test_a_block_is_read_and_written_in_the_layers_of_its_group_alone() -> None:
    layers = [LayerSpec(1, 4, 4, mx.float32), LayerSpec(2, 4, 4, mx.float32), LayerSpec(1, 4, 4, mx.float32)]
    cache = PagedKVCache(layers, [3] * 3, 2, 1, groups=[0, 1, 0])
    content = {name: mx.ones_like(array) for name, array in cache.read_block(1).items()}
    assert {name: array.shape for name, array in content.items()} == dict.fromkeys(("k0", "v0", "k1", "v1"), (2, 1, 4))
    cache.write_block(1, content)
    written = [array.sum().item() for array in arrays_of(cache)]
    assert written == [8, 8, 0, 0, 8, 8]
    for wrong in (
        {name: array.astype(mx.float16) for name, array in content.items()},
        {name: array[:1] for name, array in content.items()},
        {name: array for name, array in content.items() if name != "v1"},
    ):
        with pytest.raises(ValueError, match="another layout"):
            cache.write_block(0, wrong)


@pytest.mark.parametrize("max_staging", [1 * MEGABYTE, 8 * MEGABYTE])
def test_moving_half_a_pool_stages_no_more_than_it_may(max_staging: int) -> None:
    cache = PagedKVCache([LayerSpec(4, 64, 64, mx.float32)] * 2, [4096] * 2, 8, max_staging)
    moves = [(i, i + 2048) for i in range(2048)]
    cache.move_blocks(moves[:1])
    assert peak_growth(lambda: cache.move_blocks(moves)) < max_staging + MEGABYTE // 4


def test_a_device_that_holds_what_it_has_read_for_a_while_makes_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU lets go of what a computation has read when it is told that it is over, a little after its results are."""
    cache = PagedKVCache([LayerSpec(4, 64, 64, mx.float32)] * 2, [4096] * 2, 8, MEGABYTE)
    held: list[mx.array] = []
    evaluate, synchronize = mx.eval, mx.synchronize

    def eval_and_hold(*arrays: object) -> None:
        evaluate(*arrays)
        held[:] = [pool[0] for pool in arrays_of(cache)]

    def synchronize_and_let_go() -> None:
        synchronize()
        held.clear()

    monkeypatch.setattr(mx, "eval", eval_and_hold)
    monkeypatch.setattr(mx, "synchronize", synchronize_and_let_go)
    where, content = mx.array([5], mx.int32), mx.ones((1, 4, 64))

    def step() -> None:
        for layer in range(2):
            cache.pools[layer].keys[where, where], cache.pools[layer].values[where, where] = content, content
        evaluate(*(pool[5, 5, 0, 0] for pool in arrays_of(cache)))

    def all_that_touches_blocks() -> None:
        for work in (
            lambda: cache.move_blocks([(i, i + 2048) for i in range(200)]),
            lambda: cache.write_block(7, cache.read_block(9)),
            lambda: cache.read_block(9),
        ):
            work()
            step()

    step()
    assert peak_growth(all_that_touches_blocks) < 2 * MEGABYTE


def test_the_pool_is_as_large_as_it_says(tiny_model: Callable[..., nn.Module]) -> None:
    before = mx.get_active_memory()
    cache = PagedKVCache([LayerSpec(2, 64, 32, mx.float16)] * 3, [1000] * 3, 16, 1)
    assert cache.nbytes == 1000 * 16 * 3 * 2 * (64 + 32) * 2
    assert abs(mx.get_active_memory() - before - cache.nbytes) < MEGABYTE


def test_memory_is_given_in_blocks_bytes_or_a_share(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("qwen2")
    block_bytes = 16 * 3 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, head size, float32
    for config, num_blocks in (
        ({"num_kv_blocks": 7}, 7),
        ({"kv_cache_memory": "1MB"}, 10**6 // block_bytes),
        ({"kv_cache_memory": block_bytes * 5 + 1}, 5),
    ):
        stats = LLM.from_model(model, **config).stats()
        assert (stats.num_blocks, stats.kv_bytes) == (num_blocks, num_blocks * block_bytes)


def test_by_default_the_pool_is_no_larger_than_all_requests_could_use(tiny_model: Callable[..., nn.Module]) -> None:
    llm = LLM.from_model(tiny_model("qwen2"), max_num_seqs=3, max_model_len=100)
    assert llm.stats().num_blocks == 3 * 7
    assert "21 blocks of 16 tokens" in llm.describe_memory()


@pytest.mark.parametrize(
    ("info", "limit", "name"),
    [
        ({"max_recommended_working_set_size": 80 * MEGABYTE}, 80 * MEGABYTE, "recommended GPU memory"),
        ({"free_memory": 50 * MEGABYTE}, 80 * MEGABYTE, "free GPU memory"),
    ],
    ids=["Metal", "CUDA"],
)
def test_on_a_gpu_three_quarters_of_its_memory_are_divided(
    info: dict[str, int], limit: int, name: str, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a card without what other processes have: what this one holds, and what MLX keeps for later, is free."""
    model, config = patch_model(tiny_model("qwen2")), EngineConfig(max_num_batched_tokens=32, max_num_seqs=1000)
    mx.eval(model.model.parameters())
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 30 * MEGABYTE - mx.get_active_memory())
    plan = memory_plan.plan_memory(model, config, max_model_len=None)
    assert (plan.device_bytes, plan.device) == (limit, name)
    room = 0.75 * limit - plan.weight_bytes - plan.step_bytes
    assert plan.step_bytes > 0 and room - plan.block_bytes[0] < plan.kv_bytes <= room


def test_a_pool_is_refused_from_the_byte_on_that_does_not_fit(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch_model(tiny_model("qwen2"))
    monkeypatch.setattr(memory_plan, "measure_step_bytes", lambda *_: 500)
    room = memory_plan.weight_bytes(model.model) + 500 + 10 * 12288
    for device_bytes, num_blocks in ((room, 10), (room - 1, 9), (room + 12287, 10), (room + 12288, 11)):
        monkeypatch.setattr(memory_plan, "device_limit", lambda size=device_bytes: (size, "RAM"))
        plan = memory_plan.plan_memory(model, EngineConfig(num_kv_blocks=num_blocks), max_model_len=None)
        assert plan.num_blocks == [num_blocks]
        with pytest.raises(ValueError, match=f"a KV cache of {num_blocks + 1} blocks .* does not fit"):
            memory_plan.plan_memory(model, EngineConfig(num_kv_blocks=num_blocks + 1), max_model_len=None)


@pytest.mark.parametrize(
    ("config", "pool"),
    [
        ({"num_kv_blocks": 10**9}, "1000000000 blocks of 16 tokens = 12.3 TB"),
        ({"kv_cache_memory": "900TB"}, r"\d+ blocks of 16 tokens = 900 TB"),
        ({"kv_cache_memory": "100%"}, r"\d+ blocks of 16 tokens = \d+(\.\d+)? [GT]B"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused_with_the_arithmetic(
    config: dict[str, object], pool: str, tiny_model: Callable[..., nn.Module]
) -> None:
    size = r"\d+(\.\d+)? [KMGT]?B"
    reason = f"a KV cache of {pool} does not fit: RAM {size} - weights {size} - reserve {size} leaves {size}; lower "
    with pytest.raises(ValueError, match=f"^{reason}") as refusal:
        LLM.from_model(tiny_model("qwen2"), **config)
    assert "\n" not in str(refusal.value)


def test_a_pool_of_less_than_one_block_is_refused_with_the_size_of_one(tiny_model: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"^kv_cache_memory=12287 holds no block: one takes 12\.3 KB$"):
        LLM.from_model(tiny_model("qwen2"), kv_cache_memory=12287)
    assert LLM.from_model(tiny_model("qwen2"), kv_cache_memory=12288).stats().num_blocks == 1
