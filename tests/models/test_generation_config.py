"""Sampling defaults come from a model's generation_config.json, and what it can't mean is left out with a warning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_paged import LLM, ModelError, SamplingParams
from mlx_paged.errors import EngineWarning
from mlx_paged.models.generation_config import sampling_defaults
from mlx_paged.models.loading import load


def write(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, {}),
        ({"eos_token_id": [1, 2], "max_length": 20}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        (
            {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
            {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        ),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
        ({"do_sample": True, "temperature": None, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"top_k": -1}, {"top_k": 0}),
    ],
    ids=str,
)
def test_what_the_file_says_is_read_by_our_names(config: Any, expected: dict[str, float], tmp_path: Path) -> None:
    assert sampling_defaults(write(tmp_path, config)) == expected


def test_without_the_file_there_are_no_defaults(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}


def test_a_value_out_of_range_is_left_out_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(EngineWarning, match=r"generation_config.json: top_p must be above 0 .*, got 7; it is left out"):
        assert sampling_defaults(write(tmp_path, {"top_p": 7, "top_k": 5})) == {"top_k": 5}


def test_a_file_that_is_no_json_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config.json"):
        sampling_defaults(write(tmp_path, "{"))


def test_an_engine_hands_out_its_models_defaults_and_takes_them_only_if_they_are_given(
    demo_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    write(folder, {"eos_token_id": 4, "do_sample": True, "temperature": 0.6, "top_p": 0.9})
    llm = LLM(folder, num_kv_blocks=64)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_p=0.9)
    assert llm.engine.make_request("Anna", SamplingParams()).params == SamplingParams()
    loaded = load(None, None)
    own = LLM.from_model(loaded.model, loaded.tokenizer, num_kv_blocks=8)
    assert own.get_default_sampling_params() == SamplingParams()
