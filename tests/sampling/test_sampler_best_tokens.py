"""The best next tokens of beams are those of a stable sort, and NaN is passed on."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.budget import budget
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged.sampling.sampler import best_tokens


@settings(max_examples=budget(150, 15_000))
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.data(),
)
def test_candidates_are_the_best_tokens_and_of_equal_ones_the_lowest(
    num_rows: int, vocab_size: int, k: int, dtype: mx.Dtype, data: st.DataObject
) -> None:
    values = st.sampled_from([-np.inf, -1e30, -30.0, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0078125, 9.0])
    logits = np.array(
        data.draw(st.lists(values, min_size=num_rows * vocab_size, max_size=num_rows * vocab_size))
    ).reshape(num_rows, vocab_size)
    logits[:, 0] = np.maximum(logits[:, 0], -3.0)  # a row without any possible token has no distribution
    given_logits = mx.array(logits.astype(np.float32)).astype(dtype)
    exact = np.array(given_logits.astype(mx.float32), dtype=np.float64)
    token_ids, logprobs = (np.array(x) for x in best_tokens(given_logits, k))
    order = np.argsort(-exact, axis=-1, kind="stable")[:, :k]
    assert token_ids.tolist() == order.tolist()
    shifted = exact - exact.max(axis=-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, order, axis=-1), rtol=1e-6, atol=2e-5)
    assert logprobs.dtype == np.float32


@pytest.mark.parametrize("vocab_size", [1000, 32003])
def test_candidates_of_a_large_vocabulary_full_of_equal_logits(vocab_size: int) -> None:
    logits = np.random.default_rng(vocab_size).integers(-20, 20, (5, vocab_size)).astype(np.float32)
    token_ids, _ = best_tokens(mx.array(logits), 12)
    assert np.array(token_ids).tolist() == np.argsort(-logits, axis=-1, kind="stable")[:, :12].tolist()


@pytest.mark.parametrize("vocab_size", [7, 4099])
@pytest.mark.parametrize("not_a_number", [np.nan, -np.nan])
def test_a_row_with_nan_has_nan_candidates_and_the_others_do_not(vocab_size: int, not_a_number: float) -> None:
    logits = np.random.default_rng(0).normal(size=(4, vocab_size)).astype(np.float32)
    for row, position in ((0, 0), (1, vocab_size // 2), (2, vocab_size - 1)):
        logits[row, position] = not_a_number
    _, logprobs = best_tokens(mx.array(logits), 5)
    assert np.isnan(np.array(logprobs)).all(axis=-1).tolist() == [True, True, True, False]
    assert not np.isnan(np.array(logprobs)[3]).any()
