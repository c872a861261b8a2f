"""Finds pointers and references without an address space, which Metal rejects and clang takes to be generic."""

from __future__ import annotations

import re
from typing import NamedTuple

from .translate import SourceMap

#: What makes clang dump the syntax tree, in which declarations carry their address spaces.
DUMP = ("-fsyntax-only", "-Xclang", "-ast-dump", "-fno-color-diagnostics")

# Lines of the dump, e.g.
#   | |-ParmVarDecl 0x1f2c <col:3, col:16> col:16 used v 'const __generic float *__private'
_TREE = re.compile(r"[ |`-]*")
_IMPLICIT_FUNCTION = re.compile(r"CXX\w+Decl 0x\w+ <[^']*> \S+ (?:\w+ )*?implicit .*'.*\(")
_GENERIC_DECLARATION = re.compile(
    r"(?:ParmVarDecl|VarDecl|FieldDecl) 0x\w+ <[^']*> \S+ ([^']*)'([^']*__generic[^']*[*&][^']*)'"
)


class LintFinding(NamedTuple):
    """A declaration without an address space."""

    location: str
    variable: str
    type: str


def find_generic_pointers(dump: str, source_map: SourceMap) -> list[LintFinding]:
    """Pointers and references in the user's text that clang had to make generic."""
    findings: list[LintFinding] = []
    line = 0
    implicit_depth = None  # inside a constructor or operator that clang added
    for text in dump.splitlines():
        for number in re.findall(r"(?:line|\.metal|\.h):(\d+):\d+", text):
            line = int(number)
        tree = _TREE.match(text)
        depth = len(tree[0]) if tree else 0
        if implicit_depth is not None and depth > implicit_depth:
            continue
        implicit_depth = depth if _IMPLICIT_FUNCTION.search(text) else None
        found = _GENERIC_DECLARATION.search(text)
        if not found or not source_map.contains(line):
            continue
        words = [w for w in found[1].split() if w not in {"used", "referenced", "implicit"}]
        finding = LintFinding(source_map.describe(line), words[0] if words else "", found[2])
        if "implicit" not in found[1].split() and finding not in findings:
            findings.append(finding)
    return findings
