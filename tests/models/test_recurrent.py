"""Recurrent layers at the seam: how modules that keep states are found, called by stretches, and refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.families import family_model
from helpers.hash_model import HashModel, expected_logits
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

from mlx_paged import ModelError
from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.cache.states import States, Stretch
from mlx_paged.models.patch import patch_model
from mlx_paged.models.recurrent import StateLayerCache, kind_of, leaves

VOCAB_SIZE = 7


class Mixer(nn.Module):
    """Sums what it is given, and notes the shapes of that."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = []

    def __call__(self, x: mx.array, positions: mx.array, cache: Any = None) -> Any:
        self.shapes.append((x.shape, positions.shape, type(cache)))
        before = mx.zeros((x.shape[0], 1)) if cache[0] is None else cache[0]
        sums = mx.cumsum(x, axis=1) + before
        cache[0] = sums[:, -1:]
        return sums, None


class Model(nn.Module):
    """One such layer, in the way that `mixer` has it."""

    model_type = "sums"

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def make_cache(self) -> list[ArraysCache]:
        return [ArraysCache(1)]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        positions = mx.arange(inputs.shape[0])
        sums, nothing = self.mixer(inputs.astype(mx.float32), positions, cache=cache[0])
        assert nothing is None
        return mx.broadcast_to(sums[..., None], (*sums.shape, VOCAB_SIZE))


def step(tokens: list[int], stretches: list[Stretch]) -> ModelInputs:
    array = mx.array(tokens, mx.int32)
    return ModelInputs(array, mx.arange(len(tokens)), None, [], stretches)


def test_only_the_module_that_keeps_a_state_is_called_by_stretches() -> None:
    model = Model(mixer := type("AMixer", (Mixer,), {"__call__": Mixer.__call__})())
    patched = patch_model(model)
    assert (patched.num_entries, patched.state_bytes, patched.state_shapes) == ([1], 4, [((1,), mx.float32)])
    mixer.shapes.clear()
    states = States(patched.num_entries)
    pools: Any = SimpleNamespace(pools=[], block_size=4)
    first = [Stretch(slice(0, 3), [7], is_first=True), Stretch(slice(3, 5), [8], is_first=True)]
    assert patched(pools, step([1, 2, 3, 10, 20], first), states)[:, 0].tolist() == [1, 3, 6, 10, 30]
    both = [Stretch(slice(0, 2), [8, 7]), Stretch(slice(2, 4), [9], is_first=True)]
    assert patched(pools, step([100, 200, 5, 6], both), states)[:, 0].tolist() == [130, 206, 5, 11]
    shapes = [((1, 3), (1,)), ((1, 2), (1,)), ((2, 1), (2,)), ((1, 2), (1,))]
    assert mixer.shapes == [(*each, ArraysCache) for each in shapes]


def test_a_patched_model_still_runs_on_mlx_lms_own_caches() -> None:
    model = HashModel()
    patch_model(model)
    cache = model.make_cache()
    model(mx.array([[4, 5]]), cache=cache)
    assert mx.array_equal(model(mx.array([[6]]), cache=cache)[0, 0], mx.array(expected_logits([4, 5, 6])))


class Grows(Mixer):
    def __call__(self, x: mx.array, positions: mx.array, cache: Any = None) -> Any:
        cache[0] = x if cache[0] is None else mx.concatenate([cache[0], x], axis=1)
        return x, None


class Turns(Mixer):
    def __call__(self, x: mx.array, positions: mx.array, cache: Any = None) -> Any:
        cache[0] = x[:, -1:]
        return x.T, None


class LooksOutside(Model):
    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return mx.zeros((*inputs.shape, VOCAB_SIZE)) + (0 if cache[0][0] is None else 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model(Grows()), "a state whose shape depends on the number of tokens"),
        (Model(Turns()), r"a module that keeps a state returns \[\d+, \d+\] for"),
        (LooksOutside(Mixer()), "LooksOutside looks into its state outside of its call"),
    ],
    ids=["grows", "turns", "outside"],
)
def test_what_is_no_state_of_a_fixed_size_per_sequence_is_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(ModelError, match=f"'sums' can't be paged: .*{reason}"):
        patch_model(model)


def test_a_state_may_not_be_looked_at_by_other_modules() -> None:
    cache = StateLayerCache(States([1]), 0, 1, step([1], []))
    with pytest.raises(TypeError, match="outside of the module that keeps it"):
        cache[0]
    assert cache.make_mask(5) is None and cache.lengths is None


def test_caches_in_lists_are_told_apart() -> None:
    made = [CacheList(ArraysCache(2), KVCache()), KVCache(), ArraysCache(3)]
    kinds = list(map(kind_of, made))
    assert kinds == [[2, None], None, 3]
    assert list(leaves(kinds)) == [2, None, None, 3]
    assert list(map(type, leaves(made))) == [ArraysCache, KVCache, KVCache, ArraysCache]


def test_a_hybrid_stores_keys_for_its_attention_and_a_state_for_the_rest() -> None:
    patched = patch_model(family_model("qwen3_next"))
    assert [layer is None for layer in patched.layers] == [False]
    assert len(patched.num_entries) == 2 and patched.state_bytes > 0
    assert {dtype for _, dtype in patched.state_shapes} == {mx.float32}
