"""Compiles CUDA text for any card without having one: the few functions of NVIDIA's library for it, through ctypes.

The library and its headers come from PyPI (`nvidia-cuda-nvrtc`, `nvidia-cuda-runtime`, `nvidia-cuda-cccl`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_PRECOMPILED_BYTES = 320 << 20  # room for the headers that all kernels share, compiled once

#: What MLX 0.32 puts in its header of that name, as far as kernels of ours see it.
HEADERS = {
    "mlx/backend/cuda/device/utils.cuh": """
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""
}


class NvrtcError(RuntimeError):
    """The text does not compile, or has warnings; the message is the compiler's."""


class Resources(NamedTuple):
    """What a thread and a block of a compiled kernel take. Bytes, except `registers`."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@functools.cache
def folder() -> Path | None:
    """Where the packages put library and headers, or None without them."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(root) / "cu13").joinpath("lib", "libnvrtc.so.13").exists():
            return found
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    root = folder()
    if root is None:
        raise NvrtcError("there is no NVRTC: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl")
    library = ctypes.CDLL(str(root / "lib" / "libnvrtc.so.13"))
    library.nvrtcSetPCHHeapSize(ctypes.c_size_t(_PRECOMPILED_BYTES))
    return library


def compile_for(architecture: str, text: str, options: Sequence[str] = ()) -> Resources:
    """Compile the text of one kernel to machine code, as MLX would for that card; warnings are errors.

    architecture: "sm_90", say. Raises NvrtcError.
    """
    library, root = _library(), folder()
    assert root is not None
    arguments = [
        f"--gpu-architecture={architecture}",
        "--device-as-default-execution-space",
        f"--include-path={root / 'include'}",
        f"--include-path={root / 'include' / 'cccl'}",
        "--pch",
        f"--pch-dir={_precompiled_headers(architecture)}",
        "--ptxas-options=--verbose",
        *options,
    ]
    program = ctypes.c_void_p()
    _run("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", len(HEADERS), *_strings(HEADERS))
    try:
        encoded = (ctypes.c_char_p * len(arguments))(*map(str.encode, arguments))
        failed = library.nvrtcCompileProgram(program, len(arguments), encoded)
        size = ctypes.c_size_t()
        _run("nvrtcGetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        _run("nvrtcGetProgramLog", program, log)
    finally:
        _run("nvrtcDestroyProgram", ctypes.byref(program))
    message = log.value.decode(errors="replace")
    if failed or "warning" in message.lower():
        raise NvrtcError(message)
    return _resources(message)


@functools.cache
def _precompiled_headers(architecture: str) -> str:
    """A folder for what all kernels for a card have in common; the library keeps the rest in memory."""
    return tempfile.mkdtemp(prefix=f"nvrtc-{architecture}-")


def _strings(headers: Mapping[str, str]) -> tuple[ctypes.Array[ctypes.c_char_p], ctypes.Array[ctypes.c_char_p]]:
    kind = ctypes.c_char_p * len(headers)
    return kind(*map(str.encode, headers.values())), kind(*map(str.encode, headers))


def _run(function: str, *arguments: object) -> None:
    if status := getattr(_library(), function)(*arguments):
        raise NvrtcError(f"{function} failed with {status}")


def _resources(log: str) -> Resources:
    """Read from ptxas's report of the only kernel."""

    def number(pattern: str) -> int:
        found = re.findall(pattern, log)
        if len(found) != 1:
            raise NvrtcError(f"no report of one kernel in: {log}")
        return int(found[0])

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
    )
