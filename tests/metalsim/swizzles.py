"""Generates the swizzles of ``vec<T, N>`` (``v.xyz``, ``v.zw = ...``) for the shim headers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

_COORDINATES = "xyzw"
_COLOURS = "rgba"


def swizzle_header() -> str:
    """The text of ``metalsim_swizzles.inc``: macros ``METALSIM_SWIZZLES_2/3/4(T)``.

    A swizzle is a property (clang's ``__declspec(property)``): reading it calls a getter, and
    assigning to it a setter where no component repeats. Of the colour names only those that
    kernels use are defined: all triples, and permutations of ``rgba``.
    """
    lines = []
    for width in (2, 3, 4):
        members = list(_members(width))
        lines.append(f"#define METALSIM_SWIZZLES_{width}(T) \\")
        lines += [f"  {member} \\" for member in members[:-1]]
        lines.append(f"  {members[-1]}")
    return "\n".join(lines) + "\n"


def _members(width: int) -> Iterator[str]:
    """The member declarations for vectors of that width."""
    for length in (2, 3, 4):
        for picked in product(range(width), repeat=length):
            coordinates = "".join(_COORDINATES[i] for i in picked)
            distinct = len(set(picked)) == length
            vector = f"vec<T, {length}>"
            arguments = ", ".join(coordinates)
            for qualifier in ("const", "const constant"):
                yield (f"constexpr {vector} get_{coordinates}() {qualifier} {{ return {vector}({arguments}); }}")
            accessors = f"get = get_{coordinates}"
            if distinct:
                assignments = " ".join(f"{_COORDINATES[i]} = v.{_COORDINATES[k]};" for k, i in enumerate(picked))
                yield f"void set_{coordinates}({vector} v) {{ {assignments} }}"
                accessors += f", put = set_{coordinates}"
            names = [coordinates]
            if width > 2 and (length == 3 or (length == 4 and distinct)):
                names.append("".join(_COLOURS[i] for i in picked))
            for name in names:
                yield f"__declspec(property({accessors})) {vector} {name};"
