"""Run a benchmark as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
