"""From tokens to text as they come, with stop strings found across the borders of tokens."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """The text of one sequence. Text that could be the beginning of a stop string is held back until it is not.

    detokenizer: one of mlx-lm's streaming detokenizers, fresh.
    """

    def __init__(self, detokenizer: Any, stop_strings: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._longest_stop = max(map(len, stop_strings), default=0)
        self._pending = ""
        self.text = ""

    def add(self, token_id: int) -> str | None:
        """Take in a token; the stop string that it completed, if it did. The text then ends before it."""
        self._detokenizer.add_token(token_id)
        return self._take(self._detokenizer.last_segment)

    def finish(self) -> str | None:
        """No token follows: release what was held back. Returns a stop string that this completed, if it did."""
        self._detokenizer.finalize()
        stopped_by = self._take(self._detokenizer.last_segment)
        if stopped_by is None:
            self.text += self._pending
        self._pending = ""
        return stopped_by

    def _take(self, segment: str) -> str | None:
        if not self._stop_strings:
            self.text += segment
            return None
        self._pending += segment
        found = [(self._pending.find(stop), stop) for stop in self._stop_strings if stop in self._pending]
        if found:
            position, stopped_by = min(found)
            self.text += self._pending[:position]
            self._pending = ""
            return stopped_by
        keep = self._num_held_back()
        self.text += self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(self._pending) - keep :]
        return None

    def _num_held_back(self) -> int:
        """The length of the longest end of the pending text that begins a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self._stop_strings):
                return length
        return 0
