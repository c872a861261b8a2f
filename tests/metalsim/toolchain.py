"""Finds the compiler: clang 16 or newer, which has the C++ for OpenCL dialect kernels need."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_directory

MINIMUM_CLANG = 16
_NEWEST_CLANG = 23


class ToolchainError(RuntimeError):
    """No usable compiler, or an unsupported platform. The message says what to install."""


class CompileError(Exception):
    """The kernel does not compile; the message holds the compiler's, in the kernel's own lines."""


@dataclass(frozen=True)
class Toolchain:
    """Commands that compile and link, and what tells them from others in the cache.

    Nothing is linked to: what a library lacks it finds in the process that loads it. So no C++ library is needed.
    """

    clang: tuple[str, ...]  #: compiles kernels
    cplusplus: tuple[str, ...]  #: compiles the runtime, with the system's headers
    linker: tuple[str, ...]
    version: str

    def run(self, command: Sequence[str], arguments: Sequence[str | Path], purpose: str) -> str:
        """Runs one of the commands; returns its output, or raises CompileError with its diagnostics if it fails."""
        done = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, env=self.environment(), check=False
        )
        if done.returncode:
            raise CompileError(f"{purpose} failed:\n{done.stderr[-8000:]}")
        return done.stdout

    @staticmethod
    def environment() -> dict[str, str]:
        """The process's, with zig's own caches beside ours."""
        zig_cache = str(cache_directory() / "zig")
        return {**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig_cache, "ZIG_LOCAL_CACHE_DIR": zig_cache}


@functools.cache
def find_toolchain() -> Toolchain:
    """The compiler named by ``METALSIM_CLANG``, else the best installed one.

    Raises ToolchainError if there is none, or off Linux.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise ToolchainError("metalsim runs on Linux on x86-64 or aarch64")
    too_old = []
    for clang, cplusplus, linker in _candidates():
        version = _version(clang)
        if version is None:
            continue
        number = re.search(r"clang version (\d+)", version)
        if number and int(number[1]) >= MINIMUM_CLANG:
            return Toolchain(clang, cplusplus, linker, version)
        too_old.append(version.splitlines()[0])
    found = f" (too old: {'; '.join(too_old)})" if too_old else ""
    raise ToolchainError(
        f"Metal kernels are tested with clang {MINIMUM_CLANG} or newer, and none was found{found}: "
        "pip install 'mlx-paged[test]' brings one (as ziglang), or name one in METALSIM_CLANG"
    )


def _candidates() -> Iterator[tuple[tuple[str, ...], ...]]:
    """The commands for kernels, runtime and linking, best first."""
    chosen = os.environ.get("METALSIM_CLANG")
    if chosen:
        command = tuple(shlex.split(chosen))
        yield command, command, (*command, "-nostdlib")
        return
    versions = sorted(range(MINIMUM_CLANG, _NEWEST_CLANG + 1), key=lambda v: abs(v - 19))
    for name in [f"clang++-{v}" for v in versions] + ["clang++"]:
        path = shutil.which(name)
        if path:
            yield (path,), (path,), (path, "-nostdlib")
    ziglang = importlib.util.find_spec("ziglang")
    if ziglang and ziglang.origin:
        zig = str(Path(ziglang.origin).with_name("zig"))
        yield (zig, "clang"), (zig, "c++"), (zig, "ld.lld")


def _version(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if re.search(r"clang version \d+", done.stdout) else None


@functools.cache
def machine_flags() -> tuple[str, ...]:
    """Instruction sets worth using; half precision is slow without F16C."""
    if platform.machine() != "x86_64":
        return ()
    features = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    wanted = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
    return ("-march=x86-64-v3",) if features and wanted <= set(features[1].split()) else ()
