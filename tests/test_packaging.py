"""The package installs from a wheel, editable and from a bare checkout, and carries all that it needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import mlx_paged

REPOSITORY = Path(__file__).parent.parent
PARTS = ["mlx_paged", "metal", "cuda", "models", "tests/metalsim", "pyproject.toml", "README.md", "LICENSE"]
PROBES = ["metal/probe.metal", "metal/probe.h", "cuda/probe.cu", "cuda/probe.cuh"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with a file of every kind that kernels come in."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            shutil.copy(source, folder / part)
    for probe in PROBES:
        (folder / probe).write_text("// a kernel\n")
    return folder


def _run(*command: str | Path, cwd: Path) -> str:
    """The command's output, run in a folder of its own and without what this process has on its path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """The interpreter of a new environment that sees pip and the dependencies installed here, but not this project."""
    _run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # Folders named in a .pth file are searched, but .pth files in them (an editable install's) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    _run(*pip, "--wheel-dir", out, checkout, cwd=out)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_sources_kernels_and_the_demo_model_without_its_training(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"mlx_paged/{probe}" for probe in PROBES} | {"mlx_paged/server/page.html"} <= names
    for folder in ("mlx_paged", "models"):
        expected = {path.name for path in (REPOSITORY / folder).glob("*.py")}
        assert expected <= {Path(name).name for name in names}
    demo = {path.name for path in (REPOSITORY / "models" / "demo").iterdir() if path.is_file()}
    weights = {name for name in demo if not name.endswith(".py")}
    assert {Path(name).name for name in names if name.startswith("mlx_paged/models/demo/")} == weights
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= weights
    assert {"train.py", "stories.py"} <= demo  # what made the model stays in the repository
    tops = {name.split("/")[0] for name in names}
    assert not any("metalsim" in name for name in names)
    assert tops - {"mlx_paged"} == {next(top for top in tops if top.endswith(".dist-info"))}


@pytest.mark.slow
def test_the_source_distribution_is_a_checkout_in_which_tests_run(tmp_path: Path) -> None:
    """Of a copy of what git has, since a clone is where releases are made."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no clone, so there is no list of its files")
    tracked = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY).splitlines()
    for name in tracked:
        if (REPOSITORY / name).exists():
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / "clone" / name)
    make = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    _run(sys.executable, "-c", make, cwd=tmp_path / "clone")
    (made,) = tmp_path.glob(f"mlx_paged-{mlx_paged.__version__}.tar.gz")
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / made.name.removesuffix(".tar.gz")
    missing = {name for name in tracked if (tmp_path / "clone" / name).exists() and not (unpacked / name).exists()}
    assert missing == set()
    assert not [path for path in unpacked.rglob("*") if path.name == "__pycache__" or path.suffix == ".pyc"]
    _run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/blocks/test_allocator.py", cwd=unpacked)


def test_the_changelog_begins_with_this_version() -> None:
    (first, *_) = re.findall(r"^## (\S+?),? ", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first == mlx_paged.__version__


def _generates(python: Path, cwd: Path, package_root: Path, *command: str | Path) -> None:
    """The command writes a story, with the package that lies under `package_root`."""
    where = _run(python, "-c", "import mlx_paged, mlx_paged.models.hub as h; print(mlx_paged.__file__)", cwd=cwd)
    assert Path(where.strip()).resolve().is_relative_to(package_root.resolve())
    text = _run(*(command or (python, "-m", "mlx_paged")), "generate", "Tell me a story.", "-m", "8", cwd=cwd)
    assert len(text.split()) >= 4


@pytest.mark.slow
def test_installed_from_a_wheel_it_generates(wheel: Path, fresh_python: Path, tmp_path: Path) -> None:
    _run(fresh_python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    _generates(fresh_python, tmp_path, tmp_path / "venv", fresh_python.parent / "mlx-paged")
    kernels = "from importlib.resources import files; print(*(p.name for p in files('mlx_paged.metal').iterdir()))"
    assert "probe.metal" in _run(fresh_python, "-c", kernels, cwd=tmp_path)


@pytest.mark.slow
def test_installed_editable_it_generates(checkout: Path, fresh_python: Path, tmp_path: Path) -> None:
    install = (fresh_python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    _run(*install, "-e", checkout, cwd=tmp_path)
    _generates(fresh_python, tmp_path, checkout, fresh_python.parent / "mlx-paged")


def test_from_a_bare_checkout_it_generates(checkout: Path, fresh_python: Path) -> None:
    _generates(fresh_python, checkout, checkout)


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        ("libmlx.so: cannot open shared object file", "mlx has no backend here: install mlx-paged with one"),
        ("libcuda.so.1: cannot open shared object file", "driver is missing or too old for CUDA 13"),
        ("cudaMallocManaged(&data, size) failed: no CUDA-capable device is detected", "for the CPU install"),
    ],
)
def test_an_mlx_that_cannot_start_is_one_line_on_what_to_install(why: str, expected: str, tmp_path: Path) -> None:
    """As it fails without a backend's package, and that of CUDA without a driver and without a device."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(f"raise ImportError({why!r})\n")
    for arguments in (["generate", "Hello"], ["bench"], ["inspect"]):
        done = subprocess.run(
            [sys.executable, "-m", "mlx_paged", *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("mlx-paged: ") and expected in line and line.endswith(f"({why})")
