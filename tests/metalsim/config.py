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
    #: Inputs the kernel writes on purpose. Those that its text casts `const` away from are added.
    writable_inputs: Set[str] = frozenset()
    #: Inputs of which the kernel sees all the memory that they begin, as on a device, where a view of an array is an
    #: address in its buffer.
    whole_buffers: Set[str] = frozenset({"k_cache", "v_cache", "k_codes", "k_params", "v_codes", "v_params"})
    #: Seconds of CPU time after which a launch is given up.
    time_limit: float = 120.0
