"""Compiles a CUDA kernel's text for the CPU: C++ -> LLVM IR -> numbered checks -> shared library, cached by content."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from metalsim.build import CompiledKernel
from metalsim.cache import cache_directory, digest, publish
from metalsim.ir import number_checks
from metalsim.toolchain import CompileError, find_toolchain, machine_flags
from metalsim.translate import SourceMap

_INCLUDE = Path(__file__).parent / "include"
_UNDEFINED = "array-bounds,shift-base,shift-exponent,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"
_DIALECT = (
    *("-x", "c++", "-std=c++20", "-nostdinc", "-nostdinc++", "-fno-exceptions", "-fno-rtti", "-fPIC", "-w"),
    *("-ffp-contract=off", "-ftrivial-auto-var-init=pattern", "-gline-tables-only", "-fno-threadsafe-statics"),
)
_CHECKED = (
    *("-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1", "-Xclang", f"-fsanitize={_UNDEFINED}"),
    *("-Xclang", f"-fsanitize-recover={_UNDEFINED}", "-Xclang", "-fsanitize-minimal-runtime"),
)
_OPTIMISATION = ("-O1", "-finline-functions", "-fno-vectorize", "-fno-slp-vectorize")


@dataclass(frozen=True)
class CudaSourceMap(SourceMap):
    """As its base, of a kernel in CUDA."""

    @property
    def file(self) -> str:
        return f"{self.kernel}.cu"


def compile_kernel(function: str, text: str, source_map: CudaSourceMap, parameters: tuple[str, ...]) -> CompiledKernel:
    """Compile `text`, whose function without parameters `function` runs a thread. Raises CompileError."""
    entry = cache_directory() / f"cuda-{digest(_version(), text)}"
    publish(entry, lambda work: _build(work, text, source_map))
    places = json.loads((entry / "places.json").read_text())
    return CompiledKernel(entry / "kernel.so", function, parameters, (), tuple(places), (), source_map, 0.0)


@functools.cache
def _version() -> str:
    files = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in {".py", ".h"})
    return digest(find_toolchain().version, " ".join(machine_flags()), *(path.read_bytes() for path in files))


def _build(work: Path, text: str, source_map: CudaSourceMap) -> None:
    toolchain = find_toolchain()
    source, checked, binary = (work / f"kernel.{kind}" for kind in ("cu", "ll", "o"))
    source.write_text(text)
    front = [*_DIALECT, *_CHECKED, *_OPTIMISATION, *machine_flags(), f"-I{_INCLUDE}", "-S", "-emit-llvm"]
    try:
        toolchain.run(toolchain.clang, [*front, source, "-o", checked], f"compiling {source_map.kernel}")
    except CompileError as error:
        raise CompileError(source_map.translate(str(error))) from None
    numbered, places = number_checks(checked.read_text(), source_map)
    checked.write_text(numbered)
    back = ["-O0", *machine_flags(), "-fPIC", "-w", "-x", "ir", "-Xclang", "-disable-llvm-passes", "-c"]
    toolchain.run(toolchain.clang, [*back, checked, "-o", binary], f"generating code for {source_map.kernel}")
    toolchain.run(toolchain.linker, ["-shared", binary, "-o", work / "kernel.so"], f"linking {source_map.kernel}")
    (work / "places.json").write_text(json.dumps(places))
    for temporary in (checked, binary):
        temporary.unlink()
