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


def plant(mistake: Mistake, metal: Metal, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make kernels with the mistake from here on; returns the names of those that have it, as they are made."""
    metal.only_simulated("wrong kernels are run")
    planted = []

    def metal_kernel(*, name: str, source: str, header: str, **arguments: Any) -> Any:
        texts = []
        for text in (source, header):
            pieces = text.split(mistake.old)
            if len(pieces) > mistake.occurrence + 1:
                before, after = pieces[mistake.occurrence : mistake.occurrence + 2]
                pieces[mistake.occurrence : mistake.occurrence + 2] = [before + mistake.new + after]
                planted.append(name)
            texts.append(mistake.old.join(pieces))
        return simulator.metal_kernel(name=name, source=texts[0], header=texts[1], **arguments)

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    return planted
