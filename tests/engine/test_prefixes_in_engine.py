"""Prefixes in whole steps: what later requests find of earlier ones, and what samples share."""

from __future__ import annotations

import pytest
from helpers.engines import GREEDY, MakeEngine, complete, is_idle, tokens_of

from mlx_paged import SamplingParams


def test_the_second_identical_prompt_is_found_but_for_its_last_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = complete(engine, list(range(18)), GREEDY)
    second = complete(engine, list(range(18)), GREEDY)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert tokens_of(first) == tokens_of(second)
    assert (engine.stats().prefix_query_tokens, engine.stats().prefix_hit_tokens) == (36, 16)


def test_without_prefix_caching_nothing_is_found(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_caching=False)
    complete(engine, list(range(18)), GREEDY)
    assert complete(engine, list(range(18)), GREEDY).num_cached_tokens == 0
    assert engine.stats().prefix_hit_tokens == 0


def test_what_was_generated_is_found_by_the_next_turn(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = list(range(10))
    first = complete(engine, prompt, SamplingParams(temperature=0, max_tokens=10))
    turn = prompt + tokens_of(first) + [50, 51]
    # The last token that was put out was never fed back: 19 tokens have K and V, 4 whole blocks of them.
    assert complete(engine, turn, GREEDY).num_cached_tokens == 16


def test_a_salt_shares_with_equal_salts_only(make_engine: MakeEngine) -> None:
    engine = make_engine()
    cached = []
    for salt in (None, "a", "b", "a", None):
        params = SamplingParams(temperature=0, max_tokens=2, cache_salt=salt)
        cached.append(complete(engine, list(range(12)), params).num_cached_tokens)
    assert cached == [0, 0, 0, 8, 8]


@pytest.mark.parametrize("prompt_len, copies", [(6, 3), (8, 0)])
def test_samples_copy_a_partly_filled_last_block_once_less_than_they_are(
    make_engine: MakeEngine, prompt_len: int, copies: int
) -> None:
    engine = make_engine()
    output = complete(engine, list(range(prompt_len)), SamplingParams(seed=5, n=4, max_tokens=6))
    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert engine.stats().num_cow_copies == copies
    assert is_idle(engine)


def test_samples_share_the_blocks_of_their_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request([2] * 40, SamplingParams(seed=5, n=4, max_tokens=6))
    engine.step()
    engine.step()
    stats = engine.stats()
    assert stats.kv_tokens == 40 + 4
    assert stats.num_blocks - stats.num_free_blocks == 10 + 4


@pytest.mark.parametrize("pipelining", ["off", "build", "submit"])
def test_what_a_running_request_has_put_out_is_found_while_it_still_runs(
    make_engine: MakeEngine, pipelining: str
) -> None:
    # The check after each step would publish by itself.
    engine = make_engine(pipelining=pipelining, check_invariants=False)
    first = engine.add_request(list(range(6)), SamplingParams(temperature=0, max_tokens=30), stream=True)
    token_ids = list(range(6))
    while len(token_ids) < 14:  # the fourth block was taken for token 12
        for output in engine.step():
            token_ids += tokens_of(output)
    prompt = [*token_ids[:13], 50]
    second = engine.add_request(prompt, GREEDY)
    found = {}
    while second not in found:
        for output in engine.step():
            assert output.request_id == second or not output.finished, "the premise: the first one still runs"
            found[output.request_id] = output
    assert found[second].num_cached_tokens == 12
    assert tokens_of(found[second]) == tokens_of(complete(make_engine(), prompt, GREEDY))
    assert (engine.stats().prefix_query_tokens, engine.stats().prefix_hit_tokens) == (6 + 14, 12)
    engine.abort(first)
    assert is_idle(engine)


def test_a_block_of_a_running_output_is_found_from_the_step_on_that_takes_the_next_one(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pipelining="off", check_invariants=False)
    engine.add_request(list(range(6)), SamplingParams(temperature=0, max_tokens=30), stream=True)
    token_ids, cached = list(range(6)), []
    for _ in range(9):
        for output in engine.step():
            token_ids += tokens_of(output)
        cached.append(engine.block_manager.num_cached_tokens([*token_ids, 96]))
    # After the first step 6 tokens are computed, 8 after the third; the fourth takes a block for token 8.
    assert cached == [4, 4, 4, 8, 8, 8, 8, 12, 12]
