"""Which tokens the next step computes: running decodes first, then chunks of prompts, as far as blocks allow.

Sequences are served by priority, and in the order of their requests' arrival. When blocks run out the last one is
preempted: its blocks are freed and its tokens computed again later, which finds in the prefix tree, or in the block
store, what is still there. The first sequence can always take the blocks of all others, and a request that would not
fit the pool alone is refused when it arrives, so something always moves on. Decodes are handled as arrays. Knows no
mlx.
"""

from bisect import bisect_left, insort

import numpy as np

from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.config import EngineConfig
from mlx_paged.errors import OutOfBlocks
from mlx_paged.request import Sequence, common_prefix_len
from mlx_paged.scheduler.kept_prompts import KeptPrompts
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Chunk, Drafts, Schedule
from mlx_paged.scheduler.step_budget import StepBudget


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return -sequence.request.params.priority, sequence.request.request_id, sequence.index


class Scheduler:
    """Holds waiting and running sequences, both in the order in which they are served."""

    storing_pays: bool = True  # whether blocks of preempted sequences are worth keeping in the block store

    def __init__(self, groups: CacheGroups, batch: RunningBatch, config: EngineConfig) -> None:
        self.groups, self.batch = groups, batch
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = self.num_prompt_tokens = self.prefix_query_tokens = self.prefix_hit_tokens = 0
        self._max_num_seqs, self._max_num_tokens = config.max_num_seqs, config.max_num_batched_tokens
        self.step_budget = StepBudget(config.block_size, config.max_step_ms)
        self._rows: np.ndarray | None = np.zeros(0, np.int64)  # of `running`, in order; None: not up to date
        self._query_lens = np.ones(config.max_num_seqs, np.int32)
        self._all_decode_version, self._num_all_decode_steps = -1, 0  # of the batch: for so many steps all rows decode
        self._num_reserved_rows = 0  # for sequences that are still to be forked
        self._blocked_head: dict[Sequence, int] = {}  # the first one waiting did not fit so many free blocks
        self.kept_prompts = KeptPrompts(groups)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence without blocks wait for its turn."""
        insort(self.waiting, sequence, key=_order)

    def add_fork(self, sequence: Sequence, fork: Sequence) -> None:
        """Let `fork` run at once, sharing what is computed of a running sequence: a row was kept for it."""
        self._sync(sequence)
        self.groups.fork(sequence.seq_id, fork.seq_id, fork.token_ids)
        num_computed = int(self.batch.num_computed[sequence.row])
        self._start(fork, num_computed)
        self.batch.tail_is_shared[[sequence.row, fork.row]] = num_computed % self.batch.block_size != 0

    def release_fork_rows(self, sequence: Sequence) -> None:
        """Keep no rows any more for what could be forked from a sequence whose prompt is computed."""
        self._num_reserved_rows -= sequence.num_pending_forks
        sequence.request.is_forked = True
        self.batch.will_fork[sequence.row] = False

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, wherever it is, and free its blocks."""
        if sequence.row >= 0:
            self._stop(sequence)
        else:  # if it waits, then where its order says: a long queue is not searched
            place = bisect_left(self.waiting, _order(sequence), key=_order)
            del self.waiting[place : place + self.waiting[place : place + 1].count(sequence)]
        self.kept_prompts.done(sequence)

    def preempt(self, sequence: Sequence) -> list[Sequence]:
        """Take a running sequence's blocks; it waits for its turn again, with its tokens to compute anew.

        Beams go together, and come back by way of the tokens that they share. Returns all that lost their blocks.
        """
        together = sequence.preempted_with
        preempted = [each for each in together if each.row >= 0]
        for each in preempted:
            self._stop(each, will_return=self.storing_pays, parks=self.storing_pays and len(together) == 1)
        self._queue_beams(together)
        self.num_preemptions += len(preempted)
        return preempted

    def restart(self, sequences: list[Sequence]) -> None:
        """Forget all that is computed: `sequences`, all that have not ended, wait for their turn."""
        self.groups.clear()
        self.kept_prompts.clear()
        self.batch.clear()
        self.waiting, self.running, self._rows, self._num_reserved_rows, self._blocked_head = [], [], None, 0, {}
        for sequence in sequences:
            if sequence is sequence.preempted_with[0]:
                self._queue_beams(sequence.preempted_with)

    def sync_blocks(self) -> None:
        """Bring the block managers' counts up to date, for `stats` and `check`: a decode's lag up to a block."""
        for sequence in self.running:
            self._sync(sequence)

    def schedule(self, can_preempt: bool = True, drafts: Drafts | None = None) -> Schedule | None:
        """Choose the next step's tokens and take the blocks for them. Nothing is scheduled if nothing waits or runs.

        can_preempt: whether sequences may lose their blocks for it. If not, what would need that is put off: returns
        None if these are decodes, sets `is_short_of_blocks` for prompts. drafts: what decodes are to verify.
        """
        batch, schedule = self.batch, Schedule(max_num_tokens=self._max_num_tokens)
        running = self._running_rows()
        rows, is_prefilling = self._rows_to_decode(running, drafts)
        query_lens = self._query_lens[: len(rows)]
        if drafts is not None:
            query_lens, schedule.drafts = drafts.query_lens[rows], drafts.tokens
        schedule.rows, schedule.query_lens, schedule.num_tokens = rows, query_lens, int(query_lens.sum())
        try:
            self._allocate_slots(rows, query_lens)
        except OutOfBlocks:
            if not can_preempt:
                return None
            self._allocate_slots_one_by_one(schedule)
        if is_prefilling or self.waiting:
            self.step_budget.begin(is_read=bool(batch.is_streamed[rows].any()))
        for row in running[batch.is_prefilling[running]].tolist() if is_prefilling else ():
            sequence = batch.sequences[row]
            if sequence is not None:  # it may have been preempted for one before it
                self._schedule_chunk(sequence, schedule, can_preempt)
        if self.waiting and not schedule.preempted and not schedule.is_short_of_blocks:
            self._admit(schedule)
        return schedule

    def complete(self, schedule: Schedule) -> None:
        """Count the schedule's tokens as computed: their K/V is in place for whatever is computed from now on."""
        self.batch.num_computed[schedule.rows] += schedule.query_lens
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            if sequence.request.metrics.first_scheduled_time is None:
                sequence.request.metrics.first_scheduled_time = schedule.made_at
                sequence.request.num_cached_tokens = chunk.start
                self.prefix_query_tokens += sequence.num_target_tokens
                self.prefix_hit_tokens += chunk.start
            self.num_prompt_tokens += chunk.num_tokens
            self.batch.num_computed[sequence.row] = chunk.end
            self.groups.mark_computed(sequence.seq_id, chunk.end)
            if chunk.end == sequence.num_target_tokens:
                self.batch.is_prefilling[sequence.row] = False
                if sequence.num_shared_tokens is not None:
                    self._split(sequence)

    def cancel(self, schedule: Schedule) -> None:
        """Give up a step that can't be computed, since K/V that it counted on could not be had: its sequences wait."""
        for published in schedule.published.values():
            self.groups.unpublish(published)
        rows = [*schedule.rows.tolist(), *(chunk.sequence.row for chunk in schedule.chunks)]
        for sequence in filter(None, map(self.batch.sequences.__getitem__, rows)):  # beams go together
            self.preempt(sequence)

    def compact(self) -> int:
        """Move the blocks in use to the start of the pool, so that the free space is one run. Returns how many move."""
        num_moves = self.groups.compact()
        for sequence in self.running if num_moves else ():
            self._copy_block_table(sequence, 0)
        return num_moves

    def _rows_to_decode(self, running: np.ndarray, drafts: Drafts | None) -> tuple[np.ndarray, bool]:
        """Return the rows that decode, as many as fit a step, and whether any row still computes its prompt."""
        batch, most = self.batch, self._max_num_tokens
        self._num_all_decode_steps -= 1
        if batch.version == self._all_decode_version and self._num_all_decode_steps >= 0 and drafts is None:
            return running, False  # the same array as before, which says that nothing has changed
        is_ready = (batch.num_computed < batch.num_tokens) & (batch.num_tokens < batch.max_num_tokens)
        is_ready &= ~batch.is_prefilling
        is_prefilling = bool(np.count_nonzero(batch.is_prefilling))
        if drafts is not None:  # then a row may come to more than a token in a step
            is_ready &= ~drafts.waiting
            self._all_decode_version = -1
        if drafts is not None or np.count_nonzero(is_ready) < len(running):
            return running[is_ready[running]][:most], is_prefilling
        if not 0 < len(running) <= most:
            return running[:most], is_prefilling
        self._all_decode_version = batch.version
        self._num_all_decode_steps = int((batch.max_num_tokens - batch.num_tokens)[running].min()) - 1
        return running, is_prefilling

    def _allocate_slots(self, rows: np.ndarray, query_lens: np.ndarray) -> None:
        """Give each row slots for its next tokens. Raises OutOfBlocks; what was given until then is kept."""
        batch = self.batch
        while len(short := rows[batch.num_computed[rows] + query_lens > batch.num_slots[rows]]):
            grown = self.groups.append_blocks(batch.seq_id[short].tolist(), batch.num_computed[short].tolist())
            columns = batch.num_slots[short] // batch.block_size
            for tables, block_ids in zip(batch.tables, grown, strict=True):
                tables.append_blocks(short, columns, block_ids)
            batch.num_slots[short] += batch.block_size
        shared = rows[batch.tail_is_shared[rows]].tolist() if np.count_nonzero(batch.tail_is_shared) else ()
        for sequence in filter(None, map(batch.sequences.__getitem__, shared)):
            self._reserve(sequence, int(batch.num_computed[sequence.row]) + 1)

    def _allocate_slots_one_by_one(self, schedule: Schedule) -> None:
        """Do as `_allocate_slots`, one row after another, at the cost of the last ones."""
        for row, query_len in zip(schedule.rows.tolist(), schedule.query_lens, strict=True):
            while self.batch.sequences[row] is not None:
                try:
                    self._allocate_slots(np.array([row]), np.array([query_len]))
                    break
                except OutOfBlocks:
                    self._preempt_last(schedule)

    def _schedule_chunk(self, sequence: Sequence, schedule: Schedule, can_preempt: bool) -> None:
        """Compute the next tokens of a running prompt."""
        start = int(self.batch.num_computed[sequence.row])
        chunk = schedule.next_chunk(sequence, start, self.step_budget.room(start))
        while chunk.num_tokens > 0 and sequence.row >= 0:
            try:
                self._reserve(sequence, start + chunk.num_tokens)
                self._add_chunk(chunk, schedule)
                return
            except OutOfBlocks:
                if not can_preempt:
                    schedule.is_short_of_blocks = True
                    return
                self._preempt_last(schedule)

    def _add_chunk(self, chunk: Chunk, schedule: Schedule) -> None:
        schedule.chunks.append(chunk)
        schedule.num_tokens += chunk.num_tokens
        self.step_budget.take(chunk)
        schedule.published[chunk.sequence] = self.groups.publish(chunk.sequence.seq_id, chunk.end)

    def _admit(self, schedule: Schedule) -> None:
        """Start waiting sequences while there are tokens, time, rows and blocks for them."""
        while self.waiting and schedule.num_tokens < self._max_num_tokens and self.step_budget.has_time:
            sequence = self.waiting[0]
            if sequence.num_rows_needed > self._num_free_rows():
                break
            if self.running and self.groups.num_free_blocks <= self._blocked_head.get(sequence, -1):
                break
            if self.groups.compaction_helps(sequence.num_target_tokens):
                self.compact()
            chunk = self._allocate(sequence, schedule)
            if chunk is None:
                if not self.running and self.kept_prompts.give_up_last():
                    continue
                self._blocked_head = {sequence: self.groups.num_free_blocks}
                break
            self._blocked_head = {}
            self.waiting.pop(0)
            self._start(sequence, chunk.start)
            self.kept_prompts.done(sequence)
            self._num_reserved_rows += sequence.num_pending_forks
            self._add_chunk(chunk, schedule)

    def _allocate(self, sequence: Sequence, schedule: Schedule) -> Chunk | None:
        """Take blocks for a waiting sequence and its first chunk in every group.

        Returns that chunk, which begins after what is cached; None if there are too few blocks.
        """
        has_run = sequence.request.metrics.first_scheduled_time is not None
        if has_run and self.running and not self.kept_prompts.may_return(sequence, len(self.running)):
            return None
        try:
            start = self.kept_prompts.attach(sequence)
        except OutOfBlocks:
            return None
        chunk = schedule.next_chunk(sequence, start, max(1, self.step_budget.room(start)))
        try:
            self.groups.reserve(sequence.seq_id, chunk.end)
        except OutOfBlocks:
            self.groups.free(sequence.seq_id)
            return None
        return chunk

    def _split(self, sequence: Sequence) -> None:
        """Let preempted beams, or samples, whose shared tokens are computed, all go on from there."""
        self._num_reserved_rows -= sequence.num_pending_forks
        sequence.num_shared_tokens = None
        self.batch.recount(sequence)
        self.batch.is_prefilling[sequence.row] = True
        for sibling in sequence.request.sequences:
            if sibling is not sequence:
                self.add_fork(sequence, sibling)
        if sequence.request.in_waves:
            self.kept_prompts.keep(sequence)

    def _running_rows(self) -> np.ndarray:
        if self._rows is None:
            self._rows = np.array([sequence.row for sequence in self.running], np.int64)
        return self._rows

    def _start(self, sequence: Sequence, num_computed: int) -> None:
        """Let a sequence that has blocks run."""
        self.batch.add(sequence, num_computed)
        insort(self.running, sequence, key=_order)
        self._rows = None
        self._copy_block_table(sequence, 0)

    def _stop(self, sequence: Sequence, will_return: bool = False, parks: bool = False) -> None:
        """Let a sequence run no more, and free its blocks."""
        self._num_reserved_rows -= sequence.num_pending_forks
        self._sync(sequence)
        self.batch.remove(sequence)
        self.running.remove(sequence)
        self._rows = None
        self.groups.free(sequence.seq_id, will_return=will_return, parks=parks)

    def _sync(self, sequence: Sequence) -> None:
        """Publish what is computed of a running sequence; of what is being drawn nothing is."""
        self.groups.sync(sequence.seq_id, min(len(sequence.token_ids), int(self.batch.num_computed[sequence.row])))

    def _reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the first `num_tokens` tokens of a running sequence slots of its own. Raises OutOfBlocks."""
        block_size = self.batch.block_size
        try:
            self.groups.reserve(sequence.seq_id, num_tokens)
        finally:
            first = int(self.batch.num_computed[sequence.row]) // block_size
            self._copy_block_table(sequence, first, -(-num_tokens // block_size))
        self.batch.tail_is_shared[sequence.row] = False

    def _copy_block_table(self, sequence: Sequence, start: int, end: int | None = None) -> None:
        """Copy the entries `start` .. `end` - 1 of a sequence's block tables to its row."""
        for tables, manager in zip(self.batch.tables, self.groups.managers, strict=True):
            block_ids = manager.block_table(sequence.seq_id, start)
            tables.rewrite(sequence.row, start, block_ids if end is None else block_ids[: end - start])
        self.batch.num_slots[sequence.row] = self.groups.num_slots(sequence.seq_id)

    def _preempt_last(self, schedule: Schedule) -> None:
        if self.kept_prompts.give_up_last():
            return
        last = self.running[-1]
        for sequence in last.preempted_with:  # whose chunks will not be computed: nobody may find them
            self.groups.unpublish(schedule.published.pop(sequence, []))
        preempted = self.preempt(last)
        rows_left = np.array([self.batch.sequences[row] is not None for row in schedule.rows.tolist()], bool)
        schedule.drop(preempted, rows_left)

    def _queue_beams(self, beams: list[Sequence]) -> None:
        """Let sequences without blocks wait; beams by way of the first of them, which computes what they share."""
        for beam in beams:
            beam.beam_candidates = None
        if len(beams) > 1:
            beams[0].num_shared_tokens = common_prefix_len([beam.token_ids for beam in beams])
        self.add(beams[0])

    def _num_free_rows(self) -> int:
        """Count how many more sequences can run, beside those that are still to be forked."""
        num_free = self._max_num_seqs - len(self.running) - self._num_reserved_rows
        if self.batch.is_beam[self._running_rows()].any():
            # While a small vocabulary has too few continuations, a search has fewer beams than it may come to have.
            requests = {s.request for s in self.running if s.request.search is not None and s.request.is_forked}
            num_free -= sum(request.max_num_sequences - len(request.sequences) for request in requests)
        return num_free
