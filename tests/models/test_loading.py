"""From a model's name to a model in memory: what is said about its family, and the type of its weights."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_paged import ModelError
from mlx_paged.errors import EngineWarning
from mlx_paged.models import loading, registry


def test_a_family_that_was_never_tested_is_loaded_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "is_untested", lambda name: name == "qwen2")
    with pytest.warns(EngineWarning, match="model family 'qwen2' is not among those that were tested"):
        loading.load(None, None)


def test_a_tested_family_is_loaded_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        loading.load(None, None)


def test_a_refused_family_is_named_with_its_reason_before_its_weights_are_read(
    tmp_path: Path, demo_folder: Path
) -> None:
    config = json.loads((demo_folder / "config.json").read_text()) | {"model_type": "phi3small"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'phi3small' can't be paged: a mask of blocks hides parts"):
        loading.load(tmp_path, None)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, mx.float32 if mx.default_device() == mx.cpu else mx.float16),
        ("float16", mx.float16),
        ("bfloat16", mx.bfloat16),
    ],
)
def test_weights_get_the_type_that_was_asked_for(dtype: str | None, expected: mx.Dtype) -> None:
    model = loading.load(None, dtype).model
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {expected}


def test_a_broken_tokenizer_is_named(tmp_path: Path, demo_folder: Path) -> None:
    shutil.copytree(demo_folder, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        loading.load(tmp_path / "model", None)


def test_a_folder_without_the_file_that_has_the_chat_template_is_said_to_lack_it(
    tmp_path: Path, demo_folder: Path
) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "tokenizer_config.json")
    shutil.copytree(demo_folder, tmp_path / "model", ignore=ignored)
    with pytest.warns(EngineWarning, match=r"has no tokenizer_config\.json: prompts get no chat template"):
        loading.load(tmp_path / "model", None)


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path, demo_folder: Path) -> None:
    shutil.copytree(demo_folder, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__", "tokenizer.json"))
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        loading.load(tmp_path / "model", None)
    (tmp_path / "model" / "vocab.txt").write_text("")  # of which an empty tokenizer is made
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        loading.load(tmp_path / "model", None)


@pytest.mark.parametrize("wrong", ["x", "2", [2, None], [[2]], 2.5, True, {"a": 1}], ids=str)
def test_an_end_token_that_is_no_token_id_is_named_with_the_files_that_say_it(
    wrong: Any, tmp_path: Path, demo_folder: Path
) -> None:
    shutil.copytree(demo_folder, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ModelError, match=r"eos_token_id must be a token id or a list of them.*generation_config\.json"):
        loading.load(tmp_path / "model", None)
