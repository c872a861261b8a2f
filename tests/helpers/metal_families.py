"""Families whose code is Metal kernels of mlx-lm's: plain operations in float32 in these kernels' place."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import pytest


def use_plain_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a family's code run without Metal. Nothing for families that do."""
    if family == "bitnet":
        from mlx_lm.models.bitlinear_layers import BitLinear

        monkeypatch.setattr(BitLinear, "execute_matmul_kernel", _ternary_product)
    if family == "muse_spark":
        module = importlib.import_module("mlx_lm.models.muse_spark")
        for kernel in (_qk_norm, _qk_norm_rope, _rms_norm_sigmoid_gate, _expert_routing, _post_expert_norm_combine):
            monkeypatch.setattr(module, kernel.__name__[1:], kernel)
        monkeypatch.setattr(module, "norm_add_norm", _norm_add_norm)


def _ternary_product(self: Any, x: mx.array, packed_weights: mx.array) -> mx.array:
    rows = [((packed_weights >> shift) & 3).astype(mx.float32) - 1 for shift in (0, 2, 4, 6)]
    scale = 1 / self.weight_scale if self.invert_weight_scales else self.weight_scale
    return x @ mx.concatenate(rows).T * scale


def _qk_norm(qkvg: mx.array, *, n_heads: int, n_kv_heads: int, head_dim: int, eps: float, query_scale: float) -> Any:
    qk = qkvg[..., : (n_heads + n_kv_heads) * head_dim].reshape(*qkvg.shape[:-1], -1, head_dim)
    qk = mx.fast.rms_norm(qk, None, eps)
    return qk[..., :n_heads, :] * query_scale, qk[..., n_heads:, :]


def _qk_norm_rope(qkvg: mx.array, *, rope_base: float, offset: Any, **settings: Any) -> Any:
    def rotate(x: mx.array) -> mx.array:
        x = x.swapaxes(1, 2)
        x = mx.fast.rope(x, x.shape[-1], traditional=True, base=rope_base, scale=1.0, offset=offset)
        return x.swapaxes(1, 2)

    return tuple(map(rotate, _qk_norm(qkvg, **settings)))


def _rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, None, eps).swapaxes(1, 2).flatten(2) * mx.sigmoid(gate)


def _expert_routing(
    logits: mx.array, expert_bias: mx.array, *, top_k: int, multiplier: float, score_eps: float, route_scale: float
) -> Any:
    scores = mx.sigmoid(logits * multiplier)
    experts = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
    chosen = mx.take_along_axis(scores, experts, axis=-1)
    return experts, chosen / (chosen.sum(axis=-1, keepdims=True) + score_eps) * route_scale


def _post_expert_norm_combine(experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float) -> mx.array:
    return (mx.fast.rms_norm(experts * norm_weight, None, eps) * weights[..., None]).sum(axis=-2)


def _norm_add_norm(
    branch: mx.array, stream: mx.array, *, alpha: mx.array, beta: mx.array, post_weight: mx.array | None,
    post_eps: float, next_norm: Any,
) -> Any:  # fmt: skip
    branch = mx.fast.rms_norm(branch if post_weight is None else branch * post_weight, None, post_eps)
    stream = alpha * stream + beta * branch
    return stream, None if next_norm is None else next_norm(stream)
