"""Exponentials for processors on which MLX computes them one by one: there they are most of attention.

On x86 MLX takes 20 to 30 ns for each, as every fused multiply-add of it is a function call. `exp` is made of plain
operations, which MLX does several numbers at a time: 11 to 17 ns altogether.
"""

import math
import platform

import mlx.core as mx
import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

_LOG2_E = 1 / math.log(2)
_MIN_EXPONENT = -100
_ROUND = 1.5 * 2**23 + 127  # a float32 of this size has no bits for a fraction, and its low bits count in ones
_EXP2 = Chebyshev.interpolate(np.exp2, 5, domain=[-0.5, 0.5]).convert(kind=Polynomial).coef.tolist()  # to 1e-7


def exp_is_slow() -> bool:
    """Whether MLX computes exponentials one by one on the default device."""
    return mx.default_device() == mx.cpu and platform.machine() in ("x86_64", "AMD64")


def exp(x: mx.array) -> mx.array:
    """exp(x) for float32 x <= 0, as 2**n * 2**f with f in [-0.5, 0.5]: an exponent and a polynomial.

    It is never less than 2**-100, 8e-31, so that no product of it is denormal: those take several times as long.
    """
    x = mx.maximum(x * _LOG2_E, _MIN_EXPONENT)
    rounded = x + _ROUND  # n + 127, in its low bits
    f = x - (rounded - _ROUND)
    power = _EXP2[-1]
    for coefficient in _EXP2[-2::-1]:
        power = power * f + coefficient
    return power * (rounded.view(mx.int32) << 23).view(mx.float32)


def logsumexp(x: mx.array) -> mx.array:
    """Over the last axis of float32 [..., n], which stays with size 1; NaN where that has no highest finite number."""
    if not exp_is_slow():
        return mx.logsumexp(x, axis=-1, keepdims=True)
    top = x.max(axis=-1, keepdims=True)
    return top + mx.log(exp(x - top).sum(axis=-1, keepdims=True))
