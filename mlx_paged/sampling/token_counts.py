"""How often each token occurs in the sequences that have penalties: an array on the device, a count row for each."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


class TokenCounts:
    """Count the tokens of the rows that have penalties.

    The array exists once a row needs it, and doubles when it is too small. It takes 4 * vocab_size bytes per count row,
    of which there are at most max_num_seqs.

    The tokens of a step are added in the graph of the next one, because MLX writes in place only where no unfinished
    operation reads the array, and in its own step the penalties still do. So nothing is copied if a step has been
    computed (after `mx.synchronize()`, where steps are pipelined) when the next one is evaluated.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self.count_rows = np.full(max_num_seqs, -1, np.int32)
        """The count row of each row of the batch, int32 [max_num_seqs]; -1 for a row without one."""
        self._vocab_size = vocab_size
        self._free_count_rows = list(reversed(range(max_num_seqs)))
        # int32 [num_count_rows, vocab_size]: twice how often the token was put out, plus 1 if the prompt has it.
        self._counts = mx.zeros((0, vocab_size), mx.int32)
        self._resets: dict[int, np.ndarray] = {}  # what the next `read` writes into count rows
        self._pending: tuple[np.ndarray, mx.array] | None = None  # count rows, tokens that `read` adds
        self._known: list[tuple[int, int]] = []  # the same, a pair each

    def set(self, row: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Count the tokens of a sequence that takes `row`."""
        self.release(row)
        counts = 2 * np.bincount(np.array(output, np.int64), minlength=self._vocab_size).astype(np.int32)
        counts[np.array(prompt, np.int64)] |= 1
        self.count_rows[row] = count_row = self._free_count_rows.pop()
        self._resets[count_row] = counts

    def release(self, row: int) -> None:
        """Give back the count row of `row`, if it has one."""
        count_row = int(self.count_rows[row])
        if count_row < 0:
            return
        self.count_rows[row] = -1
        self._free_count_rows.append(count_row)
        self._resets.pop(count_row, None)
        self._known = [pair for pair in self._known if pair[0] != count_row]
        if self._pending is not None:
            count_rows, tokens = self._pending
            kept = np.flatnonzero(count_rows != count_row)
            if len(kept) < len(count_rows):
                self._pending = (count_rows[kept], tokens[mx.array(kept)]) if len(kept) else None

    def read(self, count_rows: mx.array, drafts: Sequence[tuple[int, int]] = ()) -> tuple[mx.array, mx.array]:
        """Read the counts of some count rows, int32 [n].

        drafts: pairs of one of the n, and a token that is counted there once more, this time. Returns two lazy arrays
        [n, vocab_size]: bool, whether a token occurs at all; int32, how often it was put out.
        """
        if self._resets:
            num_count_rows = self._counts.shape[0]
            needed = max(self._resets) + 1
            if needed > num_count_rows:
                more = min(max(needed, 2 * num_count_rows), len(self.count_rows)) - num_count_rows
                self._counts = mx.concatenate([self._counts, mx.zeros((more, self._vocab_size), mx.int32)])
            index = mx.array(np.array(list(self._resets), np.int32))
            self._counts[index] = mx.array(np.stack(list(self._resets.values())))
            self._resets.clear()
        if self._pending is not None:
            pending_rows, tokens = self._pending
            self._counts = self._counts.at[mx.array(pending_rows), tokens].add(2)
            self._pending = None
        if self._known:
            self._counts = self._counts.at[tuple(map(mx.array, zip(*self._known, strict=True)))].add(2)
            self._known = []
        counts = self._counts[count_rows]
        if drafts:
            counts = counts.at[tuple(map(mx.array, zip(*drafts, strict=True)))].add(2)
        return counts > 0, counts >> 1

    def add_known(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Count a token for each of these rows that has a count row, at the next `read`."""
        pairs = zip(self.count_rows[rows].tolist(), tokens.tolist(), strict=True)
        self._known += [pair for pair in pairs if pair[0] >= 0]

    def add(self, count_rows: np.ndarray, tokens: mx.array) -> None:
        """Count one token for each of `count_rows` at the next `read`; the tokens may be lazy.

        Call it once after each `read`.
        """
        self._pending = count_rows, tokens
