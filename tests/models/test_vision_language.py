"""Folders of vision-language models load their language model, as in mlx-lm; what is no text is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.tiny_models import COMMON, TINY_CONFIGS, make_model, unpaged_greedy
from mlx.utils import tree_flatten

from mlx_paged import LLM, ModelError, SamplingParams
from mlx_paged.models.hub import DEMO_FOLDER
from mlx_paged.models.loading import load
from mlx_paged.tools.cache_cost import read_model

CONTEXT = 512
DEMO_VOCAB_SIZE = json.loads((DEMO_FOLDER / "config.json").read_text())["vocab_size"]
POOL: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 64, "max_num_batched_tokens": 16}
PROMPT = [5, 17, 60, 3, 44, 8, 31, 2, 90]

# The family of the language model, what its weights are called in the folder, and what there is beside them.
FOLDERS: dict[str, tuple[str, Callable[[str], str], list[str]]] = {
    "gemma3": ("gemma3_text", lambda name: name, ["vision_tower.a.weight", "multi_modal_projector.b"]),
    "qwen2_vl": ("qwen2", lambda name: name.removeprefix("language_model."), ["visual.blocks.0.weight"]),
    "qwen3_vl": (
        "qwen3",
        lambda name: name.replace("language_model.model.", "model.language_model."),
        ["model.visual.blocks.0.weight"],
    ),
    "mistral3": ("llama", lambda name: name, ["vision_tower.a.weight", "multi_modal_projector.b"]),
    "pixtral": ("llama", lambda name: name, ["vision_tower.a.weight", "multi_modal_projector.b"]),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], tuple[Path, Any]]:
    """Writes a vision-language folder of a family; returns it and its language model in mlx-lm."""

    def write(family: str) -> tuple[Path, Any]:
        text, name_of, others = FOLDERS[family]
        sizes = {"vocab_size": DEMO_VOCAB_SIZE, "max_position_embeddings": CONTEXT}
        section = COMMON | TINY_CONFIGS.get(text, {}) | sizes | {"model_type": text, "tie_word_embeddings": True}
        model = make_model(family, vocab_size=DEMO_VOCAB_SIZE, text_config=dict(section))
        weights = {name_of(name): array for name, array in tree_flatten(model.parameters())}
        weights |= {name: mx.ones((4, 4)) for name in others}
        mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
        config = {"model_type": family, "vocab_size": DEMO_VOCAB_SIZE, "text_config": section, "image_token_index": 7}
        (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": 4}}))
        for file in DEMO_FOLDER.glob("*token*"):
            shutil.copy(file, tmp_path)
        return tmp_path, model

    return write


@pytest.mark.parametrize("family", FOLDERS)
def test_a_vision_language_folder_gives_the_tokens_of_its_language_model(
    family: str, write: Callable[[str], tuple[Path, Any]]
) -> None:
    folder, model = write(family)
    loaded = load(folder, "float32")
    assert loaded.max_model_len == CONTEXT
    assert not [name for name, _ in tree_flatten(loaded.model.parameters()) if "vis" in name or "projector" in name]
    output = LLM(folder, **POOL).generate([PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0]
    assert output.outputs[0].token_ids == unpaged_greedy(model, PROMPT, 6).token_ids


def test_a_folder_with_the_sizes_at_the_top_and_positions_in_three_parts_is_one_too(
    write: Callable[[str], tuple[Path, Any]],
) -> None:
    folder, model = write("qwen2_vl")
    config = json.loads((folder / "config.json").read_text())
    flat = config | config.pop("text_config") | {"model_type": "qwen2_vl"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}  # all alike where there is but text
    (folder / "config.json").write_text(json.dumps(flat))
    llm = LLM(folder, **POOL)
    assert llm.engine.max_model_len == CONTEXT
    output = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0]
    assert output.outputs[0].token_ids == unpaged_greedy(model, PROMPT, 6).token_ids


def test_inspect_measures_the_language_model_alone(write: Callable[[str], tuple[Path, Any]]) -> None:
    folder, model = write("gemma3")
    size = read_model(folder, "float32")
    assert (size.family, size.context, size.is_measured) == ("gemma3", CONTEXT, True)
    assert size.weight_bytes == sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_an_image_is_refused_by_the_name_of_its_part(write: Callable[[str], tuple[Path, Any]]) -> None:
    llm = LLM(write("gemma3")[0], **POOL)
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(ValueError, match=r"messages\[0\]: content\[1\]: the model reads text.*'image_url'"):
        llm.chat([{"role": "user", "content": parts}])
    assert llm.chat([{"role": "user", "content": parts[:1]}], SamplingParams(max_tokens=1)).finished


def test_a_family_of_vision_language_models_that_mlx_lm_does_not_have_is_named(
    write: Callable[[str], tuple[Path, Any]],
) -> None:
    folder, _ = write("gemma3")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "idefics3"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="idefics3") as caught:
        load(folder, None)
    assert "\n" not in str(caught.value)
