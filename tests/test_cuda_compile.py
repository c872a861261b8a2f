"""The kernels in cuda/, compiled for NVIDIA's cards by NVIDIA's compiler; none is run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import nvrtc
import pytest
from attention_cases import DTYPES, points_of
from cuda_text import Call, record, record_merge

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or nvrtc.folder() is None, reason="NVIDIA's compiler is not installed"
)

#: MLX appends an "a" from sm_90 on.
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100a"]
CONSTANTS: dict[str, list[Any]] = {
    "dtype": list(DTYPES.values()),
    "dims": [(64, 64), (128, 128), (256, 256), (40, 72)],
    "softcap": [None, 50.0],
    "sinks": [False, True],
}


def check_all(calls: Sequence[Call], architectures: Sequence[str]) -> None:
    """Each call's kernel compiles for its architecture without a warning, fits a multiprocessor and spills nothing."""
    with ThreadPoolExecutor(2) as pool:
        all_resources = pool.map(nvrtc.compile_for, architectures, [call.text for call in calls])
    for call, architecture, resources in zip(calls, architectures, all_resources, strict=True):
        assert resources.spill_stores == 0, f"{architecture} {resources}: {call.text}"
        assert resources.registers * call.threads <= 65536


def test_decode_kernels_compile_and_keep_their_state_in_registers() -> None:
    points = points_of({"heads": [5, 16], **CONSTANTS, "architecture": ARCHITECTURES})
    check_all([record("decode", *point[:-1]) for point in points], [point[-1] for point in points])


def test_prefill_kernels_compile_and_keep_their_state_in_registers() -> None:
    points = points_of({"kind": ["prefill", "shared"], "heads": [4], **CONSTANTS, "architecture": ARCHITECTURES})
    check_all([record(*point[:-1]) for point in points], [point[-1] for point in points])


def test_merge_kernels_compile() -> None:
    grid = {"dtype": CONSTANTS["dtype"], "value_dim": [64, 72, 256], "is_shared": [False, True]}
    points = points_of({**grid, "architecture": ARCHITECTURES})
    check_all([record_merge(*point[:-1]) for point in points], [point[-1] for point in points])


@pytest.mark.parametrize(
    ("old", "new"),
    [("const int lane = threadIdx.x;", "const int lane = thread;"), ("int lane =", "int unused = 0, lane =")],
)
def test_errors_and_warnings_are_noticed(old: str, new: str) -> None:
    text = record_merge(mx.float32, 64).text
    assert old in text
    with pytest.raises(nvrtc.NvrtcError, match=r"thread|unused"):
        nvrtc.compile_for("sm_90a", text.replace(old, new))
