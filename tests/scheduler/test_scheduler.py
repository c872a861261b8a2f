"""Which tokens a step computes: order, budget, places, preemption, and that everything ends."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from helpers.scheduler_bench import Bench, Planned, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged import BlockManager
from mlx_paged.blocks.cache_groups import CacheGroups, blocks_for_window
from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.blocks.transfers import BlockCopy
from mlx_paged.request import Request, Sequence
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.scheduler import Chunk, Scheduler


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


def test_no_more_sequences_run_than_there_are_places() -> None:
    bench = Bench(max_num_seqs=2)
    for _ in range(3):
        bench.add(2, max_tokens=2)
    assert [planned(bench.step()) for _ in range(3)] == [
        [(0, 0, 2), (1, 0, 2)],
        [(0, 2, 1), (1, 2, 1)],
        [(2, 0, 2)],
    ]


def test_a_request_of_n_samples_waits_for_n_places() -> None:
    bench = Bench(max_num_seqs=4)
    bench.add(2, max_tokens=3, n=2)
    bench.add(2, max_tokens=2, n=3)
    bench.add(2, max_tokens=1)
    assert planned(bench.step()) == [(0, 0, 2)]
    assert planned(bench.step()) == [(0, 2, 1), (0, 2, 1)]
    assert planned(bench.step()) == [(0, 3, 1), (0, 3, 1)]
    assert planned(bench.step()) == [(1, 0, 2), (2, 0, 2)]


def test_forks_run_from_the_next_step_on_and_copy_their_last_block_once_less_than_they_are() -> None:
    bench = Bench()
    request = bench.add(6, max_tokens=4, n=3)
    bench.step()
    assert [bench.manager.block_table(s.seq_id) for s in request.sequences] == [[0, 1]] * 3
    schedule = bench.step()
    assert planned(schedule) == [(0, 6, 1)] * 3
    assert bench.copies == [(0, 1, 2), (0, 1, 3)]
    bench.step()
    assert bench.copies == []


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


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_pool_that_fits_one_request_serves_many_one_after_another(prefix_caching: bool) -> None:
    bench = Bench(num_blocks=3, prefix_caching=prefix_caching)
    for _ in range(5):
        bench.add(5, max_tokens=8)  # 12 slots: the whole pool
    assert bench.run() < 100
    assert bench.manager.num_free_blocks == 3


def test_n_samples_in_a_pool_that_fits_one_of_them_all_finish() -> None:
    bench = Bench(num_blocks=3)
    request = bench.add(5, max_tokens=8, n=4)
    bench.run()
    assert [s.num_output_tokens for s in request.sequences] == [8] * 4
    assert bench.scheduler.num_preemptions > 0


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


def test_coming_back_from_preemption_counts_as_no_prompt() -> None:
    bench = Bench(num_blocks=5)
    bench.add(7, max_tokens=6)
    bench.add(11, max_tokens=3)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert bench.scheduler.prefix_query_tokens == 18
    assert bench.scheduler.prefix_hit_tokens == 0


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(2, 9),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(3, 6),
    budget=st.integers(1, 9),
    allocator=st.sampled_from(["lru", "fifo"]),
    prefix_caching=st.booleans(),
    arrivals=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(1, 12), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=7,
    ),
)
def test_whatever_arrives_whenever_finishes_in_a_bounded_number_of_steps(
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    allocator: str,
    prefix_caching: bool,
    arrivals: list[tuple[int, int, int, int, bool]],
) -> None:
    bench = Bench(num_blocks, block_size, max_num_seqs, budget, allocator, prefix_caching)
    slots = num_blocks * block_size
    for pause, prompt_len, max_tokens, n, common in arrivals:
        for _ in range(pause):
            bench.step()
        prompt_len = min(prompt_len, slots)
        bench.add(prompt_len, min(max_tokens, slots - prompt_len + 1), n, first_token=1 if common else None)
    # Even one after another, each preempted at every token, this is what they take.
    bound = sum(
        request.params.n * request.max_tokens * (2 + (len(request.prompt_token_ids) + request.max_tokens) // budget)
        for request in bench.requests
    )
    bench.run(most_steps=2 * bound + 50)
    assert bench.manager.num_free_blocks == num_blocks
    assert bench.scheduler.running == bench.scheduler.waiting == []


# -- priorities and fairness ------------------------------------------------------------------------------------


def test_a_higher_priority_is_served_first_and_equal_ones_in_the_order_of_arrival() -> None:
    bench = Bench(budget=4)
    for priority in (0, 1, -1, 1, 0):
        bench.add(4, priority=priority)
    assert [planned(bench.step()) for _ in range(5)] == [[(i, 0, 4)] for i in (1, 3, 0, 4, 2)]


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


def test_an_urgent_request_goes_past_those_that_wait_and_lets_those_that_run_run_on() -> None:
    bench = Bench(num_blocks=4, prefix_caching=False)
    bench.add(9, max_tokens=3)
    bench.step()
    bench.add(8)
    bench.add(2, priority=5)
    assert planned(bench.step()) == [(0, 9, 1), (2, 0, 2)]
    assert bench.scheduler.num_preemptions == 0


def test_beams_that_run_out_of_blocks_lose_them_together_and_come_back_by_what_they_share() -> None:
    bench = Pipelined(num_blocks=7, prefix_caching=False)
    first, beams = bench.add(7, max_tokens=10), bench.add(5, max_tokens=6, beam_width=3)
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert bench.scheduler.num_preemptions == 3
    assert bench.scheduler.waiting == [beams.sequences[0]]
    assert beams.sequences[0].num_shared_tokens is not None
    assert beams.sequences[0].num_shared_tokens >= 5
    assert [sequence.request for sequence in bench.scheduler.running] == [first]
    bench.run()


def beams_short_of_blocks() -> tuple[Pipelined, Sequence, Sequence]:
    """Two beams that have come back by what they share, and blocks for one of them to go on."""
    bench = Pipelined(num_blocks=10, block_size=2)
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


@pytest.mark.parametrize("overlap", [True, False])
def test_a_long_prompt_never_holds_up_who_is_decoding(overlap: bool) -> None:
    bench = Pipelined(num_blocks=100, budget=8, overlap=overlap)
    bench.add(3, max_tokens=30)
    bench.step()
    bench.add(80, max_tokens=2)
    for _ in range(11):  # 7 tokens beside the decode in each of them
        plan = bench.step()
        assert [item.sequence.request.request_id for item in plan.sequences] == [0, 1]
    bench.run()


def test_several_prompts_start_in_one_step_and_go_on_side_by_side() -> None:
    bench = Bench(num_blocks=40, budget=16)
    for length in (5, 20, 3, 4):
        bench.add(length, max_tokens=2)
    assert [planned(bench.step()) for _ in range(2)] == [
        [(0, 0, 5), (1, 0, 11)],
        [(0, 5, 1), (1, 11, 9), (2, 0, 3), (3, 0, 3)],
    ]


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
    assert bench.scheduler._blocked_head is not None
    bench.scheduler.remove(first.sequences[0])
    first.sequences[0].finish_reason = "abort"
    assert planned(bench.step()) == [(1, 0, 12)]


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
    bench, first, second = beams_short_of_blocks()
    schedule = bench.scheduler.schedule(can_preempt=False)
    assert schedule is not None
    assert (schedule.is_short_of_blocks, schedule.chunks, schedule.preempted) == (True, [Chunk(first, 1, 7)], [])
    assert bench.scheduler.running == [first, second]


# -- tokens one step late, beams, failures ----------------------------------------------------------------------

STOP = 7


@dataclass
class UnderWay:
    """Rows whose tokens are being drawn, with their stamps and what the tokens will be, and beams."""

    drawn: np.ndarray
    stamps: np.ndarray
    token_ids: np.ndarray
    beams: list[Sequence]


@dataclass
class Pipelined(Bench):
    """A stand-in that is as late as the engine: a step is scheduled before the tokens of the one before it are known.

    Beams branch and die at random. Blocks hold, for each slot, the whole prefix that was computed there, so that a
    token that would see anything else than its own sequence is noticed. stops: request id -> after how many tokens
    its samples stop by themselves. fails: the steps that are found impossible after they were scheduled.
    """

    overlap: bool = True
    seed: int = 0
    window: int | None = None
    stops: dict[int, int] = field(default_factory=dict)
    fails: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            count = blocks_for_window(self.window, self.block_size, self.max_num_seqs, self.budget)
            windowed = BlockManager(
                count, self.block_size, allocator=self.allocator, window=self.window, prefix_caching=self.prefix_caching
            )
            self.groups = CacheGroups([self.manager, windowed])
            self.rows = RunningBatch(self.max_num_seqs, 2, self.num_blocks, self.block_size)
            self.scheduler = Scheduler(self.groups, self.rows, self.max_num_seqs, self.budget)
        self.random = random.Random(self.seed)
        self.under_way: UnderWay | None = None
        self.contents: dict[tuple[int, int], list[Any]] = defaultdict(lambda: [None] * self.block_size)
        self.num_steps = 0
        self.was_idle = False

    def token_of(self, sequence: Sequence, position: int) -> int:
        """What a sequence's token at a position is, or will be."""
        if sequence.request.search is not None or position < len(sequence.request.prompt_token_ids):
            return sequence.token_ids[position]
        request_id, count = sequence.request.request_id, position - len(sequence.request.prompt_token_ids) + 1
        if self.stops.get(request_id) == count:
            return STOP
        return 10**6 * (request_id + 1) + 1000 * sequence.index + count

    def step(self) -> Planned:
        """As Engine._advance."""
        self.num_steps += 1
        schedule = self.scheduler.schedule(can_preempt=self.under_way is None)
        if schedule is None:
            self.collect()
            schedule = self.scheduler.schedule()
        plan = self.plan(schedule)
        assert schedule is not None
        if not schedule.num_tokens:
            assert not (self.was_idle and self.scheduler.running), "something must move on"
            self.was_idle = True
            self.collect()
            return plan
        self.was_idle = False
        self.move()
        if self.num_steps in self.fails:
            self.scheduler.cancel(schedule)
            self.account()
            return plan
        self.check(plan)
        self.compute(plan)
        wanted = [item for item in plan.sequences[len(schedule.rows) :] if item.needs_logits]
        drawing = [(item.sequence, item.sequence.row, self.rows.row_version[item.sequence.row]) for item in wanted]
        drawing += [(self.sequence(row), row, self.rows.row_version[row]) for row in schedule.rows.tolist()]
        for item in plan.sequences:
            item.sequence.request.metrics.first_scheduled_time = 0.0
        self.scheduler.complete(schedule)
        self.collect()
        alive = [sequence for sequence, row, row_version in drawing if self.rows.row_version[row] == row_version]
        self.draw(alive)
        if not self.overlap or schedule.is_short_of_blocks or (self.under_way is not None and self.under_way.beams):
            self.collect()
        self.account()
        return plan

    def draw(self, alive: list[Sequence]) -> None:
        beams = [sequence for sequence in alive if sequence.request.search is not None]
        samples = [sequence for sequence in alive if sequence.request.search is None]
        for sequence in list(samples):
            if not sequence.request.is_forked:
                self.scheduler.release_fork_rows(sequence)
                for _ in range(1, sequence.request.max_num_sequences):
                    fork = self.new_sequence(sequence.request)
                    self.scheduler.add_fork(sequence, fork)
                    samples.append(fork)
        drawn = np.array([sequence.row for sequence in samples], np.int64)
        for sequence in samples:
            stop_ids = [STOP] if sequence.request.request_id in self.stops else []
            self.rows.set_stop_checks(sequence.row, False, stop_ids)
        tokens = [self.token_of(sequence, int(self.rows.num_tokens[sequence.row])) for sequence in samples]
        self.rows.num_tokens[drawn] += 1
        self.under_way = UnderWay(drawn, self.rows.row_version[drawn], np.array(tokens, np.int64), beams)

    def collect(self) -> None:
        before, self.under_way = self.under_way, None
        if before is None:
            return
        current = self.rows.row_version[before.drawn] == before.stamps
        drawn, token_ids = before.drawn[current], before.token_ids[current]
        for row in drawn[self.rows.append_tokens(drawn, token_ids, np.zeros(len(drawn), np.float32))].tolist():
            sequence = self.sequence(row)
            assert sequence.token_ids[-1] == STOP or sequence.num_output_tokens == sequence.request.max_tokens
            sequence.finish_reason = "stop"
            self.scheduler.remove(sequence)
        for beam in before.beams:
            if beam.row >= 0:
                beam.beam_candidates = True
        for request in dict.fromkeys(beam.request for beam in before.beams):
            if all(beam.beam_candidates for beam in request.sequences):
                self.branch(request)

    def branch(self, request: Request) -> None:
        """As Engine._branch, with parents by lot."""
        beams = request.sequences
        if not request.is_forked:
            self.scheduler.release_fork_rows(beams[0])
        if beams[0].num_output_tokens + 1 == request.max_tokens:
            for beam in beams:
                self.scheduler.remove(beam)
                beam.finish_reason = "stop"
            return
        parents = [self.random.randrange(len(beams)) for _ in range(request.max_num_sequences)]
        if len(beams) == request.max_num_sequences and self.random.random() < 0.7:
            parents = list(range(request.max_num_sequences))  # so that some go their own way for long
        elif self.random.random() < 0.2:
            parents = parents[
                : self.random.randint(1, request.max_num_sequences)
            ]  # as of a vocabulary with too few tokens
        for i, beam in enumerate(beams):
            beam.beam_candidates = None
            if i not in parents:
                self.scheduler.remove(beam)
        request.sequences = []
        for i, parent in enumerate(parents):
            if parent in parents[:i]:
                fork = self.new_sequence(request)
                fork.token_ids = list(beams[parent].token_ids)
                self.scheduler.add_fork(beams[parent], fork)
            else:
                request.sequences.append(beams[parent])
        for i, sequence in enumerate(request.sequences):
            self.rows.append_token(sequence, 10**6 * (request.request_id + 1) + 1000 * self.random.randrange(900) + i)

    def abort(self, request: Request) -> None:
        for sequence in request.sequences:
            if not sequence.finished:
                self.scheduler.remove(sequence)
                sequence.finish_reason = "abort"
        request.is_forked = True
        self.account()

    def move(self) -> None:
        """Carry out the copies."""
        for transfer in self.groups.transfers:
            assert isinstance(transfer, BlockCopy)
            self.contents[transfer.group, transfer.dst] = list(self.contents[transfer.group, transfer.src])
        self.groups.transfers.clear()

    def compute(self, plan: Planned) -> None:
        """Write every token's slot, then look at what each of them sees."""
        prefixes = []
        for item in plan.sequences:
            tokens = tuple(self.token_of(item.sequence, i) for i in range(item.start + item.num_tokens))
            prefixes.append(tokens)
            for position in range(item.start, len(tokens)):
                for group in range(len(self.groups.managers)):
                    block_id, offset = self.slot(group, item.sequence, position)
                    self.contents[group, block_id][offset] = tokens[: position + 1]
        for item, tokens in zip(plan.sequences, prefixes, strict=True):
            for group, manager in enumerate(self.groups.managers):
                first = 0 if manager.window is None else max(0, item.start - manager.window + 1)
                for position in range(first, len(tokens)):
                    block_id, offset = self.slot(group, item.sequence, position)
                    assert self.contents[group, block_id][offset] == tokens[: position + 1], "a token of another's"

    def slot(self, group: int, sequence: Sequence, position: int) -> tuple[int, int]:
        """Where the device would look, by the table of its row."""
        matrix = self.rows.tables[group].matrix
        return int(matrix[sequence.row, position // self.block_size]), position % self.block_size

    def check(self, plan: Planned) -> None:
        assert sum(item.num_tokens for item in plan.sequences) <= self.budget
        assert all(item.num_tokens >= 1 and item.sequence.row >= 0 for item in plan.sequences)
        assert len({item.sequence.seq_id for item in plan.sequences}) == len(plan.sequences)
        if plan.preempted and self.scheduler.running:
            last = self.scheduler.running[-1]
            assert all(order(lost) > order(last) for lost in plan.preempted), "the last ones lose their blocks"

    def account(self) -> None:
        """Every place, row and block belongs to somebody."""
        scheduler, rows = self.scheduler, self.rows
        assert scheduler.running == sorted(scheduler.running, key=order)
        assert scheduler.waiting == sorted(scheduler.waiting, key=order)
        assert [rows.sequences[s.row] for s in scheduler.running] == scheduler.running
        assert len(rows._free_rows) == self.max_num_seqs - len(scheduler.running)
        to_come = 0
        places_of = dict.fromkeys((sequence.request for sequence in scheduler.running), 0)
        for request in places_of:
            num_running = sum(sequence.request is request for sequence in scheduler.running)
            is_whole = request.search is not None or not request.is_forked
            places_of[request] = request.max_num_sequences if is_whole else num_running
            if not request.is_forked:
                to_come += request.max_num_sequences - num_running
            elif request.search is not None:
                to_come += len(request.sequences) - num_running
        assert scheduler._num_reserved_rows == to_come
        assert sum(places_of.values()) <= self.max_num_seqs, "room is kept for all that may still be forked"
        self.groups.check()
        assert set(self.manager.seq_ids) == {sequence.seq_id for sequence in scheduler.running}
        for group, manager in enumerate(self.groups.managers):
            for block_id, node in manager._tree._node_of_block.items():
                assert self.contents[group, block_id] == prefixes_of(node), "what can be hit is computed and intact"

    def run(self, most_steps: int = 500) -> int:
        for steps in range(most_steps):
            if all(request.finished for request in self.requests) and self.under_way is None:
                self.check_results()
                return steps
            self.step()
        raise AssertionError(f"not finished after {most_steps} steps")

    def check_results(self) -> None:
        """Everything has ended: with the tokens that were to come, and everything given back."""
        for request in self.requests:
            for sequence in request.sequences if request.search is None else ():
                if sequence.finish_reason == "abort":
                    continue
                count = min(self.stops.get(request.request_id, request.max_tokens), request.max_tokens)
                prompt = len(request.prompt_token_ids)
                expected = [self.token_of(sequence, prompt + i) for i in range(count)]
                assert sequence.output_token_ids == expected, "no token more, none less, none twice"
            whole = not any(sequence.finish_reason == "abort" for sequence in request.sequences)
            assert request.search is not None or not whole or len(request.sequences) == request.max_num_sequences
        assert self.scheduler.running == self.scheduler.waiting == []
        assert self.scheduler._num_reserved_rows == 0
        assert all(manager.num_free_blocks == manager.num_blocks for manager in self.groups.managers)


def order(sequence: Sequence) -> tuple[int, int, int]:
    return -sequence.request.params.priority, sequence.request.request_id, sequence.index


def prefixes_of(node: PrefixNode) -> list[tuple[int, ...]]:
    """What the slots of a block hold that can be found as this node."""
    tokens: tuple[int, ...] = ()
    parent: PrefixNode | None = node
    while parent is not None:
        tokens = parent.tokens + tokens
        parent = parent.parent
    first = len(tokens) - len(node.tokens)
    return [tokens[: i + 1] for i in range(first, len(tokens))]


@st.composite
def arrivals(draw: st.DrawFn) -> list[dict[str, int | bool]]:
    kinds = st.fixed_dictionaries(
        {
            "pause": st.integers(0, 4),
            "prompt_len": st.integers(1, 20),
            "max_tokens": st.integers(1, 12),
            "n": st.integers(1, 4),
            "is_beam": st.booleans(),
            "common": st.booleans(),
            "priority": st.sampled_from([0, 0, 1, -1]),
            "stops": st.integers(1, 12),
            "aborted_after": st.sampled_from([99, 99, 99, 0, 1, 5]),
        }
    )
    return draw(st.lists(kinds, min_size=1, max_size=7))


@settings(max_examples=400, deadline=None)
@given(
    num_blocks=st.integers(2, 14),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(4, 7),
    budget=st.integers(1, 12),
    allocator=st.sampled_from(["lru", "fifo", "buddy"]),
    prefix_caching=st.booleans(),
    overlap=st.booleans(),
    window=st.sampled_from([None, None, 1, 3, 7]),
    fails=st.frozensets(st.integers(1, 40), max_size=2),
    seed=st.integers(0, 10**6),
    arriving=arrivals(),
)
def test_beams_and_late_tokens_and_priorities_and_failures_end_with_every_token_in_its_place(
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    allocator: str,
    prefix_caching: bool,
    overlap: bool,
    window: int | None,
    fails: frozenset[int],
    seed: int,
    arriving: list[dict[str, Any]],
) -> None:
    stops = {i: each["stops"] for i, each in enumerate(arriving) if not each["is_beam"]}
    bench = Pipelined(
        num_blocks, block_size, max_num_seqs, budget, allocator, prefix_caching,
        overlap=overlap, window=window, fails=fails, stops=stops, seed=seed,
    )  # fmt: skip
    slots = num_blocks * block_size
    doomed = []
    bound = 100
    for each in arriving:
        for _ in range(each["pause"]):
            bench.step()
        prompt_len, max_tokens = min(each["prompt_len"], slots), each["max_tokens"]
        width = each["n"] if each["is_beam"] else 1
        shared = prompt_len // block_size
        while shared + width * (-(-(prompt_len + max_tokens - 1) // block_size) - shared) > num_blocks:
            prompt_len, max_tokens = max(1, prompt_len - 1), max(1, max_tokens - 1)
            shared = prompt_len // block_size
            width = width - 1 if prompt_len == max_tokens == 1 else width
        request = bench.add(
            prompt_len,
            max_tokens,
            each["n"],
            first_token=1 if each["common"] else None,
            priority=each["priority"],
            beam_width=width if each["is_beam"] else 0,
        )
        # Even one after another, and preempted at every token, this is what they take.
        bound += 3 * each["n"] * max_tokens * (4 + each["n"] * (prompt_len + max_tokens) // budget)
        doomed.append((bench.num_steps + each["aborted_after"], request))
    for when, request in sorted(doomed, key=lambda pair: pair[0]):
        while bench.num_steps < when < 90 and not all(each.finished for each in bench.requests):
            bench.step()
        if when < 90 and not request.finished:
            bench.abort(request)
    bench.run(most_steps=bound)
