"""How kernels are run."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from .report import FindingKind


@dataclass(frozen=True)
class Config:
    """Options of a launch."""

    #: Instrument every access. False is several times as fast: out-of-bounds accesses are then found only past the
    #: end of the memory page, races not at all, and nothing is counted.
    check: bool = True
    #: In which order the threads of a simdgroup run between two meetings.
    order: Literal["ascending", "descending", "random"] = "ascending"
    #: For the random order.
    seed: int = 1
    #: Findings of these kinds are dropped. A shuffle from an inactive lane is legal as long as the result is not used;
    #: it reads as all ones (NaN) here.
    ignore: Set[FindingKind] = frozenset({FindingKind.INACTIVE_LANE_READ})
    #: Raise SimulationError if anything was found; else only report it.
    raise_on_findings: bool = True
    #: Inputs the kernel writes on purpose, by casting const away.
    writable_inputs: Set[str] = frozenset()
    #: Seconds of CPU time after which a launch is given up.
    time_limit: float = 120.0
