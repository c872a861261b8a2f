"""What kernels use of Metal, and how the simulator runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metalsim.fixture import Metal


def _run(
    source: str,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    grid: int,
    threadgroup: int,
    *,
    call: dict[str, Any] | None = None,
    **options: Any,
) -> list[mx.array]:
    """Inputs are in0, in1, ...; outputs, given as (shape, dtype), out0, out1, ..."""
    kernel = mx.fast.metal_kernel(
        name="feature",
        input_names=[f"in{i}" for i in range(len(inputs))],
        output_names=[f"out{i}" for i in range(len(outputs))],
        source=source,
        **options,
    )
    return kernel(
        inputs=inputs,
        grid=(grid, 1, 1),
        threadgroup=(threadgroup, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        **(call or {}),
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_template_arguments_are_types_and_constants(metal: Metal, dtype: mx.Dtype) -> None:
    kernel = mx.fast.metal_kernel(
        name="exponential",
        input_names=["x"],
        output_names=["out"],
        source="""
          uint i = thread_position_in_grid.x;
          T v = x[i];
          out[i] = NEGATE ? -metal::exp(v) : metal::exp(v);
        """,
    )
    x = mx.random.normal((4, 16)).astype(dtype)
    (out,) = kernel(
        inputs=[x],
        template=[("T", dtype), ("NEGATE", True)],
        grid=(x.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[dtype],
    )
    assert out.dtype == dtype
    assert mx.allclose(out, -mx.exp(x), rtol=1e-2 if dtype == mx.bfloat16 else 1e-3).item()


def test_simdgroup_matrices_multiply(metal: Metal) -> None:
    a = mx.random.normal((16, 32)).astype(mx.float16)
    b = mx.random.normal((32, 16)).astype(mx.float16)
    source = """
      const uint group = simdgroup_index_in_threadgroup;
      const uint row = group / 2 * 8, column = group % 2 * 8;
      simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      simdgroup_matrix<half, 8, 8> left, right;
      threadgroup float tile[4][64];
      for (uint k = 0; k < 32; k += 8) {
        simdgroup_load(left, in0 + row * 32 + k, 32);
        simdgroup_load(right, in1 + k * 16 + column, 16, ulong2(0, 0), false);
        simdgroup_multiply_accumulate(sum, left, right, sum);
      }
      simdgroup_store(sum, &tile[group][0], 8);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      for (uint i = thread_index_in_simdgroup; i < 64; i += 32) {
        out0[(row + i / 8) * 16 + column + i % 8] = tile[group][i];
      }
    """
    (out,) = _run(source, [a, b], [((16, 16), mx.float32)], 128, 128)
    assert mx.allclose(out, a.astype(mx.float32) @ b.astype(mx.float32), atol=1e-3).item()


def test_atomics_count(metal: Metal) -> None:
    x = mx.random.randint(0, 8, (1000,)).astype(mx.uint32)
    source = """
      threadgroup atomic_uint counts[8];
      uint t = thread_index_in_threadgroup;
      if (t < 8) atomic_store_explicit(&counts[t], 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint i = thread_position_in_grid.x;
      if (i < in0_shape[0]) atomic_fetch_add_explicit(&counts[in0[i]], 1u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (t < 8) {
        uint n = atomic_load_explicit(&counts[t], memory_order_relaxed);
        atomic_fetch_add_explicit(&out0[t], n, memory_order_relaxed);
      }
    """
    outputs = [((8,), mx.uint32)]
    (out,) = _run(source, [x], outputs, 1024, 128, atomic_outputs=True, call={"init_value": 0})
    assert (np.array(out) == np.bincount(np.array(x), minlength=8)).all()


def test_vectors_have_swizzles_operators_and_casts(metal: Metal) -> None:
    x = mx.random.normal((64, 4))
    source = """
      uint i = thread_position_in_grid.x;
      float4 v = ((const device float4*)in0)[i];
      float3 a = v.xyz, b = v.wzy;
      a.xz += b.zx;
      half4 h = half4(v);
      h *= 2.0h;
      auto scaled = [&](float f) { return f * TABLE[i & 3] + float(h.y); };
      ushort2 halves = as_type<ushort2>(as_type<uint>(v.x));
      bool4 positive = v > float4(0.0f);
      float4 absolute = select(-v, v, positive);
      out0[i] = scaled(dot(a, b)) + absolute.x + (any(positive) ? 1 : 0) + halves.y * 0;
    """
    header = "constant float TABLE[4] = {0.5, 1.5, 2.5, 3.5};\n"
    (out,) = _run(source, [x], [((64,), mx.float32)], 64, 64, header=header)
    v = np.array(x)
    a, b = v[:, :3].copy(), v[:, [3, 2, 1]]
    a[:, 0] += b[:, 2]
    a[:, 2] += b[:, 0]
    doubled = (v[:, 1].astype(np.float16) * np.float16(2)).astype(np.float32)
    table = np.array([0.5, 1.5, 2.5, 3.5])[np.arange(64) % 4]
    expected = (a * b).sum(1) * table + doubled + abs(v[:, 0]) + (v > 0).any(1)
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-5, atol=1e-5)


def test_half_rounds_after_every_operation(metal: Metal) -> None:
    metal.only_simulated("products and sums are rounded apart")
    x = mx.array([0.1, 1000.3, 3.3], dtype=mx.float16)
    source = """
      uint i = thread_position_in_grid.x;
      half a = in0[i];
      out0[i] = a * a + a;
      half b = a * a;
      out1[i] = b + a - 0.5h;
    """
    product, chained = _run(source, [x], [((3,), mx.float32)] * 2, 3, 3)
    h = np.array(x)
    with np.errstate(over="ignore"):
        assert (np.array(product) == (h * h + h).astype(np.float32)).all()
        assert (np.array(chained) == (h * h + h - np.float16(0.5)).astype(np.float32)).all()


def test_simdgroup_functions_combine_the_lanes(metal: Metal) -> None:
    source = """
      uint i = thread_position_in_grid.x;
      int v = in0[i];
      ushort lane = thread_index_in_simdgroup;
      out0[i] = simd_sum(v);
      out1[i] = simd_prefix_exclusive_sum(v);
      out2[i] = simd_shuffle_xor(v, 1);
      out3[i] = simd_shuffle_and_fill_down(v, -1, 2);
      out4[i] = simd_max(v) * 100 + int(simd_broadcast(v, 3));
      out5[i] = (ulong)simd_ballot(v % 2 == 0);
    """
    v = np.random.default_rng(0).integers(0, 99, 32).astype(np.int32)
    outputs = [((32,), mx.int32)] * 5 + [((32,), mx.uint32)]
    results = [np.array(o) for o in _run(source, [mx.array(v)], outputs, 32, 32)]
    assert (results[0] == v.sum()).all()
    assert (results[1] == np.cumsum(v) - v).all()
    assert (results[2] == v[np.arange(32) ^ 1]).all()
    assert (results[3] == np.append(v[2:], [-1, -1])).all()
    assert (results[4] == v.max() * 100 + v[3]).all()
    assert (results[5] == sum(1 << i for i in range(32) if v[i] % 2 == 0)).all()


def test_the_last_threadgroup_may_be_smaller(metal: Metal) -> None:
    source = """
      uint i = thread_position_in_grid.x;
      out0[i] = threads_per_threadgroup.x * 1000 + simdgroups_per_threadgroup;
    """
    (out,) = _run(source, [mx.array(0)], [((100,), mx.int32)], 100, 64)
    assert out[0].item() == 64002 and out[99].item() == 36002


def test_an_input_may_keep_its_strides(metal: Metal) -> None:
    x = mx.random.normal((6, 8)).T[::2]
    source = """
      uint i = thread_position_in_grid.x;
      out0[i] = in0[elem_to_loc(i, in0_shape, in0_strides, in0_ndim)];
    """
    outputs = [(x.shape, mx.float32)]
    (out,) = _run(source, [x], outputs, x.size, 32, ensure_row_contiguous=False)
    assert mx.array_equal(out, x).item()


APPEND = "((device float*)in0)[thread_position_in_grid.x + 4] = in1[thread_position_in_grid.x];"


def test_an_input_that_may_be_written_changes_in_place(metal: Metal) -> None:
    metal.configure(writable_inputs={"in0"})
    cache, new = mx.zeros((3, 4)), mx.array([1.0, 2.0, 3.0, 4.0] * 2)[:4]
    source = APPEND + "out0[thread_position_in_grid.x] = 0;"
    mx.eval(_run(source, [cache, new], [((4,), mx.float32)], 4, 4))
    expected = [[0.0] * 4, [1.0, 2.0, 3.0, 4.0], [0.0] * 4]
    assert cache.tolist() == expected
    assert metal.report.inputs_after["in0"].tolist() == expected
    assert metal.report.traffic.buffers["in0"].bytes_written == 16


def test_a_write_to_an_input_that_mlx_copied_is_lost(metal: Metal) -> None:
    """MLX copies an input that is not contiguous, and the kernel writes to the copy."""
    metal.configure(writable_inputs={"in0"})
    cache, new = mx.zeros((4, 3)).T, mx.arange(4).astype(mx.float32)
    source = APPEND + "out0[thread_position_in_grid.x] = 0;"
    mx.eval(_run(source, [cache, new], [((4,), mx.float32)], 4, 4))
    assert cache.tolist() == [[0.0] * 4] * 3
    assert metal.report.inputs_after["in0"].tolist() == [[0.0] * 4, [0, 1, 2, 3], [0.0] * 4]


def test_outputs_begin_with_the_initial_value(metal: Metal) -> None:
    outputs = [((8,), mx.bfloat16)]
    call = {"init_value": 7, "template": [("T", mx.bfloat16)]}
    (out,) = _run("out0[3] = T(in0);", [mx.array(2.0)], outputs, 1, 1, call=call)
    assert out.tolist() == [7, 7, 7, 2, 7, 7, 7, 7]


def test_compiled_functions_run_their_kernels(metal: Metal) -> None:
    @mx.compile
    def twice(x: mx.array) -> mx.array:
        source = "uint i = thread_position_in_grid.x; out0[i] = 2 * in0[i];"
        return _run(source, [x + 1], [((8,), mx.float32)], 8, 8)[0] * 3

    assert twice(mx.zeros((8,))).tolist() == [6.0] * 8
