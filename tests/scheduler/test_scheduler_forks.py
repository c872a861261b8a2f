"""Forks and block tables in steps: who may write which block, and when the blocks of an output are published."""

from __future__ import annotations

import pytest
from helpers.pipelined_bench import PipelinedBench
from helpers.scheduler_bench import Bench, planned

from mlx_paged.request import Request, Sequence


def test_forks_run_from_the_next_step_on_and_copy_their_last_block_once_less_than_they_are() -> None:
    bench = Bench()
    request = bench.add(6, max_tokens=4, n=3)
    bench.step()
    assert [bench.manager.block_table(s.seq_id) for s in request.sequences] == [[0, 1]] * 3
    schedule = bench.step()
    assert planned(schedule) == [(0, 6, 1)] * 3
    assert bench.copies == [(0, 1, 2), (0, 1, 3)]
    assert not bench.batch.tail_is_shared.any()
    bench.step()
    assert bench.copies == []


# -- blocks taken ahead ------------------------------------------------------------------------------------------


def fork_beam(bench: Bench, request: Request) -> Sequence:
    """Let the first of two beams go on twice, and the second end."""
    first, second = request.sequences
    bench.scheduler.remove(second)
    request.sequences = [first]
    token_id = first.token_ids.pop()
    fork = bench.new_sequence(request)
    fork.token_ids = list(first.token_ids)
    bench.scheduler.add_fork(first, fork)
    bench.batch.append_token(first, token_id)
    bench.batch.append_token(fork, token_id + 1)
    return fork


def put_off() -> tuple[Bench, Request, Request]:
    """Two beams at a block boundary have taken a block each, in a step for which two samples' tail found none."""
    bench = Bench(num_blocks=6, prefix_caching=False)
    beams, samples = bench.add(8, max_tokens=9, beam_width=2), bench.add(6, max_tokens=5, n=2)
    bench.step()
    assert bench.manager.num_free_blocks == 2
    assert bench.scheduler.schedule(can_preempt=False) is None
    assert [bench.manager.block_table(s.seq_id) for s in beams.sequences] == [[0, 1, 4], [0, 1, 5]]
    assert bench.manager.num_free_blocks == 0
    return bench, beams, samples


def test_a_block_that_a_beam_took_for_a_step_that_was_put_off_is_not_shared_by_its_fork() -> None:
    bench, beams, _ = put_off()
    fork = fork_beam(bench, beams)
    (first, _) = beams.sequences
    assert bench.manager.block_table(first.seq_id) == [0, 1, 4]
    assert bench.manager.block_table(fork.seq_id) == [0, 1]
    assert not bench.batch.tail_is_shared[[first.row, fork.row]].any()
    assert bench.batch.num_slots[[first.row, fork.row]].tolist() == [12, 8]
    plan = bench.step()  # checks that each writes blocks of its own
    assert planned(plan)[:2] == [(0, 8, 1), (0, 8, 1)]
    assert bench.manager.block_table(first.seq_id)[2] != bench.manager.block_table(fork.seq_id)[2]
    bench.run()
    assert bench.manager.num_free_blocks == 6


def test_who_took_a_block_for_a_step_that_was_put_off_takes_no_second_one() -> None:
    bench, beams, samples = put_off()
    plan = bench.step()
    assert planned(plan) == [(0, 8, 1), (0, 8, 1), (1, 6, 1)]
    assert [lost.request for lost in plan.preempted] == [samples]
    assert bench.copies == [], "the last owner of a block writes in place"
    assert [bench.manager.block_table(s.seq_id) for s in beams.sequences] == [[0, 1, 4], [0, 1, 5]]
    bench.run()
    assert bench.manager.num_free_blocks == 6


# -- publishing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_a_full_block_of_a_running_output_is_published_when_the_next_one_is_taken(overlap: bool) -> None:
    bench = PipelinedBench(overlap=overlap)
    request = bench.add(6, max_tokens=20)
    (running,) = request.sequences
    everything = [bench.token_of(running, position) for position in range(26)]
    for _ in range(12):
        bench.step()
        num_blocks = len(bench.manager.block_table(running.seq_id))
        assert bench.manager.num_cached_tokens(everything) == 4 * (num_blocks - 1)
    assert num_blocks == 5
    assert not request.finished


@pytest.mark.parametrize("overlap", [True, False])
def test_a_request_that_begins_as_a_running_output_does_starts_after_its_published_blocks(overlap: bool) -> None:
    bench = PipelinedBench(overlap=overlap)
    first = bench.add(6, max_tokens=20)
    (running,) = first.sequences
    bench.step()
    while len(bench.manager.block_table(running.seq_id)) < 4:
        bench.step()
    num_known = len(running.token_ids)
    assert 12 <= num_known < 16
    second = bench.add(0, max_tokens=4, prompt=[*running.token_ids[:12], 5, 6])
    assert (1, 12, 2) in planned(bench.step())
    assert not first.finished
    assert second.num_cached_tokens == 12
    shared = bench.manager.block_table(running.seq_id)[:3]
    assert bench.manager.block_table(second.sequences[0].seq_id)[:3] == shared
    assert [bench.manager.ref_count(block_id) for block_id in shared] == [2, 2, 2]
    bench.run()
