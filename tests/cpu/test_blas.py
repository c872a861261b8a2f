"""OpenBLAS takes the place of MLX's own BLAS where it is installed, and nothing breaks where it is not."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_paged
from mlx_paged import LLM
from mlx_paged.cpu import blas

ROOT = Path(__file__).parents[2]
PRODUCT = """
import sys
import numpy as np
{first}
from mlx_paged import paged_attention
import mlx.core as mx
from mlx_paged.cpu.blas import advice, blas_name
a = np.random.default_rng(0).normal(size=(2, 60, 70)).astype(np.float32)
product = np.array(mx.matmul(mx.array(a), mx.array(a).swapaxes(1, 2)))
error = np.abs(product - a.astype(np.float64) @ a.astype(np.float64).swapaxes(1, 2)).max()
print(blas_name(), error < 1e-4, advice() is None, sep=";")
"""


def is_installed() -> bool:
    """Whether this system has an OpenBLAS, looked for in another process so that it is not loaded into this one."""
    code = "import ctypes; ctypes.CDLL('libopenblas.so.0')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="a Mac has Accelerate")
needs_openblas = pytest.mark.skipif(sys.platform != "linux" or not is_installed(), reason="OpenBLAS is not installed")


def run(first: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Multiply matrices with MLX in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "MLX_PAGED_BLAS")}
    env = inherited | {"PYTHONPATH": str(ROOT)} | environment
    code = PRODUCT.format(first=first)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


def library_of_products(log: Path) -> str:
    """The library that MLX's products were bound to, as the dynamic linker tells."""
    text = "".join(file.read_text(errors="replace") for file in log.parent.glob(f"{log.name}*"))
    (bound,) = set(re.findall(r"binding file \S*libmlx\.so \[0\] to (\S+) \[0\]: normal symbol `cblas_sgemm'", text))
    return Path(bound).name


@needs_openblas
@pytest.mark.parametrize("allowed", [True, False])
def test_the_system_s_openblas_multiplies_unless_it_is_turned_off(allowed: bool, tmp_path: Path) -> None:
    environment = {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(tmp_path / "log")}
    result = run(**environment, **({} if allowed else {"MLX_PAGED_BLAS": "0"}))
    name, exact, silent = result.stdout.strip().split(";")
    assert name.startswith("OpenBLAS ") if allowed else name == "MLX's own BLAS, a slow one"
    assert ("openblas" in library_of_products(tmp_path / "log")) == allowed
    assert (exact, silent) == ("True", "True")


@needs_openblas
def test_mlx_that_is_imported_first_is_a_warning_that_says_what_to_do() -> None:
    result = run("import mlx.core\nfrom mlx_paged import LLM")
    assert result.stderr.count("EngineWarning: MLX was imported before mlx_paged") == 1
    assert "LD_PRELOAD" in result.stderr and "MLX_PAGED_BLAS=0" in result.stderr
    assert result.stdout.startswith("MLX's own BLAS")
    assert run("import mlx.core", MLX_PAGED_BLAS="0").stderr == ""


@needs_openblas
@pytest.mark.parametrize("name", mlx_paged.__all__)
def test_each_public_name_has_it_loaded_before_mlx_may_be(name: str) -> None:
    assert run(f"from mlx_paged import {name}\nimport mlx.core").stdout.startswith("OpenBLAS ")


@needs_openblas
def test_the_warning_points_at_who_imported_too_late() -> None:
    assert re.search(r"<string>:\d+: EngineWarning", run("import mlx.core\nfrom mlx_paged import ModelError").stderr)


@needs_openblas
def test_a_server_is_given_it_too() -> None:
    begin = """
from click.testing import CliRunner
from mlx_paged.cli import main, serve
def stop(*_): raise OSError("enough")
serve._listen = stop
assert "enough" in CliRunner().invoke(main.cli, ["serve"]).output
"""
    result = run(begin)
    assert result.stderr == "" and result.stdout.startswith("OpenBLAS ")


@needs_openblas
def test_a_preloaded_blas_is_left_alone() -> None:
    result = run("import mlx.core", LD_PRELOAD="libopenblas.so.0")
    assert result.stderr == "" and result.stdout.startswith("OpenBLAS ")


@needs_linux
def test_where_none_is_installed_mlx_s_own_multiplies_and_a_line_says_what_to_install() -> None:
    result = run("import mlx_paged.cpu.blas as blas\nblas._LIBRARIES = ('libno-such-blas.so',)")
    assert (result.stdout.strip(), result.stderr) == ("MLX's own BLAS, a slow one;True;False", "")


def test_the_line_names_packages_and_is_not_for_those_who_turned_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_PAGED_BLAS", raising=False)
    monkeypatch.setattr(blas, "blas_name", lambda: blas.SLOW_BLAS)
    assert "apt install libopenblas0" in str(blas.advice())
    monkeypatch.setenv("MLX_PAGED_BLAS", "0")
    assert blas.advice() is None
    monkeypatch.delenv("MLX_PAGED_BLAS")
    monkeypatch.setattr(blas, "blas_name", lambda: None)
    assert blas.advice() is None


def test_stats_tell_which_one_multiplies() -> None:
    llm = LLM(num_kv_blocks=8)
    assert llm.stats().blas == blas.blas_name()


@needs_linux
def test_a_library_that_is_no_openblas_has_no_version() -> None:
    assert blas._version(ctypes.CDLL("libm.so.6")) is None and blas._version(None) is None
