"""`mlx-paged models` and `mlx-paged pull`, with a hub on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_stub import Hub, ask_only, serve
from helpers.stub_llm import assert_one_line, invoke
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from mlx_paged.models import hub as model_hub
from mlx_paged.models.aliases import ALIASES
from mlx_paged.models.hub import DEMO_FOLDER
from mlx_paged.models.registry import FAMILIES, Family

WEIGHTS = (DEMO_FOLDER / "model.safetensors").stat().st_size


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that offers the demo model under a name and an alias, and an empty cache."""
    with serve(Hub({"org/tiny": DEMO_FOLDER, ALIASES["qwen3"]: DEMO_FOLDER}, gated={"org/gated"})) as hub:
        ask_only(hub, tmp_path / "cache", monkeypatch)
        disable_progress_bars()  # as a variable does for a command's own process
        yield hub
        enable_progress_bars()


def listed() -> dict[str, Any]:
    result = invoke("models", "--json")
    assert result.exit_code == 0, result.output
    return {row["repository"]: row for row in json.loads(result.stdout)}


def weights_asked_for(hub: Hub) -> list[str]:
    return [path for path in hub.requests if path.endswith("model.safetensors")]


def test_every_alias_is_listed_once_and_nothing_is_asked_of_the_hub(hub: Hub) -> None:
    rows = listed()
    assert sorted(alias for row in rows.values() for alias in row["aliases"]) == sorted(ALIASES)
    assert rows[ALIASES["llama"]]["aliases"] == ["llama", "llama-3.2-1b"]
    assert {(row["in_cache"], row["num_bytes"], row["family"]) for row in rows.values()} == {("no", None, None)}
    assert hub.requests == []


def test_what_is_in_the_cache_is_listed_with_its_size_context_and_family(hub: Hub) -> None:
    assert invoke("pull", "qwen3").exit_code == 0
    assert invoke("pull", "org/tiny").exit_code == 0
    rows = listed()
    for name in (ALIASES["qwen3"], "org/tiny"):
        row = rows[name]
        assert (row["in_cache"], row["family"], row["context"], row["runs"]) == ("yes", "qwen2", 2048, "verified")
        assert WEIGHTS < row["num_bytes"] < WEIGHTS + 2e6
        assert Path(row["folder"], "model.safetensors").is_file()
    assert rows["org/tiny"]["aliases"] == [] and list(rows)[-1] == "org/tiny"
    text = invoke("models").stdout.splitlines()
    assert text[0].split()[:2] == ["alias", "repository"]
    (line,) = (line for line in text if "org/tiny" in line)
    assert line.split()[:2] == ["org/tiny", "yes"] and "2,048" in line and line.split()[-1] == "qwen2"


def test_a_model_of_which_a_part_is_there_is_listed_as_that(hub: Hub) -> None:
    model_hub.resolve("org/tiny", config_only=True)
    assert listed()["org/tiny"]["in_cache"] == "partly"


def test_what_cannot_run_is_listed_as_refused_and_what_is_no_model_is_left_out(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "qwen2", Family("qwen2", "refused", "for this test"))
    model_hub.resolve("org/tiny", config_only=True)
    for name, config in {"new": '{"model_type": "new"}', "broken": "{", "data": "{}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        hub.repositories[f"org/{name}"] = tmp_path / name
        model_hub.resolve(f"org/{name}", config_only=True)
    rows = listed()
    assert (rows["org/tiny"]["runs"], rows["org/new"]["runs"]) == ("refused", "untested")
    assert not {"org/broken", "org/data"} & set(rows)
    text = invoke("models").stdout
    assert "qwen2 (refused)" in text and "new (untested)" in text


def test_pull_says_size_and_fit_first_and_the_folder_last(hub: Hub) -> None:
    result = invoke("pull", "qwen3")
    first, last = result.stdout.splitlines()
    assert first.startswith("qwen3: ") and " to download of " in first and "its weights, about " in first
    assert " fit into " in first
    folder = last.removeprefix("qwen3 is in ")
    assert Path(folder, "model.safetensors").read_bytes() == (DEMO_FOLDER / "model.safetensors").read_bytes()
    hub.requests.clear()
    again = invoke("pull", "qwen3").stdout.splitlines()
    assert again[0].startswith("qwen3: 0 B to download of ") and again[1] == last
    assert weights_asked_for(hub) == []


def test_weights_that_do_not_fit_into_memory_are_said_to(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_paged.runner.memory_plan.device_limit", lambda: (1000, "RAM"))
    assert "do not fit into 1 KB of RAM" in invoke("pull", "qwen3").stdout


def test_pull_goes_on_where_a_download_broke_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.cut.add("model.safetensors")
    assert_one_line(invoke("pull", "org/tiny"), 1, "broke off", "run it again")
    assert listed()["org/tiny"]["in_cache"] == "partly"
    hub.cut.clear()
    hub.requests.clear()
    result = invoke("pull", "org/tiny")
    assert result.exit_code == 0 and weights_asked_for(hub)
    assert not [path for path in hub.requests if path.endswith("tokenizer.json")]
    assert listed()["org/tiny"]["in_cache"] == "yes"


@pytest.mark.parametrize(
    ("name", "words"),
    [("qwen33", "did you mean"), ("org/unknown", "there is no model"), ("org/gated", "gated"), ("./none", "no folder")],
)
def test_a_name_that_cannot_be_pulled_is_one_line(name: str, words: str, hub: Hub) -> None:
    assert_one_line(invoke("pull", name), 1, words)


def test_a_folder_is_not_pulled(hub: Hub) -> None:
    assert_one_line(invoke("pull", str(DEMO_FOLDER)), 2, "is a folder")


def test_without_a_network_pull_is_one_line_unless_all_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    model_hub.resolve("org/tiny", config_only=True)
    invoke("pull", "qwen3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_one_line(invoke("pull", "org/tiny"), 1, "org/tiny", "HF_HUB_OFFLINE is set")
    assert invoke("pull", "qwen3").stdout.startswith("qwen3 is in ")


def test_a_disk_without_room_is_one_line_before_the_weights_are_downloaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("mlx_paged.models.hub.shutil.disk_usage", lambda _: usage)
    result = invoke("pull", "org/tiny")
    assert_one_line(result, 1, "1 KB free", "HF_HOME")
    assert result.stdout.startswith("org/tiny: 2.63 MB to download of 2.64 MB; its weights")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_family_that_cannot_run_is_not_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "qwen2", Family("qwen2", "refused", "for this test"))
    assert_one_line(invoke("pull", "org/tiny"), 1, "'qwen2' can't be paged: for this test")
    assert weights_asked_for(hub) == []


def test_models_are_listed_without_importing_mlx(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mlx_paged.cli.main import main\nsys.argv = ['mlx-paged', 'models', '--json']\n"
        "try: main()\nexcept SystemExit: print('\\nLOADED', *sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in result.stdout.split("LOADED ")[1].split()}
    assert "huggingface_hub" in modules and not modules & {"mlx", "mlx_lm", "transformers", "numpy"}


@pytest.mark.parametrize("odd", [{"text_config": "x"}, {"text_config": [1]}, {"max_position_embeddings": -3}], ids=str)
def test_an_odd_configuration_in_the_cache_is_a_line_of_the_list(hub: Hub, odd: dict[str, Any]) -> None:
    folder = model_hub.resolve("org/tiny", config_only=True)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "new[bold]", **odd}))
    row = listed()["org/tiny"]
    assert (row["family"], row["context"]) == ("new[bold]", None)
    assert "new[bold] (untested)" in invoke("models").stdout


def test_no_name_is_no_folder_to_pull(hub: Hub) -> None:
    assert_one_line(invoke("pull", ""), 1, "there is no model ''")
