"""A scheduler with a stand-in for an engine whose steps overlap, and the contents of its blocks simulated."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from helpers.scheduler_bench import Bench, Planned
from mlx_paged import BlockManager
from mlx_paged.blocks.cache_groups import CacheGroups, blocks_for_window
from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.blocks.transfers import BlockCopy
from mlx_paged.request import Request, Sequence
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Schedule
from mlx_paged.scheduler.scheduler import Scheduler

STOP = 7


@dataclass
class InFlight:
    """A step whose tokens are being drawn."""

    sampled_rows: np.ndarray
    row_versions: np.ndarray
    token_ids: np.ndarray
    """What the tokens will turn out to be."""
    beams: list[Sequence]


@dataclass
class PipelinedBench(Bench):
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
            self.batch = RunningBatch(self.max_num_seqs, 2, self.num_blocks, self.block_size)
            self.scheduler = Scheduler(self.groups, self.batch, self.config)
        self.random = random.Random(self.seed)
        self.in_flight: InFlight | None = None
        self.contents: dict[tuple[int, int], list[Any]] = defaultdict(lambda: [None] * self.block_size)
        self.num_steps = 0
        self.before: Schedule | None = None
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
        """As `Engine.step`."""
        self.num_steps += 1
        before, self.before = self.before, None
        schedule = self.scheduler.schedule(can_preempt=self.in_flight is None)
        if schedule is None:
            self.receive()
            schedule = self.scheduler.schedule()
        plan = self.plan(schedule)
        assert schedule is not None
        if not schedule.num_tokens:
            assert not (self.was_idle and self.scheduler.running), "something must move on"
            self.was_idle = True
            self.receive()
            return plan
        self.was_idle = False
        self.run_transfers()
        if self.num_steps in self.fails:
            self.scheduler.cancel(schedule)
            self.account()
            return plan
        self.check(plan)
        self.compute(plan)
        wanted = [item for item in plan.sequences[len(schedule.rows) :] if item.needs_logits]
        drawing = [(item.sequence, item.sequence.row, self.batch.row_version[item.sequence.row]) for item in wanted]
        drawing += [(self.sequence(row), row, self.batch.row_version[row]) for row in schedule.rows.tolist()]
        self.scheduler.complete(schedule)
        self.receive()
        alive = [sequence for sequence, row, row_version in drawing if self.batch.row_version[row] == row_version]
        self.draw(alive)
        must_end = schedule.is_short_of_blocks or self.scheduler.step_budget.must_time(schedule)
        is_over = not self.overlap or must_end or (self.in_flight is not None and bool(self.in_flight.beams))
        if is_over:
            self.receive()
        self.scheduler.step_budget.add(schedule, before, is_over, self.takes(schedule))
        self.before = None if is_over else schedule
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
        rows = np.array([sequence.row for sequence in samples], np.int64)
        for sequence in samples:
            stop_ids = [STOP] if sequence.request.request_id in self.stops else []
            self.batch.set_stop_checks(sequence.row, False, stop_ids)
        tokens = [self.token_of(sequence, int(self.batch.num_tokens[sequence.row])) for sequence in samples]
        self.batch.num_tokens[rows] += 1
        self.in_flight = InFlight(rows, self.batch.row_version[rows], np.array(tokens, np.int64), beams)

    def receive(self) -> None:
        before, self.in_flight = self.in_flight, None
        if before is None:
            return
        is_current = self.batch.row_version[before.sampled_rows] == before.row_versions
        rows, token_ids = before.sampled_rows[is_current], before.token_ids[is_current]
        for row in rows[self.batch.append_tokens(rows, token_ids, np.zeros(len(rows), np.float32))].tolist():
            sequence = self.sequence(row)
            assert sequence.token_ids[-1] == STOP or sequence.num_output_tokens == sequence.request.max_tokens
            sequence.finish_reason = "stop"
            self.scheduler.remove(sequence)
        for beam in before.beams:
            if beam.row >= 0:
                beam.beam_candidates = True
        for request in dict.fromkeys(beam.request for beam in before.beams):
            if all(beam.beam_candidates for beam in request.sequences):
                self.advance_beams(request)

    def advance_beams(self, request: Request) -> None:
        """As `Forking`, with parents by lot."""
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
            # As of a vocabulary with too few tokens.
            parents = parents[: self.random.randint(1, request.max_num_sequences)]
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
            self.batch.append_token(sequence, 10**6 * (request.request_id + 1) + 1000 * self.random.randrange(900) + i)

    def abort(self, request: Request) -> None:
        for sequence in request.sequences:
            if not sequence.finished:
                self.scheduler.remove(sequence)
                sequence.finish_reason = "abort"
        request.is_forked = True
        self.account()

    def run_transfers(self) -> None:
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
        matrix = self.batch.tables[group].matrix
        return int(matrix[sequence.row, position // self.block_size]), position % self.block_size

    def check(self, plan: Planned) -> None:
        assert sum(item.num_tokens for item in plan.sequences) <= self.budget
        assert all(item.num_tokens >= 1 and item.sequence.row >= 0 for item in plan.sequences)
        assert len({item.sequence.seq_id for item in plan.sequences}) == len(plan.sequences)
        if plan.preempted and self.scheduler.running:
            last = served_order(self.scheduler.running[-1])
            assert all(served_order(lost) > last for lost in plan.preempted), "the last ones lose their blocks"

    def account(self) -> None:
        """Every row and every block belongs to somebody."""
        scheduler, batch = self.scheduler, self.batch
        assert scheduler.running == sorted(scheduler.running, key=served_order)
        assert scheduler.waiting == sorted(scheduler.waiting, key=served_order)
        assert [batch.sequences[s.row] for s in scheduler.running] == scheduler.running
        assert len(batch._free_rows) == self.max_num_seqs - len(scheduler.running)
        num_reserved = 0
        rows_of = dict.fromkeys((sequence.request for sequence in scheduler.running), 0)
        for request in rows_of:
            num_running = sum(sequence.request is request for sequence in scheduler.running)
            is_whole = request.search is not None or not request.is_forked
            rows_of[request] = request.max_num_sequences if is_whole else num_running
            if not request.is_forked:
                num_reserved += request.max_num_sequences - num_running
            elif request.search is not None:
                num_reserved += len(request.sequences) - num_running
        assert scheduler._num_reserved_rows == num_reserved
        assert sum(rows_of.values()) <= self.max_num_seqs, "room is kept for all that may still be forked"
        self.groups.check()
        assert set(self.manager.seq_ids) == {sequence.seq_id for sequence in scheduler.running}
        for group, manager in enumerate(self.groups.managers):
            for block_id, node in manager._tree._node_of_block.items():
                assert self.contents[group, block_id] == prefixes_of(node), "what can be hit is computed and intact"

    def run(self, most_steps: int = 500) -> int:
        for steps in range(most_steps):
            if all(request.finished for request in self.requests) and self.in_flight is None:
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


def served_order(sequence: Sequence) -> tuple[int, int, int]:
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
