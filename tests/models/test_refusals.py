"""What is said of a model that can't be paged."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.families import config_of, family_model
from helpers.stub_llm import invoke

from mlx_paged import LLM, ModelError
from mlx_paged.models import registry, replaced


@pytest.mark.parametrize("family", ["bitnet", "muse_spark"])
@pytest.mark.skipif(mx.metal.is_available(), reason="runs here")
def test_a_family_whose_layers_are_metal_kernels_is_said_to_need_a_mac(family: str) -> None:
    with pytest.raises(
        ModelError, match=f"^model family '{family}' runs on Macs only: mlx-lm computes .* Metal kernels"
    ):
        LLM.from_model(family_model(family), num_kv_blocks=4)


@pytest.mark.parametrize("family", ["phi3small", "deepseek_v32", "deepseek_v41"])
def test_a_listed_familys_reason_is_the_lists_wherever_it_is_found_out(family: str) -> None:
    with pytest.raises(ModelError) as caught:
        LLM.from_model(family_model(family), num_kv_blocks=4)
    assert str(caught.value) == f"model family {family!r} can't be paged: {registry.FAMILIES[family].note}"


@pytest.fixture
def untouched_longcat() -> Iterator[None]:
    """Its code as mlx-lm has it, whichever test has replaced some of it before."""
    module = importlib.import_module("mlx_lm.models.longcat_flash_ngram")
    importlib.reload(module)
    yield
    importlib.reload(module)


@pytest.mark.usefixtures("untouched_longcat")
def test_a_family_that_no_list_names_is_refused_with_what_its_code_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replaced._REPLACED, "longcat_flash_ngram", {})
    monkeypatch.delitem(registry.FAMILIES, "longcat_flash_ngram")
    with pytest.raises(ModelError, match=r"itself \(a state whose shape depends on the number of tokens\)"):
        LLM.from_model(family_model("longcat_flash_ngram"), num_kv_blocks=4)


def test_a_model_that_a_tested_familys_note_excepts_is_refused_with_the_note() -> None:
    model = family_model("minimax_m3_vl", text_config=config_of("minimax_m3_sparse"))
    with pytest.raises(ModelError, match=r"\(.*\); of this family it is known: models without sparse layers only$"):
        LLM.from_model(model, num_kv_blocks=4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"intermediate_size": 64}, r"Expected shape \(64, \d+\) but received shape"),
        ({"num_hidden_layers": 99}, r"Missing \d+ parameters"),
        ({"num_hidden_layers": 1}, r"Received \d+ parameters not in model"),
    ],
)
def test_weights_of_another_model_than_the_configuration_describes_are_said_to_be(
    changes: dict[str, int], reason: str, tmp_path: Path, demo_folder: Path
) -> None:
    shutil.copytree(demo_folder, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    config = json.loads((demo_folder / "config.json").read_text()) | changes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    line = f"^the weights in {tmp_path / 'model'} are not those that its config.json describes: {reason}"
    with pytest.raises(ModelError, match=line):
        LLM(tmp_path / "model")
    for command in (["inspect", str(tmp_path / "model")], ["generate", "--model", str(tmp_path / "model"), "Hi"]):
        result = invoke(*command)
        assert result.exit_code != 0 and "are not those that its config.json describes" in result.output
        assert "Traceback" not in result.output and len(result.output.strip().splitlines()) == 1
