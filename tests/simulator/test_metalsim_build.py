"""The simulator's cache and compiler, and what stands in for MLX during a test."""

from __future__ import annotations

import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlx.core as mx
import pytest
from metalsim import ToolchainError, cache, fixture, simulator, toolchain
from metalsim.fixture import Metal

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a Mac runs kernels on its GPU, with nothing to compile")


def test_of_several_that_build_the_same_at_once_one_is_kept_whole(tmp_path: Path) -> None:
    started = Barrier(3)

    def build(work: Path) -> None:
        (work / "half").touch()
        started.wait(timeout=60)
        (work / "whole").touch()

    with ThreadPoolExecutor(3) as pool:
        new = list(pool.map(lambda _: cache.publish(tmp_path / "entry", build), range(3)))
    assert sorted(new) == [False, False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert {path.name for path in (tmp_path / "entry").iterdir()} == {"half", "whole"}


def test_what_fails_to_build_leaves_nothing(tmp_path: Path) -> None:
    def build(work: Path) -> None:
        (work / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.publish(tmp_path / "entry", build)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_moves_to_the_temporary_directory_if_home_can_not_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("in the way of a directory")
    monkeypatch.delenv("METALSIM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache.cache_directory.__wrapped__() == tmp_path / f"metalsim-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache.cache_directory.__wrapped__() == tmp_path / "other" / "mlx-paged" / "metalsim"
    monkeypatch.setenv("METALSIM_CACHE", str(tmp_path / "chosen"))
    assert cache.cache_directory.__wrapped__() == tmp_path / "chosen"


@on_linux
def test_a_kernel_is_compiled_once(metal: Metal) -> None:
    source = f"out[0] = x; // {os.urandom(8).hex()}"
    compiled = []
    for _ in range(2):
        kernel = mx.fast.metal_kernel(name="cached", input_names=["x"], output_names=["out"], source=source)
        launch = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [mx.int32]}
        (out,) = kernel(inputs=[mx.array(1)], **launch)
        assert out.item() == 1
        compiled.append(metal.report.compile_seconds > 0)
    assert compiled == [True, False]


@on_linux
def test_the_fixture_stands_in_for_mlx_and_restores_it(request: pytest.FixtureRequest) -> None:
    assert not mx.metal.is_available()
    metal = request.getfixturevalue("metal")
    assert mx.metal.is_available()
    assert mx.fast.metal_kernel == simulator.metal_kernel
    with pytest.raises(LookupError, match="no kernel was launched"):
        _ = metal.report


@on_linux
def test_a_missing_compiler_fails_the_test_with_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.delenv("METALSIM_CLANG", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fixture, "find_toolchain", toolchain.find_toolchain.__wrapped__)
    with pytest.raises(pytest.fail.Exception) as failure:
        request.getfixturevalue("metal")
    assert "pip install 'mlx-paged[test]'" in str(failure.value) and "\n" not in str(failure.value)


@on_linux
def test_a_compiler_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    command = shlex.join([sys.executable, "-c", "print('clang version 14.0.6')"])
    monkeypatch.setenv("METALSIM_CLANG", command)
    with pytest.raises(ToolchainError, match=r"too old: clang version 14\.0\.6"):
        toolchain.find_toolchain.__wrapped__()
