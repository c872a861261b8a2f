"""What the engine's counters mean."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.engines import GREEDY, MakeEngine, complete, run


def test_an_idle_engine_holds_nothing_and_wastes_nothing(make_engine: MakeEngine) -> None:
    stats = make_engine().stats()
    assert (stats.num_blocks, stats.num_free_blocks, stats.block_size) == (64, 64, 4)
    assert (stats.kv_tokens, stats.kv_waste, stats.num_steps, stats.peak_used_blocks) == (0, 0.0, 0, 0)
    assert (stats.host_time_s, stats.model_time_s) == (0.0, 0.0)
    # K and V in 2 layers of 2 heads of 8 float32 values.
    assert stats.kv_bytes == 64 * 4 * 2 * 2 * 2 * 8 * 4


def test_counters_of_a_running_request_say_what_it_holds(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request([1] * 9, GREEDY)
    engine.step()
    stats = engine.stats()
    assert (stats.kv_tokens, stats.num_free_blocks, stats.num_steps) == (9, 61, 1)
    assert stats.kv_waste == pytest.approx(1 - 9 / 12)
    engine.step()
    assert engine.stats().kv_tokens == 10
    assert engine.stats().kv_waste == pytest.approx(1 - 10 / 12)
    run(engine)
    assert (engine.stats().kv_waste, engine.stats().num_free_blocks) == (0.0, 64)
    assert (engine.stats().num_steps, engine.stats().peak_used_blocks) == (6, 4)
    assert engine.stats().model_time_s > 0 < engine.stats().host_time_s


@pytest.mark.parametrize("pipelining", ["submit", "build", "off"])
def test_submitting_a_step_is_the_models_time_and_not_the_hosts(
    pipelining: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, now, submit = make_engine(pipelining=pipelining), [0.0], mx.async_eval

    def slow(*arrays: object) -> None:
        now[0] += 1.0
        submit(*arrays)

    monkeypatch.setattr("mlx_paged.engine.engine.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(mx, "async_eval", slow)
    complete(engine, [1] * 9, GREEDY)
    stats = engine.stats()
    assert (stats.host_time_s, stats.model_time_s) == (0.0, now[0])
    assert now[0] >= stats.num_steps
