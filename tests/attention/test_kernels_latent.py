"""paged_latent, Metal's and CUDA's: agreement with float64, traffic, and that mistakes are noticed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import (
    DTYPES,
    FAR_BLOCK,
    Arrays,
    Case,
    assert_close,
    check_points,
    decodes,
    dense_attention,
    make_arrays,
    points_of,
    split,
    strided,
)
from helpers.budget import budget
from helpers.gpu import Gpu
from helpers.planted import Mistake

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.work_items import Shape

DEEPSEEK, SMALL, TINY = (576, 512), (288, 256), (24, 16)  # head sizes of keys and of values
LENGTHS = {
    "decodes": decodes(1, 15, 16, 17, 300),
    "chunks": ((5, 40), (2, 17), (1, 33), (0, 20), (1, 0), (3, 3)),
    "a prompt": ((19, 19),),
}


def latents(lengths: Any, heads: int, dims: tuple[int, int] = TINY, **changes: Any) -> Case:
    return Case(lengths, (heads, 1), dims, latent=True, **changes)


CASES = {
    "a decode of few heads": latents(decodes(15, 1, 300), 5, DEEPSEEK),
    "a decode of many heads": latents(decodes(17, 300), 128, DEEPSEEK, dtype="bfloat16"),
    "some tokens of a prompt": latents(((3, 40), (1, 16)), 20, DEEPSEEK),
    "a window": latents(((2, 60), (1, 33)), 10, SMALL, window=33, dtype="bfloat16"),
    "large blocks": latents(decodes(70, 0, 3), 8, SMALL, block_size=64),
    "all that is asked of other layers": latents(((5, 90), (1, 17)), 16, TINY, softcap=50.0, sinks=True, window=70),
}
HALVES = {name: (case.dtype, case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_dense_attention(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.check(CASES[name])
    assert gpu.kernels_run[0] == "latent"
