"""Mistakes that are planted in kernels, to see that they are noticed."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from helpers.attention_cases import Case, split


class Mistake(NamedTuple):
    """A mistake, and a case that must show it."""

    old: str
    """Text of a kernel's source or header."""
    new: str
    case: Case
    occurrence: int = 0
    """Of `old` in a text. -1: all."""
    part_size: int | None = None
    """Keys of a part. None: as it is decided."""
    finding: str = ""
    """Text of the error."""

    def set_up(self, patches: pytest.MonkeyPatch) -> None:
        """Have the case computed as the mistake needs it."""
        split(patches, self.part_size)


def with_mistake(text: str, old: str, new: str, occurrence: int) -> str:
    """The text with one occurrence of `old` replaced, or all; as it was if it does not have so many."""
    if occurrence < 0:
        return text.replace(old, new)
    pieces = text.split(old)
    if len(pieces) > occurrence + 1:
        before, after = pieces[occurrence : occurrence + 2]
        pieces[occurrence : occurrence + 2] = [before + new + after]
    return old.join(pieces)
