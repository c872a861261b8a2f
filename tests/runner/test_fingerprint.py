"""What names a model's saved prompts: whatever their keys, values and states depend on, and nothing else."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from helpers.families import family_model
from helpers.hash_model import HashModel
from helpers.tiny_models import make_model, unpaged_greedy

from mlx_paged.models.patch import patch_model
from mlx_paged.runner.fingerprint import fingerprint

LLAMA_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_ROPE["original_max_position_embeddings"] = 64


def name_of(model: nn.Module, block_size: int = 8) -> str:
    return fingerprint(patch_model(model), block_size)


def test_it_sees_every_weight_and_their_order() -> None:
    model = make_model("llama", num_hidden_layers=1)
    before = name_of(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    values = np.array(weight)
    values[[3, 4]] = values[[4, 3]]
    model.model.layers[0].mlp.up_proj.weight = mx.array(values)
    assert name_of(model) != before
    model.model.layers[0].mlp.up_proj.weight = weight
    assert name_of(model) == before


def test_the_same_weights_under_other_settings_have_another_name() -> None:
    def name(**changes: Any) -> str:
        return name_of(make_model("llama", num_hidden_layers=1, **changes))

    names = [
        name(),
        name(rope_theta=20000.0),
        name(rms_norm_eps=1e-3),
        name(rope_traditional=True),
        name(rope_scaling=LLAMA_ROPE),
        name(rope_scaling=LLAMA_ROPE | {"factor": 4.0}),
    ]
    assert len(set(names)) == len(names)


def test_what_a_module_keeps_in_no_parameter_and_no_argument_is_seen() -> None:
    """As a model that somebody wrote may, which has no arguments."""
    model = HashModel()
    names = [name_of(model)]
    model._freqs = mx.array([1.0, 2.0])
    names.append(name_of(model))
    model._freqs = mx.array([2.0, 1.0])
    names.append(name_of(model))
    model.settings = {"scale": [1.0, None, "a"]}
    names.append(name_of(model))
    assert len(set(names)) == len(names)


def test_types_layout_and_states_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", num_hidden_layers=1)
    names = [name_of(model), name_of(model, block_size=16)]
    monkeypatch.setattr(mlx_lm, "__version__", "0")
    names.append(name_of(model))
    model.set_dtype(mx.bfloat16)
    names.append(name_of(model))
    nn.quantize(model, group_size=32, bits=4)
    names.append(name_of(model))
    patched = patch_model(HashModel())
    names.append(fingerprint(patched, 8))
    patched.state_shapes = [((), mx.uint32)]
    names.append(fingerprint(patched, 8))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "deepseek_v2", "gemma3n"])
def test_it_stays_when_the_model_is_used(family: str) -> None:
    model = family_model(family)
    before = name_of(model)
    unpaged_greedy(model, [1, 2, 3], 4)
    model.train()
    assert name_of(model) == before
