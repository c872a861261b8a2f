"""Which sequences of a batch share their first blocks, so that attention can read those once for all of them.

Beams share the blocks of their prompt, samples too, and so do requests with a common system prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SharedPrefix(NamedTuple):
    """The first `num_tokens` tokens of `members`, numbers of sequences in ascending order, lie in the same blocks."""

    members: np.ndarray
    num_tokens: int
    """A multiple of the block size."""

    @property
    def num_saved(self) -> int:
        """Keys that are not read again."""
        return (len(self.members) - 1) * self.num_tokens


class _Grouping(NamedTuple):
    """A way to group some sequences."""

    num_saved: int
    """Blocks that are not read again, with what the sequences of `rest` save in the group that they are left to."""
    groups: list[SharedPrefix]
    rest: list[np.ndarray]
    """The sequences that are in none of the groups."""


def find_shared_prefixes(tables: np.ndarray, context_lens: np.ndarray, block_size: int) -> list[SharedPrefix]:
    """Group sequences, each in one group at most, so that together they save the most reads, however few.

    tables: int [num_seqs, max_blocks]; context_lens: int [num_seqs]. Of a sequence only whole blocks count, and its
    last token stays its own.
    """
    num_whole = np.maximum(context_lens - 1, 0) // block_size

    def best(members: np.ndarray, outer_lengths: list[int]) -> list[_Grouping]:
        """Group members whose first `outer_lengths[-1]` blocks are the same.

        Returns the best way for each of `outer_lengths`, if a member that is in no group here saves that many blocks
        in a group of more sequences.
        """
        length = _num_same(tables, members, outer_lengths[-1], int(num_whole[members].min()))
        is_longer = num_whole[members] > length
        longer = members[is_longer]
        branches, singles = _equal(longer, tables[longer, length]) if len(longer) else ([], longer)
        unshared = np.concatenate([members[~is_longer], singles])
        levels = [*outer_lengths, length]
        of_branches = list(zip(*(best(branch, levels) for branch in branches), strict=True)) or [()] * len(levels)
        groupings = [_joined(unshared, level, of_level) for level, of_level in zip(levels, of_branches, strict=True)]
        num_saved, groups, rest = groupings.pop()
        own_group = SharedPrefix(np.sort(np.concatenate(rest)), length * block_size)
        with_own_group = _Grouping(num_saved - length, [*groups, own_group], [])
        return [max(each, with_own_group, key=lambda g: (g.num_saved, -len(g.groups))) for each in groupings]

    return best(np.arange(len(tables)), [0])[0].groups if len(tables) > 1 else []


def _joined(unshared: np.ndarray, level: int, groupings: Sequence[_Grouping]) -> _Grouping:
    """The groupings of several branches as one, with sequences that are in no group."""
    return _Grouping(
        len(unshared) * level + sum(grouping.num_saved for grouping in groupings),
        [group for grouping in groupings for group in grouping.groups],
        [unshared, *(members for grouping in groupings for members in grouping.rest)],
    )


def _num_same(tables: np.ndarray, members: np.ndarray, first: int, last: int) -> int:
    """Count the entries that are the same in the tables of all members: at least `first`, at most `last`."""
    step = 1  # most tables have nothing in common
    while first < last:
        entries = tables[members, first : min(last, first + step)]
        same = (entries == entries[0]).all(axis=0)
        if not same.all():
            return first + int(same.argmin())
        first, step = first + entries.shape[1], 4 * step
    return last


def _equal(members: np.ndarray, values: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Sort members by value. Returns those of each value that several have, and those whose value nobody else has."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    begins = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1])
    counts = np.diff(begins, append=len(members))
    members = members[order]
    several = zip(begins[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True)
    return [members[begin : begin + count] for begin, count in several], members[begins[counts == 1]]
