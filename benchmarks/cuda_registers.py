"""Registers, spills and shared memory of the CUDA kernels, by NVIDIA's compiler: no card is needed.

    python benchmarks/cuda_registers.py

A multiprocessor has 65,536 registers; `blocks` is how many blocks of the kernel they and 227 KB of shared memory (as
of an H100) have room for at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import report

sys.path.append(str(Path(__file__).parents[1] / "tests"))
cuda_text, nvrtc = map(importlib.import_module, ("helpers.cuda_text", "helpers.nvrtc"))

SHARED_BYTES = 227 << 10
REGISTERS = 65536
DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]


def calls(quick: bool) -> Iterator[tuple[str, Any]]:
    """What is compiled, and what it is for."""
    for dtype in (mx.bfloat16,) if quick else (mx.bfloat16, mx.float32):
        name = str(dtype).removeprefix("mlx.core.")
        for dims in DIMS[2:3] if quick else DIMS:
            for heads in (4, 16):
                yield f"{name} {dims[0]}/{dims[1]}, {heads} heads", cuda_text.record("decode", heads, dtype, dims)
            yield f"{name} {dims[0]}/{dims[1]}", cuda_text.record("prefill", 4, dtype, dims)
        for heads in (16, 128) if dtype == mx.bfloat16 else ():
            yield f"{name} 576/512, {heads} heads", cuda_text.record("latent", heads, dtype, (576, 512))
        for codes in ("int8", "k8v4", "fp8") if dtype == mx.bfloat16 and not quick else ():
            for dims in ((128, 128), (256, 256)):
                what = f"{name} {dims[0]}/{dims[1]} as {codes}"
                for heads in (4, 16):
                    yield f"{what}, {heads} heads", cuda_text.record("decode", heads, dtype, dims, codes=codes)
                yield what, cuda_text.record("prefill", 4, dtype, dims, codes=codes)
            yield what, cuda_text.record_write(dtype, dims, codes=codes)
        yield f"{name} {DIMS[-1][0]}", cuda_text.record_merge(dtype, DIMS[-1][0])
        yield f"{name} {DIMS[-1][0]}/{DIMS[-1][1]}", cuda_text.record_write(dtype, DIMS[-1])
    yield "a vocabulary", cuda_text.record_draw()


def registers(quick: bool) -> list[report.Row]:
    rows = []
    for what, call in calls(quick):
        for architecture in ("sm_90a",) if quick else ("sm_80", "sm_90a", "sm_100a"):
            resources = nvrtc.compile_for(architecture, call.text)
            by_registers = REGISTERS // (-(-resources.registers // 8) * 8 * call.threads)
            by_memory = SHARED_BYTES // (call.shared_bytes + 1024)  # what the system keeps of each block's
            rows.append(
                {
                    "kernel": call.kernel,
                    "what": what,
                    "architecture": architecture,
                    "threads": call.threads,
                    "shared_bytes": call.shared_bytes,
                    "blocks": min(by_registers, by_memory, 2048 // call.threads),
                    **resources._asdict(),
                }
            )
    return rows


PARTS = [
    report.Part(
        registers,
        "Registers",
        {
            "kernel": ("kernel", ""),
            "what": ("for", ""),
            "architecture": ("card", ""),
            "threads": ("threads", ""),
            "registers": ("registers", ""),
            "spill_stores": ("spilled bytes", ""),
            "shared_bytes": ("shared bytes", ","),
            "blocks": ("blocks", ""),
        },
    )
]

if __name__ == "__main__":
    report.main("cuda_registers.py", __doc__ or "", PARTS)
