"""Which tokens a step computes: order, priorities, the budget, rows, and what waits."""

from __future__ import annotations

import operator

import pytest
from helpers.pipelined_bench import PipelinedBench
from helpers.scheduler_bench import Bench, Planned, planned

from mlx_paged.request import Sequence


def test_an_idle_scheduler_schedules_nothing() -> None:
    assert Bench().step() == Planned([], [])


def test_a_prompt_that_fits_is_computed_at_once_and_decoded_token_by_token() -> None:
    bench = Bench()
    bench.add(6, max_tokens=3)
    assert [planned(bench.step()) for _ in range(3)] == [[(0, 0, 6)], [(0, 6, 1)], [(0, 7, 1)]]
    assert bench.step().sequences == []
    assert bench.manager.num_free_blocks == 16


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    bench = Bench(budget=7)
    bench.add(17, max_tokens=2)
    assert [planned(bench.step()) for _ in range(4)] == [[(0, 0, 7)], [(0, 7, 7)], [(0, 14, 3)], [(0, 17, 1)]]
    assert bench.needed_logits == [False, False, True, True]


def test_running_decodes_come_before_chunks_of_prompts() -> None:
    bench = Bench(budget=5)
    bench.add(3, max_tokens=9)
    bench.step()
    bench.add(11, max_tokens=2)
    assert [planned(bench.step()) for _ in range(4)] == [
        [(0, 3, 1), (1, 0, 4)],
        [(0, 4, 1), (1, 4, 4)],
        [(0, 5, 1), (1, 8, 3)],
        [(0, 6, 1), (1, 11, 1)],
    ]


def test_the_rest_of_a_budget_goes_to_the_next_prompt_in_the_queue() -> None:
    bench = Bench(budget=10)
    for length in (4, 9, 2):
        bench.add(length)
    assert [planned(bench.step()) for _ in range(2)] == [[(0, 0, 4), (1, 0, 6)], [(1, 6, 3), (2, 0, 2)]]


def test_requests_are_served_in_the_order_of_arrival_even_if_a_later_one_would_fit() -> None:
    bench = Bench(num_blocks=4)
    bench.add(9, max_tokens=3)
    bench.add(8, max_tokens=1)  # two blocks, and only one is left
    bench.add(2, max_tokens=1)  # would fit, but waits behind the second
    assert planned(bench.step()) == [(0, 0, 9)]
    assert planned(bench.step()) == [(0, 9, 1)]
    assert planned(bench.step()) == [(0, 10, 1)]
    assert planned(bench.step()) == [(1, 0, 8), (2, 0, 2)]


def test_no_more_sequences_run_than_there_are_rows() -> None:
    bench = Bench(max_num_seqs=2)
    for _ in range(3):
        bench.add(2, max_tokens=2)
    assert [planned(bench.step()) for _ in range(3)] == [
        [(0, 0, 2), (1, 0, 2)],
        [(0, 2, 1), (1, 2, 1)],
        [(2, 0, 2)],
    ]


def test_a_request_of_n_samples_waits_for_n_rows() -> None:
    bench = Bench(max_num_seqs=4)
    bench.add(2, max_tokens=3, n=2)
    bench.add(2, max_tokens=2, n=3)
    bench.add(2, max_tokens=1)
    assert planned(bench.step()) == [(0, 0, 2)]
    assert planned(bench.step()) == [(0, 2, 1), (0, 2, 1)]
    assert planned(bench.step()) == [(0, 3, 1), (0, 3, 1)]
    assert planned(bench.step()) == [(1, 0, 2), (2, 0, 2)]


def test_removing_a_waiting_a_running_or_an_ended_sequence_frees_what_it_holds() -> None:
    bench = Bench(max_num_seqs=1)
    running, waiting = bench.add(5, max_tokens=9), bench.add(5)
    bench.step()
    bench.scheduler.remove(waiting.sequences[0])
    assert bench.scheduler.waiting == []
    bench.scheduler.remove(running.sequences[0])
    bench.scheduler.remove(running.sequences[0])
    assert bench.manager.num_free_blocks == 16
    assert bench.step().sequences == []


def test_prefix_counters_count_whole_prompts_once_each() -> None:
    bench = Bench()
    bench.add(10, first_token=1)
    bench.run()
    bench.add(10, first_token=1)
    bench.run()
    assert bench.scheduler.prefix_query_tokens == 20
    assert bench.scheduler.prefix_hit_tokens == 8
    assert [request.num_cached_tokens for request in bench.requests] == [0, 8]


def test_a_prompt_of_a_step_that_was_given_up_is_counted_once_it_is_computed() -> None:
    bench = Bench()
    bench.add(10, first_token=1)
    bench.run()
    request = bench.add(10, first_token=1)
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    bench.scheduler.cancel(schedule)
    assert (bench.scheduler.prefix_query_tokens, request.metrics.first_scheduled_time) == (10, None)
    bench.manager._tree.evict(0)  # what the step counted on
    bench.run()
    assert (bench.scheduler.prefix_query_tokens, bench.scheduler.prefix_hit_tokens) == (20, 0)
    assert request.num_cached_tokens == 0
    assert request.metrics.first_scheduled_time is not None


def test_a_higher_priority_is_served_first_and_equal_ones_in_the_order_of_arrival() -> None:
    bench = Bench(budget=4)
    for priority in (0, 1, -1, 1, 0):
        bench.add(4, priority=priority)
    assert [planned(bench.step()) for _ in range(5)] == [[(i, 0, 4)] for i in (1, 3, 0, 4, 2)]


def test_an_urgent_request_goes_past_those_that_wait_and_lets_those_that_run_run_on() -> None:
    bench = Bench(num_blocks=4, prefix_caching=False)
    bench.add(9, max_tokens=3)
    bench.step()
    bench.add(8)
    bench.add(2, priority=5)
    assert planned(bench.step()) == [(0, 9, 1), (2, 0, 2)]
    assert bench.scheduler.num_preemptions == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_a_long_prompt_never_holds_up_who_is_decoding(overlap: bool) -> None:
    bench = PipelinedBench(num_blocks=100, budget=8, overlap=overlap)
    bench.add(3, max_tokens=30)
    bench.step()
    bench.add(80, max_tokens=2)
    for _ in range(11):  # 7 tokens beside the decode in each of them
        plan = bench.step()
        assert [item.sequence.request.request_id for item in plan.sequences] == [0, 1]
    bench.run()


@pytest.mark.parametrize("overlap", [True, False])
def test_no_token_is_computed_after_the_last_that_is_allowed(overlap: bool) -> None:
    bench = PipelinedBench(overlap=overlap)
    requests = [bench.add(length, max_tokens) for length, max_tokens in ((3, 5), (6, 9))]
    num_computed = 0
    while not all(request.finished for request in requests):
        num_computed += sum(item.num_tokens for item in bench.step().sequences)
    assert num_computed == 3 + 4 + 6 + 8


def test_several_prompts_start_in_one_step_and_go_on_side_by_side() -> None:
    bench = Bench(num_blocks=40, budget=16)
    for length in (5, 20, 3, 4):
        bench.add(length, max_tokens=2)
    assert [planned(bench.step()) for _ in range(2)] == [
        [(0, 0, 5), (1, 0, 11)],
        [(0, 5, 1), (1, 11, 9), (2, 0, 3), (3, 0, 3)],
    ]


def test_samples_of_one_prompt_take_turns_where_a_step_has_fewer_tokens_than_they_are() -> None:
    bench = Bench(budget=2)
    bench.add(2, max_tokens=4, n=4)
    bench.run()


def test_what_a_step_that_was_given_up_would_have_computed_is_not_hit() -> None:
    bench = Bench()
    request = bench.add(9)
    schedule = bench.scheduler.schedule()
    assert schedule is not None
    assert bench.manager.num_cached_tokens(request.prompt_token_ids) == 8, "the premise: others of this step hit it"
    bench.scheduler.cancel(schedule)
    assert bench.manager.num_cached_tokens(request.prompt_token_ids) == 0
    bench.run()


def test_with_fewer_tokens_a_step_than_sequences_the_later_ones_wait_but_get_there() -> None:
    bench = Bench(budget=2)
    for _ in range(4):
        bench.add(2, max_tokens=5)
    bench.run()


def test_one_that_did_not_fit_is_tried_again_as_soon_as_blocks_come_free() -> None:
    bench = Bench(num_blocks=5)
    bench.add(8, max_tokens=2)
    bench.add(4, max_tokens=5)
    waiting = bench.add(12)
    assert planned(bench.step()) == [(0, 0, 8), (1, 0, 4)]
    assert planned(bench.step()) == [(0, 8, 1), (1, 4, 1)]  # the first one ends here and frees three
    assert planned(bench.step()) == [(1, 5, 1), (2, 0, 12)]
    assert waiting.finished


def test_one_that_did_not_fit_is_tried_again_when_who_was_in_its_way_is_gone() -> None:
    bench = Bench(num_blocks=3)
    first = bench.add(4, max_tokens=3)
    bench.step()
    bench.add(12)
    bench.step()
    assert bench.scheduler._blocked_head
    bench.scheduler.remove(first.sequences[0])
    first.sequences[0].finish_reason = "abort"
    assert planned(bench.step()) == [(1, 0, 12)]


def test_who_leaves_a_long_queue_is_found_without_a_look_at_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    requests = [bench.add(2, priority=number % 3) for number in range(1000)]
    looks = []
    monkeypatch.setattr(Sequence, "__eq__", lambda *pair: looks.append(pair) or pair[0] is pair[1])
    monkeypatch.setattr(Sequence, "__hash__", object.__hash__)
    waiting = list(bench.scheduler.waiting)
    for number in (0, 998, 500, 999):
        (sequence,) = requests[number].sequences
        bench.scheduler.remove(sequence)
        bench.scheduler.remove(sequence)  # one that does not wait is no error
        waiting = [each for each in waiting if each is not sequence]
        assert all(map(operator.is_, bench.scheduler.waiting, waiting)) and len(bench.scheduler.waiting) == len(waiting)
    assert len(looks) <= 2 * 4
