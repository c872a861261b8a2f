"""The running sequences as arrays, a row for each, so that the host's work in a step does not loop over them.

A row's tokens are counted before they are known: a step that is under way adds one to `num_tokens`, and the token
itself comes later. Known tokens wait in `recent` until somebody needs them: `flush` moves them to their sequence.
Knows no mlx.
"""

from collections.abc import Sequence as SequenceOf

import numpy as np

from mlx_paged.request import Sequence
from mlx_paged.sampling_params import SamplingParams

_NUM_RECENT = 128


class BlockTables:
    """Block tables of one cache group, int32 [num_rows, max_blocks], and which entries have changed.

    last: the last block of each row, which is where the next token of a decode goes. num_rewrites: how often a table
    became another in other ways than by growing at its end.
    """

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self.matrix = np.zeros((num_rows, max_blocks), np.int32)
        self.last = np.zeros(num_rows, np.int32)
        self.num_rewrites = 0
        self._entries = self.matrix.reshape(-1)
        self._changed: list[tuple[np.ndarray, np.ndarray]] = []

    def set(self, rows: np.ndarray, columns: np.ndarray, block_ids: SequenceOf[int]) -> None:
        """The tables of `rows`, each of them once, end with block_ids[i] at columns[i] now."""
        ids = np.array(block_ids, np.int32)
        self.last[rows] = ids
        self._set(rows * self.matrix.shape[1] + columns, ids)

    def set_tail(self, row: int, start: int, block_ids: SequenceOf[int]) -> None:
        """The entries of a row from `start` on are `block_ids` now."""
        self.num_rewrites += 1
        if len(block_ids):
            self.last[row] = block_ids[-1]
            first = row * self.matrix.shape[1] + start
            self._set(np.arange(first, first + len(block_ids)), np.array(block_ids, np.int32))

    def _set(self, indices: np.ndarray, block_ids: np.ndarray) -> None:
        self._entries[indices] = block_ids
        self._changed.append((indices, block_ids))

    def take_changes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What has changed since the last call, each entry once: indices into the flattened matrix, and block ids."""
        if not self._changed:
            return None
        changed, self._changed = self._changed, []
        if len(changed) == 1:
            return changed[0]
        indices = np.unique(np.concatenate([indices for indices, _ in changed]))
        return indices, self._entries[indices]


class Rows:
    """What a step needs of each running sequence, as arrays [num_rows].

    num_tokens: tokens it has, with one that is being drawn; of a trunk, those to compute. num_computed: those whose
    K/V is in place, or will be by the steps under way. num_slots: tokens that its blocks hold. end: the number of
    tokens at which it has to end. stamp: the `version` with which it changed hands last; every change of hands makes a
    new version. is_filling: tokens that were known when it joined are still to be computed. shares_tail: its last block
    may belong to others too. Of a row that nobody has, all counts are 0 and all that can be asked of it is false.
    """

    def __init__(self, num_rows: int, num_groups: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.sequences: list[Sequence | None] = [None] * num_rows
        self.tables = [BlockTables(num_rows, max_blocks) for _ in range(num_groups)]
        self.num_prompt, self.num_tokens, self.num_computed, self.num_slots, self.end, self.stamp = np.zeros(
            (6, num_rows), np.int32
        )
        self.version = 0
        self.seq_id = np.zeros(num_rows, np.int64)
        self._flags = np.zeros((5, num_rows), bool)
        self.is_constrained, self.is_beam, self.is_unforked, self.is_filling, self.shares_tail = self._flags
        self._care = self._flags[:3]
        self.last_token = np.zeros(num_rows, np.int32)
        self._look_from = np.zeros(num_rows, np.int32)  # the number of tokens from which on each has to be looked at
        self._stop_ids: list[np.ndarray] = []  # the first one of each row, the second one, ...; -1: it has less
        self._recent = np.full((_NUM_RECENT, num_rows), -1, np.int32)  # of the last steps; -1: none
        self._recent_logprobs = np.zeros((_NUM_RECENT, num_rows), np.float32)
        self._num_recent = 0  # steps
        self._first_recent = np.zeros(num_rows, np.int32)  # of each row: the steps before are flushed
        self._free_rows = list(range(num_rows))[::-1]
        self._joined: list[Sequence] = []

    def join(self, sequence: Sequence, num_computed: int) -> None:
        """A sequence starts to run; `watched` and the stop ids are to be set by who knows of them."""
        request = sequence.request
        row = self._free_rows.pop()
        sequence.row = row
        self.sequences[row] = sequence
        self.seq_id[row] = sequence.seq_id
        self.num_prompt[row] = len(request.prompt_token_ids)
        self.num_tokens[row] = sequence.num_wanted
        self.num_computed[row] = num_computed
        self.num_slots[row] = 0
        self.end[row] = len(request.prompt_token_ids) + request.max_tokens
        self._change_hands(row)
        self.is_beam[row] = request.search is not None
        self.is_filling[row] = num_computed < sequence.num_wanted
        self.is_unforked[row] = not request.is_forked
        self.is_constrained[row] = isinstance(request.params, SamplingParams) and request.params.is_constrained
        self.last_token[row] = sequence.token_ids[sequence.num_wanted - 1]
        self._joined.append(sequence)

    def take_joined(self) -> list[Sequence]:
        """The sequences that have started to run since the last call, and still do."""
        if not self._joined:
            return []
        joined, self._joined = self._joined, []
        return [sequence for sequence in joined if sequence.row >= 0]

    def leave(self, sequence: Sequence) -> None:
        """A sequence does not run any more; a token that is being drawn for it is nobody's."""
        self.flush(sequence)
        row, sequence.row = sequence.row, -1
        self.sequences[row] = None
        self._change_hands(row)
        self.num_tokens[row] = self.num_computed[row] = 0
        self._flags[:, row] = False
        self._free_rows.append(row)

    def clear(self) -> None:
        """No sequence runs any more."""
        for sequence in self.sequences:
            if sequence is not None:
                self.flush(sequence)
                sequence.row = -1
        self._joined = []
        self._change_hands(slice(None))
        self.num_tokens[:] = self.num_computed[:] = 0
        self._flags[:] = False
        self.sequences = [None] * len(self.sequences)
        self._free_rows = list(range(len(self.sequences)))[::-1]

    def _change_hands(self, row: int | slice) -> None:
        self.version += 1
        self.stamp[row] = self.version

    @property
    def needs_care(self) -> bool:
        """Whether any row is one of a beam, has a form, or may still be forked."""
        return bool(np.count_nonzero(self._care))

    def watch(self, row: int, watched: bool, stop_ids: SequenceOf[int]) -> None:
        """Which of a row's tokens have to be looked at: all of them, or those in `stop_ids`."""
        while len(stop_ids) > len(self._stop_ids):
            self._stop_ids.append(np.full(len(self.sequences), -1, np.int32))
        self.set_watched(row, watched)
        for i, ids in enumerate(self._stop_ids):
            ids[row] = stop_ids[i] if i < len(stop_ids) else -1

    def set_watched(self, row: int, watched: bool) -> None:
        """As `watch`, with the stop ids as they are."""
        self._look_from[row] = 0 if watched else self.end[row]

    def add_tokens(self, rows: np.ndarray, token_ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """The tokens that were being drawn for `rows`; bool [len(rows)]: which of them have to be looked at."""
        if self._num_recent == _NUM_RECENT:
            self._flush_all()
        recent, recent_logprobs = self._recent[self._num_recent], self._recent_logprobs[self._num_recent]
        self._num_recent += 1
        self.last_token[rows] = recent[rows] = token_ids.astype(np.int32)
        recent_logprobs[rows] = logprobs
        look = self.num_tokens >= self._look_from
        for stop_ids in self._stop_ids:
            look |= recent == stop_ids
        return look[rows] | (logprobs != logprobs)

    def flush(self, sequence: Sequence) -> None:
        """Move what is known of a sequence's row to the sequence."""
        row, end = sequence.row, self._num_recent
        first = self._first_recent[row]
        tokens = self._recent[first:end, row].tolist()
        logprobs = self._recent_logprobs[first:end, row].tolist()
        total, num_known = sequence.cumulative_logprob, len(sequence.token_ids)
        for token, logprob in zip(tokens, logprobs, strict=True):
            if token >= 0 and logprob == logprob:
                total += logprob
        if -1 in tokens:
            tokens = [token for token in tokens if token >= 0]
        # At once, so that an interruption leaves the tokens here or there.
        sequence.token_ids[num_known:], sequence.cumulative_logprob, self._first_recent[row] = tokens, total, end

    def _flush_all(self) -> None:
        for sequence in self.sequences:
            if sequence is not None:
                self.flush(sequence)
        self._recent[:] = -1  # before the rest, so that nothing is flushed twice wherever this is interrupted
        self._first_recent[:] = self._num_recent = 0

    def widen(self, sequence: Sequence) -> None:
        """A sequence that was a trunk is now itself, with all its tokens."""
        row = sequence.row
        self.num_tokens[row] = len(sequence.token_ids)
        self.last_token[row] = sequence.token_ids[-1]

    def put(self, sequence: Sequence, token_id: int) -> None:
        """A beam's next token, which was chosen on the host."""
        sequence.token_ids.append(token_id)
        row = sequence.row
        self.last_token[row] = token_id
        self.num_tokens[row] = len(sequence.token_ids)
