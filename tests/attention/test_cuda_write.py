"""paged_write, which only CUDA has: new keys and values go into their slots, and what reads them waits for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from cudasim import Cuda
from helpers.attention_cases import DTYPES, FAR_BLOCK, exact, points_of
from helpers.cuda_text import recorded_calls, slots_of

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention import shared_prefix as shared_prefix
from mlx_paged.attention.paged_attention import BACKEND_VARIABLE, BACKENDS, _warn_once
from mlx_paged.cache.kv_cache import LayerPool, PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.errors import EngineWarning

CUDA = BACKENDS["cuda"]
WRITES = points_of(
    {
        "num_tokens": [1, 3, 40],
        "num_kv_heads": [1, 2, 5],
        "dims": [(64, 64), (128, 128), (40, 72), (256, 8)],
        "block_size": [8, 16, 64],
        "dtype": list(DTYPES),
        "new_dtype": list(DTYPES),
        "is_strided": [False, True],
        "order": ["ascending", "random"],
    },
    reused=("dims", "dtype"),
)


def written_by_hand(
    pools: list[mx.array], where: tuple[np.ndarray, np.ndarray], new: list[mx.array]
) -> list[np.ndarray]:
    """What the pools hold when each token's row has been put into its slot."""
    expected = [exact(pool) for pool in pools]
    for content, pool, rows in zip(expected, pools, new, strict=True):
        content[where] = exact(rows.astype(pool.dtype))
    return expected


def write(pools: list[mx.array], where: tuple[np.ndarray, np.ndarray], new: list[mx.array]) -> mx.array:
    """Put new rows into pools of K and V. Returns what says that it is done, computed."""
    pool = LayerPool(dict(zip("kv", pools, strict=True)))
    CUDA.write(pool, slots_of(*where), *new)
    assert pool.write_done is not None
    mx.eval(pool.write_done)
    return pool.write_done


@pytest.mark.parametrize("part", range(2))
def test_new_keys_and_values_are_put_into_their_slots_and_nowhere_else(part: int, cuda: Cuda) -> None:
    for seed, point in enumerate(WRITES[part::2]):
        num_tokens, num_kv_heads, dims, block_size, dtype, new_dtype, is_strided, order = point
        cuda.configure(order=order)
        rng = np.random.default_rng(seed)

        def normal(shape: tuple[int, ...], kind: str, rng: np.random.Generator = rng) -> mx.array:
            return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(DTYPES[kind])

        num_blocks = 2 + num_tokens // block_size
        slots = rng.permutation(num_blocks * block_size)[:num_tokens].astype(np.int32)
        where = slots // block_size, slots % block_size
        pools = [normal((num_blocks, block_size, num_kv_heads, dim), dtype) for dim in dims]
        new = [normal((num_tokens, num_kv_heads, dim), new_dtype) for dim in dims]
        if is_strided:
            new = [mx.concatenate([rows, rows + 1], axis=2)[:, :, : rows.shape[2]] for rows in new]
        mx.eval(pools, new)
        expected = written_by_hand(pools, where, new)
        assert write(pools, where, new).tolist() == [0]
        for pool, content in zip(pools, expected, strict=True):
            np.testing.assert_array_equal(exact(pool), content)


def test_a_pool_that_something_still_reads_is_written_where_it_lies(cuda: Cuda) -> None:
    cache = PagedKVCache([LayerSpec(4, 64, 64, mx.float32)], [16], 8, 1)
    where, rows, pools = np.array([5], np.int32), mx.ones((1, 4, 64)), (cache.pools[0].keys, cache.pools[0].values)
    views = [array[5] for array in pools]  # on a card: a step that is not over
    CUDA.write(cache.pools[0], slots_of(where, where), rows, rows)
    mx.eval(cache.pools[0].write_done)
    assert cache.pools[0].keys is pools[0] and cache.pools[0].values is pools[1]
    for view, pool in zip(views, pools, strict=True):
        assert (view[5] == 1).all().item() and pool.sum().item() == 4 * 64


def test_latents_are_written_as_keys_and_no_values_beside_them(cuda: Cuda) -> None:
    pool, where = LayerPool.zeros(LayerSpec(1, 24, 16, mx.float16, value_in_key=True), 3, 8), np.array([2, 0], np.int32)
    rows = mx.arange(1, 49).reshape(2, 1, 24).astype(mx.float16)
    expected = written_by_hand([pool.keys], (where, where), [rows])
    CUDA.write(pool, slots_of(where, where), rows, rows[..., :16])
    mx.eval(pool.write_done)
    np.testing.assert_array_equal(exact(pool.keys), expected[0])


@pytest.mark.parametrize("of", ["keys", "values"])
def test_slots_past_the_32_bits_of_a_pool_are_found(of: str, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.only_simulated("memory that is not there is written")
    others = "key_pieces" if of == "values" else "value_pieces"
    plant(cuda, f"slot * {others}", f"0 * {others}", monkeypatch)
    pools = [mx.zeros((2, 16, 2, 128), mx.float16) for _ in "kv"]
    new = [mx.ones((1, 2, 128), mx.float16) for _ in "kv"]
    where = np.array([FAR_BLOCK], np.int32), np.zeros(1, np.int32)
    with pytest.raises(AssertionError, match="out-of-bounds write"):
        write(pools, where, new)


def plant(cuda: Cuda, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make kernels with `new` in the place of `old` from here on."""

    def make_with_mistake(*, source: str, **arguments: Any) -> Any:
        assert old in source
        return cuda.cuda_kernel(source=source.replace(old, new), **arguments)

    monkeypatch.setattr(mx.fast, "cuda_kernel", make_with_mistake)


WRITE_MISTAKES = {
    "a token's row in the slot of its number": ("offsets[token]", "token"),
    "the blocks are as long as there are heads": ("k_cache_shape[1]", "num_kv_heads"),
    "the values of the token before": ("token) * value_pieces", "max(token - 1, 0)) * value_pieces"),
    "keys among the values": ("piece < key_pieces", "piece <= key_pieces"),
    "a thread past the end writes": ("token < block_ids_shape[0]", "token <= block_ids_shape[0]"),
    "nobody is told": ("*write_done = 0", "{}"),
    "an input is written in secret": ("const_cast<T*>(v_cache)", "(T*)v_cache"),
}


@pytest.mark.parametrize("name", WRITE_MISTAKES)
def test_a_mistake_in_writing_is_noticed(name: str, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.only_simulated("wrong kernels are run")
    plant(cuda, *WRITE_MISTAKES[name], monkeypatch)
    pools = [mx.zeros((3, 8, 2, dim), mx.float32) for dim in (64, 32)]
    new = [mx.arange(5 * 2 * dim, dtype=mx.float32).reshape(5, 2, dim) + 1 for dim in (64, 32)]
    where = np.array([2, 0, 1, 2, 0], np.int32), np.array([7, 1, 3, 0, 4], np.int32)
    mx.eval(pools, new)
    expected = written_by_hand(pools, where, new)
    with pytest.raises(AssertionError):  # a SimulationError is one
        write(pools, where, new)
        for pool, content in zip(pools, expected, strict=True):
            np.testing.assert_array_equal(exact(pool), content)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_reads_a_pool_waits_for_what_was_written_into_it(
    family: str, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX sees no connection between the two but that one is an input of the other: by all kernels that read."""
    monkeypatch.setattr(shared_prefix, "MIN_KEYS_SAVED", 1)
    with recorded_calls() as calls:
        llm = LLM.from_model(tiny_model(family), num_kv_blocks=32, max_num_batched_tokens=16)
        del calls[:]
        llm.generate([list(range(1, 40)), [5, 6]], SamplingParams(n=3, max_tokens=9, ignore_eos=True))
    pools = {id(array) for call in calls for name, array in call.inputs.items() if name == "k_cache"}
    last: dict[int, mx.array] = {}
    for call in calls:
        if call.kernel == "paged_write":
            (last[id(call.inputs["k_cache"])],) = call.outputs
        elif call.kernel != "paged_merge":
            assert call.inputs["write_done"] is last[id(call.inputs["k_cache"])]
    assert {call.kernel for call in calls} >= {"paged_write", "paged_decode", "paged_prefill"}
    assert any("SHARED = true" in call.text for call in calls if call.kernel == "paged_prefill")
    assert len(pools) == len(tiny_model(family).layers), "pools stay where they are"


def test_what_has_no_kernel_is_written_as_it_is_read(
    cuda: Cuda, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def generated() -> list[Any]:
        llm = LLM.from_model(tiny_model("llama"), num_kv_blocks=16, block_size=4, pipelining="off")
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    with pytest.warns(EngineWarning, match="no CUDA kernel for block_size 4"):
        _warn_once.cache_clear()
        found = generated()
    cuda.only_simulated("launches are counted")
    assert not cuda.reports
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert generated() == found
