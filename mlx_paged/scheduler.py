"""Which tokens the next step computes: running decodes first, then chunks of prompts, as far as blocks allow.

Sequences are served in the order of their requests' arrival. When blocks run out the latest one is preempted: its
blocks are freed and its tokens computed again later, which finds in the prefix cache what has not been overwritten.
The earliest sequence can always take the blocks of all others, and a request that would not fit the pool alone is
refused when it arrives, so something always moves on. Knows no mlx.
"""

from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

from mlx_paged.block_manager import BlockManager
from mlx_paged.cache_groups import CacheGroups
from mlx_paged.errors import OutOfBlocks
from mlx_paged.prefix_cache import PrefixNode
from mlx_paged.sequence import Request, Sequence


class ScheduledSequence(NamedTuple):
    """The next `num_tokens` tokens of a sequence, from position `start`, are computed in this step."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def needs_logits(self) -> bool:
        """Whether the sequence's last token is among them, so that the next one can be chosen."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


@dataclass
class Schedule:
    """What one step computes, decodes before prompts.

    preempted: sequences that have just lost their blocks. promised: blocks that may be hit because this step writes
    them. compacted: whether block tables have changed as a whole.
    """

    sequences: list[ScheduledSequence] = field(default_factory=list)
    num_tokens: int = 0
    preempted: list[Sequence] = field(default_factory=list)
    promised: list[tuple[BlockManager, list[PrefixNode]]] = field(default_factory=list)
    compacted: bool = False


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.request_id, sequence.index


class Scheduler:
    """Holds waiting and running sequences, both in the order in which they are served."""

    def __init__(self, groups: CacheGroups, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.groups = groups
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens

    def add(self, sequence: Sequence) -> None:
        """A sequence without blocks waits for its turn."""
        insort(self.waiting, sequence, key=_order)

    def add_fork(self, sequence: Sequence, fork: Sequence) -> None:
        """A sequence that shares the blocks of a running one runs at once: room was kept for it."""
        self.groups.fork(sequence.seq_id, fork.seq_id)
        fork.num_computed = sequence.num_computed
        insort(self.running, fork, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.groups.free(sequence.seq_id)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Schedule:
        """Choose the next step's tokens and take the blocks for them; no sequences if nothing waits or runs."""
        schedule = Schedule()
        decodes = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        prompts = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
        for sequence in (*decodes, *prompts):
            num_tokens = min(sequence.num_uncomputed, self._max_num_batched_tokens - schedule.num_tokens)
            if num_tokens > 0 and self._make_room(sequence, sequence.num_computed + num_tokens, schedule):
                self._schedule(sequence, num_tokens, schedule)
        if not schedule.preempted:
            self._admit(schedule)
        return schedule

    def complete(self, schedule: Schedule) -> None:
        """The K/V of a step's tokens is in place."""
        for sequence, start, num_tokens in schedule.sequences:
            sequence.num_computed = start + num_tokens
            self.groups.mark_computed(sequence.seq_id, sequence.num_computed)

    def fail(self, schedule: Schedule) -> None:
        """A step broke off: nothing of it is known to be in place, so its sequences start again."""
        self.groups.withdraw(schedule.promised)
        for sequence, _, _ in schedule.sequences:
            self.preempt(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits for its turn again, with its tokens to compute anew."""
        self.running.remove(sequence)
        self.groups.free(sequence.seq_id, will_return=True)
        sequence.num_computed = 0
        self.add(sequence)
        self.num_preemptions += 1

    def _make_room(self, sequence: Sequence, end: int, schedule: Schedule) -> bool:
        """Give the sequence's tokens up to `end` slots, at the cost of later ones; False if it had to go itself."""
        while sequence not in schedule.preempted:
            try:
                self.groups.extend(sequence.seq_id, sequence.token_ids, end)
                return True
            except OutOfBlocks:
                latest = self.running[-1]
                schedule.num_tokens -= sum(item.num_tokens for item in schedule.sequences if item.sequence is latest)
                schedule.sequences = [item for item in schedule.sequences if item.sequence is not latest]
                schedule.preempted.append(latest)
                self.preempt(latest)
        return False

    def _schedule(self, sequence: Sequence, num_tokens: int, schedule: Schedule) -> None:
        """Compute the next tokens of a sequence, which have their slots."""
        schedule.sequences.append(ScheduledSequence(sequence, sequence.num_computed, num_tokens))
        schedule.num_tokens += num_tokens
        if num_tokens > 1:
            schedule.promised += self.groups.promise(sequence.seq_id, sequence.num_computed + num_tokens)

    def _admit(self, schedule: Schedule) -> None:
        """Start waiting sequences while there are tokens, places and blocks for them."""
        places = self._max_num_seqs - sum(_num_places(sequence) for sequence in self.running)
        while self.waiting and schedule.num_tokens < self._max_num_batched_tokens:
            sequence = self.waiting[0]
            if _num_places(sequence) > places:
                break
            if self.groups.would_gain_a_run(len(sequence.token_ids)):
                self.groups.compact()
                schedule.compacted = True
            budget = self._max_num_batched_tokens - schedule.num_tokens
            if not self._allocate(sequence, budget):
                break
            self.waiting.pop(0)
            insort(self.running, sequence, key=_order)
            places -= _num_places(sequence)
            self._schedule(sequence, min(sequence.num_uncomputed, budget), schedule)

    def _allocate(self, sequence: Sequence, budget: int) -> bool:
        """Take blocks for a waiting sequence and its first chunk in every group; False if there are too few."""
        if sequence.request.metrics.first_scheduled_time is not None:
            # One that was preempted comes back once every running one could take a block beside it.
            needed = -(-len(sequence.token_ids) // self.groups.block_size) + len(self.running)
            if self.running and needed > self.groups.num_free_blocks:
                return False
        try:
            num_cached = self.groups.allocate(sequence.seq_id, sequence.token_ids, salt=sequence.params.cache_salt)
        except OutOfBlocks:
            return False
        try:
            end = min(len(sequence.token_ids), num_cached + budget)
            self.groups.extend(sequence.seq_id, sequence.token_ids, end)
        except OutOfBlocks:
            self.groups.free(sequence.seq_id)
            return False
        sequence.num_computed = num_cached
        if sequence.request.metrics.first_scheduled_time is None:
            sequence.request.num_cached_tokens = num_cached
            self.prefix_query_tokens += len(sequence.token_ids)
            self.prefix_hit_tokens += num_cached
        return True


def _num_places(sequence: Sequence) -> int:
    """Places among max_num_seqs that a sequence takes: those of its forks to come included."""
    request: Request = sequence.request
    return request.params.n if len(request.sequences) == 1 else 1
