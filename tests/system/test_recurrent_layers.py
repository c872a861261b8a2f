"""Models with recurrent layers in whole engines: what is found of a prefix, what they hold, what is refused."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.budget import budget
from helpers.families import family_model
from helpers.hash_model import NUM_TOP, HashModel, expect_right_states
from helpers.tiny_models import VOCAB_SIZE
from mlx_lm.utils import load_tokenizer

from mlx_paged import LLM, SamplingParams
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.errors import EngineWarning
from mlx_paged.models.layer_cache import PagedLayerCache
from mlx_paged.models.recurrent import StateLayerCache

SMALL: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 200, "max_num_seqs": 8, "check_invariants": True}


def greedy(max_tokens: int, **values: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **values)


def prompt_of(length: int, seed: float = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def active_bytes() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


# -- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["nemotron_h", "jamba", "olmo_hybrid"])
def test_prompts_of_unequal_lengths_give_in_one_batch_what_each_gives_alone(family: str) -> None:
    llm = LLM.from_model(family_model(family), **SMALL, prefix_caching=False)
    prompts = [prompt_of(length, seed=length) for length in (1, 30, 3, 17)]
    together = llm.generate(prompts, greedy(6))
    alone = [llm.generate([prompt], greedy(6))[0] for prompt in prompts]
    assert [each.outputs[0].token_ids for each in together] == [each.outputs[0].token_ids for each in alone]


# -- prefixes -----------------------------------------------------------------------------------------------------


def test_the_next_turn_of_a_conversation_goes_on_in_the_answer() -> None:
    """After its last block: an answer alone has a state kept at each of them."""
    llm = LLM.from_model(HashModel(), **SMALL)
    prompt, found = prompt_of(21), []
    for turn in range(4):
        (output,) = llm.generate([prompt], greedy(32, logprobs=NUM_TOP))
        expect_right_states(prompt, output.outputs[0], is_greedy=True)
        found.append((output.num_cached_tokens, len(prompt)))
        prompt = prompt + output.outputs[0].token_ids + prompt_of(5, turn)
    # Of 53, 90 and 127 tokens the last was put out and never read.
    assert found == [(0, 21), (48, 58), (88, 95), (124, 132)]


def test_of_four_answers_at_once_each_has_a_state_kept_at_every_fourth_block() -> None:
    """So a step copies as many states as with one answer."""
    llm = LLM.from_model(HashModel(), **SMALL)
    prompts = [prompt_of(10, seed) for seed in range(4)]
    outputs = llm.generate(prompts, greedy(32))
    turns = [prompt + output.outputs[0].token_ids + [1] for prompt, output in zip(prompts, outputs, strict=True)]
    assert [output.num_cached_tokens for output in llm.generate(turns, greedy(1))] == [32] * 4


def test_the_second_conversation_with_a_system_message_finds_it(demo_folder: Path) -> None:
    model = family_model("lfm2", vocab_size=1600)
    llm = LLM.from_model(model, load_tokenizer(demo_folder), num_kv_blocks=100, block_size=4)
    system = {"role": "system", "content": "You tell stories of Tom and his red ball, and of nothing else."}
    prompts = [[system, {"role": "user", "content": text}] for text in ("Where is the ball?", "Who is Tom?")]
    first, second = (llm.chat(prompt, greedy(1)) for prompt in prompts)
    pairs = enumerate(zip(first.prompt_token_ids, second.prompt_token_ids, strict=False))
    num_common = next(i for i, (one, another) in pairs if one != another)
    assert first.num_cached_tokens == 0 and 0 <= num_common - second.num_cached_tokens <= 4


def test_samples_and_salts_find_what_is_theirs() -> None:
    llm = LLM.from_model(HashModel(stores_keys=True), **SMALL)
    prompt = prompt_of(30)
    for salt, num_cached in (("a", 0), ("b", 0), ("a", 28), (None, 0)):
        params = SamplingParams(n=3, max_tokens=5, logprobs=NUM_TOP, cache_salt=salt, seed=3)
        (output,) = llm.generate([prompt], params)
        assert output.num_cached_tokens == num_cached
        for sample in output.outputs:
            expect_right_states(prompt, sample, is_greedy=False)


# -- what is held -------------------------------------------------------------------------------------------------


def test_a_batch_that_goes_on_gathers_no_states() -> None:
    llm = LLM.from_model(HashModel(), **SMALL, prefix_caching=False)
    states = llm._runner.states
    assert states is not None
    llm.generate([prompt_of(9, seed) for seed in range(5)], greedy(40))
    assert states.num_gathered == 1  # when five prompts become a batch
    assert states.num_reused >= 38


def test_a_checkpoint_takes_the_bytes_of_a_state_and_no_view_keeps_a_chunk_alive() -> None:
    llm = LLM.from_model(family_model("mamba2"), **SMALL)
    size, levels = llm._runner.plan.state_bytes, []
    for turn in range(1, 4):
        llm.generate([prompt_of(201, turn)], greedy(2))
        stats = llm.stats()
        assert (stats.num_checkpoints, stats.state_bytes) == (2 * turn, 2 * turn * size)
        levels.append(active_bytes())
    assert 2 * size <= levels[2] - levels[1] < 4 * size  # MLX may take a larger buffer that it has; a chunk is 200 rows


def test_memory_stays_what_it_is_over_hundreds_of_requests() -> None:
    llm = LLM.from_model(family_model("lfm2"), **(SMALL | {"num_kv_blocks": 60}))
    assert llm.engine.cache_groups.checkpoints is not None
    llm.engine.cache_groups.checkpoints._capacity = 6
    size = llm._runner.plan.state_bytes
    rng, known, levels = random.Random(0), [prompt_of(20)], []
    for _ in range(budget(3, 20)):
        for _ in range(10):
            prompts = [rng.choice(known[-4:])[: rng.randrange(9, 24)] + prompt_of(3, rng.random()) for _ in range(10)]
            params = [greedy(rng.randrange(1, 5), n=rng.choice([1, 1, 2])) for _ in prompts]
            known += [p + o.outputs[0].token_ids for p, o in zip(prompts, llm.generate(prompts, params), strict=True)]
        levels.append(active_bytes())
        stats = llm.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert 3 <= stats.num_checkpoints <= 6 and stats.state_bytes == stats.num_checkpoints * size
    assert max(levels[1:]) <= levels[0] + 8 * size


def test_no_step_copies_a_pool() -> None:
    llm = LLM.from_model(HashModel(stores_keys=True), num_kv_blocks=1 << 15, max_num_seqs=8)
    llm.generate([prompt_of(40)], greedy(3))
    before, pool = active_bytes(), llm.stats().kv_bytes
    mx.reset_peak_memory()
    llm.generate([prompt_of(50, seed) for seed in range(4)] * 2, greedy(30))
    assert mx.get_peak_memory() - before < pool / 4


@pytest.mark.parametrize("pipelining", ["submit", "build", "off"])
def test_a_step_holds_the_states_that_it_starts_from_and_those_that_it_makes_and_no_third_ones(pipelining: Any) -> None:
    model = family_model("falcon_h1")
    before = active_bytes()
    llm = LLM.from_model(model, **SMALL, pipelining=pipelining, prefix_caching=False)
    for seed in range(4):
        llm.engine.add_request(prompt_of(9, seed), greedy(20))
    for _ in range(4):
        llm.engine.step()
    mx.synchronize()
    mx.reset_peak_memory()
    for _ in range(10):
        llm.engine.step()
    held = mx.get_peak_memory() - before - llm.stats().kv_bytes
    assert held < 2.5 * 4 * llm._runner.plan.state_bytes


@pytest.mark.parametrize("family", ["jamba", "llama"])
def test_neither_start_nor_steps_leave_anything_to_the_garbage_collector(family: str) -> None:
    """Which may come late, and pools to try out steps with are large."""
    model, kinds = family_model(family), (PagedKVCache, PagedLayerCache, StateLayerCache)
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in gc.get_objects() if isinstance(each, kinds)}
        llm = LLM.from_model(model, **SMALL)
        llm.generate([prompt_of(9)], greedy(4))
        left = [each for each in gc.get_objects() if isinstance(each, kinds) and id(each) not in before]
    finally:
        gc.enable()
    assert left == [llm._runner.kv_cache]


# -- the memory plan ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["hash", "mamba", "rwkv7"])
def test_a_model_without_attention_has_blocks_of_no_bytes(model: str) -> None:
    made = HashModel() if model == "hash" else family_model(model)
    llm = LLM.from_model(made, kv_cache_memory="8MB", max_model_len=100, max_num_seqs=3, check_invariants=True)
    stats = llm.stats()
    assert (stats.num_blocks, stats.kv_bytes) == (3 * 7, 0)
    state_bytes = llm._runner.plan.state_bytes
    assert stats.num_state_slots == min(2 * 3 + 32, int(0.4 * 8e6 / state_bytes))
    assert llm.describe_memory().startswith(f"KV cache: none; {stats.num_state_slots} states of ")
    (output,) = llm.generate([prompt_of(90)], greedy(20))
    assert output.outputs[0].finish_reason == "length" and len(output.outputs[0].token_ids) == 10


@pytest.mark.parametrize("max_model_len", [None, 40])
@pytest.mark.parametrize("pool", [{}, {"num_kv_blocks": 4}, {"kv_cache_memory": "1MB"}], ids=str)
def test_a_model_without_attention_takes_every_option_of_the_pool(
    pool: dict[str, Any], max_model_len: int | None
) -> None:
    llm = LLM.from_model(family_model("mamba"), **pool, max_model_len=max_model_len, max_num_seqs=3)
    assert llm.stats().num_blocks == pool.get("num_kv_blocks", 3 * 3 if max_model_len else 1 << 16)
    (output,) = llm.generate([prompt_of(30)], greedy(20))
    assert len(output.outputs[0].token_ids) == (10 if max_model_len else 20)


@pytest.mark.parametrize("max_model_len", [None, 1 << 20, 10**24])
def test_blocks_without_attention_have_room_for_a_million_tokens_and_no_more(max_model_len: int | None) -> None:
    """However long the context may be: what is noted of each takes memory, too."""
    assert LLM.from_model(HashModel(), block_size=16, max_model_len=max_model_len).stats().num_blocks == 1 << 16


def test_more_blocks_than_can_be_noted_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^num_kv_blocks=9999999999: blocks that store nothing are at most 4194304$"):
        LLM.from_model(HashModel(), num_kv_blocks=9_999_999_999)


def test_states_and_blocks_share_the_memory_that_is_given() -> None:
    llm = LLM.from_model(family_model("qwen3_next"), kv_cache_memory="2MB", max_num_seqs=8, prefix_caching=False)
    plan, stats = llm._runner.plan, llm.stats()
    assert stats.num_state_slots == 2 * 8 + 1
    room = 2_000_000 - 17 * plan.state_bytes
    assert room - plan.block_bytes[0] < stats.kv_bytes <= room
    assert f"; {stats.num_state_slots} states of " in llm.describe_memory()


def test_fewer_sequences_run_at_once_where_their_states_have_no_room() -> None:
    model = family_model("mamba2")
    size = LLM.from_model(model, **SMALL)._runner.plan.state_bytes
    with pytest.warns(EngineWarning, match="max_num_seqs is 4 instead of 64: there is room for 9 states, 2 of each "):
        llm = LLM.from_model(model, block_size=4, kv_cache_memory=int(9.5 * size / 0.4), max_model_len=100)
    llm.generate([prompt_of(9, seed) for seed in range(12)], greedy(4))
    stats = llm.stats()
    assert llm.engine.config.max_num_seqs == 4 and stats.num_checkpoints == 1
    assert stats.peak_used_blocks <= 4 * 4


def test_too_little_memory_for_one_state_is_said_in_one_line() -> None:
    message = r"^states of one sequence take .* are left for them, where three are needed: give"
    with pytest.raises(ValueError, match=f"{message} kv_cache_memory more$"):
        LLM.from_model(family_model("mamba2"), kv_cache_memory=20_000, max_model_len=100)


def test_a_model_without_recurrent_layers_counts_no_states() -> None:
    stats = LLM.from_model(family_model("llama"), **SMALL).stats()
    assert (stats.num_state_slots, stats.state_bytes, stats.num_checkpoints) == (0, 0, 0)
