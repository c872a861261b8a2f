"""Folders on disk: what killed processes leave goes, what living ones have stays, and all models share a bound."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
import pytest
from helpers.budget import LONG

from mlx_paged import LLM, SamplingParams
from mlx_paged.cache import block_files
from mlx_paged.cache.block_files import BlockFiles, OwnFolder, saved_models
from mlx_paged.errors import EngineWarning

OWNER = """
import sys
from pathlib import Path
from mlx_paged.cache.block_files import BlockFiles, OwnFolder
folder = OwnFolder(Path(sys.argv[1]), "swap-")
files = BlockFiles(Path(sys.argv[1]))
files.partial("half.safetensors").write_bytes(b"half")
(folder.path / "block").write_bytes(b"a block")
print("made", flush=True)
sys.stdin.read()
"""
PROMPT = [(3 * i + i * i) % 97 for i in range(40)]


@contextmanager
def owner(parent: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns a folder in `parent`, and has half a file."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", OWNER, str(parent)], text=True, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "made\n"
        try:
            yield process
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    """What is in a folder, without the random ends of names."""
    return sorted(path.name[: path.name.rfind("-") + 1] or path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, *([signal.SIGTERM, signal.SIGHUP] if LONG else [])])
def test_what_a_killed_process_left_goes_when_the_next_one_starts_and_not_before(number: int, tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        OwnFolder(tmp_path, "swap-")
        BlockFiles(tmp_path)
        (living,) = tmp_path.glob("swap-*")
        assert (living / "block").exists() and len(list(tmp_path.glob("*/half.safetensors"))) == 1
        process.send_signal(number)
        process.wait()
    assert names(tmp_path) == ["mlx-paged-writing-", "swap-"]
    folder, files = OwnFolder(tmp_path, "swap-"), BlockFiles(tmp_path)
    assert list(tmp_path.glob("swap-*")) == [folder.path]
    assert not list(tmp_path.glob("*/half.safetensors"))
    del folder, files
    assert not list(tmp_path.iterdir())


def test_a_process_that_ends_removes_what_it_has(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        process.communicate("")
        assert process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_fork_that_ends_removes_nothing_of_its_parent(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from mlx_paged.cache.block_files import OwnFolder
folder = OwnFolder(Path({str(tmp_path)!r}), "swap-")
if (child := os.fork()) == 0:
    sys.exit(0)
os.waitpid(child, 0)
print(folder.path.exists())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("True\n", "")


def add(files: BlockFiles, path: Path, num_bytes: int = 100) -> list[str]:
    """Put a file into its place. Returns the names of those that had to go."""
    partial = files.partial(path.name)
    partial.write_bytes(bytes(num_bytes))
    return [gone.stem for gone in files.add(partial, path)]


def test_files_of_all_models_and_processes_share_the_bound_and_those_used_last_stay(tmp_path: Path) -> None:
    one, other = BlockFiles(tmp_path, 500), BlockFiles(tmp_path, 500)
    for number in range(4):
        assert add(one, tmp_path / f"model{number % 2}" / f"{number}.safetensors") == []
    other.touch(tmp_path / "model0" / "0.safetensors")
    assert add(other, tmp_path / "model2" / "4.safetensors") == []
    assert add(other, tmp_path / "model2" / "5.safetensors") == ["1"]
    assert add(one, tmp_path / "model2" / "6.safetensors", 190) == ["2", "3"]
    assert sorted(path.stem for path in tmp_path.glob("*/*.safetensors")) == ["0", "4", "5", "6"]
    smaller = BlockFiles(tmp_path, 250)
    assert sorted(path.stem for path in tmp_path.glob("*/*.safetensors")) == ["6"]
    assert add(smaller, tmp_path / "model0" / "7.safetensors") == ["6"]
    with pytest.raises(OSError, match="a block or a state of 251 B has no place in 250 B"):
        add(smaller, tmp_path / "model0" / "8.safetensors", 251)
    assert [path.stem for path in tmp_path.glob("model*/*.safetensors")] == ["7"]


@pytest.mark.parametrize("vanishing", ["a-model", f"{block_files._WRITING}1"])
def test_a_folder_that_another_process_removes_meanwhile_is_passed_over(
    vanishing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (vanishing, "its-model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"block{block_files.SUFFIX}").write_bytes(b"12345")
    scandir = os.scandir

    def scan(path: Any = ".") -> Any:
        if Path(path).name == vanishing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert [file.path.parent.name for file in block_files._files(tmp_path)] == ["its-model"]


def test_a_share_is_one_of_what_is_free_and_what_the_folder_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    files = BlockFiles(tmp_path)
    for number in range(10):
        add(files, tmp_path / f"{number}.safetensors")
    files = BlockFiles(tmp_path, "50%")  # of 1000 bytes and 1000 free
    assert add(files, tmp_path / "10.safetensors", 1) == ["0"]
    files = BlockFiles(tmp_path, "10%")  # of 901 bytes and 1000 free
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["10", "9"]


def test_in_an_hour_no_more_is_written_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    files = BlockFiles(tmp_path, 300, spares_disk=True)
    for number in range(3):
        assert files.takes_more
        add(files, tmp_path / f"{number}.safetensors")
    assert not files.takes_more
    now += 3599
    assert not files.takes_more
    now += 1
    assert files.takes_more
    add(files, tmp_path / "3.safetensors", 300)
    assert not files.takes_more


# -- saved prompts of engines ------------------------------------------------------------------------------------


def make_llm(model: nn.Module, folder: Path, **config: Any) -> LLM:
    return LLM.from_model(model, block_size=8, num_kv_blocks=64, prefix_cache_dir=folder, **config)


def num_cached(llm: LLM, prompt: list[int] = PROMPT) -> int:
    return llm.generate([prompt], SamplingParams(temperature=0, max_tokens=2))[0].num_cached_tokens


def test_a_folder_of_saved_prompts_lists_its_models(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    before = time.time()
    for family in ("qwen2", "llama"):
        num_cached(make_llm(tiny_model(family), tmp_path))
    llama, qwen2 = saved_models(tmp_path)
    assert llama.name.startswith("llama-") and qwen2.name.startswith("qwen2-")
    files = list((tmp_path / f"{qwen2.name}{block_files.VERSION}").iterdir())
    assert (qwen2.num_blocks, qwen2.num_bytes) == (5, sum(path.stat().st_size for path in files))
    assert before <= qwen2.last_used <= llama.last_used <= time.time()


def test_prompts_of_a_model_that_is_gone_make_room_for_those_of_another(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    num_cached(make_llm(tiny_model("llama"), tmp_path))
    (saved,) = saved_models(tmp_path)
    size = saved.num_bytes + 2 * saved.num_bytes // 5
    llm = make_llm(tiny_model("qwen2"), tmp_path, prefix_cache_size=size)
    num_cached(llm)
    assert [(model.name[:5], model.num_blocks) for model in saved_models(tmp_path)] == [("qwen2", 5), ("llama", 2)]
    del llm
    assert num_cached(make_llm(tiny_model("qwen2"), tmp_path)) == 32


def test_what_another_process_had_to_remove_is_computed_again_without_a_word(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    num_cached(make_llm(tiny_model("qwen2"), tmp_path))
    llm = make_llm(tiny_model("qwen2"), tmp_path)
    for path in tmp_path.glob("*/*.safetensors"):
        path.unlink()
    assert num_cached(llm) == 0
    assert [warning for warning in recwarn if issubclass(warning.category, EngineWarning)] == []
    assert saved_models(tmp_path)[0].num_blocks == 5


def test_a_folder_that_is_read_only_is_read(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_cached(make_llm(tiny_model("qwen2"), tmp_path))
    before = sorted(tmp_path.rglob("*"))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for owner, name in ((block_files.tempfile, "mkdtemp"), (os, "utime"), (Path, "unlink"), (Path, "replace")):
        monkeypatch.setattr(owner, name, refuse)
    with pytest.warns(EngineWarning, match="no prompts are saved, but those that were are used: .* can't be written"):
        llm = make_llm(tiny_model("qwen2"), tmp_path)
    assert num_cached(llm) == 32
    assert num_cached(llm, PROMPT[::-1]) == 0
    assert sorted(tmp_path.rglob("*")) == before


# -- after an upgrade ----------------------------------------------------------------------------------------------


def as_of_another_version(folder: Path) -> list[Path]:
    """Rename the folders of saved prompts as a version before this one called them. Returns the files."""
    for path in folder.glob(f"*{block_files.VERSION}"):
        path.rename(path.with_name(path.name.removesuffix(block_files.VERSION)))
    return sorted(folder.glob("*/*.safetensors"))


def test_prompts_of_another_version_are_not_used_which_is_said_once(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    num_cached(make_llm(tiny_model("llama"), tmp_path))
    old = as_of_another_version(tmp_path)
    with pytest.warns(EngineWarning, match=f"{tmp_path} has .* of prompts that another version .* saved") as caught:
        assert num_cached(make_llm(tiny_model("llama"), tmp_path)) == 0
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        assert num_cached(make_llm(tiny_model("llama"), tmp_path)) == 32
    assert all(path.exists() for path in old)
    assert [model.is_current for model in saved_models(tmp_path)] == [True, False]


def test_a_file_of_another_version_in_this_ones_folder_is_computed_again(
    tiny_model: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as of_the_other:
        of_the_other.setattr("mlx_paged.cache.block_store.VERSION", ".v1")
        num_cached(make_llm(tiny_model("llama"), tmp_path))
    (folder,) = tmp_path.glob("llama-*")
    folder.rename(folder.with_name(folder.name.removesuffix(".v1") + block_files.VERSION))
    with pytest.warns(EngineWarning, match="was written by another version of mlx-paged"):
        assert num_cached(make_llm(tiny_model("llama"), tmp_path)) == 0


def test_files_of_other_versions_go_first_and_after_a_month_without_use(tmp_path: Path) -> None:
    days = {"new": 0.3, "old": 0.1, "older": 29, "oldest": 31}
    for name, age in days.items():
        folder = tmp_path / f"{name}{block_files.VERSION if name == 'new' else ''}"
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(bytes(100))
        used = time.time() - age * 24 * 3600
        os.utime(folder / f"{name}.safetensors", (used, used))
    files = BlockFiles(tmp_path, 350, spares_disk=True)
    assert files.outdated_bytes == 200 and not (tmp_path / "oldest").exists()
    newest = tmp_path / f"new{block_files.VERSION}"
    assert add(files, newest / "1.safetensors") == ["older"]  # `old` was used after `new`
    assert add(files, newest / "2.safetensors") == ["old"]
    assert add(files, newest / "3.safetensors") == ["new"]
