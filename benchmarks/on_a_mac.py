"""What has to be seen on a Mac, in ten minutes at most: on_a_mac.sh runs it in an environment of its own.

Each part answers a question that only hardware can, runs in a process of its own within a limit, and is cut off at
that. The file of results is written after each part, with the rows of a part that failed or was cut off as far as it
came. No model is downloaded. **It has not been run on a Mac yet.**
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hybrids  # isort: skip  (before mlx: where there is no GPU it has OpenBLAS looked for)
import attention
import decode_layouts
import mlx.core as mx
import mlx_lm
import report
from device_parts import ROOT, SHARING, WRITER, run_tests
from draws import DRAWS
from gpu_serving import END_TO_END, SUBMISSION, WRITES, end_to_end
from latent import LATENT
from limited import run_limited
from report import Part, Row

import mlx_paged

KERNEL_TESTS = ["decode", "write", "prefill", "shared", "latent", "engine"]
TESTS = {
    "kernel_tests": [f"attention/test_kernels_{name}.py" for name in KERNEL_TESTS]
    + ["sampling/test_draw_kernel.py", "attention/test_kernel_backend.py"],
    "engine_tests": ["models/test_demo.py", "system/test_memory_flat.py", "system/test_pipelining.py",
                     "system/test_parity.py", "attention/test_paged_attention.py", "cache/test_kv_cache.py"],
}  # fmt: skip
QUICK_TESTS = ["blocks/test_allocator.py"]
SECONDS = {"kernel_tests": 76, "engine_tests": 18}


def said_by(*command: str) -> str:
    """What a command prints, or nothing if there is none or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def device(quick: bool) -> Iterator[Row]:
    """What MLX and the system say of it."""
    about = {name: str(value) for name, value in mx.device_info().items()}
    about |= {"macos": platform.mac_ver()[0], "chip": said_by("sysctl", "-n", "machdep.cpu.brand_string")}
    cores = re.search(r'"gpu-core-count" = (\d+)', said_by("ioreg", "-rc", "AGXAccelerator", "-d1"))
    about |= {"gpu cores": cores[1] if cores else "", "memory": said_by("sysctl", "-n", "hw.memsize")}
    yield from ({"what": name, "is": value} for name, value in about.items())


def kernel_tests(quick: bool) -> Iterator[Row]:
    yield run_tests(QUICK_TESTS if quick else TESTS["kernel_tests"], "cuda", SECONDS["kernel_tests"])


def engine_tests(quick: bool) -> Iterator[Row]:
    yield run_tests(QUICK_TESTS if quick else TESTS["engine_tests"], "cuda", SECONDS["engine_tests"])


def generate(quick: bool) -> Iterator[Row]:
    """The model that comes with the project, and a profile of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        command = [sys.executable, "-m", "mlx_paged", "generate", "--verbose", "--profile", str(trace)]
        command += ["--max-tokens", "16"] if quick else []
        ended = run_limited([*command, "Tell me a story.", "Write a story about Tom."], 12)
        profile = json.loads(trace.read_text()) if trace.exists() else None
    yield {"result": ended.word, "output": ended.output[-20_000:], "profile": profile}


ENDED = {"result": ("", "")}
OF_ATTENTION = {part.run.__name__: part for part in attention.PARTS}
LAYOUTS, THREADS = decode_layouts.PARTS
SHORT_PROMPTS = next(part for part in hybrids.PARTS if part.run.__name__ == "short_prompts")
small_end_to_end = partial(end_to_end, models=["qwen2-0.5b"], most=32)
small_end_to_end.__name__ = "end_to_end"  # type: ignore[attr-defined]
PARTS = [
    Part(device, "The device", {"what": ("", ""), "is": ("", "")}, "Which Mac is this?", 10),
    WRITER._replace(limit_s=15),
    Part(
        kernel_tests, "Tests of the kernels", ENDED, "Does Apple's compiler take the kernels, and are they right?", 90
    ),
    OF_ATTENTION["decode"]._replace(limit_s=60),
    LAYOUTS._replace(limit_s=55),
    THREADS._replace(limit_s=20),
    SUBMISSION._replace(limit_s=50),
    WRITES._replace(limit_s=30),
    OF_ATTENTION["few_queries"]._replace(limit_s=40),
    OF_ATTENTION["prefill"]._replace(limit_s=40),
    DRAWS._replace(limit_s=20),
    SHARING._replace(limit_s=12),
    OF_ATTENTION["shared_prefix"]._replace(limit_s=16),
    OF_ATTENTION["long_heads"]._replace(limit_s=20),
    LATENT._replace(limit_s=22),
    END_TO_END._replace(run=small_end_to_end, limit_s=30),
    Part(engine_tests, "Tests of the engine", ENDED, "Are texts those of a CPU, and is memory flat?", 32),
    Part(generate, "A text", ENDED, "Does the bundled model tell a story, and what takes its steps' time?", 18),
    SHORT_PROMPTS._replace(limit_s=20, question="Are recurrences slower one after the other than in mlx-lm's batch?"),
]


def main() -> None:
    """Run the command line."""
    report.main(
        "on_a_mac.py",
        __doc__ or "",
        PARTS,
        apart=True,
        file=ROOT / "mlx-paged-on-a-mac.json",
        os=attention.operating_system(),
        commit=attention.commit(),
        mlx_lm=mlx_lm.__version__,
        mlx_paged=mlx_paged.__version__,
    )


if __name__ == "__main__":
    main()
