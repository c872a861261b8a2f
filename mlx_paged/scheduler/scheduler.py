"""Which tokens the next step computes: running decodes first, then chunks of prompts, as far as blocks allow.

Sequences are served by priority, and in the order of their requests' arrival. When blocks run out the last one is
preempted: its blocks are freed and its tokens computed again later, which finds in the prefix cache, or in the
second tier, what is still there. The first sequence can always take the blocks of all others, and a request that
would not fit the pool alone is refused when it arrives, so something always moves on. Knows no mlx.

Decodes are handled as arrays: only a sequence that needs a block costs work of its own. Their tokens may not be known
yet, so block managers are given slots ahead of tokens; `settle` makes up for it.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.errors import OutOfBlocks
from mlx_paged.request import Sequence
from mlx_paged.scheduler.running_batch import Rows

_NONE = np.zeros(0, np.int64)


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a prompt, from position `start`, are computed in this step."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def needs_logits(self) -> bool:
        """Whether the sequence's last token is among them, so that the next one can be chosen."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


@dataclass
class Schedule:
    """What one step computes: the next token of each row in `decodes`, then `chunks` of prompts.

    promised: of each chunk's sequence, blocks that may be hit because this step writes them. preempted: sequences that
    have lost their blocks. is_short: a prompt could not go on for lack of blocks.
    """

    decodes: np.ndarray = field(default_factory=lambda: _NONE)
    chunks: list[Chunk] = field(default_factory=list)
    num_tokens: int = 0
    promised: dict[Sequence, list[tuple[BlockManager, list[PrefixNode]]]] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)
    is_short: bool = False


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return -sequence.request.params.priority, sequence.request.request_id, sequence.index


class Scheduler:
    """Holds waiting and running sequences, both in the order in which they are served."""

    def __init__(self, groups: CacheGroups, rows: Rows, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.groups = groups
        self.rows = rows
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.swap_pays = True  # whether blocks of preempted sequences are worth keeping in the second tier
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._has_windows = len(groups.managers) > 1
        self._order: np.ndarray | None = _NONE  # rows of `running`; None: not up to date
        self._steady_version = -1  # of the rows: as long as it stays, all of them decode
        self._num_steady_steps = 0  # for so many steps
        self._num_forks_to_come = 0
        self._blocked: tuple[Sequence, int] | None = None  # the first one waiting did not fit these free blocks

    # -- a sequence's life --------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A sequence without blocks waits for its turn."""
        insort(self.waiting, sequence, key=_order)

    def add_fork(self, sequence: Sequence, fork: Sequence) -> None:
        """`fork` shares what is computed of a running sequence and runs at once: room was kept for it."""
        self.settle(sequence)
        self.groups.fork(sequence.seq_id, fork.seq_id)
        self._join(fork, int(self.rows.num_computed[sequence.row]))
        self._share_tail(sequence, fork)

    def set_forked(self, sequence: Sequence) -> None:
        """No room is kept any more for what could be forked from a sequence whose prompt is computed."""
        self._num_forks_to_come -= self._num_forks_of(sequence)
        sequence.request.is_forked = True
        self.rows.is_unforked[sequence.row] = False

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it is."""
        if sequence.row >= 0:
            self._num_forks_to_come -= self._num_forks_of(sequence)
            self.settle(sequence)
            self._leave(sequence)
            self.groups.free(sequence.seq_id)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def settle(self, sequence: Sequence) -> None:
        """Tell the block managers which tokens a running sequence has by now, so that they can be shared and hit."""
        self.rows.flush(sequence)
        end = min(len(sequence.token_ids), int(self.rows.num_computed[sequence.row]))
        self.groups.extend(sequence.seq_id, sequence.token_ids, end)
        self.groups.mark_computed(sequence.seq_id, end)

    def settle_all(self) -> None:
        """`settle` all that run."""
        for sequence in self.running:
            self.settle(sequence)

    def preempt(self, sequence: Sequence) -> list[Sequence]:
        """Take a running sequence's blocks; it waits for its turn again, with its tokens to compute anew.

        Beams go together, and come back by way of the tokens that they share. Returns all that lost their blocks.
        """
        beams = _together(sequence)
        lost = [each for each in beams if each.row >= 0]
        for each in lost:
            self._num_forks_to_come -= self._num_forks_of(each)
            self.settle(each)
            self._leave(each)
            self.groups.free(each.seq_id, will_return=self.swap_pays)
            each.candidates = None
        self._wait_together(beams)
        self.num_preemptions += len(lost)
        return lost

    def start_over(self, sequences: Iterable[Sequence]) -> None:
        """Nothing is computed any more: `sequences`, all that have not ended, wait for their turn."""
        self.groups.clear()
        self.rows.clear()
        self.waiting, self.running = [], []
        self._order, self._num_forks_to_come, self._blocked = None, 0, None
        for sequence in sequences:
            sequence.candidates = None
            if sequence.request.search is None:
                self.add(sequence)
            elif sequence is sequence.request.sequences[0]:
                self._wait_together(sequence.request.sequences)

    # -- steps --------------------------------------------------------------------------------------------------

    def schedule(self, may_preempt: bool = True) -> Schedule | None:
        """Choose the next step's tokens and take the blocks for them; nothing scheduled if nothing waits or runs.

        may_preempt: whether sequences may lose their blocks for it. If not, what would need that is put off: None if
        these are decodes, `is_short` for prompts.
        """
        rows, schedule = self.rows, Schedule()
        decodes = running = self._running_rows()
        num_filling = 0
        if rows.version != self._steady_version or self._num_steady_steps <= 0:
            # Over all rows, those that nobody has included, since that is faster than picking the others.
            is_ready = rows.num_tokens == rows.num_computed + 1
            is_ready &= rows.num_tokens < rows.end
            num_filling = int(np.count_nonzero(rows.is_filling))
            if num_filling:
                is_ready &= ~rows.is_filling
            if np.count_nonzero(is_ready) < len(running):
                decodes = running[is_ready[running]]
            elif 0 < len(running) <= self._max_num_batched_tokens:
                self._steady_version = rows.version
                self._num_steady_steps = int((rows.end - rows.num_tokens)[running].min())
        self._num_steady_steps -= 1
        if len(decodes) > self._max_num_batched_tokens:
            decodes = decodes[: self._max_num_batched_tokens]
        schedule.decodes = decodes
        schedule.num_tokens = len(decodes)
        try:
            self._give_slots(decodes)
        except OutOfBlocks:
            if not may_preempt:
                return None
            self._give_slots_in_turn(schedule)
        for row in running[rows.is_filling[running]].tolist() if num_filling else ():
            sequence = rows.sequences[row]
            if sequence is not None:  # it may have been preempted for one before it
                self._schedule_chunk(sequence, schedule, may_preempt)
        if self.waiting and not schedule.preempted and not schedule.is_short:
            self._admit(schedule)
        return schedule

    def complete(self, schedule: Schedule) -> None:
        """The K/V of the schedule's tokens is in place for whatever is computed from now on."""
        self.rows.num_computed[schedule.decodes] += 1
        for sequence, start, num_tokens in schedule.chunks:
            self.rows.num_computed[sequence.row] = start + num_tokens
            self.groups.mark_computed(sequence.seq_id, start + num_tokens)
            if start + num_tokens == sequence.num_wanted:
                self.rows.is_filling[sequence.row] = False
                if sequence.trunk is not None:
                    self._unfold(sequence)

    def fail(self, schedule: Schedule) -> None:
        """The step can't be computed, since K/V that it counted on could not be had: its sequences start again."""
        for promised in schedule.promised.values():
            self.groups.withdraw(promised)
        for row in [*schedule.decodes.tolist(), *(chunk.sequence.row for chunk in schedule.chunks)]:
            sequence = self.rows.sequences[row]
            if sequence is not None:  # beams go together
                self.preempt(sequence)

    # -- decodes ------------------------------------------------------------------------------------------------

    def _give_slots(self, decodes: np.ndarray) -> None:
        """A slot for the next token of each row. Raises OutOfBlocks; what was given until then is kept."""
        rows = self.rows
        full = decodes[(rows.num_computed == rows.num_slots)[decodes]]
        if len(full):
            if self._has_windows:
                for sequence in filter(None, [rows.sequences[row] for row in full.tolist()]):
                    self.settle(sequence)
            grown = self.groups.grow(rows.seq_id[full].tolist())
            columns = rows.num_slots[full] // rows.block_size
            for tables, block_ids in zip(rows.tables, grown, strict=True):
                tables.set(full, columns, block_ids)
            rows.num_slots[full] += rows.block_size
        shared = decodes[rows.shares_tail[decodes]].tolist() if np.count_nonzero(rows.shares_tail) else ()
        for row in shared:
            sequence = rows.sequences[row]
            assert sequence is not None
            self.groups.own_tail(sequence.seq_id)
            self._write_tables(sequence, int(rows.num_computed[row]) // rows.block_size)
            rows.shares_tail[row] = False

    def _give_slots_in_turn(self, schedule: Schedule) -> None:
        """As `_give_slots`, one row after another, at the cost of the last ones."""
        for row in schedule.decodes.tolist():
            while self.rows.sequences[row] is not None:
                try:
                    self._give_slots(np.array([row]))
                    break
                except OutOfBlocks:
                    self._preempt_last(schedule)

    # -- prompts ------------------------------------------------------------------------------------------------

    def _schedule_chunk(self, sequence: Sequence, schedule: Schedule, may_preempt: bool) -> None:
        """Compute the next tokens of a running prompt."""
        start = int(self.rows.num_computed[sequence.row])
        num_tokens = min(sequence.num_wanted - start, self._max_num_batched_tokens - schedule.num_tokens)
        while num_tokens > 0 and sequence.row >= 0:
            try:
                self._extend(sequence, start + num_tokens)
                self._add_chunk(sequence, num_tokens, schedule)
                return
            except OutOfBlocks:
                if not may_preempt:
                    schedule.is_short = True
                    return
                self._preempt_last(schedule)

    def _add_chunk(self, sequence: Sequence, num_tokens: int, schedule: Schedule) -> None:
        start = int(self.rows.num_computed[sequence.row])
        schedule.chunks.append(Chunk(sequence, start, num_tokens))
        schedule.num_tokens += num_tokens
        if num_tokens > 1:
            schedule.promised[sequence] = self.groups.promise(sequence.seq_id, start + num_tokens)

    def _extend(self, sequence: Sequence, end: int) -> None:
        """Slots for the known tokens of a sequence up to `end`. Raises OutOfBlocks."""
        try:
            self.groups.extend(sequence.seq_id, sequence.token_ids, end)
        finally:
            block_size = self.rows.block_size
            self._write_tables(sequence, int(self.rows.num_computed[sequence.row]) // block_size, -(-end // block_size))
        self.rows.shares_tail[sequence.row] = False

    def _admit(self, schedule: Schedule) -> None:
        """Start waiting sequences while there are tokens, places and blocks for them."""
        while self.waiting and schedule.num_tokens < self._max_num_batched_tokens:
            sequence = self.waiting[0]
            if self._num_places_of(sequence) > self._num_free_places():
                break
            if self._blocked is not None and self.running:
                blocked, num_free = self._blocked
                if sequence is blocked and self.groups.num_free_blocks <= num_free:
                    break
            if self.groups.would_gain_a_run(sequence.num_wanted):
                self.compact()
            budget = self._max_num_batched_tokens - schedule.num_tokens
            num_cached = self._allocate(sequence, budget)
            if num_cached is None:
                self._blocked = sequence, self.groups.num_free_blocks
                break
            self._blocked = None
            self.waiting.pop(0)
            self._join(sequence, num_cached)
            self._num_forks_to_come += self._num_forks_of(sequence)
            self._add_chunk(sequence, min(sequence.num_wanted - num_cached, budget), schedule)

    def _allocate(self, sequence: Sequence, budget: int) -> int | None:
        """Take blocks for a waiting sequence and its first chunk in every group; how many of its tokens are cached.

        None if there are too few blocks.
        """
        request, tokens = sequence.request, sequence.token_ids[: sequence.num_wanted]
        has_run = request.metrics.first_scheduled_time is not None
        if has_run and self.running:
            # One that was preempted comes back once every running one could take a block beside it.
            num_blocks = -(-len(tokens) // self.groups.block_size)
            num_tails = (len(request.sequences) if sequence.trunk is not None else 0) * (
                1 + -(-len(sequence.token_ids) // self.groups.block_size) - num_blocks
            )
            if num_blocks + num_tails + len(self.running) > self.groups.num_free_blocks:
                return None
        try:
            num_cached = self.groups.allocate(sequence.seq_id, tokens, salt=request.params.cache_salt)
        except OutOfBlocks:
            return None
        try:
            self.groups.extend(sequence.seq_id, tokens, min(len(tokens), num_cached + budget))
        except OutOfBlocks:
            self.groups.free(sequence.seq_id)
            return None
        if not has_run:
            request.num_cached_tokens = num_cached
            self.prefix_query_tokens += len(tokens)
            self.prefix_hit_tokens += num_cached
        return num_cached

    def _unfold(self, sequence: Sequence) -> None:
        """The shared tokens of preempted beams are computed: all of them go on from there."""
        self._num_forks_to_come -= self._num_forks_of(sequence)
        sequence.trunk = None
        self.rows.widen(sequence)
        self.rows.is_filling[sequence.row] = True
        for sibling in sequence.request.sequences:
            if sibling is not sequence:
                self.add_fork(sequence, sibling)

    def compact(self) -> int:
        """Move the blocks in use to the start of the pool, so that the free space is one run; how many move."""
        num_moves = self.groups.compact()
        for sequence in self.running if num_moves else ():
            self._write_tables(sequence, 0)
        return num_moves

    # -- helpers ------------------------------------------------------------------------------------------------

    def _running_rows(self) -> np.ndarray:
        if self._order is None:
            self._order = np.array([sequence.row for sequence in self.running], np.int64)
        return self._order

    def _join(self, sequence: Sequence, num_computed: int) -> None:
        """A sequence that has blocks runs from now on."""
        self.rows.join(sequence, num_computed)
        insort(self.running, sequence, key=_order)
        self._order = None
        self._write_tables(sequence, 0)

    def _leave(self, sequence: Sequence) -> None:
        self.rows.leave(sequence)
        self.running.remove(sequence)
        self._order = None

    def _write_tables(self, sequence: Sequence, start: int, end: int | None = None) -> None:
        """Copy the entries `start` .. `end` - 1 of a sequence's block tables to its row."""
        row = sequence.row
        for tables, manager in zip(self.rows.tables, self.groups.managers, strict=True):
            block_ids = manager.block_table(sequence.seq_id, start)
            tables.set_tail(row, start, block_ids if end is None else block_ids[: end - start])
        self.rows.num_slots[row] = self.groups.num_slots(sequence.seq_id)

    def _share_tail(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.rows.shares_tail[sequence.row] = self.rows.num_computed[sequence.row] % self.rows.block_size != 0

    def _preempt_last(self, schedule: Schedule) -> list[Sequence]:
        last = self.running[-1]
        for sequence in _together(last):  # whose chunks will not be computed: nobody may find them
            self.groups.withdraw(schedule.promised.pop(sequence, ()))
        lost = self.preempt(last)
        schedule.preempted += lost
        gone = [chunk for chunk in schedule.chunks if chunk.sequence in lost]
        schedule.num_tokens -= sum(chunk.num_tokens for chunk in gone)
        schedule.chunks = [chunk for chunk in schedule.chunks if chunk.sequence not in lost]
        decodes = [row for row in schedule.decodes.tolist() if self.rows.sequences[row] is not None]
        schedule.num_tokens -= len(schedule.decodes) - len(decodes)
        schedule.decodes = np.array(decodes, np.int64)
        return lost

    def _wait_together(self, beams: list[Sequence]) -> None:
        """Sequences without blocks wait; beams by way of the first of them, which computes what they share."""
        if len(beams) > 1:
            beams[0].trunk = _num_shared(beams)
        self.add(beams[0])

    def _num_free_places(self) -> int:
        """How many more sequences can run, with room kept for those that are still to be forked."""
        num_free = self._max_num_seqs - len(self.running) - self._num_forks_to_come
        if self.rows.is_beam[self._running_rows()].any():
            # While a small vocabulary has too few continuations, a search has fewer beams than it may come to have.
            requests = {s.request for s in self.running if s.request.search is not None and s.request.is_forked}
            num_free -= sum(request.width - len(request.sequences) for request in requests)
        return num_free

    def _num_places_of(self, sequence: Sequence) -> int:
        """How many sequences may run once this one does."""
        request = sequence.request
        return request.width if request.search is not None else self._num_forks_of(sequence) + 1

    def _num_forks_of(self, sequence: Sequence) -> int:
        """Sequences that will be forked from this one, and for which room is kept."""
        request = sequence.request
        if sequence.trunk is not None:
            return len(request.sequences) - 1
        return 0 if request.is_forked else request.width - 1


def _together(sequence: Sequence) -> list[Sequence]:
    """The sequences that lose their blocks when this one does: beams go together."""
    return sequence.request.sequences if sequence.request.search is not None else [sequence]


def _num_shared(sequences: list[Sequence]) -> int:
    """How many tokens sequences of one length have in common, short of the last."""
    first = sequences[0].token_ids
    shared = len(first) - 1
    for sequence in sequences[1:]:
        shared = next((i for i in range(shared) if sequence.token_ids[i] != first[i]), shared)
    return shared
