"""From a schedule to arrays: token ids, positions, slots and block tables of one step."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs
from mlx_paged.attention.shared_prefix import SharedPrefix, find_shared_prefixes
from mlx_paged.scheduler.running_batch import BlockTables, Rows
from mlx_paged.scheduler.scheduler import Schedule


class Drawn(NamedTuple):
    """The tokens of the step under way: token_ids, int [len(rows)], of `rows` at a version of the rows."""

    rows: np.ndarray
    version: int
    token_ids: mx.array


class BatchBuilder:
    """Turns schedules into ModelInputs.

    Block tables are kept on the device, a row per running sequence: a step sends the entries that have changed.
    num_sent_entries counts them.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._tables = [_DeviceTables(tables) for tables in rows.tables]
        self._sharing = _Sharing(rows, rows.tables[0])  # of the layers that keep the whole context
        self._last_rows = np.zeros(0, np.int64)
        self._last_device_rows = mx.array(self._last_rows)
        self._counts = np.arange(len(rows.sequences) + 1, dtype=np.int32)

    @property
    def num_sent_entries(self) -> int:
        return sum(tables.num_sent_entries for tables in self._tables)

    def build(self, schedule: Schedule, drawn: Drawn | None) -> tuple[ModelInputs, np.ndarray]:
        """The arrays of a step, and the row of each of its logits.

        drawn: the tokens that are not known yet. At least one token must be scheduled.
        """
        rows, block_size = self._rows, self._rows.block_size
        decodes, chunks = schedule.decodes, schedule.chunks
        positions, token_rows, seq_rows = rows.num_computed[decodes], decodes, decodes
        context_lens, cu_seqlens_q = positions + 1, self._counts[: len(decodes) + 1]
        if chunks:
            starts = np.concatenate([positions, np.array([chunk.start for chunk in chunks], np.int32)])
            lengths = np.ones(len(starts), np.int32)
            lengths[len(decodes) :] = [chunk.num_tokens for chunk in chunks]
            seq_rows = np.concatenate([decodes, [chunk.sequence.row for chunk in chunks]])
            context_lens = starts + lengths
            cu_seqlens_q = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            positions = self._counts_to(cu_seqlens_q[-1]) + np.repeat(starts - cu_seqlens_q[:-1], lengths)
            token_rows = np.repeat(seq_rows, lengths)
        offsets = mx.array(positions % block_size)
        if seq_rows is not self._last_rows:
            if not np.array_equal(seq_rows, self._last_rows):
                self._last_device_rows = mx.array(seq_rows.astype(np.int32))
            self._last_rows = seq_rows
        num_columns = -(-int(context_lens[context_lens.argmax()]) // block_size)

        def find_shared(seqs: np.ndarray) -> list[SharedPrefix]:
            return self._sharing.of(seq_rows[seqs], context_lens[seqs])

        groups, first = [], self._tables[0]
        for tables in self._tables:
            host = tables.host
            block_ids = host.matrix[token_rows, positions // block_size] if chunks else host.last[decodes]
            used = tables.synced()[:, :num_columns][self._last_device_rows]
            find = find_shared if tables is first else None
            slots = {"slot_block_ids": mx.array(block_ids), "slot_offsets": offsets}
            groups.append(AttentionMetadata(used, context_lens, cu_seqlens_q, find, **slots))
        inputs = ModelInputs(self._token_ids(schedule, drawn), mx.array(positions), None, groups)
        if not chunks:
            return inputs, decodes
        wanted = np.flatnonzero([*[True] * len(decodes), *[chunk.needs_logits for chunk in chunks]])
        wanted_rows = seq_rows[wanted]
        if len(wanted) == 0:
            wanted = np.array([len(seq_rows) - 1])  # a step needs a result that can be waited for
        return inputs._replace(logits_indices=mx.array(cu_seqlens_q[1:][wanted] - 1)), wanted_rows

    def _counts_to(self, end: int) -> np.ndarray:
        """int32: 0 .. end - 1."""
        if end > len(self._counts):
            self._counts = np.arange(end, dtype=np.int32)
        return self._counts[:end]

    def _token_ids(self, schedule: Schedule, drawn: Drawn | None) -> mx.array:
        """int32 [num_tokens]: from the host what is known there, the rest from what is being drawn."""
        rows, decodes = self._rows, schedule.decodes
        if drawn is not None and decodes is drawn.rows and not schedule.chunks and rows.version == drawn.version:
            return drawn.token_ids.astype(mx.int32)
        pending = np.zeros(0, np.int64)  # of each decode, where its token is among those being drawn; or -1
        if drawn is not None:
            places = np.full(len(rows.sequences), -1)
            current = np.nonzero(rows.stamp[drawn.rows] <= drawn.version)[0]
            places[drawn.rows[current]] = current
            pending = places[decodes]
            if not schedule.chunks and (pending >= 0).all():
                return drawn.token_ids[mx.array(pending)].astype(mx.int32)
        host = rows.last_token[decodes]
        if schedule.chunks:
            parts = [c.sequence.token_ids[c.start : c.start + c.num_tokens] for c in schedule.chunks]
            host = np.concatenate([host, *(np.array(part, np.int32) for part in parts)])
        token_ids = mx.array(host)
        places = np.nonzero(pending >= 0)[0]
        if drawn is not None and len(places):
            token_ids[mx.array(places)] = drawn.token_ids[mx.array(pending[places])].astype(mx.int32)
        return token_ids


class _DeviceTables:
    """The device's copy of a group's block tables."""

    def __init__(self, host: BlockTables) -> None:
        self.host = host
        self.num_sent_entries = 0
        self._entries = mx.array(host.matrix.reshape(-1))

    def synced(self) -> mx.array:
        """int32 [num_rows, max_blocks], with what has changed on the host."""
        changes = self.host.take_changes()
        if changes is not None:
            indices, block_ids = map(mx.array, changes)
            self._entries = mx.put_along_axis(self._entries, indices, block_ids, axis=0)
            self.num_sent_entries += block_ids.size
        return self._entries.reshape(self.host.matrix.shape)


class _Sharing:
    """The prefixes that running sequences share, found again only when their blocks may have become others.

    A decode adds blocks that nobody shares, so as long as no sequence comes or goes, and no table is rewritten, what
    is shared stays the same.
    """

    def __init__(self, rows: Rows, tables: BlockTables) -> None:
        self._rows = rows
        self._tables = tables
        self._found_for: tuple[int, int] | None = None
        self._of_rows = np.zeros(0, np.int64)
        self._prefixes: list[SharedPrefix] = []

    def of(self, rows: np.ndarray, context_lens: np.ndarray) -> list[SharedPrefix]:
        """The prefixes that sequences in these rows share; members are indices into `rows`."""
        now = (self._rows.version, self._tables.num_rewrites)
        if now != self._found_for or not np.array_equal(rows, self._of_rows):
            num_columns = -(-int(context_lens.max(initial=0)) // self._rows.block_size)
            used = self._tables.matrix[rows, :num_columns]
            self._prefixes = find_shared_prefixes(used, context_lens, self._rows.block_size)
            self._found_for, self._of_rows = now, rows
        return self._prefixes
