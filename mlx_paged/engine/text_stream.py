"""Text as it comes, with stop strings found across the borders of tokens."""

import copy
from collections.abc import Sequence

from mlx_paged.engine.detokenizer import DecodeStream, Detokenizer
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams


class TextStream:
    """The text of one sequence. Text that could be the beginning of a stop string is held back until it is not.

    decode_stream: fresh, of the sequence's tokens. `text` only grows; it is what has been, or may be, handed out.
    """

    def __init__(self, decode_stream: DecodeStream, stop_strings: Sequence[str]) -> None:
        self._decode_stream = decode_stream
        self._stop_strings = stop_strings
        self._beginnings = tuple({stop[:length] for stop in stop_strings for length in range(1, len(stop))})
        self._pending = ""
        self.text = ""

    @classmethod
    def of(cls, detokenizer: Detokenizer, params: SamplingParams | BeamSearchParams) -> "TextStream":
        """Make the stream of a sequence, or of a beam, with such parameters."""
        return cls(DecodeStream(detokenizer, params.skip_special_tokens), params.stop_strings)

    def copy(self) -> "TextStream":
        """Make a stream that goes on by itself from here."""
        other = copy.copy(self)
        other._decode_stream = self._decode_stream.copy()
        return other

    def add(self, token_id: int) -> str | None:
        """Take in a token; the stop string that it completed, if it did. The text then ends before it.

        A stop string counts as soon as it is in the text that the tokens so far would have if no other came.
        """
        new = self._decode_stream.add(token_id)
        if not self._stop_strings:
            self.text += new
            return None
        self._pending += new
        stopped_by = self._find_stop(self._pending + self._decode_stream.tail.rstrip("\ufffd"))  # no half characters
        if stopped_by is None:
            end = len(self._pending) - self._num_held_back()
            self.text += self._pending[:end]
            self._pending = self._pending[end:]
        return stopped_by

    def finish(self, whole: str) -> str | None:
        """No token follows: make the text that of all tokens, `whole`. Returns a stop string that this completed."""
        rest = self._pending + self._decode_stream.tail
        if whole.startswith(self.text):  # as it should: then nothing that was handed out differs
            rest = whole[len(self.text) :]
        stopped_by = self._find_stop(rest)
        if stopped_by is None:
            self.text += rest
        self._pending = ""
        return stopped_by

    def _find_stop(self, following: str) -> str | None:
        """Look for stop strings in what follows the text. Returns the first one, before which the text then ends."""
        found = [(following.find(stop), stop) for stop in self._stop_strings if stop in following]
        if not found:
            return None
        position, stopped_by = min(found)
        self.text += following[:position]
        self._pending = ""
        return stopped_by

    def _num_held_back(self) -> int:
        """The length of the longest end of the pending text that begins a stop string."""
        if not self._pending.endswith(self._beginnings):
            return 0
        return max(len(beginning) for beginning in self._beginnings if self._pending.endswith(beginning))
