"""Drafts by looking up what followed the last time: no second model, and no more than some host time.

The last tokens of a sequence are looked for earlier in its prompt and output, and what followed there is proposed
(prompt lookup decoding, Saxena 2023). Knows no mlx.
"""

from array import array

from mlx_paged.request import Sequence

_MOST_PLACES = 64
"""That are compared with the last tokens, the last ones first."""


class NgramLookup:
    """Where the n-grams of one sequence ended, in some tens of bytes for each of its tokens."""

    def __init__(self, longest: int, shortest: int) -> None:
        """longest, shortest: of the n-grams that are looked up, in tokens; longer matches come first."""
        self._longest, self._shortest = longest, shortest
        self._ends: dict[int, int] = {}  # past the last occurrence of the shortest n-grams, by their hash
        self._before = array("l")  # past the one before that which ends with each token; 0: there is none
        self._follows = 0  # where what followed the last tokens begins; 0: they are new

    def update(self, token_ids: list[int]) -> tuple[int, int]:
        """Take in tokens that the sequence has come to.

        Returns how many of them the tokens before would have foretold, none of the first time, and how many there are.
        """
        first, num_foretold, shortest = len(self._before), 0, self._shortest
        for end in range(first + 1, len(token_ids) + 1):
            num_foretold += bool(self._follows) and token_ids[self._follows] == token_ids[end - 1]
            place = 0
            if end >= shortest:
                key = hash(tuple(token_ids[end - shortest : end]))
                place = self._ends.get(key, 0)
                self._ends[key] = end
            self._before.append(place)
            self._follows = self._longest_match(token_ids, end, place) if first or end == len(token_ids) else 0
        return num_foretold, len(token_ids) - first

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        """Return up to `most` tokens that may come next. token_ids: as `update` has taken them in."""
        draft: list[int] = []
        for place in range(self._follows, self._follows + most) if self._follows else ():
            ahead = place - len(token_ids)  # what repeats itself goes on to do so
            draft.append(token_ids[place] if ahead < 0 else draft[ahead])
        return draft

    def _longest_match(self, token_ids: list[int], end: int, place: int) -> int:
        """Return past which earlier tokens, at `place` or before, most are the same as before `end`; 0: too few."""
        found, most = 0, self._shortest - 1
        for _ in range(_MOST_PLACES):
            if not place or most == self._longest:
                break
            length = 0
            while length < min(self._longest, place) and token_ids[place - 1 - length] == token_ids[end - 1 - length]:
                length += 1
            if length > most:
                found, most = place, length
            place = self._before[place - 1]
        return found


class NgramProposer:
    """Proposes what followed the last tokens of each sequence the last time. It costs nothing to know of them all."""

    first_share = 0.0

    def __init__(self, longest: int, shortest: int) -> None:
        """longest, shortest: as in `NgramLookup`."""
        self._longest, self._shortest = longest, shortest
        self._lookups: dict[int, NgramLookup] = {}

    def keep(self, seq_ids: set[int]) -> None:
        """Forget all sequences but these."""
        self._lookups = {seq_id: self._lookups[seq_id] for seq_id in seq_ids & self._lookups.keys()}

    def update(self, sequence: Sequence) -> tuple[float, float]:
        """Do as `NgramLookup.update`, of the tokens that a sequence has come to."""
        lookup = self._lookups.get(sequence.seq_id)
        if lookup is None:
            lookup = self._lookups[sequence.seq_id] = NgramLookup(self._longest, self._shortest)
        return lookup.update(sequence.token_ids)

    def seconds(self, num_sequences: int, num_drafts: int) -> float:
        return 0.0

    def skip(self) -> None:
        pass  # looking up costs nothing that could be taken for too dear

    def seconds_to_catch_up(self, sequence: Sequence) -> float:
        return 0.0

    def catch_up(self, sequences: list[Sequence]) -> list[Sequence]:
        """Return all of them: each update has done all there is to do."""
        return sequences

    def propose(self, rooms: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Return the drafts of the sequences that have some."""
        found = {each: self._lookups[each.seq_id].propose(each.token_ids, room) for each, room in rooms.items()}
        return {sequence: tokens for sequence, tokens in found.items() if tokens}
