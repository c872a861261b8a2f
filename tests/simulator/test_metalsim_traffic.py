"""Traffic of kernels that are small enough to count by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metalsim import example
from metalsim.fixture import Metal

LANES = 32


def _run(source: str, inputs: dict[str, mx.array], size: int, *, threads: int = LANES) -> mx.array:
    kernel = mx.fast.metal_kernel(
        name="counted",
        input_names=list(inputs),
        output_names=["out"],
        source=source,
    )
    (out,) = kernel(
        inputs=list(inputs.values()),
        grid=(threads, 1, 1),
        threadgroup=(min(threads, 128), 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
    )
    mx.eval(out)  # a real GPU is to run it, too
    return out


def test_neighbouring_lanes_share_lines(metal: Metal) -> None:
    _run(
        "uint i = thread_position_in_grid.x; out[i] = x[i];",
        {"x": mx.zeros((128,))},
        128,
        threads=128,
    )
    x, out = metal.report.traffic.buffers["x"], metal.report.traffic.buffers["out"]
    assert (x.bytes_read, x.distinct_bytes_read, x.read_instructions) == (512, 512, 4)
    assert (x.lines_read, x.distinct_lines_read, x.read_amplification) == (4, 4, 1.0)
    assert (out.bytes_written, out.write_instructions, out.lines_written) == (512, 4, 4)
    assert out.distinct_bytes_written == 512


@pytest.mark.parametrize(("stride", "lines"), [(2, 2), (8, 8), (64, 32)])
def test_a_stride_costs_a_line_for_each_lane(metal: Metal, stride: int, lines: int) -> None:
    """32 floats at a stride touch stride lines, at most one per lane."""
    source = f"uint i = thread_position_in_grid.x; out[i] = x[i * {stride}];"
    _run(source, {"x": mx.zeros((LANES * stride,))}, LANES)
    x = metal.report.traffic.buffers["x"]
    assert (x.read_instructions, x.lines_read, x.bytes_read) == (1, lines, 128)
    assert x.distinct_bytes_read == 128


def test_lanes_that_read_one_element_share_its_line(metal: Metal) -> None:
    """All lanes read one element: one line, 4 distinct bytes, 128 requested."""
    _run("uint i = thread_position_in_grid.x; out[i] = x[77];", {"x": mx.zeros((100,))}, LANES)
    x = metal.report.traffic.buffers["x"]
    assert (x.bytes_read, x.distinct_bytes_read, x.lines_read) == (128, 4, 1)


@pytest.mark.parametrize(
    ("dtype", "name", "instructions", "lines"),
    [(mx.float16, "half4", 1, 2), (mx.float32, "float4", 1, 4), (mx.float32, "float2", 1, 2)],
)
def test_a_vector_load_is_one_instruction(
    metal: Metal, dtype: mx.Dtype, name: str, instructions: int, lines: int
) -> None:
    width = int(name[-1])
    source = f"""
      uint i = thread_position_in_grid.x;
      {name} v = ((const device {name}*)x)[i];
      float sum = 0;
      for (int k = 0; k < {width}; k++) sum += float(v[k]);
      out[i] = sum;
    """
    _run(source, {"x": mx.zeros((LANES * width,), dtype=dtype)}, LANES)
    x = metal.report.traffic.buffers["x"]
    assert (x.read_instructions, x.lines_read) == (instructions, lines)
    assert x.bytes_read == x.distinct_bytes_read == x.nbytes


def test_adjacent_loads_of_an_unrolled_loop_are_one_vector(metal: Metal) -> None:
    """Four adjacent floats per lane, loaded one by one in a loop of known length."""
    source = """
      uint i = thread_position_in_grid.x;
      float v[4];
      for (int k = 0; k < 4; k++) v[k] = x[i * 4 + k];
      out[i] = v[0] + v[1] * v[2] + v[3];
    """
    _run(source, {"x": mx.zeros((LANES * 4,))}, LANES)
    x = metal.report.traffic.buffers["x"]
    assert (x.read_instructions, x.lines_read) == (1, 4)


def test_each_iteration_of_a_loop_is_an_instruction(metal: Metal) -> None:
    """A loop of unknown length: each iteration is an instruction of its own."""
    source = """
      uint i = thread_position_in_grid.x;
      float sum = 0;
      for (int k = 0; k < n[0]; k++) sum += x[k * 32 + i];
      out[i] = sum;
    """
    _run(source, {"x": mx.zeros((LANES * 10,)), "n": mx.array([10])}, LANES)
    x = metal.report.traffic.buffers["x"]
    assert (x.read_instructions, x.lines_read, x.bytes_read) == (10, 10, 1280)


def test_reading_again_counts_again(metal: Metal) -> None:
    source = """
      uint i = thread_position_in_grid.x;
      float first = x[i];
      simdgroup_barrier(mem_flags::mem_device);
      out[i] = first + simd_sum(x[i ^ 1]);
    """
    _run(source, {"x": mx.zeros((LANES,))}, LANES)
    traffic = metal.report.traffic
    x = traffic.buffers["x"]
    assert (x.lines_read, x.bytes_read, x.distinct_bytes_read) == (2, 256, 128)
    assert (x.read_amplification, x.distinct_lines_read) == (2.0, 1)
    assert (traffic.simdgroup_barriers, traffic.collectives) == (1, 1)


def test_diverging_lanes_have_instructions_of_their_own(metal: Metal) -> None:
    """Both sides of a branch are instructions; each has the lines of its own lanes."""
    source = """
      uint i = thread_position_in_grid.x;
      if (i < 16) out[i] = x[i * 32]; else out[i] = 2 * x[i];
    """
    _run(source, {"x": mx.zeros((LANES * 16,))}, LANES)
    x = metal.report.traffic.buffers["x"]
    assert (x.read_instructions, x.lines_read) == (2, 17)


def test_atomics_count_as_read_and_written(metal: Metal) -> None:
    kernel = mx.fast.metal_kernel(
        name="count",
        input_names=["x"],
        output_names=["out"],
        source="""
          atomic_fetch_add_explicit(&out[x[thread_position_in_grid.x]], 1, memory_order_relaxed);
        """,
        atomic_outputs=True,
    )
    (out,) = kernel(
        inputs=[mx.arange(64) % 2],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(2,)],
        output_dtypes=[mx.int32],
        init_value=0,
    )
    assert out.tolist() == [32, 32]
    traffic = metal.report.traffic.buffers["out"]
    assert (traffic.bytes_read, traffic.bytes_written) == (256, 256)
    assert (traffic.read_instructions, traffic.lines_written) == (2, 2)
    assert traffic.distinct_bytes_written == 8


def test_threadgroup_memory_and_barriers_are_counted(metal: Metal) -> None:
    source = """
      threadgroup float shared[128];
      uint i = thread_position_in_threadgroup.x;
      shared[i] = x[thread_position_in_grid.x];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float v = shared[127 - i];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      out[thread_position_in_grid.x] = v;
    """
    _run(source, {"x": mx.zeros((384,))}, 384, threads=384)
    traffic = metal.report.traffic
    assert (traffic.threadgroups, traffic.threads) == (3, 384)
    assert (traffic.barriers, traffic.barriers_per_threadgroup) == (6, 2)
    assert traffic.threadgroup_memory == 512
    assert traffic.threadgroup_bytes_written == traffic.threadgroup_bytes_read == 3 * 512


def test_the_summary_names_the_busiest_lines_of_the_source(metal: Metal) -> None:
    source = "uint i = thread_position_in_grid.x;\nfloat a = x[i * 32];\nout[i] = a + y[i];"
    _run(source, {"x": mx.zeros((1024,)), "y": mx.zeros((32,))}, LANES)
    traffic = metal.report.traffic
    assert [(s.location, s.buffer, s.lines) for s in traffic.sites] == [
        ("counted.source:2", "x", 32),
        ("counted.source:3", "y", 1),
        ("counted.source:3", "out", 1),
    ]
    text = traffic.summary(sites=1)
    assert "x read" in text and "32.00" in text
    assert text.splitlines()[-1].startswith("counted.source:2: x read, 1 instructions, 32 lines")


def test_every_query_head_of_a_group_reads_the_kv_cache_again_in_whole_lines(metal: Metal) -> None:
    lengths, heads, kv_heads, head_dim = [100, 33], 8, 2, 128
    case = example.make_case(lengths, heads, kv_heads, head_dim)
    out = example.attend(example.make_kernel(), case)
    np.testing.assert_allclose(np.array(out), example.reference(case), atol=1e-3)
    compulsory = sum(lengths) * kv_heads * head_dim * 2
    traffic = metal.report.traffic
    for name in ("k_cache", "v_cache"):
        buffer = traffic.buffers[name]
        assert buffer.distinct_bytes_read == compulsory
        assert buffer.bytes_read == compulsory * heads / kv_heads
        assert buffer.lines_read == buffer.bytes_read // 128
        assert buffer.read_instructions == sum(lengths) * heads
        assert buffer.bytes_written == 0
    assert traffic.buffers["out"].bytes_written == case["q"].nbytes
    assert traffic.barriers_per_threadgroup == 1
    assert traffic.collectives == sum(lengths) * heads
    assert traffic.threadgroup_memory == 4 * (8 + 8 + 8 * head_dim)
