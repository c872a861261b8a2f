"""What whoever looks at an engine sees: every block, request and prefix as they are at that moment."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import workload
from helpers.engines import GREEDY, MakeEngine, complete, run
from helpers.hash_model import HashModel

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.blocks.block_manager import NO_BLOCK
from mlx_paged.engine import snapshot as module
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import RequestOutput, RequestSnapshot


def expected_blocks(engine: Engine, group: int) -> Iterator[tuple[int, bool, int, int]]:
    """Of each block: its holders, whether it is free and cached, its oldest request, its place in that one's table."""
    manager = engine.cache_groups.managers[group]
    requests = engine._outputs.requests.values()
    owner_of: dict[Any, int] = {s.seq_id: request.request_id for request in requests for s in request.sequences}
    owner_of |= {-1 - request.request_id: request.request_id for request in requests}  # of prompts that are kept
    held: dict[int, list[tuple[int, int]]] = {}
    for seq_id in manager.seq_ids:
        for position, block_id in enumerate(manager.block_table(seq_id)):
            if block_id != NO_BLOCK:
                held.setdefault(block_id, []).append((owner_of[seq_id], position))
    for block_id in range(manager.num_blocks):
        owner, position = min(held.get(block_id, [(-1, -1)]))
        is_cached = manager.is_cached(block_id) and block_id not in held
        yield manager.ref_count(block_id), is_cached, owner, position


def assert_cells_are_right(engine: Engine) -> None:
    snapshot = engine.snapshot()
    for group, pool in enumerate(snapshot.pools):
        manager = engine.cache_groups.managers[group]
        blocks = list(expected_blocks(engine, group))
        assert (pool.window, pool.num_blocks, pool.block_size) == (manager.window, len(blocks), manager.block_size)
        assert len(pool.cells) == -(-len(blocks) // pool.blocks_per_cell) <= module.MAX_CELLS
        assert sum(cell[0] for cell in pool.cells) == manager.num_blocks - manager.num_free_blocks
        for number, (num_held, num_cached, owner, refs, position) in enumerate(pool.cells):
            cell = blocks[number * pool.blocks_per_cell : (number + 1) * pool.blocks_per_cell]
            assert num_held == sum(refs > 0 for refs, *_ in cell)
            assert num_cached == sum(is_cached for _, is_cached, *_ in cell)
            assert refs == max(refs for refs, *_ in cell)
            owners = [owner for *_, owner, _ in cell if owner >= 0]
            assert owners.count(owner) == max(map(owners.count, owners), default=0)
            places = [place for *_, each, place in cell if each == owner]
            assert position == places[0]


@pytest.mark.parametrize("most_cells", [4096, 7])
@pytest.mark.parametrize("family", sorted(workload.FAMILIES))
def test_cells_sum_up_to_what_the_block_managers_count_whatever_runs(
    family: str, most_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CELLS", most_cells)
    chance = random.Random(most_cells)
    engine = workload.make_engine(family, block_size=4, num_kv_blocks=90, max_num_seqs=6)
    requests = workload.random_requests(chance, 14)
    requests.insert(7, workload.Asked([3] * 9, SamplingParams(n=8, seed=1, max_tokens=6)))  # more than run at once
    while requests or engine.has_unfinished():
        for _ in range(chance.randrange(3)):
            if requests:
                asked = requests.pop()
                engine.add_request(asked.prompt, asked.params, stream=asked.stream)
        engine.step()
        assert_cells_are_right(engine)
    assert all(cell[0] == 0 for pool in engine.snapshot().pools for cell in pool.cells)
    assert engine.stats().num_free_blocks == 90


def shared(engine: Engine) -> tuple[list[list[int]], RequestSnapshot]:
    """The cells that are held, and the one request."""
    snapshot = engine.snapshot()
    (request,) = snapshot.requests
    return [cell for cell in snapshot.pools[0].cells if cell[0]], request


def test_samples_of_a_prompt_share_its_blocks_and_count_them_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request_id = engine.add_request([1] * 8, SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True))
    for _ in range(3):
        engine.step()
    cells, request = shared(engine)
    assert sorted(cells) == [[1, 0, request_id, 1, 2]] * 3 + [[1, 0, request_id, 3, 0], [1, 0, request_id, 3, 1]]
    assert (request.id, request.kind, request.state) == (request_id, "sample", "running")
    assert (request.num_sequences, request.num_blocks, request.num_prompt_tokens) == (3, 5, 8)
    assert request.num_output_tokens >= 3 and 8 < request.num_computed_tokens <= 11
    assert request.first_tokens == [1] * 8 and request.age_s >= 0


def test_beams_share_what_they_have_in_common(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request_id = engine.add_request([1] * 8, BeamSearchParams(beam_width=4, max_tokens=6))
    for _ in range(3):
        engine.step()
    cells, request = shared(engine)
    assert [1, 0, request_id, 4, 0] in cells and [1, 0, request_id, 4, 1] in cells
    assert (request.kind, request.num_sequences) == ("beam", 4)
    assert request.num_blocks == len(cells) < 4 * 3


def test_a_shared_block_is_that_of_the_oldest_request(make_engine: MakeEngine) -> None:
    engine = make_engine()
    long = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    first, second = (engine.add_request([1] * 9, long) for _ in range(2))
    engine.step()
    engine.step()
    cells = [cell for cell in engine.snapshot().pools[0].cells if cell[3] == 2]
    assert [cell[2] for cell in cells] == [first, first]
    engine.abort(first)
    cells = [cell for cell in engine.snapshot().pools[0].cells if cell[0]]
    assert [cell[2] for cell in cells] == [second] * len(cells)


def test_requests_that_wait_are_there_too_and_of_many_the_oldest(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_REQUESTS", 3)
    engine = make_engine(max_num_seqs=1)
    ids = [engine.add_request([1 + i] * 6, GREEDY) for i in range(5)]
    snapshot = engine.snapshot()  # before any step
    assert [request.state for request in snapshot.requests] == ["waiting"] * 3 and snapshot.num_more_requests == 2
    assert snapshot.stats.num_waiting == 5
    engine.step()
    snapshot = engine.snapshot()
    assert [request.id for request in snapshot.requests] == ids[:3]
    assert [request.state for request in snapshot.requests] == ["running", "waiting", "waiting"]
    assert [request.num_blocks for request in snapshot.requests] == [2, 0, 0]


def test_what_is_cached_is_there_when_its_request_has_ended(make_engine: MakeEngine) -> None:
    engine = make_engine()
    complete(engine, [1] * 9, GREEDY)
    snapshot = engine.snapshot()
    assert (snapshot.requests, snapshot.num_more_requests, snapshot.num_more_prefixes) == ([], 0, 0)
    (bar,) = snapshot.prefixes
    assert bar.num_blocks == sum(cell[1] for cell in snapshot.pools[0].cells) == 3
    assert bar.first_tokens[:9] == [1] * 9 and bar.num_holders == 0


@pytest.mark.parametrize("pipelining", ["submit", "off"])
def test_tokens_are_counted_as_they_are_computed(pipelining: str, make_engine: MakeEngine) -> None:
    engine = make_engine(pipelining=pipelining)
    engine.add_request([1] * 9, SamplingParams(n=2, seed=3, max_tokens=5))
    engine.add_request([2] * 7, GREEDY)
    outputs = run(engine)
    stats = engine.stats()
    assert stats.num_prompt_tokens == 16
    assert stats.num_output_tokens == sum(output.num_output_tokens for output in outputs.values())
    engine.add_request([3] * 4, BeamSearchParams(beam_width=2, max_tokens=3))
    run(engine)
    assert engine.stats().num_output_tokens > stats.num_output_tokens


# -- why a prompt was not cached ----------------------------------------------------------------------------------


def asked(engine: Engine, prompt: list[int], **options: Any) -> tuple[int, int, str]:
    match = engine.match_prefix(prompt, options.get("salt"), options.get("limit"))
    assert match.num_tokens == len(prompt)
    return match.num_cached_tokens, match.num_matching_tokens, match.reason


def cache(engine: Engine, prompt: list[int], salt: str | None = None) -> RequestOutput:
    return complete(engine, prompt, SamplingParams(temperature=0, max_tokens=1, cache_salt=salt))


def test_the_first_token_that_differs_from_the_nearest_prefix_is_found(make_engine: MakeEngine) -> None:
    engine = make_engine()
    cache(engine, [*range(10, 22), 1])
    cache(engine, [*range(10, 14), *range(30, 40)])
    prompt = [*range(10, 19), 7, 8, 9, 1, 2]
    match = engine.match_prefix(prompt, None)
    assert (match.num_cached_tokens, match.num_matching_tokens) == (8, 9)
    assert match.tokens[match.num_tokens_before] == 7 and match.cached_tokens[match.num_tokens_before] == 19
    assert match.tokens == prompt and match.cached_tokens == [*range(10, 22)]
    assert "differs from the nearest cached prefix at token 9" in match.reason and "blocks of 4" in match.reason
    assert cache(engine, prompt).num_cached_tokens == match.num_cached_tokens


def test_each_reason_says_what_is_so(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert asked(engine, [1] * 9) == (0, 0, "nothing that is cached begins like it")
    cache(engine, [1] * 10)
    assert asked(engine, [2] * 9) == (0, 0, "nothing that is cached begins like it")
    assert asked(engine, [1] * 9, salt="mine") == (0, 0, "nothing that is cached begins like it")
    assert asked(engine, [1] * 10 + [3] * 9)[:2] == (8, 8)
    assert "ends at token 8: a block that was only partly filled is not shared" in asked(engine, [1] * 19)[2]
    assert asked(engine, [1] * 9) == (
        8,
        8,
        "all is found that can be: whole blocks of 4 tokens, without the last token",
    )
    assert asked(engine, [1] * 8)[:2] == (4, 8) and "without the last token" in asked(engine, [1] * 8)[2]
    assert asked(engine, [1] * 4)[2] == "it has no whole block of 4 tokens before its last token"
    assert asked(engine, [1] * 9, limit=0)[0] == 0 and "log-probabilities" in asked(engine, [1] * 9, limit=0)[2]
    off = make_engine(prefix_caching=False)
    cache(off, [1] * 10)
    assert asked(off, [1] * 10) == (0, 0, "prefix caching is off")


def test_what_was_saved_is_said_to_be_read_back(make_engine: MakeEngine, tmp_path: Any) -> None:
    cache(make_engine(prefix_cache_dir=str(tmp_path)), [1] * 10)
    engine = make_engine(prefix_cache_dir=str(tmp_path))
    num_cached, num_matching, reason = asked(engine, [1] * 8 + [2] * 8)
    assert (num_cached, num_matching) == (8, 8) and "tokens 0 to 7 are read back" in reason
    assert cache(engine, [1] * 8 + [2] * 8).num_cached_tokens == 8
    assert "read back" not in asked(engine, [1] * 8 + [2] * 8)[2]


def test_a_window_that_has_lost_what_it_needs_is_named() -> None:
    engine = workload.make_engine("gemma3_text", block_size=4, num_kv_blocks=60, max_num_seqs=2)
    prompt = [3 + i % 50 for i in range(40)]
    complete(engine, prompt, SamplingParams(temperature=0, max_tokens=1))
    _, _, tree = engine.cache_groups.managers[1].parts
    for block_id in [node.block_id for node in tree.nodes()][8:]:  # as others would take them
        assert block_id is not None
        tree.evict(block_id)
    num_cached, num_matching, reason = asked(engine, prompt)
    assert (num_cached, num_matching) == (32, 40)
    assert (
        reason.startswith("36 tokens are cached for the layers that see the whole context") and "window of 7" in reason
    )


def test_a_prefix_that_reaches_beyond_its_checkpoint_is_said_to() -> None:
    engine = LLM.from_model(HashModel(stores_keys=True), block_size=4, num_kv_blocks=60).engine
    complete(engine, [1] * 31, SamplingParams(temperature=0, max_tokens=1))
    num_cached, num_matching, reason = asked(engine, [1] * 26 + [2] * 8)
    assert (num_cached, num_matching) == (20, 26)
    assert reason == (
        "24 tokens are cached for the layers that see the whole context, but recurrent ones can start from token 20 "
        "at most"
    )
