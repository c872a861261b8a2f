"""Which tokens a step computes: order, budget, places, preemption, and that everything ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged import BlockManager, SamplingParams
from mlx_paged.cache_groups import CacheGroups
from mlx_paged.outputs import RequestMetrics
from mlx_paged.scheduler import Schedule, Scheduler
from mlx_paged.sequence import Request, Sequence


@dataclass
class Bench:
    """A scheduler with a stand-in for the engine: it gives every sequence that is far enough its next token."""

    num_blocks: int = 16
    block_size: int = 4
    max_num_seqs: int = 8
    budget: int = 16
    allocator: str = "lru"
    prefix_caching: bool = True
    requests: list[Request] = field(default_factory=list)
    next_seq_id: int = 0
    needed_logits: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.manager = BlockManager(
            self.num_blocks, self.block_size, allocator=self.allocator, prefix_caching=self.prefix_caching
        )
        self.groups = CacheGroups([self.manager])
        self.scheduler = Scheduler(self.groups, self.max_num_seqs, self.budget)
        self.copies: list[tuple[int, ...]] = []

    def add(self, prompt_len: int, max_tokens: int = 1, n: int = 1, first_token: int | None = None) -> Request:
        """Queue a request whose prompt differs from all others from its first token on."""
        request_id = len(self.requests)
        first = 1000 * (request_id + 1) if first_token is None else first_token
        prompt = list(range(first, first + prompt_len))
        request = Request(request_id, None, prompt, SamplingParams(n=n), 0, max_tokens, False, RequestMetrics(0.0))
        self.requests.append(request)
        self.scheduler.add(self.new_sequence(request))
        return request

    def new_sequence(self, request: Request) -> Sequence:
        sequence = Sequence(self.next_seq_id, request, len(request.sequences), list(request.prompt_token_ids))
        self.next_seq_id += 1
        request.sequences.append(sequence)
        return sequence

    def step(self) -> Schedule:
        """Schedule, check what must hold of any schedule, and pretend that it was computed."""
        decodes = {sequence.seq_id for sequence in self.scheduler.running if sequence.num_uncomputed == 1}
        schedule = self.scheduler.schedule()
        self.check(schedule, decodes)
        self.copies = [tuple(transfer) for transfer in self.groups.transfers]
        self.groups.transfers.clear()
        for item in schedule.sequences:
            if item.sequence.request.metrics.first_scheduled_time is None:
                item.sequence.request.metrics.first_scheduled_time = 0.0
        self.needed_logits += [item.needs_logits for item in schedule.sequences]
        self.scheduler.complete(schedule)
        for item in schedule.sequences:
            request = item.sequence.request
            if not item.needs_logits:
                continue
            if len(request.sequences) == request.params.n:
                self.put_out(item.sequence)
                continue
            for _ in range(len(request.sequences), request.params.n):
                self.scheduler.add_fork(item.sequence, self.new_sequence(request))
            for sequence in request.sequences:
                self.put_out(sequence)
        self.manager.check()
        return schedule

    def put_out(self, sequence: Sequence) -> None:
        token = 10**6 + 1000 * sequence.seq_id + len(sequence.output.token_ids)
        sequence.token_ids.append(token)
        sequence.output.token_ids.append(token)
        if len(sequence.output.token_ids) == sequence.request.max_tokens:
            sequence.output.finish_reason = "length"
            self.scheduler.remove(sequence)

    def check(self, schedule: Schedule, decodes: set[int]) -> None:
        items = schedule.sequences
        assert sum(item.num_tokens for item in items) <= self.budget
        assert all(item.num_tokens >= 1 for item in items)
        assert len({item.sequence.seq_id for item in items}) == len(items), "a sequence is scheduled once"
        is_prompt = [item.sequence.seq_id not in decodes for item in items]
        assert is_prompt == sorted(is_prompt), "decodes come before chunks of prompts"
        running = self.scheduler.running
        places = sum(s.request.params.n if len(s.request.sequences) == 1 else 1 for s in running)
        assert places <= self.max_num_seqs
        assert {item.sequence.seq_id for item in items} <= {s.seq_id for s in running}
        assert not {s.seq_id for s in schedule.preempted} & {item.sequence.seq_id for item in items}
        for item in items:
            seq_id, end = item.sequence.seq_id, item.start + item.num_tokens
            assert item.start == item.sequence.num_computed
            assert end <= len(item.sequence.token_ids)
            assert len(self.manager.block_table(seq_id)) * self.block_size >= end, "every token has a slot"
            for position in range(max(item.start, len(item.sequence.request.prompt_token_ids)), end):
                block_id, _ = self.manager.slot(seq_id, position)
                assert self.manager.ref_count(block_id) == 1, "what is generated is written to a block of one's own"

    def run(self, most_steps: int = 500) -> int:
        """Step until everything has finished; the number of steps."""
        for steps in range(most_steps):
            if all(request.finished for request in self.requests):
                return steps
            assert self.step().sequences, "something must move on in every step"
        raise AssertionError(f"not finished after {most_steps} steps")


def planned(schedule: Schedule) -> list[tuple[int, int, int]]:
    """(request, first position, number of tokens) of each scheduled sequence."""
    return [(item.sequence.request.request_id, item.start, item.num_tokens) for item in schedule.sequences]


def test_an_idle_scheduler_schedules_nothing() -> None:
    assert Bench().scheduler.schedule() == Schedule()


def test_a_prompt_that_fits_is_computed_at_once_and_decoded_token_by_token() -> None:
    bench = Bench()
    bench.add(6, max_tokens=3)
    assert [planned(bench.step()) for _ in range(3)] == [[(0, 0, 6)], [(0, 6, 1)], [(0, 7, 1)]]
    assert bench.scheduler.schedule().sequences == []
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
    assert late.sequences[0].num_computed == 0
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
    assert [len(s.output.token_ids) for s in request.sequences] == [8] * 4
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
    assert bench.scheduler.schedule().sequences == []


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
