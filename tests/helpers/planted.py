"""Mistakes that are planted in kernels, to see that they are noticed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from helpers.attention_cases import Case, split
from mlx_paged.attention import metal as metal


class Mistake(NamedTuple):
    """A mistake, and a case that must show it."""

    old: str
    """Text of a kernel's source or header."""
    new: str
    case: Case
    occurrence: int = 0
    part_size: int | None = None
    """Keys of a part. None: as it is decided."""
    layout: Any = None
    """Of Metal's paged_decode, instead of the one that is decided."""
    finding: str = ""
    """Text of the error."""

    def set_up(self, patches: pytest.MonkeyPatch) -> None:
        """Have the case computed as the mistake needs it."""
        split(patches, self.part_size)
        if self.layout is not None:
            patches.setattr(metal, "decode_layout", lambda _: self.layout)


def with_mistake(text: str, old: str, new: str, occurrence: int) -> str:
    """The text with one occurrence of `old` replaced; as it was if it does not have so many."""
    pieces = text.split(old)
    if len(pieces) > occurrence + 1:
        before, after = pieces[occurrence : occurrence + 2]
        pieces[occurrence : occurrence + 2] = [before + new + after]
    return old.join(pieces)
