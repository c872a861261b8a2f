"""The kernels in cuda/, compiled for NVIDIA's cards by NVIDIA's compiler; none is run."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest
from helpers import nvrtc
from helpers.attention_cases import DTYPES
from helpers.budget import LONG
from helpers.cuda_text import Call, kernel_text, record, record_draw, record_merge, record_write

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


def points_of(**grid: list[Any]) -> list[tuple[Any, ...]]:
    """Points in which every value of each dimension comes once, or all: a compilation takes seconds."""
    if LONG:
        return list(itertools.product(*grid.values()))
    return [tuple(values[i % len(values)] for values in grid.values()) for i in range(max(map(len, grid.values())))]


def check_all(calls: Sequence[Call], architectures: Sequence[str]) -> None:
    """Each call's kernel compiles for its architecture without a warning, fits a multiprocessor and spills nothing."""
    with ThreadPoolExecutor(2) as pool:
        all_resources = pool.map(nvrtc.compile_for, architectures, [call.text for call in calls])
    for call, architecture, resources in zip(calls, architectures, all_resources, strict=True):
        assert resources.spill_stores == 0, f"{architecture} {resources}: {call.text}"
        assert resources.registers * call.threads <= 65536


@pytest.mark.slow
def test_decode_kernels_compile_and_keep_their_state_in_registers() -> None:
    points = points_of(kind=["decode", "decode", "several"], heads=[16, 5, 4], **CONSTANTS, architecture=ARCHITECTURES)
    check_all([record(*point[:-1]) for point in points], [point[-1] for point in points])


@pytest.mark.slow
def test_prefill_kernels_compile_and_keep_their_state_in_registers() -> None:
    points = points_of(kind=["prefill", "shared"], heads=[4], **CONSTANTS, architecture=ARCHITECTURES)
    check_all([record(*point[:-1]) for point in points], [point[-1] for point in points])


@pytest.mark.slow
def test_latent_kernels_compile_and_keep_their_state_in_registers() -> None:
    grid = CONSTANTS | {"dtype": [mx.float16, mx.bfloat16], "dims": [(576, 512), (288, 256), (24, 16)]}
    points = points_of(kind=["latent"], heads=[128, 16], **grid, architecture=ARCHITECTURES)
    longer = points_of(kind=["long"], heads=[8, 32], **grid | {"dims": [(512, 512), (320, 512)]}, on=ARCHITECTURES)
    points += longer
    check_all([record(*point[:-1]) for point in points], [point[-1] for point in points])


@pytest.mark.slow
def test_kernels_over_codes_compile_and_keep_their_state_in_registers() -> None:
    grid = CONSTANTS | {"dims": [(256, 256), (128, 128), (64, 96)], "codes": ["k8v4", "int8", "fp8"]}
    points = points_of(kind=["several", "decode", "decode"], heads=[4, 16, 5], **grid, architecture=ARCHITECTURES)
    others = grid | {"dtype": [mx.bfloat16, mx.float16], "codes": ["k8v4", "fp8"]}
    prompts = others | {"dims": [(256, 256), (64, 96)]}
    points += points_of(kind=["prefill", "shared"], heads=[4], **prompts, architecture=ARCHITECTURES[1:])
    points += points_of(kind=["long"], heads=[32], **others | {"dims": [(512, 512)]}, architecture=ARCHITECTURES[:1])[
        :1
    ]
    check_all([record(*point[:-1]) for point in points], [point[-1] for point in points])


def test_merge_kernels_compile() -> None:
    grid = {"dtype": CONSTANTS["dtype"], "value_dim": [64, 72, 512], "is_shared": [False, True]}
    points = points_of(**grid, architecture=ARCHITECTURES)
    check_all([record_merge(*point[:-1]) for point in points], [point[-1] for point in points])


def test_write_kernels_compile() -> None:
    grid = {"dtype": CONSTANTS["dtype"], "dims": CONSTANTS["dims"], "is_latent": [False, True]}
    points = points_of(**grid, architecture=ARCHITECTURES)
    check_all([record_write(*point[:-1]) for point in points], [point[-1] for point in points])


def test_kernels_that_write_codes_compile() -> None:
    grid = {
        "dtype": CONSTANTS["dtype"],
        "dims": [(64, 64), (96, 512)],
        "latent": [False],
        "codes": ["int8", "fp8", "k8v4"],
    }
    points = points_of(**grid, architecture=ARCHITECTURES)
    check_all([record_write(*point[:-1]) for point in points], [point[-1] for point in points])


def test_the_kernel_that_draws_compiles() -> None:
    check_all([record_draw()] * len(ARCHITECTURES), ARCHITECTURES)


# -- the text around a kernel --

#: As printed by the library of MLX 0.32.4 for CUDA, `cuda_kernel` with `verbose`, for the sample below.
PRINTED = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

// header
constexpr int ONE = 1;
namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_sample_bfloat16_t_5_t_f_float(
    const __half* a,
    const __grid_constant__ Shape a_shape,
    const __nv_bfloat16* b,
    const __grid_constant__ int b_ndim,
    const float* c,
    const int32_t* d,
    const __grid_constant__ Shape d_shape,
    const __grid_constant__ Strides d_strides,
    const uint32_t* e,
    __half* x,
    float* y) {
  using T = __nv_bfloat16;
  constexpr int SIZE = 5;
  constexpr bool YES = true;
  constexpr bool NO = false;
  using U = float;

const int n = a_shape[0] + d_shape[2] + int(d_strides[1]) + b_ndim + c_shape;
x[0] = T(n + SIZE);
}

} // namespace mlx::core::cu
"""


def test_the_text_around_a_kernel_is_the_one_that_mlx_makes() -> None:
    shapes = {"a": ((2, 3), mx.float16), "b": ((4,), mx.bfloat16), "c": ((), mx.float32), "d": ((5, 6, 7), mx.int32)}
    inputs = {name: mx.zeros(*shape) for name, shape in (shapes | {"e": ((1,), mx.uint32)}).items()}
    rebuilt = kernel_text(
        "custom_kernel_sample_bfloat16_t_5_t_f_float",
        "const int n = a_shape[0] + d_shape[2] + int(d_strides[1]) + b_ndim + c_shape;\nx[0] = T(n + SIZE);",
        "// header\nconstexpr int ONE = 1;\n",
        inputs,
        {"x": mx.float16, "y": mx.float32},
        [("T", mx.bfloat16), ("SIZE", 5), ("YES", True), ("NO", False), ("U", mx.float32)],
    )
    assert rebuilt == PRINTED


# -- the compiler --


@pytest.mark.parametrize(
    ("old", "new"),
    [("const int lane = threadIdx.x;", "const int lane = thread;"), ("int lane =", "int unused = 0, lane =")],
)
def test_errors_and_warnings_are_noticed(old: str, new: str) -> None:
    text = record_merge(mx.float32, 64).text
    assert old in text
    with pytest.raises(nvrtc.NvrtcError, match=r"thread|unused"):
        nvrtc.compile_for("sm_90a", text.replace(old, new))
