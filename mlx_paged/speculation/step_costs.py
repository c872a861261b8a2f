"""What a step takes, by how many tokens it computes: whether verifying drafts pays depends on that. Knows no mlx."""

from bisect import bisect_left
from itertools import accumulate

import numpy as np

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of tokens that costs are kept for; between them they are interpolated."""
MEASURED = (1, 4, 8, 16, 32, 64)
"""Those that are measured at load, as far as there is time."""
_WEIGHT = 0.2  # of a new measurement
_MOST = 3.0  # times what was expected: more is somebody else's load
_LEAST_SLOPE = 0.25  # of what as many steps of one token would take
_FADE = 1 / 200  # of what larger steps are dearer than cheap ones, with each smaller step: what was dear is tried again
_SLOW_FADE = 1 / 800  # of steps that are not made at all, with each that others make


class StepCosts:
    """Seconds of decoding steps: measured at load, and kept up to date by those that run."""

    def __init__(self, seconds: dict[int, float]) -> None:
        """seconds: by numbers of tokens, 1 among them. What is missing is made up, rather too low than too high:

        steps that are taken for cheap are tried, and then known.
        """
        self._sizes = sorted({*seconds, *SIZES})
        last = max(seconds)
        known = list(accumulate((seconds[size] for size in sorted(seconds)), max))  # more tokens take no less time
        per_token = max(_LEAST_SLOPE * known[-1] / last, (known[-1] - known[0]) / max(1, last - 1))
        guesses = [known[-1] + per_token * (size - last) for size in self._sizes if size > last]
        places = [self._sizes.index(size) for size in sorted(seconds)]
        self._seconds = [*np.interp(range(places[-1] + 1), places, known).tolist(), *guesses]

    def of(self, num_tokens: int) -> float:
        """Return the seconds of a step of so many tokens."""
        place = bisect_left(self._sizes, num_tokens)
        if place == len(self._sizes):  # beyond what was measured: in proportion
            return self._seconds[-1] * num_tokens / self._sizes[-1]
        if self._sizes[place] == num_tokens or place == 0:
            return self._seconds[place]
        low, high = self._sizes[place - 1 : place + 1]
        share = (num_tokens - low) / (high - low)
        return self._seconds[place - 1] * (1 - share) + self._seconds[place] * share

    def fade(self) -> None:
        """Know that another step was made in place of these: what was dear when it was last measured is tried again."""
        self._seconds = [(1 - _SLOW_FADE) * seconds for seconds in self._seconds]

    def add(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step. Longer contexts make all steps dearer: those of other sizes follow, a quarter as fast.

        What is known of larger steps was learned in other contexts, maybe longer ones, and fades.
        """
        change = min(seconds / self.of(num_tokens), _MOST) - 1
        near = min(range(len(self._sizes)), key=lambda i: abs(self._sizes[i] - num_tokens))
        for i in range(len(self._seconds)):
            self._seconds[i] *= 1 + change * (_WEIGHT if i == near else _WEIGHT / 4)
        known = self._seconds[near]
        for i, size in enumerate(self._sizes):
            if i <= near:
                self._seconds[i] = min(self._seconds[i], known)
            else:
                dear = self._seconds[i] - known * (1 + _LEAST_SLOPE * (size / self._sizes[near] - 1))
                self._seconds[i] = max(self._seconds[i] - _FADE * max(0.0, dear), known)
