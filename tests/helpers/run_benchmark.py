"""Run a benchmark as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SOMETIMES = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "device_name", "architecture"}  # where set, on a GPU


def run_benchmark(*arguments: str | Path, script: str = "memory.py") -> str:
    """What a benchmark prints."""
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env=os.environ | {"PYTHONPATH": python_path, "COLUMNS": "160"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def check_machine(content: dict[str, Any], script: str, *versions: str) -> None:
    """A file of results says what it depends on beside the code, and which command repeats it."""
    expected = {"platform", "device", "cpu_count", "python", "mlx", "preloaded", "command", *versions}
    assert set(content["machine"]) - SOMETIMES == expected
    assert content["machine"]["command"].startswith(f"python benchmarks/{script}")
