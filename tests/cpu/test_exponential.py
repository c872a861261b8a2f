"""Exponentials made of other operations are those of float64, also at the edges."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_paged.cpu import exponential as exponential


def test_exponentials_are_exact_to_seven_digits_and_never_so_small_that_arithmetic_is_slow() -> None:
    x = np.concatenate([-np.logspace(-8, 1.8, 999), [0.0]]).astype(np.float32)
    np.testing.assert_allclose(np.array(exponential.exp(mx.array(x))), np.exp(x.astype(np.float64)), rtol=4e-6)
    near = x[x > -1]
    np.testing.assert_allclose(np.array(exponential.exp(mx.array(near))), np.exp(near.astype(np.float64)), rtol=3e-7)
    far = np.array(exponential.exp(mx.array([-100.0, -1e9, -mx.inf])))
    np.testing.assert_allclose(far, 2.0**-100, rtol=3e-7)
    assert np.isnan(np.array(exponential.exp(mx.array([mx.nan, -1.0])))).tolist() == [True, False]


@pytest.mark.parametrize("slow", [False, True], ids=["MLX's exponentials", "our own"])
def test_sums_of_exponentials_are_those_of_float64(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponential, "exp_is_slow", lambda: slow)
    x = np.random.default_rng(0).normal(scale=30, size=(3, 1, 1001)).astype(np.float32)
    x[0, 0, 5] = -np.inf
    x[1] += 1e4
    expected = np.logaddexp.reduce(x.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(np.array(exponential.logsumexp(mx.array(x))), expected, rtol=1e-6)
    x[2, 0, 7] = np.nan
    assert np.isnan(np.array(exponential.logsumexp(mx.array(x)))).ravel().tolist() == [False, False, True]
