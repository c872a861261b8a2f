"""States of recurrent layers in swap and in saved prompts: what comes back, how deep, what it takes, what may break."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.budget import budget
from helpers.families import family_model
from helpers.hash_model import NUM_TOP, HashModel, expect_right_states
from helpers.tiny_models import VOCAB_SIZE, unpaged_greedy

from mlx_paged import LLM, SamplingParams
from mlx_paged.cache import block_store
from mlx_paged.cache.block_files import SUFFIX
from mlx_paged.cache.block_mover import BlockMover
from mlx_paged.cache.block_store import MemoryStore
from mlx_paged.errors import EngineWarning
from mlx_paged.outputs import RequestOutput

FAMILIES = ("qwen3_next", "kimi_linear", "mamba2")  # with K and V, with latents, with blocks of no bytes
SWAPS = [("qwen3_next", "files"), ("kimi_linear", "memory"), ("mamba2", "files"), ("gear", "memory")]  # with a window
SMALL: dict[str, Any] = {"block_size": 4, "max_num_seqs": 8, "check_invariants": True}


@pytest.fixture(autouse=True)
def storing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes to move what is so small."""
    monkeypatch.setattr(BlockMover, "round_trip_s", None)


def prompt_of(length: int, seed: float = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def greedy(max_tokens: int, **values: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **values)


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def in_memory(monkeypatch: pytest.MonkeyPatch, capacity: int = 10**7) -> MemoryStore:
    """Have swap in a store in memory, as where the device has its own."""
    store = MemoryStore(capacity)
    monkeypatch.setattr(block_store, "_open_swap", lambda _: store)
    return store


def bytes_of(store: MemoryStore) -> int:
    return store._capacity - store._bytes_available


# -- swap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), SWAPS)
def test_what_is_preempted_goes_on_without_computing_a_token_again(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = in_memory(monkeypatch) if kind == "memory" else None
    model, prompts = family_model(family), [prompt_of(length, length) for length in (11, 18, 13)]
    llm = LLM.from_model(model, num_kv_blocks=16, swap_space=str(tmp_path / "swap"), **SMALL)
    outputs = llm.generate(prompts, greedy(24))
    assert list(map(tokens_of, outputs)) == [unpaged_greedy(model, prompt, 24).token_ids for prompt in prompts]
    stats = llm.stats()
    assert stats.num_preemptions > 0 and stats.num_swapped_states >= stats.num_preemptions
    # The last token of each that was preempted had been chosen, and not been computed yet.
    assert stats.num_prompt_tokens == sum(map(len, prompts)) + stats.num_preemptions
    if swap is not None:
        assert not any(key.startswith("sequence-") for key in swap._blocks)
    assert not [*tmp_path.rglob(f"sequence-*{SUFFIX}")]


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_a_preempted_sequence_takes_the_bytes_of_its_state_and_its_last_block_until_it_returns_or_ends(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = in_memory(monkeypatch)
    llm = LLM.from_model(family_model(family), num_kv_blocks=16, swap_space="1MB", **SMALL)
    engine, plan = llm.engine, llm._runner.plan
    for aborts in (False, True):
        ids = [engine.add_request(prompt_of(length, length), greedy(24)) for length in (11, 18, 13)]
        before = engine.stats().num_preemptions
        while not (held := [key for key in swap._blocks if key.startswith("sequence-")]):
            engine.step()
        assert engine.stats().num_preemptions == before + len(held) == before + 1
        engine._receive(engine._in_flight)
        parked = engine._scheduler.waiting[0]
        assert (len(parked.token_ids) - 1) % 4, "the premise: a block that is not full"
        tail = plan.block_bytes[0]
        assert sum(raw.nbytes for raw, _ in swap._blocks[held[0]].values()) == plan.state_bytes + tail
        size = bytes_of(swap)
        if aborts:
            engine.abort(ids[2])
            assert held[0] not in swap and bytes_of(swap) == size - plan.state_bytes - tail
        while engine.has_unfinished():
            engine.step()
        assert held[0] not in swap
    assert bytes_of(swap) == sum(block_store._size(swap.get(key)) for key in [*swap._blocks])


def test_a_failed_step_gives_up_what_was_swapped_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    swap = in_memory(monkeypatch)
    llm = LLM.from_model(HashModel(stores_keys=True), num_kv_blocks=16, swap_space="1MB", **SMALL)
    prompts = dict(enumerate(prompt_of(length, length) for length in (11, 18, 13)))
    for prompt in prompts.values():
        llm.engine.add_request(prompt, greedy(24, logprobs=NUM_TOP))
    while not any(key.startswith("sequence-") for key in swap._blocks):
        llm.engine.step()
    run = llm._runner.run

    def fail(inputs: Any) -> None:
        llm._runner.run = run  # type: ignore[method-assign]
        raise RuntimeError("the device is gone")

    llm._runner.run = fail  # type: ignore[method-assign,assignment]
    outputs = [*llm.engine.step()]
    assert not any(key.startswith("sequence-") for key in swap._blocks)
    while llm.engine.has_unfinished():
        outputs += llm.engine.step()
    samples = {output.request_id: output.outputs[0] for output in outputs if isinstance(output, RequestOutput)}
    for request_id, sample in samples.items():
        expect_right_states(prompts[request_id], sample, is_greedy=True)
    assert sorted(str(sample.finish_reason) for sample in samples.values()) == ["error", "error", "length"]


@pytest.mark.parametrize("capacity", [60, 300])
def test_a_state_that_swap_has_no_room_for_is_computed_again(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory(monkeypatch, capacity)
    llm = LLM.from_model(HashModel(stores_keys=True), num_kv_blocks=16, swap_space="1MB", **SMALL)
    prompts = [prompt_of(length, length) for length in (11, 18, 13)]
    for prompt, output in zip(prompts, llm.generate(prompts, greedy(24, logprobs=NUM_TOP)), strict=True):
        expect_right_states(prompt, output.outputs[0], is_greedy=True)
    assert llm.stats().num_preemptions > 0


def test_a_checkpoint_that_had_to_go_comes_back_from_swap_with_or_without_its_blocks() -> None:
    llm = LLM.from_model(HashModel(stores_keys=True), num_kv_blocks=40, swap_space="1MB", **SMALL)
    assert llm.engine.cache_groups.checkpoints is not None
    llm.engine.cache_groups.checkpoints._capacity = 2

    def serve(prompt: list[int]) -> int:
        (output,) = llm.generate([prompt], greedy(1, logprobs=NUM_TOP))
        expect_right_states(prompt, output.outputs[0], is_greedy=True)
        return output.num_cached_tokens

    first = prompt_of(40, 1)
    assert [serve(first), serve(first)] == [0, 36]
    for seed in (2, 3):
        serve(prompt_of(24, seed))
    assert serve(first) == 36, "the blocks are in the pool, the state was in the way of others"
    for seed in range(4, 10):
        serve(prompt_of(40, seed))
    assert serve(first) == 36
    assert llm.stats().num_swapped_states > 0 < llm.stats().num_swapped_blocks


def test_memory_stays_what_it_is_while_states_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    swap = in_memory(monkeypatch, 40_000)
    llm = LLM.from_model(family_model("mamba2"), num_kv_blocks=16, swap_space="1MB", **SMALL)
    levels = []
    for turn in range(budget(4, 40)):
        llm.generate([prompt_of(length, turn + length) for length in (11, 18, 13) * 2], greedy(10))
        gc.collect()
        levels.append(mx.get_active_memory())
        assert bytes_of(swap) <= 40_000 and len(swap._blocks) <= 40_000 / 256
    assert llm.stats().num_swapped_states > 10
    assert max(levels[1:]) <= levels[0] + 40 * llm._runner.plan.state_bytes


def test_swap_space_that_holds_no_state_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"^swap_space='1KB' holds no state of this model: one takes \d+.* KB$"):
        LLM.from_model(family_model("mamba2"), num_kv_blocks=16, swap_space="1KB", **SMALL)


# -- saved prompts ------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., LLM]:
    """Starts engines one after another, as processes would be, that save prompts in the same folder."""

    def make(model: nn.Module, **options: Any) -> LLM:
        return LLM.from_model(model, num_kv_blocks=200, prefix_cache_dir=tmp_path, **(SMALL | options))

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_restart_a_prompt_and_its_next_turn_are_hit_as_deep_as_before(
    family: str, start: Callable[..., LLM]
) -> None:
    model = family_model(family)
    llm, prompt = start(model), prompt_of(45)
    (first,) = llm.generate([prompt], greedy(7))
    parting = prompt[:30] + prompt_of(9, 1)  # which makes a checkpoint where it parts
    third = prompt[:30] + prompt_of(9, 2)
    llm.generate([parting], greedy(1))
    turn = prompt + tokens_of(first) + prompt_of(6, 3)
    rewritten = prompt[:38] + prompt_of(20, 4)  # as if a template wrote the prompt's end anew
    asked = [prompt, third, rewritten, turn]
    found = []
    for each in (start(model), llm):
        outputs = [each.generate([one], greedy(7))[0] for one in asked]
        assert list(map(tokens_of, outputs)) == [unpaged_greedy(model, one, 7).token_ids for one in asked]
        found.append([output.num_cached_tokens for output in outputs])
    assert found[0] == found[1] == [44, 28, 36, 48]


def test_keys_and_values_without_a_state_are_no_hit(start: Callable[..., LLM], tmp_path: Path) -> None:
    model, prompt = HashModel(stores_keys=True), prompt_of(45)
    start(model).generate([prompt], greedy(1))
    for path in tmp_path.rglob(f"state-*{SUFFIX}"):
        path.unlink()
    llm = start(model)
    assert llm.engine.match_prefix(prompt, None).num_cached_tokens == 0
    (output,) = llm.generate([prompt], greedy(5, logprobs=NUM_TOP))
    assert output.num_cached_tokens == 0
    expect_right_states(prompt, output.outputs[0], is_greedy=True)


@pytest.mark.parametrize("how", ["cut", "changed", "gone", "another's", "of another shape"])
def test_a_state_file_that_is_broken_is_a_checkpoint_less_and_nothing_else(
    how: str, start: Callable[..., LLM], tmp_path: Path
) -> None:
    model, prompt, shorter = HashModel(stores_keys=True), prompt_of(45), prompt_of(45)[:23]
    before = start(model)
    before.generate([shorter], greedy(1))
    before.generate([prompt], greedy(1))
    checkpoints = before.engine.cache_groups.checkpoints
    assert checkpoints is not None
    llm = start(model)
    assert llm.engine.match_prefix(prompt, None).num_cached_tokens == 44
    deepest = max(checkpoints._path(prompt, None, 44).items())[1]
    (path,) = tmp_path.rglob(f"state-{deepest.digest.hex()}{SUFFIX}")
    whole = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "of another shape":
        stores = llm.engine._block_mover._stores
        assert stores is not None and stores._disk is not None
        stores._disk.put(path.stem, {"s0.0": mx.zeros((1, 3))})
    else:
        other = next(each for each in path.parent.glob(f"state-*{SUFFIX}") if each != path)
        changed = {"cut": whole[: len(whole) // 2], "changed": whole[:-1] + b"?", "another's": other.read_bytes()}
        path.write_bytes(changed[how])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for num_found in (36, 44):  # then it is there again
            (output,) = llm.generate([prompt], greedy(5, logprobs=NUM_TOP))
            assert output.num_cached_tokens == num_found
            expect_right_states(prompt, output.outputs[0], is_greedy=True)
    messages = [str(each.message) for each in caught if issubclass(each.category, EngineWarning)]
    assert len(messages) == (how != "gone")
    assert all(message.startswith("what can't be read back is computed again: ") for message in messages)
    assert start(model).engine.match_prefix(prompt, None).num_cached_tokens == 44


def test_the_same_weights_under_another_config_have_prompts_of_their_own(start: Callable[..., LLM]) -> None:
    prompt = prompt_of(30)
    for changes in ({}, {"rope_theta": 500.0}, {"rms_norm_eps": 1e-2}):
        model = family_model("qwen3_next", **changes)
        for num_found in (0, 28):
            (output,) = start(model).generate([prompt], greedy(6))
            assert output.num_cached_tokens == num_found
            assert tokens_of(output) == unpaged_greedy(model, prompt, 6).token_ids


def test_a_prompt_s_states_are_written_once(start: Callable[..., LLM], tmp_path: Path) -> None:
    model, prompt = HashModel(stores_keys=True), prompt_of(45)
    start(model).generate([prompt], greedy(1))
    paths = sorted(tmp_path.rglob(f"*{SUFFIX}"))
    assert [path.name[:6] for path in paths].count("state-") == 2
    for path in paths:
        os.utime(path, ns=(1, 1))
    inodes = [path.stat().st_ino for path in paths]
    start(model).generate([prompt], greedy(1))
    assert [path.stat().st_ino for path in paths] == inodes
    assert all(path.stat().st_mtime_ns > 1 for path in paths), "they are in use"
