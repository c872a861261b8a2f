"""What the tests of this folder share: a compiler for the demo model's tokenizer, and the kernels of both GPUs."""

from __future__ import annotations

from typing import Any

import pytest
from cudasim.fixture import cuda as cuda
from helpers.gpu import gpu as gpu
from helpers.grammars import END, PADDED

from mlx_paged.sampling.grammar import GrammarCompiler


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, PADDED, [END])
