"""The script that is run on a Mac: its parts as far as they go elsewhere, and what it does when one of them fails."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.budget import LONG

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "on_a_mac.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


def run(*arguments: object, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    root = script.parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A copy of the script whose Python does nothing but fail in the tests, and say so."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in\n"- "*) exec "{sys.executable}" "$@" ;;\n*pytest*) echo "1 failed"; exit 3 ;;\n'
        '*"bench -p"*) echo "a note"\n'
        'echo \'[{"test": "pp16", "mb": "\'$MLX_MAX_MB_PER_BUFFER$MLX_PAGED_WRITE\'"}]\' ;;\n'
        '*) echo "ran $*" ;;\nesac\n'
    )
    python.chmod(0o755)
    return python


def test_bash_reads_the_script() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).stderr == b""


@pytest.mark.skipif(platform.machine() == "arm64", reason="this is a Mac")
def test_on_another_machine_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "report.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "not a Mac" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--quik"], "no option --quik"), (["--output"], "--output needs"), (["--quick", "--python"], "--python needs")],
)
def test_bad_usage_is_one_line(arguments: list[str], reason: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr and done.stderr.count("\n") == 1


def test_a_report_that_cannot_be_written_is_one_line_before_anything_runs(tmp_path: Path) -> None:
    done = run("--anywhere", "--quick", "--output", tmp_path / "nowhere" / "report.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere/report.json can't be written" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(not LONG, reason="takes long: MLX_PAGED_LONG_TESTS=1 runs it")
@pytest.mark.slow
def test_a_quick_run_reports_every_step_and_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = run("--anywhere", "--quick", "--python", sys.executable, "--output", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"all done; please send back {file}\n")
    report = json.loads(file.read_text())
    assert {"platform", "chip", "macos", "commit", "device", "mlx", "mlx-lm"} <= set(report["machine"])
    names = [step["name"] for step in report["steps"]]
    assert names[:3] == ["device", "tests", "generate"]
    assert all(step["exit_code"] == 0 and step["seconds"] >= 0 and step["output"] for step in report["steps"])
    assert report["profile"]["traceEvents"]
    assert report["prefill_kernel"]["results"] and report["prefill_gathered"]["results"]
    assert report["attention"]["results"] and report["latent"]["results"] and report["bench"]
    assert report["draws"]["results"]
    assert report["layouts"]["results"] and report["hybrids"]["results"]


def test_a_step_that_fails_is_reported_and_the_others_run(stub: Path, tmp_path: Path) -> None:
    script, file = tmp_path / "benchmarks" / SCRIPT.name, tmp_path / "report.json"
    done = run("--anywhere", "--python", stub, "--output", file, script=script)
    assert done.returncode == 1
    assert f"failed: tests; {file} says how" in done.stdout
    report = json.loads(file.read_text())
    steps = {step["name"]: step for step in report["steps"]}
    assert [(name, step["exit_code"]) for name, step in steps.items()] == [
        ("device", 0),
        ("tests", 3),
        ("generate", 0),
        ("attention", 0),
        ("prefill-kernel", 0),
        ("prefill-gathered", 0),
        ("latent", 0),
        ("draws", 0),
        ("layouts", 0),
        ("hybrids", 0),
        ("bench", 0),
        ("bench-large-buffers", 0),
        ("bench-scatter", 0),
    ]
    assert steps["tests"]["output"] == "1 failed\n"
    assert steps["generate"]["output"].startswith("ran -m mlx_paged generate")
    assert report["bench"] == [{"test": "pp16", "mb": ""}]
    assert report["bench_large_buffers"] == [{"test": "pp16", "mb": "1000000"}]
    assert report["bench_scatter"] == [{"test": "pp16", "mb": "scatter"}]
    assert report["attention"] is None and report["machine"]["device"] is None
