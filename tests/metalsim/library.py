"""A compiled kernel in this process: loads it, launches it, names places in it."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from . import abi
from .build import CompiledKernel, runtime_library
from .config import Config
from .report import BufferTraffic, Finding, FindingKind, SiteTraffic, Traffic

MAX_THREADS = 1024  # per threadgroup; runtime/fiber.h
_MAX_FINDINGS = 64
_MAX_SITES = 4096
_ORDERS = {"ascending": 0, "descending": 1, "random": 2}
_COMPLETED = 0
_OTHER_THREADGROUP = -2


@dataclass(frozen=True)
class LaunchResult:
    """What the runtime found and counted."""

    completed: bool  #: every thread ran to its end
    findings: list[Finding]
    traffic: Traffic | None
    unwritten: dict[str, tuple[int, int]]  #: per output: elements nobody wrote, index of the first


class KernelLibrary:
    """A compiled kernel, loaded."""

    _launching = threading.Lock()  # the runtime runs one launch at a time per process

    def __init__(self, compiled: CompiledKernel) -> None:
        self.compiled = compiled
        ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)  # kernels are linked to nothing
        self._runtime = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
        self._runtime.metalsim_count_unwritten.restype = ctypes.c_uint64
        self._library = ctypes.CDLL(str(compiled.library))
        self._kernel = ctypes.cast(getattr(self._library, compiled.function), ctypes.c_void_p)
        self._variables = self._find_variables()

    @property
    def threadgroup_memory(self) -> int:
        """Bytes of threadgroup memory."""
        return sum(v.nbytes for v in self._variables)

    def _find_variables(self) -> list[abi.ThreadgroupVariable]:
        symbols = self.compiled.variables
        if not symbols:
            return []
        sizes = (ctypes.c_uint64 * len(symbols)).in_dll(self._library, "metalsim_threadgroup_sizes")
        variables = []
        for symbol, nbytes in zip(symbols, sizes, strict=True):
            address = ctypes.addressof(ctypes.c_char.in_dll(self._library, symbol))
            name = _variable_name(symbol, self.compiled.function)
            variables.append(abi.ThreadgroupVariable(address, nbytes, name.encode()[:47]))
        return variables

    def launch(
        self,
        buffers: Sequence[abi.BufferSpec],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        config: Config,
        outputs: Iterable[int] = (),
    ) -> LaunchResult:
        """Runs the kernel; ``outputs`` are the buffers to look for unwritten elements in."""
        findings = (abi.Finding * _MAX_FINDINGS)()
        buffer_counters = (abi.BufferCounters * len(buffers))()
        site_counters = (abi.SiteCounters * _MAX_SITES)()
        launch = abi.Launch(
            kernel=self._kernel,
            buffers=(abi.BufferSpec * len(buffers))(*buffers),
            variables=(abi.ThreadgroupVariable * len(self._variables))(*self._variables),
            findings=findings,
            buffer_counters=buffer_counters,
            site_counters=site_counters,
            buffer_count=len(buffers),
            variable_count=len(self._variables),
            max_findings=_MAX_FINDINGS,
            max_sites=_MAX_SITES,
            grid=tuple(grid),
            threadgroup=tuple(threadgroup),
            order=_ORDERS[config.order],
            checked=config.check,
            seed=config.seed,
            time_limit=config.time_limit,
        )
        unwritten = {}
        with self._launching:
            completed = self._runtime.metalsim_launch(ctypes.byref(launch)) == _COMPLETED
            if completed and config.check:
                for index in outputs:
                    first = ctypes.c_uint64()
                    count = self._runtime.metalsim_count_unwritten(index, ctypes.byref(first))
                    if count:
                        unwritten[buffers[index].name.decode()] = (count, first.value)
        result = [self._finding(f) for f in findings[: launch.finding_count]]
        traffic = None
        if config.check:
            traffic = self._traffic(launch, buffers, buffer_counters, site_counters)
        return LaunchResult(completed, result, traffic, unwritten)

    def _finding(self, raw: abi.Finding) -> Finding:
        kind = FindingKind(raw.kind)
        name = raw.name.decode()
        detail = ""
        if kind is FindingKind.UNDEFINED_BEHAVIOUR:
            name, detail = "", f"({name})"
        elif kind is FindingKind.DIVERGENT_COLLECTIVE:
            detail = f"({raw.other} live lanes elsewhere)"
        elif kind is FindingKind.EXIT_BEFORE_BARRIER:
            detail = f"({raw.other} threads)"
        elif name:
            detail = f"at byte {raw.offset} (+{raw.size})"
        if kind in (FindingKind.THREADGROUP_RACE, FindingKind.DEVICE_RACE):
            other = raw.other
            with_whom = "another threadgroup" if other == _OTHER_THREADGROUP else f"thread {other}"
            detail += f" with {with_whom}"
        return Finding(
            kind=kind,
            location=self._location(raw.call, raw.site),
            memory=name,
            detail=detail,
            thread=raw.thread if raw.thread >= 0 else None,
            threadgroup=tuple(raw.threadgroup),
            count=raw.count,
        )

    def _traffic(
        self,
        launch: abi.Launch,
        buffers: Sequence[abi.BufferSpec],
        buffer_counters: Sequence[abi.BufferCounters],
        site_counters: Sequence[abi.SiteCounters],
    ) -> Traffic:
        names = [b.name.decode() for b in buffers]
        raw_sites = site_counters[: launch.site_count]
        by_place: defaultdict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0, 0])
        for s in raw_sites:  # an unrolled loop has several sites in one place
            totals = by_place[self._location(s.call, s.site), names[s.buffer], bool(s.is_write)]
            for i, count in enumerate((s.instructions, s.lines, s.bytes)):
                totals[i] += count
        sites = [SiteTraffic(*place, *totals) for place, totals in by_place.items() if totals[0]]
        counters = launch.counters
        return Traffic(
            buffers={
                name: BufferTraffic(
                    name=name,
                    nbytes=spec.nbytes,
                    bytes_read=c.bytes[0],
                    bytes_written=c.bytes[1],
                    distinct_bytes_read=c.distinct_bytes[0],
                    distinct_bytes_written=c.distinct_bytes[1],
                    read_instructions=c.instructions[0],
                    write_instructions=c.instructions[1],
                    lines_read=c.lines[0],
                    lines_written=c.lines[1],
                    distinct_lines_read=c.distinct_lines[0],
                    distinct_lines_written=c.distinct_lines[1],
                )
                for name, spec, c in zip(names, buffers, buffer_counters, strict=True)
            },
            sites=tuple(sorted(sites, key=lambda s: -s.lines)),
            threadgroups=counters.threadgroups,
            threads=counters.threads,
            barriers=counters.barriers,
            simdgroup_barriers=counters.simdgroup_barriers,
            collectives=counters.collectives,
            threadgroup_memory=self.threadgroup_memory,
            threadgroup_bytes_read=counters.threadgroup_bytes[0],
            threadgroup_bytes_written=counters.threadgroup_bytes[1],
        )

    def _location(self, call: int, site: int) -> str:
        if site:
            return self.compiled.source_map.describe(site >> 8, site & 255)
        return self.compiled.places[call - 1] if call else ""


def _variable_name(symbol: str, function: str) -> str:
    """``red`` from the mangled name of a threadgroup variable, e.g. ``_ZZ6kernelE3red``."""
    prefix = f"_ZZ{len(function)}{function}E"
    if not symbol.startswith(prefix):
        return symbol.rsplit(".", 1)[-1]
    rest = symbol.removeprefix(prefix)
    digits = len(rest) - len(rest.lstrip("0123456789"))
    return rest[digits : digits + int(rest[:digits] or 0)] or symbol
