"""From a schedule to arrays: token ids, positions, slots and block tables of one step."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs, TableUpdate
from mlx_paged.attention.shared_prefix import SharedPrefix, find_shared_prefixes
from mlx_paged.blocks.checkpoints import Checkpoints
from mlx_paged.runner.in_flight import StepInFlight
from mlx_paged.runner.stretches import make_stretches
from mlx_paged.scheduler.block_tables import MIN_COLUMNS, BlockTables
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Schedule


class InputBuilder:
    """Turns schedules into what a model is told.

    Block tables are kept on the device, a row per running sequence: a step sends the entries that have changed.
    """

    def __init__(self, batch: RunningBatch, checkpoints: Checkpoints | None = None) -> None:
        """checkpoints: of a model that has recurrent layers."""
        self._batch = batch
        self._checkpoints = checkpoints
        self._tables = [_DeviceTables(tables) for tables in batch.tables]
        self._shared_prefixes = _SharedPrefixes(batch, batch.tables[0])  # of the layers that keep the whole context
        self._last_rows = np.zeros(0, np.int64)
        self._last_device_rows = mx.array(self._last_rows)
        self._counts = np.arange(len(batch.sequences) + 1, dtype=np.int32)

    @property
    def num_sent_entries(self) -> int:
        """Entries of block tables that have gone to the device."""
        return sum(tables.num_sent_entries for tables in self._tables)

    def build(self, schedule: Schedule, in_flight: StepInFlight | None) -> tuple[ModelInputs, np.ndarray]:
        """Return the arrays of a step, and the row of the running batch that each row of its logits belongs to.

        in_flight: the step whose tokens are not known yet. At least one token must be scheduled.
        """
        batch, chunks = self._batch, schedule.chunks
        rows, query_lens = schedule.rows, schedule.query_lens
        starts = batch.num_computed[rows]
        if chunks:
            starts = np.concatenate([starts, np.array([chunk.start for chunk in chunks], np.int32)])
            query_lens = np.concatenate([query_lens, np.array([chunk.num_tokens for chunk in chunks], np.int32)])
            rows = np.concatenate([rows, [chunk.sequence.row for chunk in chunks]])
        token_ids = self._token_ids(schedule, in_flight)
        inputs, token_rows = self.arrange(token_ids, rows, starts, query_lens, schedule.num_tokens)
        if self._checkpoints is not None:
            inputs = inputs._replace(stretches=make_stretches(schedule, batch, self._checkpoints))
        if not chunks:
            return inputs, token_rows
        num_decodes = schedule.num_tokens - sum(c.num_tokens for c in chunks)
        ends = inputs.groups[0].cu_seqlens_q[-len(chunks) :] - 1
        tokens = np.append(np.arange(num_decodes, dtype=np.int32), ends[[chunk.needs_logits for chunk in chunks]])
        logits_rows = token_rows[tokens]
        if len(tokens) == 0:
            tokens = ends[-1:]  # a step needs a result that can be waited for
        return inputs._replace(logits_indices=mx.array(tokens)), logits_rows

    def arrange(
        self, token_ids: mx.array, rows: np.ndarray, starts: np.ndarray, query_lens: np.ndarray, num_tokens: int
    ) -> tuple[ModelInputs, np.ndarray]:
        """Return the arrays of a step that takes `query_lens` tokens of these rows from positions `starts` on.

        With them comes the row of each token.
        """
        batch, block_size = self._batch, self._batch.block_size
        context_lens = starts + query_lens
        if num_tokens == len(rows):  # one token each
            cu_seqlens_q, positions, token_rows = self._counts[: len(rows) + 1], starts, rows
        else:
            cu_seqlens_q = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
            first_positions = starts - cu_seqlens_q[:-1]
            positions = np.repeat(first_positions, query_lens) + np.arange(cu_seqlens_q[-1], dtype=np.int32)
            token_rows = np.repeat(rows, query_lens)
        if not (rows is self._last_rows or np.array_equal(rows, self._last_rows)):
            self._last_device_rows = mx.array(rows.astype(np.int32))
        self._last_rows = rows
        num_columns = max(MIN_COLUMNS, -(-int(context_lens[context_lens.argmax()]) // block_size))

        def find_shared(seqs: np.ndarray) -> list[SharedPrefix]:
            return self._shared_prefixes.find(rows[seqs], starts[seqs] + 1)

        groups, slot_offsets = [], mx.array(positions % block_size)
        for tables in self._tables:
            host = tables.host
            block_ids = host.matrix[token_rows, positions // block_size]
            used = tables.update()[:, :num_columns][self._last_device_rows]
            find = find_shared if tables is self._tables[0] else None
            slots = mx.array(block_ids), slot_offsets
            groups.append(AttentionMetadata(used, context_lens, cu_seqlens_q, find, *slots))
        changes, host = [tables.last_changes for tables in self._tables], self._tables[0].host
        update = TableUpdate(rows, host.matrix.shape, (batch.version, host.num_rewrites), changes)
        return ModelInputs(token_ids, mx.array(positions), None, groups, tables=update), token_rows

    def _token_ids(self, schedule: Schedule, in_flight: StepInFlight | None) -> mx.array:
        """Return int32 [num_tokens]: from the host what is known there, the rest from what is being drawn."""
        batch, rows, chunks = self._batch, schedule.rows, schedule.chunks
        pending, drawn = np.zeros(0, np.int64), None  # of each row, where its token is among the drawn; or -1
        if in_flight is not None and in_flight.sampled_rows is not None and in_flight.sampled_tokens is not None:
            sampled_rows, version = in_flight.sampled_rows, in_flight.sampled_version
            drawn = in_flight.sampled_tokens.token_ids
            if rows is sampled_rows and not (chunks or schedule.drafts) and batch.version == version:
                return drawn.astype(mx.int32)
            places = np.full(len(batch.sequences), -1)
            current = np.nonzero(batch.row_version[sampled_rows] <= version)[0]
            places[sampled_rows[current]] = current
            pending = places[rows]
            if not (chunks or schedule.drafts) and (pending >= 0).all():
                return drawn[mx.array(pending)].astype(mx.int32)
        known, firsts = batch.last_token[rows], np.cumsum(schedule.query_lens) - schedule.query_lens
        if schedule.drafts:
            drafts = (schedule.drafts.get(row, []) for row in rows.tolist())
            known = np.concatenate([[last, *draft] for last, draft in zip(known, drafts, strict=True)]).astype(np.int32)
        if chunks:
            parts = [c.sequence.token_ids[c.start : c.start + c.num_tokens] for c in chunks]
            known = np.concatenate([known, *(np.array(part, np.int32) for part in parts)])
        token_ids = mx.array(known)
        places = np.nonzero(pending >= 0)[0]
        if drawn is not None and len(places):
            token_ids[mx.array(firsts[places])] = drawn[mx.array(pending[places])].astype(mx.int32)
        return token_ids


class _DeviceTables:
    """The device's copy of a group's block tables."""

    def __init__(self, host: BlockTables) -> None:
        self.host = host
        self.num_sent_entries = 0
        self.last_changes: tuple[np.ndarray, np.ndarray] | None = None
        self._entries = mx.array(host.matrix.reshape(-1))

    def update(self) -> mx.array:
        """Send what has changed on the host. Returns the tables, int32 [num_rows, num_columns]."""
        self.last_changes = self.host.pop_changes()
        if self.last_changes is not None:
            indices, block_ids = map(mx.array, self.last_changes)
            self._entries = mx.put_along_axis(self._entries, indices, block_ids, axis=0)
            self.num_sent_entries += block_ids.size
        return self._entries.reshape(self.host.matrix.shape)


class _SharedPrefixes:
    """The prefixes that running sequences share, found again only when their blocks may have become others.

    A decode adds blocks that nobody shares, so as long as no sequence comes or goes, and no table is rewritten, what
    is shared stays the same.
    """

    def __init__(self, batch: RunningBatch, tables: BlockTables) -> None:
        self._batch = batch
        self._tables = tables
        self._found_for: tuple[int, int] | None = None
        self._rows = np.zeros(0, np.int64)
        self._prefixes: list[SharedPrefix] = []

    def find(self, rows: np.ndarray, context_lens: np.ndarray) -> list[SharedPrefix]:
        """Return the prefixes that sequences in these rows share; members are indices into `rows`.

        context_lens: of each sequence what its first query sees.
        """
        now = (self._batch.version, self._tables.num_rewrites)
        if now != self._found_for or not np.array_equal(rows, self._rows):
            num_columns = -(-int(context_lens.max(initial=0)) // self._batch.block_size)
            used = self._tables.matrix[rows, :num_columns]
            self._prefixes = find_shared_prefixes(used, context_lens, self._batch.block_size)
            self._found_for, self._rows = now, rows
        return self._prefixes
