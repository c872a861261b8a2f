"""From a schedule to arrays: token ids, positions, slots and block tables of one step."""

from collections.abc import Hashable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention import AttentionMetadata
from mlx_paged.block_manager import BlockManager
from mlx_paged.cache_groups import CacheGroups
from mlx_paged.scheduler import Schedule


class GroupInputs(NamedTuple):
    """What differs between cache groups: block_ids, int32 [num_tokens], where each token goes, and the metadata."""

    block_ids: mx.array
    metadata: AttentionMetadata


class StepInputs(NamedTuple):
    """What a model needs to compute one step.

    token_ids, positions, block_offsets: int32 [num_tokens]. logit_rows: int32 [num_rows], the tokens after which a
    next one is chosen; None: all of them. If the step only computes parts of prompts, its last token alone.
    """

    token_ids: mx.array
    positions: mx.array
    block_offsets: mx.array
    logit_rows: mx.array | None
    groups: list[GroupInputs]


class BatchBuilder:
    """Turns schedules into StepInputs.

    Block tables are kept in one matrix per group, a row per sequence; a step only writes entries of new blocks.
    """

    def __init__(self, groups: CacheGroups, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        self._block_size = groups.block_size
        self._tables = [_BlockTables(manager, max_num_seqs, max_blocks_per_seq) for manager in groups.managers]
        self._rows: dict[Hashable, int] = {}
        self._free_rows = list(range(max_num_seqs))[::-1]

    def forget(self, seq_id: Hashable) -> None:
        """A sequence has ended or lost its blocks: its row may be another's."""
        row = self._rows.pop(seq_id, None)
        if row is not None:
            self._free_rows.append(row)
            for tables in self._tables:
                tables.num_written[row] = 0

    def rewrite(self) -> None:
        """Block tables have changed as a whole."""
        for tables in self._tables:
            tables.num_written[:] = 0

    def build(self, schedule: Schedule) -> StepInputs:
        """The arrays of a step. At least one sequence must be scheduled."""
        for sequence in schedule.preempted:
            self.forget(sequence.seq_id)
        if schedule.compacted:
            self.rewrite()
        starts = np.array([item.start for item in schedule.sequences], np.int32)
        lengths = np.array([item.num_tokens for item in schedule.sequences], np.int32)
        cu_seqlens_q = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens_q[1:])
        context_lens = starts + lengths
        positions = np.arange(cu_seqlens_q[-1], dtype=np.int32) + np.repeat(starts - cu_seqlens_q[:-1], lengths)
        rows = np.array([self._row(item.sequence.seq_id) for item in schedule.sequences])
        groups = []
        for tables in self._tables:
            block_ids = tables.matrix[np.repeat(rows, lengths), positions // self._block_size]
            used = tables.matrix[rows, : -(-int(context_lens.max()) // self._block_size)]
            groups.append(GroupInputs(mx.array(block_ids), AttentionMetadata(used, context_lens, cu_seqlens_q)))
        token_ids: list[int] = []
        for sequence, start, num_tokens in schedule.sequences:
            token_ids += sequence.token_ids[start : start + num_tokens]
        last_tokens = cu_seqlens_q[1:] - 1
        rows_wanted = last_tokens[[item.needs_logits for item in schedule.sequences]]
        if len(rows_wanted) == 0:
            rows_wanted = last_tokens[-1:]  # a step must have a result, or its writes could not be waited for
        logit_rows = None if len(rows_wanted) == len(token_ids) else mx.array(rows_wanted)
        return StepInputs(
            mx.array(token_ids, mx.int32),
            mx.array(positions),
            mx.array(positions % self._block_size),
            logit_rows,
            groups,
        )

    def _row(self, seq_id: Hashable) -> int:
        """The sequence's row, with what its tables have gained since the last step."""
        row = self._rows.get(seq_id)
        if row is None:
            row = self._rows[seq_id] = self._free_rows.pop()
        for tables in self._tables:
            tables.update(row, seq_id)
        return row


class _BlockTables:
    """The block tables of one group as a matrix, int32 [max_num_seqs, max_blocks_per_seq]."""

    def __init__(self, manager: BlockManager, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        self._manager = manager
        self.matrix = np.zeros((max_num_seqs, max_blocks_per_seq), np.int32)
        self.num_written = np.zeros(max_num_seqs, np.int64)

    def update(self, row: int, seq_id: Hashable) -> None:
        # The last entry is written again, since copy-on-write may have replaced it.
        begin = max(0, int(self.num_written[row]) - 1)
        tail = self._manager.block_table(seq_id, begin)
        self.matrix[row, begin : begin + len(tail)] = tail
        self.num_written[row] = begin + len(tail)
