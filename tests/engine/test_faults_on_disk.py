"""Block stores on a full or damaged disk: nobody's result changes."""

from __future__ import annotations

import errno
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.faults import TIGHT, Run
from helpers.workload import make_engine

from mlx_paged.cache import block_store as block_store
from mlx_paged.errors import EngineWarning


@pytest.mark.parametrize("where", ["swap_space", "prefix_cache_dir"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("no space left")])
@pytest.mark.parametrize("method", ["save_safetensors", "replace"])
def test_a_full_disk_changes_no_result(
    method: str, error: Exception, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = mx if method == "save_safetensors" else Path
    original, count = getattr(owner, method), itertools.count()
    number = 0

    def failing(*arguments: Any) -> Any:
        if next(count) >= number:
            raise error
        return original(*arguments)

    monkeypatch.setattr(owner, method, failing)
    for number in (0, 1, 5):
        count = itertools.count()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineWarning)
            engine = make_engine("gemma3_text", **TIGHT, **{where: tmp_path / str(number)})
            Run(engine).to_the_end().check("gemma3_text")
        assert next(count) > number, "the premise: the disk was full"
        assert not list(tmp_path.rglob("*partial*"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1))


def remove(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    (path / "full").mkdir(parents=True)


def change_layout(path: Path) -> None:
    content, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[misc]
    content = {name: mx.array(np.array(array)[:, :, :1]) for name, array in content.items()}
    mx.save_safetensors(str(path), content, metadata | {"crc32": block_store.checksum(content)})


def drop_an_array(path: Path) -> None:
    content, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[misc]
    content = {"k0": mx.array(np.array(content["k0"]))}
    mx.save_safetensors(str(path), content, metadata | {"crc32": block_store.checksum(content)})


def change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40  # of the last number, its exponent
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["swap_space", "prefix_cache_dir"])
@pytest.mark.parametrize(
    "damage",
    [cut, empty, scramble, remove, replace_by_folder, change_layout, drop_an_array, change_a_bit],
    ids=lambda d: d.__name__,
)
def test_damaged_files_are_computed_again(damage: Callable[[Path], None], where: str, tmp_path: Path) -> None:
    engine = make_engine("gemma3_text", **TIGHT, **{where: tmp_path})
    Run(engine).to_the_end().check("gemma3_text")
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert files, "the premise: there is something to damage"
    for path in files[::2]:
        damage(path)
    if where == "prefix_cache_dir":
        engine = make_engine("gemma3_text", **TIGHT, **{where: tmp_path})
    else:
        engine._scheduler.restart([])  # so that nothing is in the pool any more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        run = Run(engine).to_the_end()
    assert run.results.errors == {}
    run.check("gemma3_text")
