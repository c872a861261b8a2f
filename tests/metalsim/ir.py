"""Changes to a kernel's LLVM IR, as text, between the compiler's stages."""

from __future__ import annotations

import re

from .translate import SourceMap

#: Symbol of the table of the threadgroup variables' sizes.
SIZES_SYMBOL = "metalsim_threadgroup_sizes"
_SECTION = "metalsim_threadgroup"

_LINKAGE = r"(?:internal|linkonce_odr|weak_odr) (?:unnamed_addr )?"
_VARIABLE = re.compile(rf'^@"?([\w$.]+)"? = {_LINKAGE}global (.*?) undef(?:, comdat)?, align \d+', re.MULTILINE)

_CHECK = r"@(?:__tsan_(?:unaligned_)?(?:read|write)\d+|__tsan_mem\w+|__ubsan_handle_\w+)"
_CALL = re.compile(rf"^(.* call .*?{_CHECK}\()(.*)(\)(?: #\d+)?(?:, !.*)?)$", re.MULTILINE)
_DECLARATION = re.compile(rf"^(declare .*?{_CHECK}\()(.*?)(\).*)$", re.MULTILINE)
_DEBUG_LOCATION = re.compile(r", !dbg !(\d+)")
_METADATA = re.compile(r"^!(\d+) = (?:distinct )?!(DI\w+)\((.*)\)$", re.MULTILINE)


def expose_threadgroup_memory(ir: str) -> tuple[str, list[str]]:
    """Makes threadgroup variables real shared memory; returns their symbols as well.

    clang emits them as internal globals of a function it knows to run once, which LLVM would turn into registers.
    They become exported, in a section of their own, beside a table of their sizes.
    """
    variables, sizes = [], []

    def expose(match: re.Match[str]) -> str:
        name, kind = match[1], match[2]
        variables.append(name)
        sizes.append(f"i64 ptrtoint (ptr getelementptr ({kind}, ptr null, i32 1) to i64)")
        return f'@"{name}" = global {kind} zeroinitializer, section "{_SECTION}", align 64'

    ir = _VARIABLE.sub(expose, ir).replace(" norecurse", "")
    if variables:
        ir += f"\n@{SIZES_SYMBOL} = constant [{len(sizes)} x i64] [{', '.join(sizes)}]\n"
    return ir, variables


def keep_loops(ir: str) -> str:
    """Has loops stay loops that the source wants unrolled: compiling them takes a fraction of the time."""
    return ir.replace('!"llvm.loop.unroll.full"', '!"llvm.loop.unroll.disable"')


def number_checks(ir: str, source_map: SourceMap) -> tuple[str, list[str]]:
    """Adds a last argument to each call of a check, its number from 1; returns the calls' places in the source."""
    metadata = {number: (kind, fields) for number, kind, fields in _METADATA.findall(ir)}
    places: list[str] = []

    def add_number(match: re.Match[str]) -> str:
        location = _DEBUG_LOCATION.search(match[3])
        places.append(_place(location[1], metadata, source_map) if location else "")
        arguments = f"{match[2]}, " if match[2] else ""
        return f"{match[1]}{arguments}i64 {len(places)}{match[3]}"

    ir = _CALL.sub(add_number, ir)
    ir = _DECLARATION.sub(lambda m: f"{m[1]}{m[2]}{', ' if m[2] else ''}i64{m[3]}", ir)
    return re.sub(r"^!llvm\.dbg\.cu = .*$", "", ir, flags=re.MULTILINE), places  # no debug information needed any more


def _place(location: str, metadata: dict[str, tuple[str, str]], source_map: SourceMap) -> str:
    """Where an instruction stands: the innermost of the inlined calls around it that is in the user's text."""

    def field(number: str, name: str) -> str:
        found = re.search(rf'\b{name}: (?:!(\d+)|"([^"]*)"|(\d+))', metadata[number][1])
        return next(filter(None, found.groups()), "") if found else ""

    innermost = ""
    while location:
        scope = field(location, "scope")
        file = field(field(scope, "file"), "filename").rsplit("/", 1)[-1]
        line = field(location, "line") or "0"
        if file == source_map.file:
            return source_map.describe(int(line))
        innermost = innermost or f"{file}:{line}"
        location = field(location, "inlinedAt")
    return innermost
