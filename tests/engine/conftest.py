"""An engine of a tiny random model, for all tests of this folder."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.engines import MakeEngine
from helpers.llms import MakeLLM

from mlx_paged.engine.engine import Engine


@pytest.fixture
def make_engine(make_llm: MakeLLM) -> MakeEngine:
    """An engine without tokenizer, in blocks of 4, that verifies itself after every step."""

    def make(tokenizer: Any = None, **config: Any) -> Engine:
        return make_llm(tokenizer, **config).engine

    return make
