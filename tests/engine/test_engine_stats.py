"""What the engine's counters mean."""

from __future__ import annotations

import mlx.core as mx
import pytest
from helpers.engines import GREEDY, MakeEngine, complete, run

from mlx_paged import SamplingParams


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


# -- the most blocks in use ---------------------------------------------------------------------------------------


def test_the_most_used_blocks_are_those_of_all_that_ran_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_caching=False)
    peaks = []
    for num_requests in (1, 3, 2):
        for i in range(num_requests):
            engine.add_request([i + 1] * 6, SamplingParams(temperature=0, max_tokens=4))  # 9 slots: 3 blocks
        run(engine)
        peaks.append(engine.stats().peak_used_blocks)
    assert peaks == [3, 9, 9], "it does not go down again"
    assert engine.stats().num_free_blocks == 64


def test_the_most_used_blocks_count_shared_ones_once_and_cached_ones_that_nobody_holds_not_at_all(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    complete(engine, [3] * 8, SamplingParams(seed=1, n=4, max_tokens=2))  # two blocks shared, one for each
    assert engine.stats().peak_used_blocks == 2 + 4
    for i in range(6):
        complete(engine, [10 + i] * 9, SamplingParams(max_tokens=1))
    assert engine.stats().peak_used_blocks == 2 + 4


def test_the_most_used_blocks_are_counted_while_a_request_runs_and_stay_when_it_is_aborted(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(pipelining="off")
    request_id = engine.add_request([1] * 7, SamplingParams(temperature=0, max_tokens=20))
    peaks = []
    for _ in range(7):
        engine.step()
        peaks.append(engine.stats().peak_used_blocks)
    assert peaks == [2, 2, 3, 3, 3, 3, 4]  # the first decode fills the second block
    engine.abort(request_id)
    assert (engine.stats().peak_used_blocks, engine.stats().num_free_blocks) == (4, 64)


def test_in_a_pool_that_is_too_small_for_all_the_most_used_blocks_are_all(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=6, prefix_caching=False)
    for i in range(4):
        engine.add_request([i + 1] * 7, SamplingParams(seed=i, max_tokens=14))
    run(engine)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().peak_used_blocks == 6
