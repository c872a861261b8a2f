"""Long stretches of prompts by MLX's own attention: chosen by device and layer, as right as by our kernels."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.attention_cases import Arrays, Case, assert_close, dense_attention, make_arrays
from helpers.gpu import Gpu
from helpers.tiny_models import VOCAB_SIZE

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention import gathered
from mlx_paged.attention import paged_attention as attention
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.cli.main import cli

LENGTHS = ((1, 50), (40, 90), (0, 12), (33, 33), (12, 70), (64, 64))  # queries and context of each sequence


@pytest.fixture
def wanted(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Kernels that leave stretches of at least 30 tokens to MLX."""
    monkeypatch.setenv(gathered.VARIABLE, "gathered")
    monkeypatch.setattr(gathered, "MIN_QUERIES", 30)
    return gpu


def attend(gpu: Gpu, arrays: Arrays) -> mx.array:
    metadata = AttentionMetadata(arrays.block_tables, arrays.context_lens, arrays.cu_seqlens_q)
    return gpu.backend.attend(arrays.q, arrays.pool, metadata, AttentionOptions(**arrays.options))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("window", [None, 100])
def test_stretches_short_and_long_and_decodes_in_one_step_equal_dense_attention(
    dtype: str, window: int | None, wanted: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All slots that hold no token are NaN."""
    calls: list[tuple[int, ...]] = []
    attention_of_mlx = mx.fast.scaled_dot_product_attention

    def recorded(queries: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        calls.append(queries.shape)
        return attention_of_mlx(queries, *args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", recorded)
    arrays = make_arrays(Case(LENGTHS, (4, 2), (64, 64), dtype=dtype, window=window), seed=3)
    out = attend(wanted, arrays)
    mx.eval(out)
    assert calls == [(1, 4, num_queries, 64) for num_queries in (40, 33, 64)]
    assert {"decode", "prefill"} <= set(wanted.kernels_run)
    assert_close(out, dense_attention(arrays))


@pytest.mark.parametrize(
    "more",
    [{"softcap": 50.0}, {"sinks": True}, {"window": 33}, {"dtype": "float32"}, {"dims": (64, 32)}, {"dims": (40, 40)}],
    ids=str,
)
def test_what_mlx_has_no_fast_kernel_for_stays_with_ours(
    more: dict[str, Any], wanted: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", None)
    settings = {"dims": (64, 64), "dtype": "float16"} | more
    arrays = make_arrays(Case(((40, 90),), (4, 2), settings.pop("dims"), **settings), seed=0)
    assert_close(attend(wanted, arrays), dense_attention(arrays))


def test_a_context_whose_copy_would_be_large_stays_with_ours(wanted: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", None)
    monkeypatch.setattr(gathered, "MAX_BYTES", 89 * 2 * 64 * 2)
    arrays = make_arrays(Case(((40, 90),), (4, 2), (64, 64), dtype="float16"), seed=0)
    assert_close(attend(wanted, arrays), dense_attention(arrays))


def is_used(array: mx.array, result: mx.array) -> bool:
    """Whether a result is computed from an array."""
    graph = io.StringIO()
    mx.export_to_dot(graph, result, array=array)
    return '{ "array"; }' in graph.getvalue()


@pytest.mark.parametrize("num_reads", [0, 1])
def test_keys_are_gathered_once_they_are_written_and_not_written_before(num_reads: int) -> None:
    """MLX does not know that a kernel writes the pools, so each has to be computed from what the one before makes."""
    arrays = make_arrays(Case(((40, 90),), (4, 2), (64, 64), dtype="float16"), seed=0)
    written, others = mx.zeros(8, mx.int32) + 0, [mx.zeros(8, mx.int32) + 0] * num_reads
    metadata = AttentionMetadata(arrays.block_tables, arrays.context_lens, arrays.cu_seqlens_q)
    pool = dataclasses.replace(arrays.pool, write_done=written, reads_done=[*others])
    out = gathered.attend(arrays.q, pool, metadata, 0.1)
    assert is_used(written, out)
    (over,) = pool.reads_done
    assert is_used(written, over) and all(is_used(other, over) for other in others)
    assert "Softmax" in dot_of(over) or "ScaledDotProductAttention" in dot_of(over)


def dot_of(result: mx.array) -> str:
    graph = io.StringIO()
    mx.export_to_dot(graph, result)
    return graph.getvalue()


def test_a_model_generates_the_same_tokens_both_ways(
    wanted: Gpu, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32; prompts in chunks, chunk after chunk, beside decodes."""
    monkeypatch.setattr(gathered, "DTYPES", (mx.float32,))
    monkeypatch.setattr(gathered, "HEAD_DIMS", range(257))
    model = tiny_model("llama", num_hidden_layers=2)
    prompts = [np.random.default_rng(0).integers(0, VOCAB_SIZE, length).tolist() for length in (3, 130, 70)]
    contexts: list[int] = []

    def tokens(backend: str) -> list[list[int]]:
        monkeypatch.setenv(attention.BACKEND_VARIABLE, backend)
        llm = LLM.from_model(model, num_kv_blocks=32, max_num_batched_tokens=48, pipelining="off")
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        return [list(output.outputs[0].token_ids) for output in outputs]

    expected = tokens("reference")
    attend = gathered.attend

    def recorded(q: mx.array, pool: Any, metadata: AttentionMetadata, scale: float) -> mx.array:
        contexts.extend(metadata.context_lens.tolist())
        return attend(q, pool, metadata, scale)

    monkeypatch.setattr(gathered, "attend", recorded)
    assert tokens(wanted.name) == expected
    assert max(contexts) > 90


@pytest.mark.parametrize(
    "name, info, has_units",
    [
        ("metal", {"architecture": "applegpu_g17s"}, True),
        ("metal", {"architecture": "applegpu_g18p"}, True),
        ("metal", {"architecture": "applegpu_g17p"}, False),
        ("metal", {"architecture": "applegpu_g16s"}, False),
        ("metal", {}, False),
        ("cuda", {"compute_capability_major": 8}, False),
        ("cuda", {"compute_capability_major": 9}, True),
        ("cuda", {"compute_capability_major": 12}, True),
    ],
)
@pytest.mark.parametrize("asked", [None, "kernel", "gathered"])
def test_the_device_decides_unless_the_environment_does(
    name: str, info: dict[str, Any], has_units: bool, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: info)
    if asked is not None:
        monkeypatch.setenv(gathered.VARIABLE, asked)
    backend: Any = type(attention.BACKENDS[name])()
    assert backend.has_matrix_units == has_units
    assert gathered.is_wanted(has_units) == (has_units if asked is None else asked == "gathered")


def test_an_environment_that_asks_for_something_else_is_told_in_a_line(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gathered.VARIABLE, "fast")
    monkeypatch.setenv(attention.BACKEND_VARIABLE, gpu.name)
    result = CliRunner().invoke(cli, ["generate", "--num-kv-blocks", "16", "Tell me a story."])
    assert result.exit_code == 1
    assert result.output.strip().split("\n")[-1].endswith("MLX_PAGED_PREFILL must be kernel or gathered, got 'fast'")
