"""How many tokens of prompts a step may compute while somebody reads a stream: as many as fit into some time.

A step takes as long as all that it computes, and every stream waits for its end. What a token of a prompt takes is
measured, with what the step's decodes take in it: so a step that took twice as long as it may is followed by one with
half the tokens. Attention makes tokens dearer the further into their prompt they are, so costs are kept by position;
where none is known yet, twice the position is taken to cost twice as much, which is never too little. Of the last
costs the median counts, and the last one where that is more: costs that rise are believed at once, and a step that
was held up makes one small chunk. Knows no mlx, and no clock.
"""

import math
import sys
from collections import deque
from collections.abc import Sequence
from statistics import median

from mlx_paged.scheduler.schedule import Chunk, Schedule

_NUM_RECENT = 5  # measurements that count
_NUM_DECODES = 5  # a step takes as long as so many of decodes alone: four fifths of the time are the prompts'
_GOOD_CHUNK = 64  # tokens; or as long as so many take: fewer cost more each, since each chunk reads all keys before it
_MOST_S = 0.5  # but not longer than this for their sake
_LEAST_S = 0.05
_LOW_POSITIONS = 1024  # cost the same


class StepBudget:
    """The time for prompts that the step being scheduled has left, and what is known of costs."""

    s_per_token: float | None = None
    """Seconds that a token of a prompt took lately; None: not known."""

    def __init__(self, block_size: int, max_step_ms: float | None = None) -> None:
        """max_step_ms: as `EngineConfig` has it."""
        self._block_size = self._least = block_size
        self._given_s = None if max_step_ms is None else max_step_ms / 1000 or math.inf
        self._decodes: deque[float] = deque(maxlen=_NUM_RECENT)  # seconds of steps
        self._costs: dict[int, deque[float]] = {}  # of a token, by `_place`
        self._left_s = math.inf
        self._position = 0  # where the last cost was measured

    @property
    def max_step_s(self) -> float:
        """What a step may take while somebody reads a stream, in seconds, at the position that was computed last."""
        return self._limit_s(self._position)

    def begin(self, is_read: bool) -> None:
        """Begin a step. is_read: whether it decodes for a stream."""
        self._left_s = self.max_step_s if is_read else math.inf  # until the first prompt's position is known
        self._least = self._block_size

    @property
    def has_time(self) -> bool:
        """Whether the step has time for more prompts."""
        return self._left_s > 0

    def room(self, start: int) -> int:
        """Count the tokens of a prompt from `start` on for which there is time: of the first one at least a block."""
        if self._left_s == math.inf:
            return sys.maxsize
        if self._least:
            self._left_s = self._limit_s(start)
        return max(self._least, int(self._left_s / self._cost(start)))

    def take(self, chunk: Chunk) -> None:
        """Take the time of a chunk. What does not suffice for another block is no time."""
        if self._left_s < math.inf:
            cost = self._cost(chunk.start)
            self._left_s -= chunk.num_tokens * cost
            self._least = 0
            if self._left_s < self._block_size * cost:
                self._left_s = 0.0

    def must_time(self, schedule: Schedule) -> bool:
        """Say whether a step has to be over before the next one is scheduled, which depends on how long it took."""
        return self._left_s < math.inf and self._tells(schedule.chunks)

    def add(self, schedule: Schedule, before: Schedule | None, is_over: bool, seconds: float) -> None:
        """Learn from how long it took to launch a step, while the one before it ran.

        before: None if none did. is_over: this one has ended too. Without that the time is of one of the two, and
        tells something if they are of one kind.
        """
        is_prompt, was_prompt = bool(schedule.chunks), before is not None and bool(before.chunks)
        if was_prompt if is_over else before is None or was_prompt != is_prompt:
            return
        if not is_prompt:
            self._decodes.append(seconds)
        elif self._tells(schedule.chunks):
            num_tokens = sum(chunk.num_tokens for chunk in schedule.chunks)
            largest = max(schedule.chunks, key=lambda chunk: chunk.num_tokens)
            self._position = middle = largest.start + largest.num_tokens // 2
            self._costs.setdefault(_place(middle), deque(maxlen=_NUM_RECENT)).append(max(seconds / num_tokens, 1e-9))
            self.s_per_token = self._cost(middle)

    def _tells(self, chunks: Sequence[Chunk]) -> bool:
        """Say whether chunks take enough time to tell what a token costs: half of what a step may take."""
        if not chunks or not self._costs:
            return bool(chunks)
        expected_s = sum(chunk.num_tokens * self._cost(chunk.start) for chunk in chunks)
        return expected_s > min(self._limit_s(chunks[0].start), _MOST_S) / 2

    def _limit_s(self, position: int) -> float:
        """Return what a step may take that computes a prompt from a position on, in seconds."""
        if self._given_s is not None:
            return self._given_s
        decodes_s = median(self._decodes) if self._decodes else _MOST_S / _NUM_DECODES
        return max(_LEAST_S, _NUM_DECODES * decodes_s, min(_MOST_S, _GOOD_CHUNK * self._cost(position)))

    def _cost(self, position: int) -> float:
        """Estimate the seconds of a prompt's token at a position."""
        if not self._costs:
            return _MOST_S / _GOOD_CHUNK
        place = _place(position)
        known = max((each for each in self._costs if each <= place), default=min(self._costs))
        recent = self._costs[known]
        return max(recent[-1], median(recent)) * 2 ** max(0, place - known)


def _place(position: int) -> int:
    """Number the positions of a cost: 0 for the first ones, then one more each time that they double."""
    return (position // _LOW_POSITIONS).bit_length()
