"""Compiles kernels: C++ for OpenCL -> LLVM IR -> instrumented LLVM IR -> shared library, cached by content."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_directory, digest, publish
from .ir import expose_threadgroup_memory, keep_loops, number_checks
from .lint import DUMP, LintFinding, find_generic_pointers
from .swizzles import swizzle_header
from .toolchain import CompileError, find_toolchain, machine_flags
from .translate import SourceMap, Translation, drop_thread_qualifiers, translate_kernel

_PACKAGE = Path(__file__).parent
# fmt: off
_METAL_HEADERS = (
    "atomic", "common", "compute", "geometric", "integer", "limits", "logging", "math", "matrix", "pack",
    "relational", "simdgroup", "simdgroup_matrix", "stdlib", "type_traits", "types",
)
# fmt: on
_PREAMBLE_HEADER = "mlx/backend/metal/kernels/utils.h"

_DIALECT = (
    "-x",
    "clcpp",
    "-cl-std=clc++2021",
    "-cl-no-stdinc",
    "-fdeclspec",
    "-Xclang",
    "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64",
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",
    "-fPIC",
    "-gline-tables-only",
    "-w",
)
_UNDEFINED = (
    "alignment,array-bounds,shift-base,shift-exponent,signed-integer-overflow,"
    "integer-divide-by-zero,float-cast-overflow,return"
)
_CHECKED_DIALECT = (
    "-fsanitize=thread",
    "-Xclang",
    f"-fsanitize={_UNDEFINED}",
    "-Xclang",
    f"-fsanitize-recover={_UNDEFINED}",
    "-Xclang",
    "-fsanitize-minimal-runtime",
)
_CHECKED_OPTIMISATION = (
    "-O1",
    "-finline-functions",
    "-funroll-loops",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fsanitize=thread",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-read-before-write=1",
)
# By MLX's numbering of math modes: safe, relaxed, fast.
_MATH_MODES = (
    (),
    ("-funsafe-math-optimizations", "-fno-math-errno"),
    ("-ffast-math", "-D__FAST_MATH__=1"),
)


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel in the cache."""

    library: Path
    function: str
    parameters: tuple[str, ...]  #: buffers in binding order
    variables: tuple[str, ...]  #: symbols of the threadgroup variables
    places: tuple[str, ...]  #: of the checks in the source, by their numbers
    lint: tuple[LintFinding, ...]
    source_map: SourceMap
    compile_seconds: float  #: 0 if it was cached


def compile_kernel(function: str, text: str, kernel: str, *, checked: bool, math_mode: int) -> CompiledKernel:
    """Compiles MLX's text for a kernel.

    Args:
        function: the function's name in the text.
        text: what MLX generated.
        kernel: the user's name for the kernel, for messages.
        checked: with instrumentation.
        math_mode: MLX's number for it.

    Raises:
        CompileError: with the compiler's diagnostics, placed in the user's header and source.
        ToolchainError: without a compiler.
    """
    translation = translate_kernel(function, text, kernel)
    variant = _Variant(checked, math_mode)
    entry = _base() / f"kernel-{digest(translation.text, repr(variant))}"
    started = time.monotonic()
    is_new = publish(entry, lambda work: _build_kernel(work, translation, variant))
    facts = json.loads((entry / "facts.json").read_text())
    return CompiledKernel(
        library=entry / "kernel.so",
        function=function,
        parameters=translation.parameters,
        variables=tuple(facts["variables"]),
        places=tuple(facts["places"]),
        lint=tuple(LintFinding(*finding) for finding in facts["lint"]),
        source_map=translation.source_map,
        compile_seconds=time.monotonic() - started if is_new else 0.0,
    )


@functools.cache
def runtime_library() -> Path:
    """The simulator's own library, which kernels call."""

    def build(work: Path) -> None:
        toolchain = find_toolchain()
        flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-w", "-fno-exceptions", "-fno-rtti"]
        # longjmp between stacks is what the simulator does; do not let glibc object
        flags += ["-fno-c++-static-destructors", "-U_FORTIFY_SOURCE"]
        source, binary = _PACKAGE / "runtime" / "runtime.cpp", work / "runtime.o"
        toolchain.run(toolchain.cplusplus, [*flags, "-c", source, "-o", binary], "compiling the simulator")
        toolchain.run(toolchain.linker, ["-shared", binary, "-o", work / "runtime.so"], "linking the simulator")

    publish(_base() / "runtime", build)
    return _base() / "runtime" / "runtime.so"


@dataclass(frozen=True)
class _Variant:
    """How a kernel's text is compiled; determines the precompiled preamble it can use."""

    checked: bool
    math_mode: int

    def dialect(self) -> list[str]:
        checked = _CHECKED_DIALECT if self.checked else ()
        target = ("-target", f"{os.uname().machine}-linux-gnu")
        return [*_DIALECT, *target, *machine_flags(), *checked, *_MATH_MODES[self.math_mode]]

    def optimisation(self) -> tuple[str, ...]:
        return _CHECKED_OPTIMISATION if self.checked else ("-O2",)

    def code_generation(self) -> tuple[str, ...]:
        """Quickly where the checks take most of the time anyway: it was half of the time to compile."""
        return ("-O0",) if self.checked else ("-O2",)


@functools.cache
def _base() -> Path:
    """The part of the cache for this compiler, machine, MLX and version of the simulator."""
    files = sorted(p for p in _PACKAGE.rglob("*") if p.suffix in {".py", ".cpp", ".h", ".inc"})
    preamble = _mlx_preamble()
    version = find_toolchain().version
    base = cache_directory() / digest(version, " ".join(machine_flags()), preamble, *(p.read_bytes() for p in files))

    def build(work: Path) -> None:
        shutil.copytree(_PACKAGE / "include", work, dirs_exist_ok=True)
        (work / "metalsim_swizzles.inc").write_text(swizzle_header())
        for name in _METAL_HEADERS:
            (work / f"metal_{name}").write_text('#include "metalsim.h"\n')
        (work / "preamble.cl").write_text(f'#include "metalsim.h"\n{preamble}\n')

    publish(base / "include", build)
    return base


def _mlx_preamble() -> str:
    """What MLX puts before every custom kernel, from the installed package's headers."""
    import mlx

    for root in mlx.__path__:
        include = Path(root) / "include"
        if (include / _PREAMBLE_HEADER).is_file():
            return drop_thread_qualifiers("\n".join(_flatten(_PREAMBLE_HEADER, include, set())))
    raise CompileError(f"the installed mlx package has no include/{_PREAMBLE_HEADER}")


def _flatten(header: str, include: Path, seen: set[str]) -> list[str]:
    """The header's lines with its quoted includes in place, each once."""
    if header in seen:
        return []
    seen.add(header)
    lines = [f'#line 1 "{header}"']
    for number, line in enumerate((include / header).read_text().splitlines(), 1):
        included = re.match(r'\s*#include "(.*)"', line)
        if included:
            lines += _flatten(included[1], include, seen)
            lines.append(f'#line {number + 1} "{header}"')
        else:
            lines.append("" if line.startswith("#pragma once") else line)
    return lines


@functools.cache
def _precompiled_preamble(variant: _Variant) -> Path:
    include = _base() / "include"

    def build(work: Path) -> None:
        toolchain = find_toolchain()
        output = ["-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp"]
        output += ["-Xclang", "-o", "-Xclang", str(work / "preamble.pch")]
        flags = [*variant.dialect(), *variant.optimisation(), f"-I{include}", "-fsyntax-only", *output]
        toolchain.run(toolchain.clang, [*flags, include / "preamble.cl"], "compiling MLX's kernel headers")

    entry = _base() / f"preamble-{digest(repr(variant))}"
    publish(entry, build)
    return entry / "preamble.pch"


def _build_kernel(work: Path, translation: Translation, variant: _Variant) -> None:
    toolchain = find_toolchain()
    source_map = translation.source_map
    source, plain, final, binary = (work / f"kernel.{kind}" for kind in ("cl", "ll", "final.ll", "o"))
    source.write_text(translation.text)
    front = [*variant.dialect(), *variant.optimisation(), "-include-pch", str(_precompiled_preamble(variant))]
    without_passes = ["-Xclang", "-disable-llvm-passes"]
    emit = [*without_passes, "-S", "-emit-llvm", "-o", plain, source]
    try:
        toolchain.run(toolchain.clang, [*front, *emit], f"compiling {source_map.kernel}")
    except CompileError as error:
        raise CompileError(source_map.translate(str(error))) from None
    text, variables = expose_threadgroup_memory(plain.read_text())
    plain.write_text(keep_loops(text) if variant.checked else text)
    back = [*machine_flags(), "-fPIC", "-w", "-x", "ir"]
    purpose = f"generating code for {source_map.kernel}"
    toolchain.run(toolchain.clang, [*variant.optimisation(), *back, "-S", "-emit-llvm", plain, "-o", final], purpose)
    text, places = number_checks(final.read_text(), source_map)
    final.write_text(text)
    code = [*variant.code_generation(), *back, *without_passes]
    toolchain.run(toolchain.clang, [*code, "-c", final, "-o", binary], purpose)
    toolchain.run(toolchain.linker, ["-shared", binary, "-o", work / "kernel.so"], f"linking {source_map.kernel}")
    facts = {"variables": variables, "places": places, "lint": _lint(translation, [*front, source])}
    (work / "facts.json").write_text(json.dumps(facts))
    for temporary in (plain, final, binary):
        temporary.unlink()


def _lint(translation: Translation, arguments: list[str | Path]) -> list[LintFinding]:
    """What is found in the syntax tree; looked for in one instance of a template, since it is the same in all."""

    def build(work: Path) -> None:
        dump = find_toolchain().run(find_toolchain().clang, [*DUMP, *arguments], "dumping the syntax tree")
        (work / "findings.json").write_text(json.dumps(find_generic_pointers(dump, translation.source_map)))

    entry = _base() / f"lint-{digest(translation.source_map.kernel, translation.written)}"
    publish(entry, build)
    return [LintFinding(*finding) for finding in json.loads((entry / "findings.json").read_text())]
