"""Block stores: blocks that leave the pool come back as they were, from memory, files and earlier processes."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.block_stores import content, folder_store, same_bits
from helpers.tiny_models import unpaged_greedy

from mlx_paged import LLM, SamplingParams
from mlx_paged.cache import block_store as block_store
from mlx_paged.cache.block_store import MemoryStore
from mlx_paged.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=40)
PROMPTS = [[(7 * i + j * j) % 97 for j in range(length)] for i, length in enumerate((70, 120, 60, 90))]


def make_llm(model: nn.Module, **config: object) -> LLM:
    """An engine that can hold two of the prompts and their outputs at a time, but not three."""
    settings = {"block_size": 8, "num_kv_blocks": 36, "max_num_batched_tokens": 64, "check_invariants": True}
    return LLM.from_model(model, **(settings | config))


def texts(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_block_comes_back_bit_for_bit(dtype: mx.Dtype, tmp_path: Path) -> None:
    for store in (MemoryStore(10**6), folder_store(tmp_path)):
        store.put("one", content(1, dtype))
        store.put("two", content(2, dtype))
        assert same_bits(store.get("one"), content(1, dtype))
        assert same_bits(store.get("two"), content(2, dtype))
        assert "three" not in store


def test_the_block_used_least_recently_goes_first_when_a_store_is_full(tmp_path: Path) -> None:
    folder_store(tmp_path / "one").put("0", content(0))
    on_disk = (tmp_path / "one" / "0.safetensors").stat().st_size
    room_for_three = 3 * sum(array.nbytes for array in content(0).values())
    tmp_path = tmp_path / "three"
    for store in (MemoryStore(room_for_three), folder_store(tmp_path, capacity=3 * on_disk)):
        for number in range(3):
            store.put(str(number), content(number))
        store.get("0")
        store.put("3", content(3))
        assert [str(number) in store for number in range(4)] == [True, False, True, True]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_store_takes_blocks_of_no_bytes_and_no_end_of_them(tmp_path: Path) -> None:
    """As the blocks of a model are that has recurrent layers only."""
    in_memory = MemoryStore(2560)
    for store in (in_memory, folder_store(tmp_path)):
        for number in range(20):
            store.put(str(number), {})
        assert store.get("19") == {}
    assert len(in_memory._blocks) == 10


def test_what_is_larger_than_a_store_leaves_the_others_there(tmp_path: Path) -> None:
    for store in (MemoryStore(300), folder_store(tmp_path, capacity=600)):
        store.put("one", content(1))
        with pytest.raises(OSError, match=r"a block or a state of .* has no place in"):
            store.put("two", {"s0.0": mx.zeros((1, 200))})
        assert "one" in store and "two" not in store


def test_a_file_that_is_not_whole_or_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    folder_store(tmp_path).put("one", content(1))
    folder_store(tmp_path).put("two", content(2))
    (tmp_path / "three.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"one\.safetensors was written for another model"):
        folder_store(tmp_path, "another model").get("one")
    with pytest.raises(ValueError, match=r"three\.safetensors was written for another"):
        folder_store(tmp_path).get("three")
    size = (tmp_path / "one.safetensors").stat().st_size
    for cut in (0, 5, size // 2, size - 1):
        os.truncate(tmp_path / "one.safetensors", cut)
        with pytest.raises(ValueError, match=r"one\.safetensors is not a whole block"):
            folder_store(tmp_path).get("one")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_file_of_which_one_bit_changed_is_refused_by_name(dtype: mx.Dtype, tmp_path: Path) -> None:
    folder_store(tmp_path).put("one", content(1, dtype))
    path = tmp_path / "one.safetensors"
    whole = path.read_bytes()
    for offset in (-1, -17):
        changed = bytearray(whole)
        changed[offset] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"one\.safetensors is not what was written"):
            folder_store(tmp_path).get("one")


def test_while_a_block_is_written_its_name_is_not_there_and_an_older_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, seen = folder_store(tmp_path), []

    def save(path: str, *arguments: object) -> None:
        Path(path).write_bytes(b"half")
        seen.append({name.stem: name.read_bytes() for name in tmp_path.glob("*.safetensors")})
        real_save(path, *arguments)

    real_save = mx.save_safetensors
    monkeypatch.setattr(mx, "save_safetensors", save)
    store.put("one", content(1))
    whole = (tmp_path / "one.safetensors").read_bytes()
    store.put("one", content(2))
    assert seen == [{}, {"one": whole}]
    assert same_bits(store.get("one"), content(2))


@pytest.mark.parametrize(
    ("family", "allocator", "swap"),
    [
        ("qwen2", "lru", "64MB"),
        ("gemma3_text", "buddy", "20KB"),
        ("gemma3_text", "lru", "folder"),
        ("qwen2", "buddy", "memory"),
        ("gemma3_text", "fifo", "64MB"),
    ],
)
def test_preempted_requests_give_the_same_tokens_with_swap(
    family: str,
    allocator: str,
    swap: str,
    tiny_model: Callable[..., nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if swap == "memory":  # as where the device has memory of its own
        monkeypatch.setattr(block_store, "_open_swap", lambda _: MemoryStore(10**8))
    model = tiny_model(family)
    llm = make_llm(model, allocator=allocator, swap_space={"folder": str(tmp_path), "memory": "64MB"}.get(swap, swap))
    outputs = llm.generate(PROMPTS, GREEDY)
    assert texts(outputs) == [unpaged_greedy(model, prompt, 40).token_ids for prompt in PROMPTS]
    stats = llm.stats()
    assert stats.num_preemptions > 0
    assert stats.num_swapped_blocks > 0
    assert stats.num_free_blocks == stats.num_blocks


def test_what_comes_back_from_swap_is_not_computed_again(tiny_model: Callable[..., nn.Module]) -> None:
    def num_computed_tokens(swap_space: str | None) -> int:
        llm = make_llm(tiny_model("qwen2"), swap_space=swap_space)
        run, total = llm._runner.run, 0

        def counting(inputs):  # type: ignore[no-untyped-def]
            nonlocal total
            total += inputs.token_ids.size
            return run(inputs)

        llm._runner.run = counting  # type: ignore[method-assign]
        llm.generate(PROMPTS, GREEDY)
        return total

    necessary = sum(len(prompt) + 39 for prompt in PROMPTS)
    assert num_computed_tokens("64MB") < num_computed_tokens(None)
    assert num_computed_tokens("64MB") <= necessary + 3 * 8  # at most a partly filled block per preemption


def test_swap_files_are_gone_with_the_engine(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    llm = make_llm(tiny_model("qwen2"), swap_space=str(tmp_path))
    llm.generate(PROMPTS, GREEDY)
    assert list(tmp_path.rglob("*.safetensors"))
    del llm
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_turns_swap_into_recompute_with_one_warning(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen2")
    llm = make_llm(model, swap_space=str(tmp_path))
    saved = []

    def save_until_full(path: str, *arguments: object) -> None:
        saved.append(path)
        if len(saved) > 3:
            Path(path).write_bytes(b"half a file")
            raise RuntimeError("[save_safetensors] No space left on device")
        real_save(path, *arguments)

    real_save = mx.save_safetensors
    monkeypatch.setattr(mx, "save_safetensors", save_until_full)
    with pytest.warns(UserWarning, match="swap is off, preempted requests are computed again") as caught:
        outputs = llm.generate(PROMPTS, GREEDY)
    assert len(caught) == 1
    assert len(saved) == 4
    assert texts(outputs) == [unpaged_greedy(model, prompt, 40).token_ids for prompt in PROMPTS]
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_a_second_process_starts_from_the_blocks_of_the_first(
    family: str, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_model(family)
    first, second = (make_llm(model, num_kv_blocks=100, prefix_cache_dir=tmp_path) for _ in range(2))
    prompt = PROMPTS[1]
    expected = first.generate([prompt], GREEDY)[0]
    assert expected.num_cached_tokens == 0
    third = make_llm(model, num_kv_blocks=100, prefix_cache_dir=tmp_path)
    for llm in (second, third):  # the second looked at the folder before the first had written to it
        again = llm.generate([prompt, prompt[:50] + [1, 2]], GREEDY)
        assert texts(again)[0] == expected.outputs[0].token_ids
    assert [output.num_cached_tokens for output in again] == [112, 48]


def test_saved_blocks_are_found_by_the_same_weights_block_size_and_type_only(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    prompt = PROMPTS[0]

    def num_cached(model: nn.Module, **config: object) -> int:
        return make_llm(model, prefix_cache_dir=tmp_path, **config).generate([prompt], GREEDY)[0].num_cached_tokens

    model = tiny_model("qwen2")
    assert num_cached(model) == 0
    assert num_cached(tiny_model("qwen2", seed=1)) == 0
    assert num_cached(model, block_size=16) == 0
    assert num_cached(tiny_model("qwen2", dtype=mx.float16)) == 0
    assert num_cached(model) == 64


def test_damaged_blocks_are_computed_again_with_one_warning(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    expected = texts(make_llm(model, prefix_cache_dir=tmp_path).generate(PROMPTS, GREEDY))
    files = sorted(tmp_path.rglob("*.safetensors"))
    for path in files[::3]:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.warns(UserWarning, match="can't be read back is computed again") as caught:
        assert texts(make_llm(model, prefix_cache_dir=tmp_path).generate(PROMPTS, GREEDY)) == expected
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(make_llm(model, prefix_cache_dir=tmp_path).generate(PROMPTS, GREEDY)) == expected


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_what_could_not_be_read_back_counts_as_not_cached(
    family: str, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    def make() -> LLM:
        return make_llm(tiny_model(family), num_kv_blocks=100, prefix_cache_dir=tmp_path)

    expected = texts(make().generate(PROMPTS[:2], GREEDY))
    for path in tmp_path.rglob("*.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
    second = make()
    with pytest.warns(UserWarning, match="can't be read back is computed again"):
        outputs = second.generate(PROMPTS[:2], GREEDY)
    assert texts(outputs) == expected
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    stats = second.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (190, 0)


def test_a_prompt_is_saved_even_if_its_block_is_in_swap(tmp_path: Path) -> None:
    swap, saved = MemoryStore(10**6), folder_store(tmp_path)
    stores = block_store.BlockStores(swap, saved)
    stores.put_evicted("one", content(1))
    assert "one" in stores
    assert not stores.has_prompt("one")
    stores.put_prompt("one", content(1))
    assert stores.has_prompt("one")


def test_salted_prompts_are_saved_apart(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    def num_cached(salt: str | None) -> int:
        params = SamplingParams(temperature=0, max_tokens=1, cache_salt=salt)
        llm = make_llm(tiny_model("qwen2"), prefix_cache_dir=tmp_path)
        return llm.generate([PROMPTS[0]], params)[0].num_cached_tokens

    assert [num_cached("a"), num_cached("b"), num_cached(None), num_cached("a")] == [0, 0, 0, 64]


@pytest.mark.parametrize("setting", ["swap_space", "prefix_cache_dir"])
def test_a_folder_that_cannot_be_written_to_is_refused(
    setting: str, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"can't be written to .* give another folder"):
        make_llm(tiny_model("qwen2"), **{setting: str(tmp_path / "file")})


@pytest.mark.parametrize("setting", ["swap_space", "prefix_cache_dir"])
def test_a_block_store_without_prefix_caching_is_refused(setting: str, tiny_model: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="not with prefix_caching=False"):
        make_llm(tiny_model("qwen2"), prefix_caching=False, **{setting: "1GB"})


@pytest.mark.parametrize("size", ["50%", "0GB", "8 parsecs"])
def test_a_swap_size_that_cannot_be_meant_is_refused(size: str, tiny_model: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"^swap_space '"):
        make_llm(tiny_model("qwen2"), swap_space=size)
