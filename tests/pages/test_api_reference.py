"""The API reference builds without warnings, and what it shows says what it is."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_paged
from mlx_paged import outputs
from mlx_paged.engine import engine, profile
from mlx_paged.tools import block_picture

ROOT = Path(__file__).parents[2]


def test_the_reference_builds_and_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="the extra docs is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error", str(ROOT / "docs" / "api.py"), str(tmp_path / "api")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == f"open {tmp_path / 'api' / 'index.html'}\n"
    page = (tmp_path / "api" / "mlx_paged.html").read_text()
    for name in mlx_paged.__all__:
        assert f'id="{name}"' in page, name
    for module, name in {
        "outputs": "RequestOutput",
        "engine/engine": "Engine.step",
        "engine/profile": "Profile.write",
    }.items():
        assert f'id="{name}"' in (tmp_path / "api" / "mlx_paged" / f"{module}.html").read_text()


@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [("docs/api.py", "pdoc", "docs"), ("benchmarks/plots.py", "matplotlib", "plots")],
)
def test_a_script_without_its_extra_names_it(script: str, package: str, extra: str) -> None:
    code = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path({str(ROOT / script)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"{script} needs {package}: pip install -e '.[{extra}]'\n"


def test_every_public_name_and_every_method_that_does_something_has_a_docstring() -> None:
    shown = [getattr(mlx_paged, name) for name in mlx_paged.__all__]
    for module in (block_picture, engine, outputs, profile):
        names = [name for name in vars(module) if not name.startswith("_")]
        shown += [
            value for name in names if getattr(value := getattr(module, name), "__module__", "") == module.__name__
        ]
    assert len(shown) > 15
    for each in shown:
        assert inspect.getdoc(each), each
        for name, member in vars(each).items() if inspect.isclass(each) else ():
            if not name.startswith("_") and inspect.isfunction(member):
                assert inspect.getdoc(member), f"{each.__name__}.{name}"
