"""What every test has: no network, one profile of Hypothesis, the simulators, tiny models and the demo model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_paged import LLM  # isort: skip  (before mlx, so that it finds OpenBLAS as it does for users)
import hypothesis
import mlx.nn as nn
import pytest
from helpers.llms import SMALL, MakeLLM
from helpers.tiny_models import make_model
from metalsim.fixture import metal as metal
from mlx_lm.utils import load_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for the network must fail, not download

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """`make_model`, each model made once in a session."""
    made: dict[Any, nn.Module] = {}

    def get(family: str, **changes: Any) -> nn.Module:
        key = (family, tuple(sorted(changes.items(), key=str)))
        if key not in made:
            made[key] = make_model(family, **changes)
        return made[key]

    return get


@pytest.fixture
def make_llm(tiny_model: Callable[..., nn.Module]) -> MakeLLM:
    """An LLM over a tiny random model, in blocks of 4, that verifies itself after every step."""

    def make(tokenizer: Any = None, **config: Any) -> LLM:
        model = tiny_model("llama", **SMALL, **({"vocab_size": len(tokenizer)} if tokenizer else {}))
        config = {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8, "check_invariants": True} | config
        return LLM.from_model(model, tokenizer, **config)

    return make


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The bundled demo model."""
    from mlx_paged.models import hub

    return hub.resolve(None)


@pytest.fixture(scope="session")
def tokenizer(demo_folder: Path) -> Any:
    """The demo model's tokenizer, with the token that ends a turn as its end token."""
    return load_tokenizer(demo_folder, eos_token_ids=4)
