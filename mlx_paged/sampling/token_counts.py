"""How often each token occurs in the sequences that have penalties: one array on the device, a slot per sequence."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


class TokenCounts:
    """Token counts of the rows that need them. The array exists once a row does, and doubles when it is too small:
    4 * vocab_size bytes a slot, at most max_num_seqs slots.

    The tokens of a step are added in the graph of the next one, because MLX writes in place only where no unfinished
    operation reads the array, and in its own step the penalties still do. So nothing is copied if a step has been
    computed (after `mx.synchronize()`, where steps are pipelined) when the next one is evaluated.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self.slots = np.full(max_num_seqs, -1, np.int32)  # of the rows; -1: none
        self._vocab_size = vocab_size
        self._free_slots = list(reversed(range(max_num_seqs)))
        # int32 [num_slots, vocab_size]: twice how often the token was put out, plus 1 if the prompt has it.
        self._counts = mx.zeros((0, vocab_size), mx.int32)
        self._resets: dict[int, np.ndarray] = {}  # what the next `read` writes into slots
        self._drawn: tuple[np.ndarray, mx.array] | None = None  # slots, and tokens that the next `read` counts there

    def set(self, row: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Count the tokens of a sequence that takes `row`."""
        self.release(row)
        counts = 2 * np.bincount(np.array(output, np.int64), minlength=self._vocab_size).astype(np.int32)
        counts[np.array(prompt, np.int64)] |= 1
        self.slots[row] = slot = self._free_slots.pop()
        self._resets[slot] = counts

    def release(self, row: int) -> None:
        """Give back the slot of `row`, if it has one."""
        slot = int(self.slots[row])
        if slot < 0:
            return
        self.slots[row] = -1
        self._free_slots.append(slot)
        self._resets.pop(slot, None)
        if self._drawn is not None:
            slots, tokens = self._drawn
            kept = np.flatnonzero(slots != slot)
            if len(kept) < len(slots):
                self._drawn = (slots[kept], tokens[mx.array(kept)]) if len(kept) else None

    def read(self, slots: mx.array) -> tuple[mx.array, mx.array]:
        """Lazy bool and int32 [., vocab_size] of `slots`: whether a token occurs at all, how often it was put out."""
        if self._resets:
            num_slots = self._counts.shape[0]
            needed = max(self._resets) + 1
            if needed > num_slots:
                more = min(max(needed, 2 * num_slots), len(self.slots)) - num_slots
                self._counts = mx.concatenate([self._counts, mx.zeros((more, self._vocab_size), mx.int32)])
            index = mx.array(np.array(list(self._resets), np.int32))
            self._counts[index] = mx.array(np.stack(list(self._resets.values())))
            self._resets.clear()
        if self._drawn is not None:
            drawn_slots, tokens = self._drawn
            self._counts = self._counts.at[mx.array(drawn_slots), tokens].add(2)
            self._drawn = None
        counts = self._counts[slots]
        return counts > 0, counts >> 1

    def add(self, slots: np.ndarray, tokens: mx.array) -> None:
        """`tokens`, one for each of `slots`, were put out; they may be lazy. Call it once after each `read`."""
        self._drawn = slots, tokens
