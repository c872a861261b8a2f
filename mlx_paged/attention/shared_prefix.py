"""Which sequences of a batch share their first blocks, so that attention can read those once for all of them.

Beams share the blocks of their prompt, samples too, and so do requests with a common system prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_KEYS_SAVED = 512  # that are not read again: fewer are not worth another launch and the merging of its results


class SharedPrefix(NamedTuple):
    """The first `num_tokens` tokens of `members`, numbers of sequences in ascending order, lie in the same blocks."""

    members: np.ndarray
    num_tokens: int

    @property
    def num_saved(self) -> int:
        """Keys that are not read again."""
        return (len(self.members) - 1) * self.num_tokens


class _Choice(NamedTuple):
    """Groups among some sequences, and what they save in blocks, with what those outside of them save elsewhere."""

    num_saved: int
    groups: list[SharedPrefix]
    rest: list[np.ndarray]


def find_shared_prefixes(tables: np.ndarray, context_lens: np.ndarray, block_size: int) -> list[SharedPrefix]:
    """Groups of sequences, each sequence in one of them at most, that together save the most reads.

    tables: int [num_seqs, max_blocks]; context_lens: int [num_seqs]. Of a sequence only whole blocks count, and its
    last token stays its own.
    """
    num_whole = np.maximum(context_lens - 1, 0) // block_size

    def best(members: np.ndarray, above: list[int]) -> list[_Choice]:
        """What saves the most among members whose first `above[-1]` blocks are the same, for each number in `above`:
        so many blocks does a member save that is left to a group of more sequences.
        """
        length = _num_same(tables, members, above[-1], int(num_whole[members].min()))
        is_longer = num_whole[members] > length
        longer = members[is_longer]
        branches, loners = _equal(longer, tables[longer, length]) if len(longer) else ([], longer)
        alone = np.concatenate([members[~is_longer], loners])
        levels = [*above, length]
        of_branches = list(zip(*(best(branch, levels) for branch in branches), strict=True)) or [()] * len(levels)
        choices = [_joined(alone, level, of_level) for level, of_level in zip(levels, of_branches, strict=True)]
        num_saved, groups, rest = choices.pop()
        trunk = SharedPrefix(np.sort(np.concatenate(rest)), length * block_size)
        with_trunk = _Choice(num_saved - length, [*groups, trunk], [])
        return [max(choice, with_trunk, key=lambda each: (each.num_saved, -len(each.groups))) for choice in choices]

    groups = best(np.arange(len(tables)), [0])[0].groups if len(tables) > 1 else []
    return [group for group in groups if group.num_saved >= LEAST_KEYS_SAVED]


def _joined(alone: np.ndarray, level: int, choices: Sequence[_Choice]) -> _Choice:
    """Choices together, and sequences that are in no group."""
    return _Choice(
        len(alone) * level + sum(choice.num_saved for choice in choices),
        [group for choice in choices for group in choice.groups],
        [alone, *(members for choice in choices for members in choice.rest)],
    )


def _num_same(tables: np.ndarray, members: np.ndarray, first: int, last: int) -> int:
    """How many entries are the same in the tables of all members, of which `first` are, and `last` is the most."""
    step = 1  # most tables have nothing in common
    while first < last:
        entries = tables[members, first : min(last, first + step)]
        same = (entries == entries[0]).all(axis=0)
        if not same.all():
            return first + int(same.argmin())
        first, step = first + entries.shape[1], 4 * step
    return last


def _equal(members: np.ndarray, values: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The members that have a value together, for each value of several; and those that have one alone."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    begins = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1])
    counts = np.diff(begins, append=len(members))
    members = members[order]
    several = zip(begins[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True)
    return [members[begin : begin + count] for begin, count in several], members[begins[counts == 1]]
