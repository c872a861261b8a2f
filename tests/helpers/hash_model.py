"""A model whose state is a hash of all tokens so far, exactly: a state at a wrong position shows in every logit."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache

from helpers.tiny_models import VOCAB_SIZE
from mlx_paged.outputs import CompletionOutput

_FACTORS = (1664525, 22695477)
_SPREAD = np.array([(2 * i + 1) * 0x9E3779B1 % 2**32 for i in range(VOCAB_SIZE)], np.uint32)
NUM_TOP = 3


class _Hash(nn.Module):
    """Keeps one entry of a cache that it shares with another one, as time and channel mixing do in RWKV-7."""

    def __init__(self, entry: int) -> None:
        super().__init__()
        self._entry = entry

    def __call__(self, x: mx.array, cache: ArraysCache | None = None) -> mx.array:
        states = [mx.zeros(x.shape[:1], mx.uint32)]
        if cache is not None and cache[self._entry] is not None:
            states = [cache[self._entry]]
        for position in range(x.shape[1]):
            states.append(states[-1] * _FACTORS[self._entry] + x[:, position] + 1)
        if cache is not None:
            cache[self._entry] = states[-1]
        return mx.stack(states[1:], axis=1)


class HashModel(nn.Module):
    """Two hashes, the second one of the first's states; and, if asked for, keys and values that nothing reads."""

    model_type = "hash"

    def __init__(self, *, stores_keys: bool = False) -> None:
        super().__init__()
        self.layers = [_Hash(0), _Hash(1)]
        self.scale = mx.array(2.0**-20)
        self._stores_keys = stores_keys

    def make_cache(self) -> list[ArraysCache | KVCache]:
        return [ArraysCache(2), *([KVCache()] if self._stores_keys else [])]

    def __call__(self, inputs: mx.array, cache: list[ArraysCache | KVCache] | None = None) -> mx.array:
        hashes = inputs.astype(mx.uint32)
        for layer in self.layers:
            hashes = layer(hashes, None if cache is None else cache[0])
        if cache is not None and self._stores_keys:
            stored = inputs.astype(mx.float32)[:, None, :, None]
            cache[1].update_and_fetch(stored, stored)
        return (hashes[..., None] * mx.array(_SPREAD) >> 9).astype(mx.float32) * self.scale


def expected_logits(tokens: Sequence[int]) -> np.ndarray:
    """The logits after these tokens, float32 [VOCAB_SIZE], exactly."""
    first = second = 0
    for token in tokens:
        first = (first * _FACTORS[0] + token + 1) % 2**32
        second = (second * _FACTORS[1] + first + 1) % 2**32
    return (np.uint32(second) * _SPREAD >> np.uint32(9)).astype(np.float32) * np.float32(2.0**-20)


def expected_logprobs(tokens: Sequence[int]) -> np.ndarray:
    """Likewise the log-probabilities, float64."""
    logits = expected_logits(tokens).astype(np.float64)
    result: np.ndarray = logits - np.log(np.exp(logits).sum())
    return result


def expect_right_states(prompt: Sequence[int], output: CompletionOutput, *, is_greedy: bool) -> None:
    """Fail if any token of an output was chosen by other logits than those after all tokens before it.

    The output must have been asked for with `logprobs=NUM_TOP`.
    """
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    for i, (token, step) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        best = np.argsort(-expected_logits([*prompt, *output.token_ids[:i]]), kind="stable")[:NUM_TOP].tolist()
        assert list(step)[:NUM_TOP] == best or set(step) == {*best, token}, (i, best, step)
        assert not is_greedy or token == best[0]
