"""`mlx-paged doctor`: a line for each part, whatever is wrong with it or with others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from helpers.stub_llm import invoke

from mlx_paged import __version__
from mlx_paged.cli import doctor, doctor_parts
from mlx_paged.cli.doctor_parts import APART, HERE, Finding
from mlx_paged.errors import EngineWarning
from mlx_paged.models import hub

ROOT = Path(__file__).parents[2]
PARTS = [*HERE, "folders", *APART]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are examined here, where they can be replaced, and not in a process for each."""
    monkeypatch.setattr(doctor, "run_apart", lambda name: doctor._guarded(APART[name]))


def answered(*args: str) -> tuple[int, dict[str, Finding]]:
    result = invoke("doctor", "--json", *args)
    report = json.loads(result.stdout)
    assert report["ok"] == (result.exit_code == 0) and list(report["parts"]) == PARTS, result.output
    return result.exit_code, {name: Finding(**part) for name, part in report["parts"].items()}


def wrong(parts: dict[str, Finding]) -> dict[str, str]:
    return {name: part.line for name, part in parts.items() if part.state == "wrong"}


def test_here_nothing_is_wrong_and_the_demo_model_gives_the_stored_tokens(tmp_path: Path) -> None:
    result = invoke("doctor", "--prefix-cache-dir", str(tmp_path / "prompts"))
    assert result.exit_code == 0, result.output
    *lines, last = result.stdout.splitlines()
    assert last == "nothing is wrong" and [line.split()[1] for line in lines] == PARTS
    found = {line.split()[1]: line for line in lines}
    assert __version__ in found["mlx-paged"] and sys.executable in found["python"]
    assert metadata.version("mlx") in found["mlx"] and metadata.version("mlx-lm") in found["mlx-lm"]
    assert str(tmp_path / "prompts") in found["folders"] and "38 tokens of the demo model" in found["generation"]
    assert {line.split()[0] for line in lines} <= {"ok", "note"}


@pytest.mark.usefixtures("in_this_process")
def test_a_part_that_fails_is_its_line_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("two\nlines")

    for parts in (HERE, APART):
        for name in parts:
            monkeypatch.setitem(parts, name, fail if name in ("chip", "device") else lambda: "fine")
    code, found = answered()
    assert code == 1 and wrong(found) == dict.fromkeys(("chip", "device"), "RuntimeError: two lines")
    assert invoke("doctor").stdout.splitlines()[-1] == "wrong: chip, device"


@pytest.mark.usefixtures("in_this_process")
def test_without_mlx_what_needs_it_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is where pip brought mlx without a backend."""
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    code, found = answered()
    assert code == 1 and "install mlx-paged with one" in found["mlx"].line
    assert {line for name, line in wrong(found).items() if name != "mlx"} == {"needs mlx"}
    assert list(wrong(found)) == list(APART)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.abort()", "crashed: SIGABRT"),
        ("import sys; print('the driver is gone', file=sys.stderr); sys.exit(3)", "exit code 3; the driver is gone"),
        ("import time; time.sleep(600)", "did not end within 1 seconds"),
    ],
    ids=["crash", "exit", "hang"],
)
def test_a_library_that_ends_the_process_or_hangs_is_a_line(
    code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    state, line = doctor.run_apart("device", limit_s=1 if "sleep" in code else 60)
    assert state == "wrong" and words in line


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_folder_that_cannot_be_written_to_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    folder = tmp_path / "a file" if place == "a file" else tmp_path / "a file" / "prompts"
    with pytest.raises(OSError, match=rf"{folder}, for prompts, can't be written to: \w+"):
        doctor_parts.folders(str(folder))


@pytest.mark.parametrize(("name", "words"), [("", "is empty"), ("~nobody-here", "there is no user of that name")])
def test_a_folder_that_cannot_be_is_told_of(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"--prefix-cache-dir.*{words}"):
        doctor_parts.folders(name)


def test_a_folder_for_what_is_temporary_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert ", for swap, can be written to" in doctor_parts.folders(None)
    monkeypatch.setenv("TMP", "/no/such/folder")
    with pytest.raises(ValueError, match="TMP=/no/such/folder is not a folder, and MLX compiles there"):
        doctor_parts.folders(None)
    monkeypatch.setenv("TMPDIR", "/tmp")  # which is looked at before
    assert ", for swap, can be written to" in doctor_parts.folders(None)


def test_a_folder_that_can_only_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mlx_paged.cache.block_files.tempfile.mkdtemp", refuse)
    with pytest.raises(OSError, match="for swap, can't be written to: Permission denied"):
        doctor_parts.folders(None)


@pytest.mark.parametrize("version", ["0.31.0", "0.33.1"])
def test_an_mlx_lm_of_another_version_is_wrong_with_what_to_install(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "mlx-lm" else real(name))
    state, line = doctor._guarded(APART["mlx-lm"])
    assert state == "wrong" and f"mlx-lm {version} is installed" in line and "pip install 'mlx-lm" in line


def test_an_mlx_lm_whose_functions_changed_is_wrong_by_the_functions_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import base

    from mlx_paged.models import patch

    monkeypatch.setitem(patch.SEAM, base.create_attention_mask, ["h", "cache"])
    state, line = doctor._guarded(APART["mlx-lm"])
    assert state == "wrong" and "create_attention_mask takes h, cache, window_size" in line


def test_a_package_that_is_missing_and_an_extra_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("rich", "uvicorn"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    packages, extras = doctor._guarded(HERE["packages"]), doctor._guarded(HERE["extras"])
    assert packages.state == "wrong" and "rich is not installed: pip install 'rich" in packages.line
    assert extras.state == "ok" and "[server]: none; pip install 'mlx-paged[server]' adds it" in extras.line


def test_without_openblas_a_note_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_paged.cpu.blas.blas_name", lambda: "MLX's own BLAS, a slow one")
    monkeypatch.delenv("MLX_PAGED_BLAS", raising=False)
    state, line = doctor._guarded(APART["matrices"])
    assert state == "note" and "apt install libopenblas0" in line


def test_without_openblas_by_the_environment_s_word_a_note_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_paged.cpu.blas.blas_name", lambda: "MLX's own BLAS, a slow one")
    monkeypatch.setenv("MLX_PAGED_BLAS", "0")
    assert doctor._guarded(APART["matrices"]) == ("note", "by MLX's own BLAS, a slow one, as MLX_PAGED_BLAS=0 has it")


def test_a_folder_for_prompts_that_is_not_there_is_looked_at_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "not" / "there"
    assert f"{folder}, for prompts, is not there yet, and can be made" in doctor_parts.folders(str(folder))
    assert not folder.parent.exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match=f"{folder}, for prompts, can't be made: {tmp_path} can't be written to"):
        doctor_parts.folders(str(folder))


def cut(weights: bytes) -> bytes:
    return weights[:-1]


def turned(weights: bytes) -> bytes:
    """The same bytes with the last layers' halves exchanged."""
    middle = len(weights) // 2
    return weights[: -middle // 2] + weights[-middle // 2 :][::-1]


@pytest.mark.parametrize(
    ("damage", "words"), [(cut, "model.safetensors is not a whole"), (turned, "answers are wrong, by ")]
)
def test_a_damaged_demo_model_is_found(
    damage: Callable[[bytes], bytes], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(hub.DEMO_FOLDER, tmp_path / "demo")
    weights = tmp_path / "demo" / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    monkeypatch.setattr(hub, "DEMO_FOLDER", tmp_path / "demo")
    state, line = doctor._guarded(APART["generation"])
    assert state == "wrong" and words in line


def test_wrong_answers_of_kernels_are_compared_with_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([("Metal kernels", 1.0, ["to 'a' [1] instead of [2]"]), ("plain MLX operations", 1.0, [])])
    monkeypatch.setattr(doctor_parts, "_answers", lambda: next(answers))
    monkeypatch.setenv("MLX_PAGED_BACKEND", "")
    line = doctor._guarded(APART["generation"]).line
    assert "by Metal kernels: to 'a'" in line and line.endswith("with MLX_PAGED_BACKEND=reference they are right")


def test_what_the_engine_warns_of_is_noted() -> None:
    import warnings

    def part() -> str:
        warnings.warn("plain MLX operations take its place", EngineWarning, stacklevel=1)
        return "it works"

    assert doctor._guarded(part) == Finding("note", "it works; plain MLX operations take its place")


def test_from_a_checkout_that_is_not_installed_it_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert doctor._guarded(HERE["packages"]).state == "note"
    assert doctor._guarded(APART["mlx"]) == Finding("ok", metadata.version("mlx"))


def test_doctor_loads_no_mlx_into_its_own_process() -> None:
    code = (
        "import sys\nfrom mlx_paged.cli import doctor\ndoctor.run_apart = lambda name: doctor.Finding('ok', '')\n"
        "doctor.examine(prefix_cache_dir=None, as_json=True)\nprint('LOADED', *sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    modules = {name.split(".")[0] for name in result.stdout.split("LOADED ")[1].split()}
    assert not modules & {"mlx", "mlx_lm", "transformers", "numpy"}
