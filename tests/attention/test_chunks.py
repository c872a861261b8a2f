"""Attention in chunks: sequences cut where a chunk begins give what a mask of chunks does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import Case, dense_attention, exact, make_arrays

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.chunks import cut_into_chunks
from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs
from mlx_paged.attention.paged_attention import BACKENDS

BLOCK_SIZE = 8
LENGTHS = [(1, 24), (1, 25), (41, 41), (1, 1), (30, 70), (7, 55), (24, 48), (1, 200)]


def cut(metadata: AttentionMetadata, chunk: int) -> AttentionMetadata:
    nothing = mx.zeros(0, mx.int32)
    inputs = ModelInputs(nothing, nothing, None, [metadata, metadata])
    whole, parts = cut_into_chunks(inputs, [None, chunk], BLOCK_SIZE).groups
    assert whole is metadata
    return parts


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("chunk", [8, 24, 64, 512])
def test_sequences_cut_where_chunks_begin_give_what_a_mask_of_chunks_does(chunk: int, backend: str) -> None:
    arrays = make_arrays(Case(LENGTHS, block_size=BLOCK_SIZE, dtype="float32"))
    for table, (num_queries, context) in zip(tables := np.array(arrays.block_tables), LENGTHS, strict=True):
        table[: (context - num_queries) // chunk * chunk // BLOCK_SIZE] = -1  # given back
    metadata = AttentionMetadata(mx.array(tables), arrays.context_lens, arrays.cu_seqlens_q)
    parts = cut(metadata, chunk)
    assert int(parts.context_lens.max()) <= chunk
    options = AttentionOptions(arrays.options["scale"])
    out = BACKENDS[backend].attend(arrays.q, arrays.pool, parts, options)
    assert exact(out) == pytest.approx(dense_attention(arrays, chunk), abs=2e-5)


def test_a_prompt_over_three_chunks_is_three_sequences() -> None:
    table = mx.arange(10, dtype=mx.int32)[None]
    metadata = AttentionMetadata(table, np.array([70], np.int32), np.array([0, 60], np.int32))
    parts = cut(metadata, 24)
    assert parts.context_lens.tolist() == [24, 24, 22]
    assert parts.cu_seqlens_q.tolist() == [0, 14, 38, 60]
    assert parts.block_tables[:, :3].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_tables_are_as_wide_as_those_that_kernels_were_compiled_for() -> None:
    metadata = AttentionMetadata(mx.arange(8)[None], np.array([17], np.int32), np.array([0, 1], np.int32))
    parts = cut(metadata, 24)
    assert parts.block_tables.size == 8 and parts.block_tables[0, :3].tolist() == [0, 1, 2]
