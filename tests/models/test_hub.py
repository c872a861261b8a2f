"""models/hub.py: names to folders, downloads from a hub on this machine, and what is said when that fails."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_stub import Hub, ask_only, serve

from mlx_paged.errors import ModelError
from mlx_paged.models.aliases import ALIASES
from mlx_paged.models.hub import DEMO_FOLDER, check_files, resolve


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that offers org/tiny, and an empty cache."""
    with serve(Hub({"org/tiny": model_folder}, gated={"org/gated"})) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        yield hub


def message(model: str | Path | None, **kwargs: str) -> str:
    """The one line that resolve() answers for a model that can't be had."""
    with pytest.raises(ModelError) as caught:
        resolve(model, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_name_means_the_bundled_demo_model() -> None:
    assert resolve(None) == DEMO_FOLDER
    check_files(DEMO_FOLDER)


def test_a_folder_is_taken_as_it_is(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(model_folder) == model_folder
    assert resolve(str(model_folder)) == model_folder
    monkeypatch.chdir(model_folder.parent)
    assert resolve("./tiny").samefile(model_folder)


def test_a_folder_without_config_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    assert "no config.json" in message(tmp_path) and str(tmp_path) in message(tmp_path)


def test_a_file_is_not_a_model(model_folder: Path) -> None:
    assert "is a file" in message(str(model_folder / "model.safetensors"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere/at/all", "a/b/c", Path("nowhere")])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str | Path, hub: Hub) -> None:
    assert "there is no folder" in message(name)
    assert hub.requests == []


def test_a_name_that_cannot_be_looked_for_is_one_line() -> None:
    assert "name too long" in (said := message("x" * 5000)) and len(said) < 300
    assert "there is no user of that name" in message("~nobody-here/model")


def test_a_mistyped_alias_gets_the_close_ones_and_where_all_are_listed() -> None:
    text = message("qwen22")
    assert "did you mean qwen2" in text and "mlx-paged models" in text


def test_a_name_like_nothing_gets_the_three_kinds_of_names() -> None:
    for name in ("zzzzzz", ""):
        text = message(name)
        assert "did you mean" not in text and "alias" in text and "org/name" in text and "folder" in text


def test_aliases_are_lower_case_names_of_repositories() -> None:
    for alias, repository in ALIASES.items():
        assert alias == alias.lower() and "/" not in alias
        assert repository.count("/") == 1


def test_an_alias_downloads_its_repository(hub: Hub, model_folder: Path) -> None:
    hub.repositories[ALIASES["qwen2"]] = model_folder
    assert (resolve("qwen2") / "config.json").read_text() == (model_folder / "config.json").read_text()


def test_an_alias_wins_over_a_folder_of_the_same_name(
    hub: Hub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[ALIASES["llama"]] = model_folder
    monkeypatch.chdir(model_folder.parent)
    model_folder.rename("llama")
    hub.repositories[ALIASES["llama"]] = Path("llama").absolute()
    assert resolve("llama") != Path("llama")
    assert resolve("./llama") == Path("llama")


def test_a_download_brings_what_a_model_needs_and_no_code(hub: Hub, model_folder: Path) -> None:
    folder = resolve("org/tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()
    check_files(folder)


def test_what_was_downloaded_is_not_downloaded_again(hub: Hub) -> None:
    folder = resolve("org/tiny")
    hub.requests.clear()
    assert resolve("org/tiny") == folder
    assert not [path for path in hub.requests if "/resolve/" in path]


def test_what_was_downloaded_works_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = resolve("org/tiny")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/tiny") == folder
    assert hub.requests == []


def test_what_was_downloaded_works_when_the_hub_has_it_no_more_or_is_gone(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = resolve("org/tiny")
    hub.repositories.clear()
    assert resolve("org/tiny") == folder
    with serve(Hub({})) as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    assert resolve("org/tiny") == folder


def test_offline_and_not_downloaded_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "org/tiny is not downloaded yet and HF_HUB_OFFLINE is set" in message("org/tiny")


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with serve(Hub({})) as gone:
        pass
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert f"not downloaded yet and {gone.url} can't be reached" in message("org/tiny")


def test_an_unknown_repository_is_one_line(hub: Hub) -> None:
    assert "there is no model 'org/unknown'" in message("org/unknown")


def test_a_gated_repository_says_where_to_accept_its_licence(hub: Hub) -> None:
    text = message("org/gated")
    assert "gated" in text and f"{hub.url}/org/gated" in text


def test_an_unknown_revision_is_named(hub: Hub) -> None:
    assert "no revision 'v9'" in message("org/tiny", revision="v9")


def test_a_name_that_no_repository_can_have_is_one_line(hub: Hub) -> None:
    assert "can't be a repository's name" in message("org/two--dashes")


def test_a_repository_without_config_is_no_model(hub: Hub, model_folder: Path) -> None:
    (model_folder / "config.json").unlink()
    assert "org/tiny has no config.json" in message("org/tiny")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_where_it_is_full(number: int, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object, **__: object) -> None:
        raise OSError(number, "no space")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", write)
    from huggingface_hub import constants

    text = message("org/tiny")
    assert "disk is full" in text and constants.HF_HUB_CACHE in text and "HF_HOME" in text


def test_a_download_that_breaks_off_can_be_taken_up_again(
    hub: Hub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.cut.add("model.safetensors")
    assert "broke off" in message("org/tiny")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "only partly downloaded" in message("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.cut.clear()
    check_files(resolve("org/tiny"))


def test_looking_for_a_model_imports_neither_mlx_nor_the_hub() -> None:
    code = "import sys, mlx_paged.models.hub; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mlx_paged.models.hub" in loaded
    assert not {"mlx", "mlx.core", "mlx_lm", "huggingface_hub", "numpy"} & set(loaded)


def start_generate(hub: Hub, cache: Path) -> subprocess.Popen[str]:
    """The real command with a model from `hub`, which it finds as users' processes do: in the environment."""
    env = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        env.pop(name, None)
    args = ["generate", "--model", "org/tiny", "--max-tokens", "6", "-q", "Once upon a time"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_paged", *args],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_generate_downloads_a_repository_once_and_works_without_the_hub_afterwards(tmp_path: Path) -> None:
    with serve(Hub({"org/tiny": DEMO_FOLDER})) as hub:
        process = start_generate(hub, tmp_path)
        answer, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert len(answer.split()) > 2
    assert [path for path in hub.requests if path.endswith("/model.safetensors")]
    assert not [path for path in hub.requests if path.endswith(".py")]
    process = start_generate(hub, tmp_path)
    assert process.communicate() == (answer, "")
    assert process.returncode == 0


def test_ctrl_c_does_not_wait_for_the_end_of_a_download(tmp_path: Path) -> None:
    with serve(Hub({"org/tiny": DEMO_FOLDER}, held={"model.safetensors"})) as hub:
        process = start_generate(hub, tmp_path)
        assert hub.holding.wait(timeout=60)
        process.send_signal(signal.SIGINT)
        answer, errors = process.communicate(timeout=60)
    assert (process.returncode, answer, errors.strip()) == (130, "", "")
