"""What every test has: no network, one profile of Hypothesis, the simulators, tiny models and the demo model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import mlx.nn as nn
import pytest
from helpers.tiny_models import make_model
from metalsim.fixture import metal as metal

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


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The bundled demo model."""
    from mlx_paged.models import hub

    return hub.resolve(None)
