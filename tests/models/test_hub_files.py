"""models/hub.py: which files a model's folder must have, and what is said of one that lacks some."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
from helpers.model_files import write_safetensors

from mlx_paged.errors import ModelError
from mlx_paged.models.hub import check_files


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_files(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_model_passes(model_folder: Path) -> None:
    check_files(model_folder)


def test_a_config_that_is_not_json_is_named(model_folder: Path) -> None:
    (model_folder / "config.json").write_text('{"model_type": ')
    assert "config.json" in refusal(model_folder)
    (model_folder / "config.json").write_text("[]")
    assert "JSON object" in refusal(model_folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", r"from_pretrained\('{folder}'\).save_pretrained\('{folder}'\)"),
        ("model.pth", "saved by PyTorch"),
        ("model.gguf", "for llama.cpp"),
        ("weights.npz", "newer conversion"),
        ("adapter_model.safetensors", "an adapter, of no use without its base model"),
        ("consolidated.safetensors", "under that name it isn't looked for"),
    ],
)
def test_weights_in_another_format_are_named_with_what_helps(name: str, said: str, model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / name)
    text = refusal(model_folder)
    assert f"there is only {name}: " in text and "mlx_lm.convert" not in text
    assert re.search(said.format(folder=model_folder), text), text


@pytest.mark.parametrize(
    "files", [["tokenizer.model"], ["spiece.model"], ["qwen.tiktoken"], ["vocab.json", "merges.txt"], ["vocab.txt"]]
)
def test_a_folder_without_a_vocabulary_is_refused_and_any_kind_of_file_with_one_will_do(
    files: list[str], model_folder: Path
) -> None:
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name in files:
        assert f"{model_folder} has no tokenizer.json, nor another file with a vocabulary" in refusal(model_folder)
        (model_folder / name).write_text("x")
    check_files(model_folder)


def test_a_missing_shard_is_named(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "model-00002-of-00002.safetensors" in refusal(model_folder)
    write_safetensors(model_folder / "model-00002-of-00002.safetensors")
    check_files(model_folder)
    index.write_text("{}")
    assert index.name in refusal(model_folder)


def test_a_missing_shard_is_named_without_an_index_too(model_folder: Path) -> None:
    for number in (1, 3):
        write_safetensors(model_folder / f"model-0000{number}-of-00004.safetensors")
    text = refusal(model_folder)
    assert "lacks model-00002-of-00004.safetensors, model-00004-of-00004.safetensors (2 of 4 files" in text


@pytest.mark.parametrize("kept", [0, 7, 20, -1])
def test_a_file_that_is_cut_short_is_named(kept: int, model_folder: Path) -> None:
    shard = model_folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    assert str(shard) in refusal(model_folder)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not found</html>",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 10) + b'{"a": {} }',
        b"\x02" + bytes(7) + b"[]",
    ],
)
def test_a_file_that_is_no_safetensors_is_named(content: bytes, model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(model_folder)
