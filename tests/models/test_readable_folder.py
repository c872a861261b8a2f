"""A model whose text files begin with a byte order mark, or whose folder has brackets in its name, is read."""

from __future__ import annotations

import codecs
import shutil
from pathlib import Path

import pytest

from mlx_paged import LLM, SamplingParams
from mlx_paged.models import hub
from mlx_paged.models.readable_folder import as_readable

FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def marked(demo_folder: Path, tmp_path: Path) -> Path:
    """The demo model, as an editor that writes marks has saved it."""
    folder = tmp_path / "marked"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in FILES:
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    return folder


def test_a_model_whose_files_have_marks_answers_as_the_one_without(marked: Path) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    params = SamplingParams(temperature=0, max_tokens=12)
    plain, llm = LLM(num_kv_blocks=64), LLM(marked, num_kv_blocks=64)
    expected, output = plain.chat(messages, params), llm.chat(messages, params)
    assert output.prompt_token_ids == expected.prompt_token_ids
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert output.outputs[0].text == expected.outputs[0].text
    assert llm.get_default_sampling_params() == plain.get_default_sampling_params()
    assert llm.tokenizer.eos_token_ids == plain.tokenizer.eos_token_ids


def test_a_configuration_with_a_mark_is_read(marked: Path) -> None:
    assert hub.read_json(marked / "config.json") == hub.read_json(hub.DEMO_FOLDER / "config.json")


def test_a_template_with_a_mark_is_copied_without_it_and_what_is_large_is_linked(marked: Path) -> None:
    (marked / "chat_template.jinja").write_bytes(codecs.BOM_UTF8 + b"{{ messages }}")
    with as_readable(marked) as folder:
        assert {path.name for path in folder.iterdir()} == {path.name for path in marked.iterdir()}
        assert (folder / "chat_template.jinja").read_bytes() == b"{{ messages }}"
        assert (folder / "model.safetensors").is_symlink()
        assert not any((folder / name).read_bytes().startswith(codecs.BOM_UTF8) for name in FILES)
    assert not folder.exists()
    assert (marked / "config.json").read_bytes().startswith(codecs.BOM_UTF8), "the model's own files stay"


def test_a_folder_without_marks_is_taken_as_it_is(demo_folder: Path) -> None:
    with as_readable(demo_folder) as folder:
        assert folder == demo_folder


def test_a_folder_with_brackets_in_its_name_is_found_by_mlx_lms_patterns(demo_folder: Path, tmp_path: Path) -> None:
    bracketed = Path(shutil.copytree(demo_folder, tmp_path / "a model [4-bit]"))
    params = SamplingParams(temperature=0, max_tokens=5)
    answers = [LLM(folder, num_kv_blocks=8).generate("Once", params)[0] for folder in (demo_folder, bracketed)]
    assert answers[0].outputs[0].token_ids == answers[1].outputs[0].token_ids
