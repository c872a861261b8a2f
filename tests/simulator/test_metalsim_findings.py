"""A kernel as one would write it gives the right results, and the simulator finds each mistake planted in it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metalsim import FindingKind, example
from metalsim.fixture import Metal

TOLERANCES = {mx.float16: 2**-10, mx.bfloat16: 2**-7, mx.float32: 2e-6}
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize(
    ("dtype", "order"),
    [(dtype, "ascending") for dtype in TOLERANCES] + [(mx.float16, "descending"), (mx.float16, "random")],
    ids=str,
)
def test_a_right_kernel_gives_the_right_results_in_any_order_of_threads(
    metal: Metal, dtype: mx.Dtype, order: str
) -> None:
    metal.configure(order=order)
    case = example.make_case([1, 15, 16, 17, 129, 200], dtype=dtype)
    actual = np.array(example.attend(example.make_kernel(), case).astype(mx.float32))
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(actual, example.reference(case), atol=tolerance / 2, rtol=tolerance)
    assert metal.report.findings == ()


def test_without_checks_a_right_kernel_gives_the_right_results_and_no_traffic(metal: Metal) -> None:
    metal.configure(check=False)
    case = example.make_case([129, 200])
    out = example.attend(example.make_kernel(), case)
    np.testing.assert_allclose(np.array(out), example.reference(case), atol=1e-3)
    assert metal.report.traffic is None


# What is wrong: (old, new) in the source or header, and what must be reported.
BUGS = {
    "missing barrier": (BARRIER, "", "uninitialised threadgroup memory `maxima`"),
    "barrier without fence": (
        "mem_flags::mem_threadgroup",
        "mem_flags::mem_none",
        "data race in threadgroup memory `maxima`",
    ),
    "row too far": (
        "heads + head) * D + d]",
        "heads + head + 1) * D + d]",
        r"out-of-bounds write `out` at byte 4096 \(\+2\)",
    ),
    "unused block": (
        "table[b]",
        "table[b + 1]",
        "out-of-bounds read `k_cache` at byte -",
    ),
    "threadgroup array too small": (
        "partial[SIMDGROUPS * D]",
        "partial[SIMDGROUPS * D - 4]",
        "out-of-bounds write `partial` at byte 4080",
    ),
    "threads at different barriers": (
        BARRIER,
        f"if (lane < 16) {BARRIER} else {{ {BARRIER} }}",
        "different barriers",
    ),
    "return before barrier": (
        "  const int context =",
        "  if (group == 7) return;\n  const int context =",
        r"returned before a barrier others wait at \(32 threads\)",
    ),
    "simd_sum by half a simdgroup": (
        "float score = simd_sum(dot(qv, kv));",
        "float score = dot(qv, kv); if (lane < 16) score = simd_sum(score);",
        "only part of the simdgroup",
    ),
    "output half written": (
        "if (d < D)",
        "if (d < D / 2)",
        r"never written `out` \(1024 of 2048, first \(0, 0, 64\)\)",
    ),
    "two threads, one element": (
        "+ d] = static_cast",
        "+ d / 2 * 2] = static_cast",
        "data race in device memory `out`",
    ),
    "threadgroups overlap": (
        "(size_t(sequence) * heads + head) * D + d] =",
        "(size_t(sequence) * heads + head / 2) * D + d] =",
        "data race in device memory `out` .* with another threadgroup",
    ),
    "pointer without address space": (
        "const threadgroup float* v",
        "const float* v",
        r"paged.header:2\d: pointer or reference without an address space `v`",
    ),
    "write to an input": (
        "const int d =",
        "((device T*)q)[0] = T(0); const int d =",
        "write to a read-only input `q`",
    ),
    "too much threadgroup memory": (
        "partial[SIMDGROUPS * D]",
        "partial[SIMDGROUPS * D * 8]",
        r"too much threadgroup memory \(32832 bytes, at most 32768\)",
    ),
    "misaligned vector": ("lane * PER_LANE) * scale", "lane * PER_LANE + 1) * scale", "misaligned"),
    "signed overflow": (
        "const int d =",
        "volatile int big = 2147483647; big = big + 1; const int d =",
        r"undefined behaviour \(add_overflow\)",
    ),
    "endless loop": (
        "const int d =",
        "volatile int spin = 1; while (spin) {} const int d =",
        "time limit",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_mistake_is_found(metal: Metal, bug: str) -> None:
    old, new, finding = BUGS[bug]
    metal.configure(time_limit=0.5 if bug == "endless loop" else 20)
    source, header = example.SOURCE.replace(old, new), example.HEADER.replace(old, new)
    assert (source, header) != (example.SOURCE, example.HEADER)
    with metal.finds(finding):
        example.attend(example.make_kernel(source, header), example.make_case([200, 163]))


def test_a_finding_names_the_line_of_the_source(metal: Metal) -> None:
    source = example.SOURCE.replace("heads + head) * D + d]", "heads + head + 1) * D + d]")
    line = 1 + source[: source.index("head + 1")].count("\n")
    with metal.finds(rf"(?m)^  paged\.source:{line}: out-of-bounds write `out`"):
        example.attend(example.make_kernel(source), example.make_case([20]))


def test_an_uninitialised_local_variable_spoils_the_result(metal: Metal) -> None:
    metal.only_simulated("uninitialised variables have a known value")
    source = example.SOURCE.replace("float4 acc = float4(0.0f)", "float4 acc")
    out = example.attend(example.make_kernel(source), example.make_case([20]))
    assert mx.all(mx.isnan(out)).item()


ERRORS = {
    "wrong address space": ("const threadgroup float* v", "const device float* v", "largest"),
    "threadgroup variable in a function": (
        "  float r = v[0];",
        "  threadgroup float t[4]; float r = v[0];",
        r"paged.header:\d+:\d+: error: .*local address space",
    ),
    "double": ("float o = 0.0f;", "double o = 0.0f;", r"paged.source:\d+:\d+: error: .*double"),
    "std": ("metal::exp2", "std::exp2", "undeclared identifier 'std'"),
    "write through const": (
        "const int d =",
        "q[0] = T(0); const int d =",
        "no viable overloaded '='",
    ),
    "ambiguous call": (
        "const int d =",
        "float f = metal::max(1.0f, half(2)); const int d =",
        "max",
    ),
    "float to bfloat": ("static_cast<T>(l ==", "(l ==", "no viable overloaded '='"),
    "bfloat to half": ("const int d =", "half h = q[0]; const int d =", "deleted function"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_what_metal_rejects_does_not_compile(metal: Metal, error: str) -> None:
    old, new, message = ERRORS[error]
    source, header = example.SOURCE.replace(old, new), example.HEADER.replace(old, new)
    with metal.rejects(message):
        example.attend(example.make_kernel(source, header), example.make_case([20], dtype=mx.bfloat16))


def _run(source: str, size: int, *, threads: int, threadgroup: int = 32, inputs: int = 1, header: str = "") -> None:
    """Runs a kernel with inputs in0, in1, ... of 16 numbers and an output of `size` numbers."""
    kernel = mx.fast.metal_kernel(
        name="wrong",
        input_names=[f"in{i}" for i in range(inputs)],
        output_names=["out"],
        source=source,
        header=header,
    )
    kernel(
        inputs=[mx.zeros((16,))] * inputs,
        grid=(threads, 1, 1),
        threadgroup=(threadgroup, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
    )


def test_findings_can_be_ignored_and_can_be_reported_without_raising(metal: Metal) -> None:
    source = "out[0] = thread_position_in_grid.x;"
    with metal.finds("data race") as error:
        _run(source, 2, threads=2)
    kinds = {finding.kind for finding in error.value.report.findings}
    assert kinds == {FindingKind.DEVICE_RACE, FindingKind.UNWRITTEN_OUTPUT}
    metal.configure(raise_on_findings=False)
    _run(source, 2, threads=2)
    assert {finding.kind for finding in metal.report.findings} == kinds
    metal.configure(raise_on_findings=True, ignore=kinds)
    _run(source, 2, threads=2)
    assert metal.report.findings == ()


def test_races_on_inputs_that_may_be_written_are_found(metal: Metal) -> None:
    metal.configure(writable_inputs={"in0"})
    with metal.finds("race in device memory `in0`"):
        _run("((device float*)in0)[0] = 1; out[thread_position_in_grid.x] = 0;", 4, threads=4)


def test_more_than_1024_threads_are_too_many(metal: Metal) -> None:
    with metal.finds(r"too many threads .*\(2048, at most 1024\)"):
        _run("out[thread_position_in_grid.x] = 0;", 2048, threads=2048, threadgroup=2048)


def test_more_than_31_buffers_are_too_many(metal: Metal) -> None:
    with metal.finds(r"too many buffers \(32, "):
        _run("out[0] = in0[0];", 1, threads=1, inputs=31)


def test_a_shuffle_from_an_inactive_lane_reads_nan_and_can_be_found(metal: Metal) -> None:
    metal.only_simulated("inactive lanes have a known value")
    metal.configure(raise_on_findings=False, ignore=frozenset())
    _run("out[thread_position_in_grid.x] = isnan(simd_shuffle_down(in0[0], 8)) ? 1 : 0;", 16, threads=16)
    (finding,) = metal.report.findings
    assert (finding.kind, finding.count) == (FindingKind.INACTIVE_LANE_READ, 8)


def test_without_checks_a_write_far_past_the_end_is_a_memory_fault(metal: Metal) -> None:
    metal.configure(check=False)
    with metal.finds("memory fault `out` at byte 4096"):
        _run("out[thread_position_in_grid.x + 1024] = 0;", 1024, threads=1024)


def test_every_pointer_and_reference_needs_an_address_space(metal: Metal) -> None:
    header = """
      struct View { float* data; };
      struct Fine { float4 low, high; };
      inline float first(const device float* p) { return p[0]; }
    """
    source = """
      float local = first(in0);
      float& alias = local;
      Fine fine = {in0[0], in0[1]}, copy = fine;
      out[0] = alias + copy.low.x;
    """
    with metal.finds("without an address space") as error:
        _run(source, 1, threads=1, header=header)
    found = [(finding.location, finding.memory) for finding in error.value.report.findings]
    assert found == [("wrong.header:2", "data"), ("wrong.source:3", "alias")]
