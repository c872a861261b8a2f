"""What the tests of grammars share: a compiler for the demo model's tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.grammars import END, PADDED

from mlx_paged.sampling.grammar import GrammarCompiler


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, PADDED, [END])
