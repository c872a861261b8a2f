"""Who loses its blocks, when, and how it comes back."""

from __future__ import annotations

import pytest
from helpers.pipelined_bench import PipelinedBench
from helpers.scheduler_bench import Bench, planned

from mlx_paged.request import Sequence
from mlx_paged.scheduler.scheduler import Chunk


def test_the_latest_sequence_is_preempted_and_comes_back_when_there_is_room() -> None:
    bench = Bench(num_blocks=4, prefix_caching=False)
    early, late = bench.add(7, max_tokens=6), bench.add(7, max_tokens=3)
    assert planned(bench.step()) == [(0, 0, 7), (1, 0, 7)]
    assert planned(bench.step()) == [(0, 7, 1), (1, 7, 1)]
    schedule = bench.step()  # both need a third block, and none is free
    assert planned(schedule) == [(0, 8, 1)]
    assert [s.request for s in schedule.preempted] == [late]
    assert bench.scheduler.num_preemptions == 1
    assert late.sequences[0].row == -1
    assert bench.manager.seq_ids == [early.sequences[0].seq_id]
    assert [planned(bench.step()) for _ in range(3)] == [[(0, 9, 1)], [(0, 10, 1)], [(0, 11, 1)]]
    assert early.finished
    assert planned(bench.step()) == [(1, 0, 9)]  # prompt and output, computed again
    assert late.finished


def test_a_preempted_sequence_finds_in_the_cache_what_was_not_overwritten() -> None:
    bench = Bench(num_blocks=5)
    bench.add(7, max_tokens=6)
    late = bench.add(11, max_tokens=3)
    bench.step()
    bench.step()
    assert bench.scheduler.num_preemptions == 0
    assert [s.request for s in bench.step().preempted] == [late]
    while not bench.requests[0].finished:
        bench.step()
    ((request_id, start, num_tokens),) = planned(bench.step())
    assert request_id == 1
    assert start == 8, "the first blocks of its chain were left alone"
    assert start + num_tokens == 12, "prompt and output"


def test_a_preempted_sequence_is_served_before_those_that_came_later() -> None:
    bench = Bench(num_blocks=4, prefix_caching=False)
    bench.add(7, max_tokens=4)
    bench.add(7, max_tokens=3)
    bench.step()
    bench.add(1)
    bench.step()
    assert [s.request.request_id for s in bench.step().preempted] == [1]
    assert [s.request.request_id for s in bench.scheduler.waiting] == [1, 2]


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    bench = Bench(num_blocks=4, prefix_caching=False)
    bench.add(7, max_tokens=6)
    bench.add(7, max_tokens=3)
    bench.step()
    bench.step()
    bench.add(1)
    schedule = bench.step()
    assert schedule.preempted and planned(schedule) == [(0, 8, 1)]


def test_a_prompt_in_the_middle_of_its_chunks_is_preempted_too() -> None:
    bench = Bench(num_blocks=4, budget=4, prefix_caching=False)
    bench.add(4, max_tokens=8)
    bench.step()
    late = bench.add(12, max_tokens=1)
    assert planned(bench.step()) == [(0, 4, 1)]
    bench.run()
    assert late.finished


@pytest.mark.parametrize("pays", [True, False])
def test_what_a_preempted_sequence_loses_is_stored_where_that_pays(pays: bool) -> None:
    bench = Bench(num_blocks=4, has_store=True)
    bench.add(7, max_tokens=6)
    bench.add(7, max_tokens=3)
    bench.scheduler.storing_pays = pays
    for _ in range(3):
        plan = bench.step()
    assert plan.preempted, "the premise: its last block is overwritten by the other sequence"
    assert [block_id for _, block_id, _ in bench.copies] == ([3] if pays else [])


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_pool_that_fits_one_request_serves_many_one_after_another(prefix_caching: bool) -> None:
    bench = Bench(num_blocks=3, prefix_caching=prefix_caching)
    for _ in range(5):
        bench.add(5, max_tokens=8)  # 12 slots: the whole pool
    assert bench.run() < 100
    assert bench.manager.num_free_blocks == 3


@pytest.mark.parametrize(
    ("num_blocks", "requests"), [(10, [(12, 20), (12, 20)]), (7, [(4, 13), (6, 12), (8, 9)])], ids=str
)
def test_requests_that_cannot_run_together_are_preempted_once_at_most(
    num_blocks: int, requests: list[tuple[int, int]]
) -> None:
    bench = Bench(num_blocks=num_blocks, prefix_caching=False)
    for prompt_len, max_tokens in requests:
        bench.add(prompt_len, max_tokens)
    preempted = []
    while not all(request.finished for request in bench.requests):
        preempted += bench.step().preempted
    assert preempted and len(set(preempted)) == len(preempted)


def test_n_samples_in_a_pool_that_fits_one_of_them_all_finish() -> None:
    bench = Bench(num_blocks=3)
    request = bench.add(5, max_tokens=8, n=4)
    bench.run()
    assert [s.num_output_tokens for s in request.sequences] == [8] * 4
    assert bench.scheduler.num_preemptions > 0


def test_coming_back_from_preemption_counts_as_no_prompt() -> None:
    bench = Bench(num_blocks=5)
    bench.add(7, max_tokens=6)
    bench.add(11, max_tokens=3)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert bench.scheduler.prefix_query_tokens == 18
    assert bench.scheduler.prefix_hit_tokens == 0


def test_the_lowest_priority_is_preempted_first_however_early_it_came() -> None:
    bench = Bench(num_blocks=4, prefix_caching=False)
    low, high = bench.add(7, max_tokens=6), bench.add(7, max_tokens=3, priority=1)
    assert planned(bench.step()) == [(1, 0, 7), (0, 0, 7)]
    bench.step()
    plan = bench.step()  # both need a third block
    assert planned(plan) == [(1, 8, 1)]
    assert [sequence.request for sequence in plan.preempted] == [low]
    assert high.finished
    bench.run()


# -- beams --------------------------------------------------------------------------------------------------------


def test_beams_that_run_out_of_blocks_lose_them_together_and_come_back_by_what_they_share() -> None:
    bench = PipelinedBench(num_blocks=7, prefix_caching=False)
    first, beams = bench.add(7, max_tokens=10), bench.add(5, max_tokens=6, beam_width=3)
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert bench.scheduler.num_preemptions == 3
    assert bench.scheduler.waiting == [beams.sequences[0]]
    assert beams.sequences[0].num_shared_tokens is not None
    assert beams.sequences[0].num_shared_tokens >= 5
    assert [sequence.request for sequence in bench.scheduler.running] == [first]
    bench.run()


def test_beams_come_back_only_with_room_for_what_each_has_of_its_own() -> None:
    bench = PipelinedBench(num_blocks=10, prefix_caching=False)
    bench.add(8, max_tokens=17)
    bench.add(7, max_tokens=10, beam_width=3)
    bench.run()
    assert bench.scheduler.num_preemptions == 3, "all three once, and not again and again"


def beams_short_of_blocks(num_left: int = 0) -> tuple[PipelinedBench, Sequence, Sequence]:
    """Two beams that have come back by what they share, and blocks for one of them to go on, and `num_left` more."""
    bench = PipelinedBench(num_blocks=10 + num_left, block_size=2)
    request = bench.add(1, max_tokens=20, beam_width=2)
    request.is_forked = True
    bench.new_sequence(request)
    for i, beam in enumerate(request.sequences):
        beam.token_ids += [100 * i + j for j in range(7)]
    bench.scheduler.restart(request.sequences)
    bench.step()
    first, second = bench.scheduler.running
    bench.manager.allocate("other", range(50, 60))
    return bench, first, second


def test_what_a_beam_was_to_compute_when_its_group_lost_its_blocks_can_not_be_hit() -> None:
    bench, first, second = beams_short_of_blocks()
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    assert (schedule.preempted, schedule.chunks, schedule.num_tokens) == ([first, second], [], 0)
    assert [bench.manager.num_cached_tokens([*beam.token_ids, 0]) for beam in (first, second)] == [0, 0]


# -- while tokens are in flight -----------------------------------------------------------------------------------


def test_nobody_loses_blocks_while_it_is_not_known_yet_who_has_ended() -> None:
    bench = Bench(num_blocks=4, prefix_caching=False)
    for _ in range(2):
        bench.add(8, max_tokens=5)
    bench.step()  # both need a third block now
    assert bench.scheduler.schedule(can_preempt=False) is None
    assert (len(bench.scheduler.running), bench.scheduler.num_preemptions) == (2, 0)
    assert len(bench.step().preempted) == 1
    bench.run()


def test_what_could_go_on_only_at_the_cost_of_others_waits_while_they_are_not_known() -> None:
    bench, first, second = beams_short_of_blocks(num_left=2)
    bench.add(1)
    schedule = bench.scheduler.schedule(can_preempt=False)
    assert schedule is not None
    assert (schedule.is_short_of_blocks, schedule.chunks, schedule.preempted) == (True, [Chunk(first, 1, 7)], [])
    assert len(bench.scheduler.waiting) == 1, "there would be a block for it, but not its turn"
    assert bench.scheduler.running == [first, second]
