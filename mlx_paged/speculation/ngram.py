"""Drafts by looking up what followed the last time: no second model, and no more than some host time.

The last tokens of a sequence are looked for earlier in its prompt and output, and what followed there is proposed
(prompt lookup decoding, Saxena 2023). Knows no mlx.
"""


class NgramLookup:
    """Where the n-grams of one sequence ended last."""

    def __init__(self, longest: int, shortest: int) -> None:
        """longest, shortest: of the n-grams that are looked up, in tokens; longer matches come first."""
        self._lengths = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # past the last token of each n-gram's last occurrence
        self._num_indexed = 0
        self._follows = -1  # where what followed the last tokens begins; -1: they are new

    def update(self, token_ids: list[int]) -> tuple[int, int]:
        """Take in tokens that the sequence has come to.

        Returns of how many of them the token before foretold them by what had followed it, and how many there are.
        """
        first, num_foretold = self._num_indexed, 0
        for end in range(first + 1, len(token_ids) + 1):
            if self._follows >= 0:
                num_foretold += token_ids[self._follows] == token_ids[end - 1]
            self._follows = -1
            for length in self._lengths:
                if length <= end:
                    gram = tuple(token_ids[end - length : end])
                    if self._follows < 0:
                        self._follows = self._ends.get(gram, -1)
                    self._ends[gram] = end
        self._num_indexed = len(token_ids)
        return num_foretold, len(token_ids) - first

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        """Return up to `most` tokens that may come next. token_ids: as `update` has taken them in."""
        if self._follows < 0:
            return []
        draft: list[int] = []
        for place in range(self._follows, self._follows + most):
            ahead = place - len(token_ids)  # what repeats itself goes on to do so
            draft.append(token_ids[place] if ahead < 0 else draft[ahead])
        return draft
