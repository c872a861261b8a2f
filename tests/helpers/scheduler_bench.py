"""A scheduler with a stand-in for the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_paged import BeamSearchParams, SamplingParams
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.config import EngineConfig
from mlx_paged.outputs import RequestMetrics
from mlx_paged.request import Request, Sequence
from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Chunk, Schedule
from mlx_paged.scheduler.scheduler import Scheduler


@dataclass
class Planned:
    """A schedule with its decodes as chunks."""

    sequences: list[Chunk]
    preempted: list[Sequence]


@dataclass
class Bench:
    """A scheduler with a stand-in for the engine: it gives every sequence that is far enough its next token."""

    num_blocks: int = 16
    block_size: int = 4
    max_num_seqs: int = 8
    budget: int = 16
    allocator: str = "lru"
    prefix_caching: bool = True
    has_store: bool = False
    max_step_ms: float | None = None
    takes: Callable[[Schedule], float] = lambda _: 0.0
    """The seconds of a step."""
    requests: list[Request] = field(default_factory=list)
    next_seq_id: int = 0
    needed_logits: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.groups = CacheGroups.make(
            [self.num_blocks],
            [None],
            self.block_size,
            stored_keys=() if self.has_store else None,
            allocator=self.allocator,
            prefix_caching=self.prefix_caching,
        )
        (self.manager,) = self.groups.managers
        self.batch = RunningBatch(self.max_num_seqs, 1, self.num_blocks, self.block_size)
        self.scheduler = Scheduler(self.groups, self.batch, self.config)
        self.copies: list[tuple[int, ...]] = []

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_step_ms=self.max_step_ms,
        )

    def add(
        self,
        prompt_len: int,
        max_tokens: int = 1,
        n: int = 1,
        first_token: int | None = None,
        priority: int = 0,
        beam_width: int = 0,
        prompt: list[int] | None = None,
        stream: bool = False,
    ) -> Request:
        """Queue a request whose prompt, if none is given, differs from all others from its first token on."""
        request_id = len(self.requests)
        first = 1000 * (request_id + 1) if first_token is None else first_token
        prompt = list(range(first, first + prompt_len)) if prompt is None else prompt
        params: SamplingParams | BeamSearchParams = SamplingParams(n=n, priority=priority)
        search = None
        if beam_width:
            params = BeamSearchParams(beam_width, max_tokens, priority=priority)
            search = BeamSearch(params, max_tokens, ())
        request = Request(request_id, None, prompt, params, 0, max_tokens, stream, RequestMetrics(0.0), search)
        self.requests.append(request)
        self.scheduler.add(self.new_sequence(request))
        return request

    def new_sequence(self, request: Request) -> Sequence:
        sequence = Sequence(self.next_seq_id, request, request.num_sequences_made, list(request.prompt_token_ids))
        self.next_seq_id += 1
        request.num_sequences_made += 1
        request.sequences.append(sequence)
        return sequence

    def plan(self, schedule: Schedule | None) -> Planned:
        assert schedule is not None
        assert schedule.query_lens.tolist() == [1] * len(schedule.rows), "without drafts a decode computes one token"
        decodes = [
            Chunk(self.sequence(row), int(self.batch.num_computed[row]), query_len)
            for row, query_len in zip(schedule.rows, schedule.query_lens.tolist(), strict=True)
        ]
        plan = Planned(decodes + schedule.chunks, schedule.preempted)
        assert schedule.num_tokens == sum(item.num_tokens for item in plan.sequences)
        return plan

    def sequence(self, row: int) -> Sequence:
        sequence = self.batch.sequences[row]
        assert sequence is not None
        return sequence

    def step(self) -> Planned:
        """Schedule, check what must hold of any schedule, and pretend that it was computed."""
        schedule = self.scheduler.schedule()
        assert schedule is not None
        plan = self.plan(schedule)
        self.check(plan)
        self.copies = [tuple(transfer) for transfer in self.groups.transfers]
        self.groups.transfers.clear()
        self.needed_logits += [item.needs_logits for item in plan.sequences]
        self.scheduler.complete(schedule)
        self.scheduler.step_budget.add(schedule, None, True, self.takes(schedule))
        for item in plan.sequences:
            request = item.sequence.request
            if not item.needs_logits:
                continue
            if request.is_forked:
                self.put_out(item.sequence)
                continue
            self.scheduler.release_fork_rows(item.sequence)
            for _ in range(1, request.max_num_sequences):
                self.scheduler.add_fork(item.sequence, self.new_sequence(request))
            for sequence in request.sequences:
                self.put_out(sequence)
        for sequence in self.scheduler.running:
            self.scheduler._sync(sequence)
        self.manager.check()
        return plan

    def put_out(self, sequence: Sequence) -> None:
        self.batch.append_token(sequence, 10**6 + 1000 * sequence.seq_id + sequence.num_output_tokens)
        if sequence.num_output_tokens == sequence.request.max_tokens:
            sequence.finish_reason = "length"
            self.scheduler.remove(sequence)

    def check(self, plan: Planned) -> None:
        items = plan.sequences
        assert sum(item.num_tokens for item in items) <= self.budget
        assert all(item.num_tokens >= 1 for item in items)
        assert len({item.sequence.seq_id for item in items}) == len(items), "a sequence is scheduled once"
        running = self.scheduler.running
        assert sum(1 if s.request.is_forked else s.request.max_num_sequences for s in running) <= self.max_num_seqs
        assert {item.sequence.seq_id for item in items} <= {s.seq_id for s in running}
        assert not {s.seq_id for s in plan.preempted} & {item.sequence.seq_id for item in items}
        for item in items:
            seq_id, end = item.sequence.seq_id, item.start + item.num_tokens
            table = self.manager.block_table(seq_id)
            assert end <= len(item.sequence.token_ids)
            assert len(table) * self.block_size >= end, "every token has a slot"
            assert self.batch.tables[0].matrix[item.sequence.row, : len(table)].tolist() == table
            for position in range(max(item.start, len(item.sequence.request.prompt_token_ids)), end):
                assert self.manager.ref_count(table[position // self.block_size]) == 1, "written by its owner alone"

    def run(self, most_steps: int = 500) -> int:
        """Step until everything has finished; the number of steps."""
        for steps in range(most_steps):
            if all(request.finished for request in self.requests):
                return steps
            assert self.step().sequences, "something must move on in every step"
        raise AssertionError(f"not finished after {most_steps} steps")


def planned(schedule: Planned) -> list[tuple[int, int, int]]:
    """(request, first position, number of tokens) of each scheduled sequence."""
    return [(item.sequence.request.request_id, item.start, item.num_tokens) for item in schedule.sequences]
