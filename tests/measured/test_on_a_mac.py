"""The script that is run on a Mac: its parts as far as they go elsewhere, and what it does when one of them fails."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from helpers.budget import LONG
from helpers.parts_here import run_here

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "on_a_mac.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A Python that only says what it was asked to do."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $*"\n')
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


def test_files_are_looked_for_where_it_is_run(stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("--anywhere", "--python", f"./{stub.name}", "--output", "report.json")
    assert done.stdout == f"ran benchmarks/on_a_mac.py --json {tmp_path / 'report.json'}\n"
    assert not (ROOT / "report.json").exists()
    done = run("--anywhere", "--python", "nowhere/python")
    assert (done.returncode, done.stderr) == (2, f"on_a_mac.sh: there is no {tmp_path}/nowhere/python\n")


def test_an_old_python_is_refused_before_an_environment_is_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "python3"  # as Xcode brings it; what an environment was made of it keeps
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.6\nexit $(($# - 1))\n')
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    done = run("--anywhere", "--output", tmp_path / "report.json")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "python3 is Python 3.9.6, and 3.11 or newer is needed" in done.stderr
    assert not (tmp_path / "report.json").exists()


def test_it_hands_over_to_the_parts_with_the_options_that_are_theirs(stub: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = run("--anywhere", "--quick", "--only", "decode", "--python", stub, "--output", file)
    assert done.stdout == f"ran benchmarks/on_a_mac.py --json {file} --quick --only decode\n"
    assert not file.exists(), "parts add to a file that is there, and this one is empty"


def names() -> list[str]:
    return [part.run.__name__ for part in importlib.import_module("on_a_mac").PARTS]


def test_the_test_files_that_it_runs_exist() -> None:
    on_a_mac = importlib.import_module("on_a_mac")
    named = [file for files in (*on_a_mac.TESTS.values(), on_a_mac.QUICK_TESTS) for file in files]
    assert [file for file in named if not (ROOT / "tests" / file).is_file()] == []


@pytest.mark.slow
def test_a_quick_run_answers_every_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_mac, file = importlib.import_module("on_a_mac"), tmp_path / "report.json"
    speed = {"test": "tg2", "batch": 1, "tokens_per_s": 1.0, "deviation": 0.0}
    bench = SimpleNamespace(returncode=0, stdout=json.dumps({"results": {"speed": [speed]}}))
    ended = importlib.import_module("limited").Ended(0, 0.5, "== 3 passed, 1 skipped in 0.50s ==\n")
    monkeypatch.setattr(importlib.import_module("gpu_serving"), "run_python", lambda *_, **__: bench)
    monkeypatch.setattr(importlib.import_module("device_parts"), "run_limited", lambda *_: ended)
    monkeypatch.setattr(on_a_mac, "run_limited", lambda *_: ended)
    slower = {"short_prompts"}  # test_hybrids.py tries it
    asked = [name for name in names() if name not in slower]
    said = run_here(monkeypatch, on_a_mac.main, "on_a_mac.py", "--quick", "--json", file, "--only", ",".join(asked))
    assert said == ""
    content = json.loads(file.read_text())
    without_kernels = {"sharing_costs"} if mx.default_device() == mx.cpu else set()
    assert set(content["results"]) == set(asked) - without_kernels
    assert list(content["parts"]) == asked and {part["ended"] for part in content["parts"].values()} == {"whole"}
    assert {"os", "commit", "mlx", "mlx_lm"} <= set(content["machine"])
    assert content["results"]["kernel_tests"][0]["result"] == "whole: 3 passed, 1 skipped in 0.50s"
    assert {"macos", "chip", "gpu cores"} <= {row["what"] for row in content["results"]["device"]}
    assert capsys.readouterr().out.splitlines()[-1] == f"Please send back this file: {file}"


@pytest.mark.skipif(not LONG, reason="takes long: MLX_PAGED_LONG_TESTS=1 runs it")
@pytest.mark.slow
def test_a_quick_run_in_processes_of_their_own_answers_too(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = run("--anywhere", "--quick", "--python", sys.executable, "--output", file)
    assert done.stdout.splitlines()[-1] == f"Please send back this file: {file}", done.stdout + done.stderr
    content = json.loads(file.read_text())
    assert list(content["parts"]) == names()
    assert content["results"]["generate"][0]["profile"]["traceEvents"]
    assert not any(part["ended"] == "failed" for part in content["parts"].values())
