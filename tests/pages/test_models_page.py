"""docs/models.md tells of every model file of the mlx-lm that is installed, and says what the registry says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from mlx_paged.models import registry


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "docs" / "models_table.py"))


def test_the_page_on_models_has_the_table_that_its_script_writes(script: dict[str, Any]) -> None:
    assert script["PAGE"].read_text() == script["page"](), "run python docs/models_table.py --write"


def test_every_model_file_of_mlx_lm_is_on_the_page_and_no_other(script: dict[str, Any]) -> None:
    files = script["model_files"]()
    assert len(files) > 100 and {"llama", "lfm2-vl", "phi3small", "solar_open"} <= set(files)
    assert not {"base", "cache", "mla", "rope_utils", "switch_layers"} & set(files)
    assert [name for name in files if f"`{name}`" not in script["PAGE"].read_text()] == []
    assert set(files) == set(registry.FAMILIES)


def test_a_file_that_the_registry_does_not_list_is_shown_as_untried(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(registry.FAMILIES, "gemma2")
    assert "| `gemma2` | nothing is known: tried when it is loaded |" in script["table"]()


def test_all_names_that_mlx_lm_runs_as_another_are_on_the_page(script: dict[str, Any]) -> None:
    for name, code in registry.SAME_CODE.items():
        assert f"`{name}` as `{code}`" in script["PAGE"].read_text()
