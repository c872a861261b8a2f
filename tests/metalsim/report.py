"""What a launch found and counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

LINE_BYTES = 128


class FindingKind(IntEnum):
    """What can be wrong with a kernel. The first ones are numbered as in runtime/abi.h."""

    OUT_OF_BOUNDS_READ = 1
    OUT_OF_BOUNDS_WRITE = 2
    READ_ONLY_WRITE = 3
    UNINITIALISED_THREADGROUP_READ = 4
    UNINITIALISED_OUTPUT_READ = 5
    THREADGROUP_RACE = 6
    DEVICE_RACE = 7
    DIVERGENT_BARRIER = 8
    EXIT_BEFORE_BARRIER = 9
    DIVERGENT_COLLECTIVE = 10
    INACTIVE_LANE_READ = 11
    FOREIGN_PRIVATE_ACCESS = 12
    MEMORY_FAULT = 13
    UNDEFINED_BEHAVIOUR = 14
    MISALIGNED_ACCESS = 15
    TIME_LIMIT = 16
    UNWRITTEN_OUTPUT = 100
    MISSING_ADDRESS_SPACE = 101
    TOO_MUCH_THREADGROUP_MEMORY = 102
    TOO_MANY_THREADS = 103
    TOO_MANY_BUFFERS = 104

    @property
    def description(self) -> str:
        """The kind in words."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    FindingKind.OUT_OF_BOUNDS_READ: "out-of-bounds read",
    FindingKind.OUT_OF_BOUNDS_WRITE: "out-of-bounds write",
    FindingKind.READ_ONLY_WRITE: "write to a read-only input",
    FindingKind.UNINITIALISED_THREADGROUP_READ: "read of uninitialised threadgroup memory",
    FindingKind.UNINITIALISED_OUTPUT_READ: "read of uninitialised output memory",
    FindingKind.THREADGROUP_RACE: "data race in threadgroup memory",
    FindingKind.DEVICE_RACE: "data race in device memory",
    FindingKind.DIVERGENT_BARRIER: "threads of one threadgroup wait at different barriers",
    FindingKind.EXIT_BEFORE_BARRIER: "threads returned before a barrier others wait at",
    FindingKind.DIVERGENT_COLLECTIVE: "simdgroup function reached by only part of the simdgroup",
    FindingKind.INACTIVE_LANE_READ: "shuffle reads an inactive lane",
    FindingKind.FOREIGN_PRIVATE_ACCESS: "access to another thread's private memory",
    FindingKind.MEMORY_FAULT: "memory fault",
    FindingKind.UNDEFINED_BEHAVIOUR: "undefined behaviour",
    FindingKind.MISALIGNED_ACCESS: "misaligned access",
    FindingKind.TIME_LIMIT: "the launch exceeded its time limit",
    FindingKind.UNWRITTEN_OUTPUT: "output elements never written",
    FindingKind.MISSING_ADDRESS_SPACE: "pointer or reference without an address space",
    FindingKind.TOO_MUCH_THREADGROUP_MEMORY: "too much threadgroup memory",
    FindingKind.TOO_MANY_THREADS: "too many threads per threadgroup",
    FindingKind.TOO_MANY_BUFFERS: "too many buffers",
}


@dataclass(frozen=True)
class Finding:
    """One thing wrong, at one place; repetitions at the same place are counted."""

    kind: FindingKind
    location: str = ""  #: ``kernel.source:line[:column]``, lines of the text the user wrote
    memory: str = ""  #: the buffer or threadgroup variable concerned
    detail: str = ""
    thread: int | None = None
    threadgroup: tuple[int, int, int] | None = None
    count: int = 1

    def __str__(self) -> str:
        memory = f" `{self.memory}`" if self.memory else ""
        detail = f" {self.detail}" if self.detail else ""
        text = f"{self.kind.description}{memory}{detail}"
        if self.location:
            text = f"{self.location}: {text}"
        if self.thread is not None:
            text += f"; thread {self.thread} of threadgroup {self.threadgroup}"
        return text + (f" [{self.count}x]" if self.count > 1 else "")


@dataclass(frozen=True)
class BufferTraffic:
    """Device memory traffic of one buffer.

    An instruction is one load or store executed by a simdgroup (up to 16 adjacent bytes per lane,
    see the README), and touches each 128-byte line its lanes access once.
    """

    name: str
    nbytes: int
    bytes_read: int  #: summed over threads: 32 lanes reading one float count 128 bytes
    bytes_written: int
    distinct_bytes_read: int
    distinct_bytes_written: int
    read_instructions: int
    write_instructions: int
    lines_read: int  #: line transactions, summed over instructions
    lines_written: int
    distinct_lines_read: int  #: lines of the buffer read at least once
    distinct_lines_written: int

    @property
    def read_amplification(self) -> float:
        """Bytes moved by line transactions per distinct byte read; 1 is ideal, 0 is no reads."""
        return self.lines_read * LINE_BYTES / max(1, self.distinct_bytes_read)

    @property
    def write_amplification(self) -> float:
        """The same for writes."""
        return self.lines_written * LINE_BYTES / max(1, self.distinct_bytes_written)


@dataclass(frozen=True)
class SiteTraffic:
    """Device memory traffic of one buffer in one line of the kernel's text."""

    location: str
    buffer: str
    is_write: bool
    instructions: int
    lines: int
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """What a launch moved and how often its threads met."""

    buffers: dict[str, BufferTraffic]
    sites: tuple[SiteTraffic, ...]  #: most lines first
    threadgroups: int
    threads: int
    barriers: int  #: threadgroup barriers passed, summed over threadgroups
    simdgroup_barriers: int  #: summed over simdgroups
    collectives: int  #: simdgroup functions executed, summed over simdgroups
    threadgroup_memory: int  #: bytes allocated per threadgroup
    threadgroup_bytes_read: int  #: threadgroup memory, summed over threads
    threadgroup_bytes_written: int

    @property
    def barriers_per_threadgroup(self) -> float:
        """The average number of threadgroup barriers a threadgroup passes."""
        return self.barriers / max(1, self.threadgroups)

    @property
    def collectives_per_threadgroup(self) -> float:
        """The average number of simdgroup functions the simdgroups of a threadgroup execute."""
        return self.collectives / max(1, self.threadgroups)

    def summary(self, sites: int = 0) -> str:
        """A text table: one row per buffer accessed, then ``sites`` of the busiest places."""
        columns = ["", "requested", "distinct", "instructions", "lines", "line bytes/distinct"]
        rows = [columns]
        for b in self.buffers.values():
            if b.bytes_read:
                numbers = (b.bytes_read, b.distinct_bytes_read, b.read_instructions, b.lines_read)
                rows.append([f"{b.name} read", *map(str, numbers), f"{b.read_amplification:.2f}"])
            if b.bytes_written:
                rows.append(
                    [
                        f"{b.name} written",
                        str(b.bytes_written),
                        str(b.distinct_bytes_written),
                        str(b.write_instructions),
                        str(b.lines_written),
                        f"{b.write_amplification:.2f}",
                    ]
                )
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        text = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        text.append(
            f"{self.threadgroups} threadgroups, {self.threads} threads; per threadgroup "
            f"{self.barriers_per_threadgroup:g} barriers, "
            f"{self.collectives_per_threadgroup:g} simdgroup functions, "
            f"{self.threadgroup_memory} bytes of threadgroup memory"
        )
        text += [
            f"{s.location}: {s.buffer} {'written' if s.is_write else 'read'}, "
            f"{s.instructions} instructions, {s.lines} lines, {s.bytes} bytes"
            for s in self.sites[:sites]
        ]
        return "\n".join(text)


@dataclass(frozen=True)
class LaunchReport:
    """The outcome of one kernel launch."""

    kernel: str
    findings: tuple[Finding, ...] = ()
    traffic: Traffic | None = None  #: None without check
    #: Contents of the writable inputs after the launch.
    inputs_after: dict[str, mx.array] = field(default_factory=dict)
    compile_seconds: float = 0.0  #: 0 if the compiled kernel was cached

    def __str__(self) -> str:
        return "\n  ".join([f"{self.kernel}:", *map(str, self.findings or ["nothing found"])])


class SimulationError(AssertionError):
    """A launch with findings; ``report`` has them."""

    def __init__(self, report: LaunchReport) -> None:
        super().__init__(str(report))
        self.report = report
