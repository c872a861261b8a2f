"""paged_write, Metal's and CUDA's: new keys and values go into their slots, and kernels wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import DTYPES, FAR_BLOCK, Case, exact, found_far, points_of, share_all
from helpers.cuda_text import slots_of
from helpers.gpu import Gpu
from helpers.planted import Mistake
from metalsim.order import UnorderedAccess

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import BACKEND_VARIABLE, _warn_once
from mlx_paged.cache.kv_cache import LayerPool, PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.errors import EngineWarning
from mlx_paged.runner.trial_writes import WRITE_VARIABLE

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


def write(gpu: Gpu, pools: list[mx.array], where: tuple[np.ndarray, np.ndarray], new: list[mx.array]) -> None:
    """Put new rows into pools of K and V."""
    pool = LayerPool(dict(zip("kv", pools, strict=True)))
    gpu.backend.write(pool, slots_of(*where), *new)
    mx.eval(pool.write_done)
    mx.synchronize()


@pytest.mark.parametrize("part", range(2))
def test_new_keys_and_values_are_put_into_their_slots_and_nowhere_else(part: int, gpu: Gpu) -> None:
    for seed, point in enumerate(WRITES[part::2]):
        num_tokens, num_kv_heads, dims, block_size, dtype, new_dtype, is_strided, order = point
        gpu.configure(order=order)
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
        write(gpu, pools, where, new)
        for pool, content in zip(pools, expected, strict=True):
            np.testing.assert_array_equal(exact(pool), content)


def test_latents_are_written_as_keys_and_no_values_beside_them(gpu: Gpu) -> None:
    pool, where = LayerPool.zeros(LayerSpec(1, 24, 16, mx.float16, value_in_key=True), 3, 8), np.array([2, 0], np.int32)
    rows = mx.arange(1, 49).reshape(2, 1, 24).astype(mx.float16)
    expected = written_by_hand([pool.keys], (where, where), [rows])
    gpu.backend.write(pool, slots_of(where, where), rows, rows[..., :16])
    mx.eval(pool.write_done)
    np.testing.assert_array_equal(exact(pool.keys), expected[0])


def test_a_pool_that_something_still_reads_is_written_where_it_lies(gpu: Gpu) -> None:
    cache = PagedKVCache([LayerSpec(4, 64, 64, mx.float32)], [16], 8, 1)
    where, rows, pools = np.array([5], np.int32), mx.ones((1, 4, 64)), (cache.pools[0].keys, cache.pools[0].values)
    views = [array[5] for array in pools]  # on a card: a step that is not over
    gpu.backend.write(cache.pools[0], slots_of(where, where), rows, rows)
    mx.eval(cache.pools[0].write_done)
    mx.synchronize()
    assert cache.pools[0].keys is pools[0] and cache.pools[0].values is pools[1]
    for view, pool in zip(views, pools, strict=True):
        assert (view[5] == 1).all().item() and pool.sum().item() == 4 * 64


def test_a_pool_that_kernels_write_stays_theirs_when_another_model_is_loaded_that_scatters(gpu: Gpu) -> None:
    """Scatter would wait for none of the writes that MLX knows nothing of."""
    where, rows = np.array([1], np.int32), mx.ones((1, 2, 64), mx.float16)
    written, new = (LayerPool.zeros(LayerSpec(2, 64, 64, mx.float16), 2, 8) for _ in range(2))
    gpu.backend.write(written, slots_of(where, where), rows, rows)
    gpu.backend.writes_in_place = False
    for pool in (written, new):
        gpu.backend.write(pool, slots_of(where, where + 1), 2 * rows, rows)
        mx.eval(pool.arrays, [] if pool.write_done is None else pool.write_done)
        assert pool.keys[1, 2, 1, 7].item() == 2
    gpu.only_simulated("launches are counted")
    assert gpu.kernels_run == ["write", "write"]


@pytest.mark.parametrize("of", ["keys", "values"])
def test_slots_past_the_32_bits_of_a_pool_are_found(of: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    others = "key_pieces" if of == "values" else "value_pieces"
    plant(gpu, f"slot * {others}", f"0 * {others}", monkeypatch)
    pools = [mx.zeros((2, 16, 2, 128), mx.float16) for _ in "kv"]
    new = [mx.ones((1, 2, 128), mx.float16) for _ in "kv"]
    where = np.array([FAR_BLOCK], np.int32), np.zeros(1, np.int32)
    with pytest.raises(AssertionError, match=found_far("write")):
        write(gpu, pools, where, new)


def plant(gpu: Gpu, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make kernels with `new` in the place of `old` from here on."""
    gpu.plant(Mistake(old, new, Case(())), monkeypatch)


WRITE_MISTAKES = {
    "a token's row in the slot of its number": ("offsets[token]", "token"),
    "the blocks are as long as there are heads": ("k_cache_shape[1]", "num_kv_heads"),
    "the values of the token before": ("token) * value_pieces", "token - (token > 0)) * value_pieces"),
    "keys among the values": ("piece < key_pieces", "piece <= key_pieces"),
    "a thread past the end writes": ("token < keys_shape[0]", "token <= keys_shape[0]"),
    "nobody is told": ("write_done[thread", "if (false) write_done[thread"),
    "an input is written in secret": ("const_cast<{space}T*>(v_cache)", "({space}T*)v_cache"),
}


@pytest.mark.parametrize("name", WRITE_MISTAKES)
def test_a_mistake_in_writing_is_noticed(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (text.replace("{space}", "device " * (gpu.name == "metal")) for text in WRITE_MISTAKES[name])
    plant(gpu, old, new, monkeypatch)
    pools = [mx.zeros((3, 8, 2, dim), mx.float32) for dim in (64, 32)]
    new = [mx.arange(5 * 2 * dim, dtype=mx.float32).reshape(5, 2, dim) + 1 for dim in (64, 32)]
    where = np.array([2, 0, 1, 2, 0], np.int32), np.array([7, 1, 3, 0, 4], np.int32)
    mx.eval(pools, new)
    expected = written_by_hand(pools, where, new)
    with pytest.raises(AssertionError):  # a SimulationError is one
        write(gpu, pools, where, new)
        for pool, content in zip(pools, expected, strict=True):
            np.testing.assert_array_equal(exact(pool), content)


# -- who waits for whom: MLX sees no connection but that one kernel takes what another has made --


def steps_of(pool: LayerPool, gpu: Gpu) -> tuple[Callable[[], None], Callable[[], None]]:
    """What writes tokens into a pool, and what reads them: a decode and a prompt."""
    metadata = AttentionMetadata(
        mx.zeros((2, 8), mx.int32), np.array([9, 8], np.int32), np.array([0, 1, 4], np.int32),
        slot_block_ids=mx.zeros(4, mx.int32), slot_offsets=mx.array([8, 5, 6, 7]),
    )  # fmt: skip
    rows = mx.ones((4, 2, 32))
    return (
        lambda: gpu.backend.write(pool, metadata, rows, rows),
        lambda: mx.eval(gpu.backend.attend(mx.ones((4, 4, 32)), pool, metadata, AttentionOptions(1.0))),
    )


@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_write_waits_for_all_that_has_read_since_the_last_one(reads: int, gpu: Gpu) -> None:
    pool = LayerPool.zeros(LayerSpec(2, 32, 32, mx.float32), 2, 16)
    write, read = steps_of(pool, gpu)
    write()
    for _ in range(reads):  # as by layers that share what is stored
        read()
    assert len(pool.reads_done) == 2 * reads
    write()
    read()
    gpu.only_simulated("the order is checked")
    pool.reads_done.pop()
    with pytest.raises(UnorderedAccess, match="paged_write writes into k_cache"):
        write()


def test_a_read_waits_for_the_last_write(gpu: Gpu) -> None:
    pool = LayerPool.zeros(LayerSpec(2, 32, 32, mx.float32), 2, 16)
    write, read = steps_of(pool, gpu)
    write()
    before = pool.write_done
    write()
    read()
    gpu.only_simulated("the order is checked")
    for pool.write_done in (before, None):
        with pytest.raises(UnorderedAccess, match="reads k_cache"):
            read()


def test_samples_beams_and_chunks_are_the_same_over_pools_that_kernels_write(
    gpu: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several chunks, of which the second copies blocks, and prefixes that are read once for all samples."""
    share_all(monkeypatch)
    model, prompts = tiny_model("gpt_oss", num_hidden_layers=2), [list(range(1, 40)), [5, 6]]

    def generated() -> list[Any]:
        llm = LLM.from_model(model, num_kv_blocks=48, block_size=8, max_num_batched_tokens=24)
        assert llm.engine._runner.overlap_is_safe
        samples = llm.generate(prompts, SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True))
        beams = llm.beam_search(prompts, BeamSearchParams(beam_width=2, max_tokens=3))
        return [[[each.token_ids for each in o.outputs] for o in samples], [o.sequences[0].token_ids for o in beams]]

    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    expected = generated()
    monkeypatch.setenv(BACKEND_VARIABLE, gpu.name)
    assert generated() == expected
    assert {"decode", "prefill", "merge", "write"} <= set(gpu.kernels_run)


def test_copying_blocks_waits_for_kernels_and_copies_no_pool_whose_blocks_they_have_seen(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view that was left over would make MLX copy all of it; and MLX does not know that a write may not be over."""
    cache = PagedKVCache([LayerSpec(2, 32, 32, mx.float32)], [2048], 16, 1 << 20)
    write, read = steps_of(cache.pools[0], gpu)
    write()
    read()
    done: list[str] = []
    synchronize, take = mx.synchronize, mx.array.__getitem__
    monkeypatch.setattr(mx, "synchronize", lambda: (done.append("waited"), synchronize()))
    monkeypatch.setattr(mx.array, "__getitem__", lambda *arguments: (done.append("read"), take(*arguments))[1])
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    cache.move_blocks([(0, 1)])
    assert mx.get_peak_memory() - before < cache.nbytes / 4
    assert done[:2] == ["waited", "read"]
    assert mx.array_equal(cache.pools[0].keys[0], cache.pools[0].keys[1]) and cache.pools[0].keys[1].any()


# -- where a kernel can't write --


def test_what_writes_is_found_out_and_said_before_the_first_step(
    gpu: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device on which a write into an input is lost, or no kernel for it is made."""
    monkeypatch.setenv(BACKEND_VARIABLE, gpu.name)
    load = partial(LLM.from_model, tiny_model("llama", num_hidden_layers=2), num_kv_blocks=8, pipelining="off")
    plant(gpu, "token < keys_shape[0]", "false", monkeypatch)
    instead = "; MLX's scatter takes their place"
    with pytest.warns(
        EngineWarning, match="can't write into pools here: a pool did not show what was written into it" + instead
    ):
        llm = load()
    assert not gpu.backend.writes_in_place
    before = len(gpu.kernels_run)
    llm.generate([[1, 2, 3] * 3], SamplingParams(max_tokens=3, ignore_eos=True))
    assert set(gpu.kernels_run[before:]) == {"prefill", "decode"}
    plant(gpu, "const int key_pieces", "not int key_pieces", monkeypatch)
    with pytest.warns(EngineWarning, match="can't write into pools here: .*error.*" + instead):
        load()
    monkeypatch.setenv(WRITE_VARIABLE, "kernel")
    with pytest.raises(ValueError, match=r"can't write into pools here: .* \(MLX_PAGED_WRITE\)$"):
        load()


def test_scatter_is_used_where_it_is_asked_for(
    gpu: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, gpu.name)
    load = partial(LLM.from_model, tiny_model("llama", num_hidden_layers=2), num_kv_blocks=8, pipelining="off")
    texts = []
    for asked, kernels in (("scatter", {"decode", "prefill"}), ("kernel", {"write", "decode", "prefill"})):
        monkeypatch.setenv(WRITE_VARIABLE, asked)
        before = len(gpu.kernels_run)
        texts.append(
            load().generate([[1, 2, 3] * 3], SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].token_ids
        )
        assert set(gpu.kernels_run[before:]) == kernels
    assert texts[0] == texts[1]
    monkeypatch.setenv(WRITE_VARIABLE, "pencil")
    with pytest.raises(ValueError, match=r"^MLX_PAGED_WRITE must be one of kernel, scatter, got 'pencil'$"):
        load()


def test_what_has_no_kernel_is_written_as_it_is_read(
    gpu: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def generated() -> list[Any]:
        llm = LLM.from_model(tiny_model("llama"), num_kv_blocks=16, block_size=4, pipelining="off")
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    with pytest.warns(EngineWarning, match=f"no {gpu.backend.title} kernel for block_size 4"):
        _warn_once.cache_clear()
        found = generated()
    gpu.only_simulated("launches are counted")
    assert not gpu.kernels_run
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert generated() == found
