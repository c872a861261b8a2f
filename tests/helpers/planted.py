"""Kernels with a mistake in them, to see that it is noticed."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from metalsim import simulator
from metalsim.fixture import Metal


class Mistake(NamedTuple):
    """Text of a kernel's source or header, what takes its place, and which of its occurrences."""

    old: str
    new: str
    occurrence: int = 0


def with_mistake(text: str, old: str, new: str, occurrence: int) -> str:
    """The text with one occurrence of `old` replaced; as it was if it does not have so many."""
    pieces = text.split(old)
    if len(pieces) > occurrence + 1:
        before, after = pieces[occurrence : occurrence + 2]
        pieces[occurrence : occurrence + 2] = [before + new + after]
    return old.join(pieces)


def plant(mistake: Mistake, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make kernels with the mistake from here on; returns the names of those that have it, as they are made."""
    metal.only_simulated("wrong kernels are run")
    planted = []

    def metal_kernel(*, name: str, source: str, header: str, **arguments: Any) -> Any:
        texts = [with_mistake(text, mistake.old, mistake.new, mistake.occurrence) for text in (source, header)]
        planted.extend(name for before, after in zip((source, header), texts, strict=True) if before != after)
        return simulator.metal_kernel(name=name, source=texts[0], header=texts[1], **arguments)

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    return planted
