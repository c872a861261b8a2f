"""The block tables of the running sequences as one array per cache group."""

from collections.abc import Sequence

import numpy as np

MIN_COLUMNS = 8
"""Of a table that goes to the device. MLX compiles a Metal kernel again for an input of fewer elements, which is in
another address space: a request that outgrew its first blocks would wait for that."""


class BlockTables:
    """Block tables of one cache group, a row for each running sequence, and which entries have changed."""

    matrix: np.ndarray
    """int32 [num_rows, num_columns]."""
    num_rewrites: int
    """How often a table became another in other ways than by growing at its end."""

    def __init__(self, num_rows: int, max_blocks: int) -> None:
        self.matrix = np.zeros((num_rows, max(MIN_COLUMNS, max_blocks)), np.int32)
        self.num_rewrites = 0
        self._entries = self.matrix.reshape(-1)
        self._changed: list[tuple[np.ndarray, np.ndarray]] = []

    def append_blocks(self, rows: np.ndarray, columns: np.ndarray, block_ids: Sequence[int]) -> None:
        """Let the tables of `rows`, each of them once, end with block_ids[i] at columns[i]."""
        self.write(rows * self.matrix.shape[1] + columns, np.array(block_ids, np.int32))

    def rewrite(self, row: int, start: int, block_ids: Sequence[int]) -> None:
        """Set the entries of a row from `start` on."""
        self.num_rewrites += 1
        if len(block_ids):
            first = row * self.matrix.shape[1] + start
            self.write(np.arange(first, first + len(block_ids)), np.array(block_ids, np.int32))

    def write(self, indices: np.ndarray, block_ids: np.ndarray) -> None:
        """Set entries of the flattened matrix."""
        self._entries[indices] = block_ids
        self._changed.append((indices, block_ids))

    def pop_changes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return what has changed since the last call: indices into the flattened matrix, each once, and block ids."""
        if not self._changed:
            return None
        changed, self._changed = self._changed, []
        if len(changed) == 1:
            return changed[0]
        indices = np.unique(np.concatenate([indices for indices, _ in changed]))
        return indices, self._entries[indices]
