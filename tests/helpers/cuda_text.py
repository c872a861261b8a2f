"""The text that MLX 0.32 puts around a kernel made with `mx.fast.cuda_kernel`, which it does only beside a device.

Before the header stand MLX's utilities and cooperative groups; every input is a `const` pointer, also one without
dimensions; `x_shape`, `x_strides` and `x_ndim` follow it if their names occur in the body; template arguments are
constants at the beginning of the body. test_cuda_compile.py has an example that MLX's own library has printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.cuda import CudaBackend
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.sampling.draw_kernel import draw_tokens

_TYPES = {
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}
_PREAMBLE = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

"""
_EXTRAS = {"shape": "Shape", "strides": "Strides", "ndim": "int"}


def type_of(dtype: mx.Dtype) -> str:
    return _TYPES[dtype]


def extras_of(name: str, array: mx.array, source: str) -> list[str]:
    """Which of "shape", "strides", "ndim" the kernel is told of an input."""
    return [extra for extra in _EXTRAS if array.ndim > 0 and f"{name}_{extra}" in source]


def kernel_text(
    function: str,
    source: str,
    header: str,
    inputs: Mapping[str, mx.array],
    outputs: Mapping[str, mx.Dtype],
    template: Sequence[tuple[str, Any]],
) -> str:
    """What is compiled for a call: inputs and outputs by name, in order."""
    parameters = []
    for name, array in inputs.items():
        parameters.append(f"const {type_of(array.dtype)}* {name}")
        for extra in extras_of(name, array, source):
            parameters.append(f"const __grid_constant__ {_EXTRAS[extra]} {name}_{extra}")
    parameters += [f"{type_of(dtype)}* {name}" for name, dtype in outputs.items()]
    constants = []
    for name, value in template:
        if isinstance(value, mx.Dtype):
            constants.append(f"  using {name} = {type_of(value)};\n")
        elif isinstance(value, bool):
            constants.append(f"  constexpr bool {name} = {str(value).lower()};\n")
        else:
            constants.append(f"  constexpr int {name} = {value};\n")
    return (
        f"{_PREAMBLE}{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {function}(\n    "
        + ",\n    ".join(parameters)
        + ") {\n"
        + "".join(constants)
        + ("\n" if constants else "")
        + f"{source}\n}}\n\n}} // namespace mlx::core::cu\n"
    )


class Call(NamedTuple):
    """A kernel's call: what MLX would compile for it, how many threads a block has, and its dynamic shared memory.

    inputs: by name.
    """

    kernel: str
    text: str
    threads: int
    shared_bytes: int
    inputs: dict[str, mx.array]
    outputs: list[mx.array]


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Within it all calls of kernels made with `mx.fast.cuda_kernel` are recorded, and compute zeros."""
    calls: list[Call] = []

    def cuda_kernel(
        *, name: str, input_names: Any, output_names: Any, source: str, header: str, shared_memory: int = 0, **_: Any
    ) -> Any:
        def call(
            *, inputs: Any, template: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any, **_: Any
        ) -> list[mx.array]:
            arrays = dict(zip(input_names, inputs, strict=True))
            outputs = dict(zip(output_names, output_dtypes, strict=True))
            text = kernel_text(f"custom_kernel_{name}", source, header, arrays, outputs, template)
            results = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            calls.append(Call(name, text, math.prod(threadgroup), shared_memory, arrays, results))
            return results

        return call

    with (
        mock.patch.object(mx.fast, "cuda_kernel", cuda_kernel),
        mock.patch.object(mx.cuda, "is_available", lambda: True),
    ):
        yield calls


def record(
    kind: str,
    heads: int,
    dtype: mx.Dtype,
    dims: tuple[int, int],
    softcap: float | None = None,
    sinks: bool = False,
    codes: str | None = None,
) -> Call:
    """The call of a kernel for `heads` query heads on one KV head.

    kind: "decode", "several", that of several queries, "prefill", "latent", "long", that of heads longer than 256,
    or "shared", the prefill's for a prefix that two sequences share. dims: head sizes of keys and of values. codes: the
    type that K and V are stored as.
    """
    queries = 16 // heads if kind == "several" else 1
    q = mx.zeros((2 * queries, heads, dims[0]), dtype)
    layer = LayerSpec(1, *dims, dtype, value_in_key=kind == "latent")
    pool = LayerPool.zeros(layer.quantised(codes) if codes else layer, 2, 16)
    tables, shape = mx.zeros((2, 2), mx.int32), shape_of(q, pool)
    options = AttentionOptions(1.0, None, softcap, mx.zeros(heads, dtype) if sinks else None)
    context_lens = np.array([20, 20], np.int32)
    prefixes = [SharedPrefix(np.arange(2), 16)] if kind == "shared" else []
    with recorded_calls() as calls:
        if kind in ("prefill", "latent", "long"):
            plan = CudaBackend().plan_prefill(context_lens[:1], np.array([0, 2], np.int32), None, shape)
            CudaBackend().run(q, pool, tables[:1], plan, options)
        else:
            plan = CudaBackend().plan_decode(context_lens, np.arange(3) * queries, None, shape, prefixes)
            CudaBackend().run(q, pool, tables, plan, options)
    return calls[1 if kind == "shared" else 0]


def record_merge(dtype: mx.Dtype, value_dim: int, is_shared: bool = False) -> Call:
    """The call of the merge kernel; is_shared: with parts of shared prefixes."""
    parts, numbers = [mx.zeros((4, 8, value_dim), dtype), mx.zeros((4, 8))], mx.zeros(8, mx.int32)
    ranges = numbers.reshape(4, 2) if is_shared else None
    with recorded_calls() as calls:
        CudaBackend().prepare_merge(mx.zeros((2, 8, 8), dtype), value_dim, numbers, ranges)(parts)
    return calls[0]


def record_write(dtype: mx.Dtype, dims: tuple[int, int], is_latent: bool = False, codes: str | None = None) -> Call:
    """The call of the kernel that writes K and V, of 3 tokens with 2 KV heads. dims: their head sizes."""
    layer = LayerSpec(2, *dims, dtype, is_latent)
    pool = LayerPool.zeros(layer.quantised(codes) if codes else layer, 2, 16)
    new = [mx.zeros((3, 2, dim), dtype) for dim in dims]
    with recorded_calls() as calls:
        CudaBackend().write(pool, slots_of(np.zeros(3, np.int32), np.zeros(3, np.int32)), *new)
    return calls[0]


def record_draw(vocab_size: int = 1000) -> Call:
    """The call of the kernel that draws a token for each of two rows."""
    with recorded_calls() as calls:
        draw_tokens("cuda", mx.zeros((2, vocab_size)), np.zeros((2, 8), np.uint32))
    return calls[0]


def slots_of(block_ids: np.ndarray, offsets: np.ndarray) -> AttentionMetadata:
    """Metadata that tells where new keys and values go, and nothing else."""
    nothing = np.zeros(0, np.int32)
    slots = {"slot_block_ids": mx.array(block_ids), "slot_offsets": mx.array(offsets)}
    return AttentionMetadata(mx.array(nothing), nothing, nothing, **slots)
