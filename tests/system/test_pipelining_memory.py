"""Overlapping steps copy no pool, and are only submitted where they would not."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.pipelined import MEGABYTE, make_engine, run
from helpers.tiny_models import make_model

from mlx_paged import BeamSearchParams, EngineConfig, SamplingParams
from mlx_paged.attention.backend import Backend
from mlx_paged.attention.reference import ReferenceBackend
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.config import PIPELINING
from mlx_paged.engine.engine import Engine
from mlx_paged.errors import EngineWarning
from mlx_paged.models.patch import PatchedModel, patch_model
from mlx_paged.runner import warmup as warmup
from mlx_paged.runner.warmup import overlap_is_safe


@pytest.fixture(scope="module")
def flat_model() -> nn.Module:
    """One layer, so that nothing stands between the reads of a step and the writes of the next."""
    return make_model("llama", num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32)


def steps_of_all_kinds(engine: Engine) -> int:
    """Decodes, chunks, forks, beams and preemptions; the bytes held at most beyond what was held before."""

    def serve() -> None:
        for length in (3, 40, 70):
            engine.add_request([length % 90] * length, SamplingParams(seed=1, max_tokens=24, n=2))
        engine.add_request([5, 6, 7], BeamSearchParams(beam_width=3, max_tokens=12))
        run(engine)

    manager = engine.block_manager
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    serve()
    manager.allocate("somebody else", range((manager.num_blocks - 14) * manager.block_size))
    serve()
    manager.free("somebody else")
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("pipelining", PIPELINING)
def test_no_step_of_a_one_layer_model_copies_the_pool(flat_model: nn.Module, pipelining: str) -> None:
    engine = make_engine(
        flat_model, num_kv_blocks=8192, block_size=16, max_num_batched_tokens=32, pipelining=pipelining,
        check_invariants=False,
    )  # fmt: skip
    layer_bytes = engine.stats().kv_bytes
    assert layer_bytes >= 32 * MEGABYTE
    assert steps_of_all_kinds(engine) < layer_bytes / 4
    stats = engine.stats()
    assert stats.num_preemptions > 3
    assert stats.num_cow_copies > 6


@pytest.mark.parametrize("pipelining", ["off", "build"])
def test_a_copy_of_the_pool_would_be_seen(
    flat_model: nn.Module, pipelining: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(flat_model, num_kv_blocks=8192, block_size=16, pipelining=pipelining, check_invariants=False)
    views = []
    write = Backend.write

    def write_with_a_view_around(self: Backend, pool: Any, *arguments: Any) -> None:
        view = pool.keys[0]
        write(self, pool, *arguments)
        views[:] = [view]

    monkeypatch.setattr(Backend, "write", write_with_a_view_around)
    assert steps_of_all_kinds(engine) > engine.stats().kv_bytes / 4


class FewOperations:
    """Stands for a patched model whose whole step is a write and two reads: the next write would come too early."""

    layers = [LayerSpec(2, 32, 32, mx.float32)]  # noqa: RUF012
    groups = [None]  # noqa: RUF012
    stored_layers = [(layers[0], 0)]  # noqa: RUF012
    vocab_size = 8

    def __call__(self, cache: PagedKVCache, step: Any) -> mx.array:
        block_ids = step.groups[0].slot_block_ids
        rows = mx.zeros((step.token_ids.shape[0], 2, 32))
        ReferenceBackend().write(cache.pools[0], step.groups[0], rows, rows)
        return sum(pool[block_ids].sum(axis=(1, 2))[:, :8] for pool in (cache.pools[0].keys, cache.pools[0].values))


def test_a_write_that_would_copy_while_the_step_before_reads_is_found_out() -> None:
    assert not overlap_is_safe(FewOperations(), EngineConfig())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def deep_model() -> PatchedModel:
    return patch_model(make_model("llama", num_hidden_layers=16, hidden_size=32, intermediate_size=32))


def test_a_deep_model_may_be_submitted_early(deep_model: PatchedModel) -> None:
    assert overlap_is_safe(deep_model, EngineConfig())


def test_steps_do_not_overlap_where_one_alone_already_copies_its_pools(
    deep_model: PatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that holds what a step reads until all of it is over."""
    held: list[mx.array] = []
    write, synchronize = Backend.write, mx.synchronize

    def write_what_is_held(self: Backend, pool: Any, *arguments: Any) -> None:
        held.extend(array[0] for array in pool.arrays.values())
        write(self, pool, *arguments)

    monkeypatch.setattr(Backend, "write", write_what_is_held)
    monkeypatch.setattr(mx, "synchronize", lambda: (held.clear(), synchronize()))
    gc.collect()  # earlier tests' pools would otherwise be let go meanwhile
    with pytest.warns(EngineWarning, match="each step copies whole pools of KV blocks"):
        assert not overlap_is_safe(deep_model, EngineConfig())


def test_of_small_pools_nothing_is_said(deep_model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step takes beside them varies by more than they are."""
    taken = iter([0, 10 * MEGABYTE])
    monkeypatch.setattr(warmup, "_bytes_alone", lambda *_: next(taken))
    assert overlap_is_safe(deep_model, EngineConfig(), max_blocks=40)


def test_what_keeps_the_device_busy_is_no_copy_of_a_pool(
    deep_model: PatchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix product that takes a GPU some time is larger than a pool."""
    monkeypatch.setattr(warmup, "_keep_busy", lambda: mx.async_eval(mx.zeros(64 * MEGABYTE, mx.int8) + 1))
    assert overlap_is_safe(deep_model, EngineConfig())


@pytest.mark.parametrize(("pipelining", "expected"), [("submit", True), ("build", False), ("off", False)])
def test_what_is_asked_for_is_done_without_trying(pipelining: str, expected: bool) -> None:
    assert overlap_is_safe(None, EngineConfig(pipelining=pipelining)) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize("pipelining", ["on", "", "Auto", None, True])
def test_another_word_than_the_four_is_refused(pipelining: Any) -> None:
    with pytest.raises(ValueError, match="pipelining must be one of auto, submit, build, off"):
        EngineConfig(pipelining=pipelining)
