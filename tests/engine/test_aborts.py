"""Aborts and arrivals at any moment, from any thread, and streams that are dropped: nobody else is harmed."""

from __future__ import annotations

import functools
import gc
import sys
import threading
from typing import Any

import mlx.core as mx
import pytest
from helpers.budget import LONG
from helpers.faults import GREEDY, PIPELINING, PREFIX, TIGHT, Run, alone, broken, requests
from helpers.workload import Asked, Results, assert_idle, make_engine, tiny, tiny_tokenizer

from mlx_paged import LLM, SamplingParams
from mlx_paged.cache import block_store as block_store


@pytest.mark.parametrize("pipelining", PIPELINING)
@pytest.mark.parametrize("victim", range(8))
def test_a_request_of_any_kind_can_be_aborted_at_any_moment(victim: int, pipelining: str) -> None:
    engine = make_engine("gemma3_text", **TIGHT, pipelining=pipelining)
    for num_steps in range(2 * victim + 1, 2 * victim + 30, 1 if LONG else 9):
        run = Run(engine)
        for _ in range(num_steps):
            run.step()
        request_id = sorted(run.asked)[victim]
        output = engine.abort(request_id)
        assert (output is None) == (request_id in run.results.finished)
        assert engine.abort(request_id) is None
        asked = run.asked[request_id]
        if output is not None:
            run.results.take([output])
            alone("gemma3_text").compare_part(asked, run.results.finished[request_id])
            del run.asked[request_id]
        run.to_the_end().check("gemma3_text")


@pytest.mark.parametrize("pipelining", PIPELINING)
def test_beams_that_wait_after_a_preemption_can_be_aborted(pipelining: str) -> None:
    engine = make_engine("llama", **TIGHT, pipelining=pipelining)
    num_aborted = 0
    for number in range(0, 12, 2):
        run = Run(engine)
        for _ in range(8 + number):
            run.step()
        beams = [sequence for sequence in engine._scheduler.running if sequence.request.search is not None]
        if beams:
            request = engine._scheduler.preempt(beams[-1])[0].request
            for _ in range(number % 3):
                run.step()
            if engine.abort(request.request_id) is not None:
                del run.asked[request.request_id]
                num_aborted += 1
        run.to_the_end().check("llama")
    assert num_aborted > 1


@pytest.mark.parametrize("pipelining", PIPELINING)
def test_requests_may_be_aborted_and_come_from_other_threads_while_a_step_is_made(pipelining: str) -> None:
    engine = make_engine("llama", **TIGHT, pipelining=pipelining)
    ids: dict[int, Asked] = {}
    aborted: dict[int, Any] = {}
    results, begun = Results(), threading.Semaphore(0)
    original = engine._runner.run

    def announcing(inputs: Any) -> mx.array:
        begun.release()
        return original(inputs)

    def come(part: int) -> None:
        for asked in requests()[part:] * 3:
            ids[engine.add_request(asked.prompt, asked.params)] = asked
            begun.acquire(timeout=0.01)

    def go() -> None:
        for request_id in range(1, 40, 3):
            begun.acquire(timeout=0.5)
            try:
                output = engine.abort(request_id)
            except KeyError:
                continue
            if output is not None:
                aborted[request_id] = output

    engine._runner.run = announcing  # type: ignore[method-assign]
    threads = [threading.Thread(target=come, args=(part,)) for part in (0, 2, 4)] + [threading.Thread(target=go)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or engine.has_unfinished():
            results.take(engine.step())
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert len(ids) == 3 * (8 + 6 + 4)
    assert sorted([*results.finished, *aborted]) == sorted(ids)
    for request_id, found in results.finished.items():
        alone("llama").compare(ids[request_id], found)
    assert_idle(engine)


@pytest.mark.parametrize("point", ["_scheduler.schedule", "_recover", "_scheduler.restart"])
def test_a_request_that_arrives_at_an_awkward_moment_is_served(point: str) -> None:
    """While a step looks at the queue; while the engine gathers what there is after an error."""
    engine = make_engine("llama", **TIGHT)
    *path, name = point.split(".")
    owner = functools.reduce(getattr, path, engine)
    original, late, run = getattr(owner, name), requests(), Run(engine, [])

    def arrive() -> None:
        asked = late.pop()
        run.asked[engine.add_request(asked.prompt, asked.params, stream=asked.stream)] = asked

    def while_somebody_arrives(*arguments: Any, **values: Any) -> Any:
        if late:
            thread = threading.Thread(target=arrive)
            thread.start()
            thread.join()
        return original(*arguments, **values)

    setattr(owner, name, while_somebody_arrives)
    num_failed = 0
    while late:
        if point == "_scheduler.schedule":
            run.step()  # at first of an engine that has nothing to do
            continue
        run.asked[engine.add_request([3], GREEDY)] = Asked([3], GREEDY)
        with broken(engine, "_runner.run", 1, RuntimeError("out of memory")) as fault:
            run.step()
            run.step()
        num_failed += fault.happened
    run.to_the_end()
    delattr(owner, name)
    assert len(run.results.errors) >= num_failed
    run.check("llama")


@pytest.mark.parametrize("moment", ["step", "stats", "abort"])
def test_a_stream_may_be_closed_by_the_garbage_collector_at_any_moment(moment: str) -> None:
    llm = LLM.from_model(tiny("llama"), tiny_tokenizer(), **TIGHT)
    engine = llm.engine
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    streams = [llm.stream(PREFIX[i:], params) for i in range(3)]
    for stream in streams:
        next(stream)
    sync, remove = engine._scheduler._sync, engine._scheduler.remove

    def collect() -> None:
        if streams:
            cycle: list[Any] = [streams.pop(0)]
            cycle.append(cycle)
            del cycle
            gc.collect()

    def syncing(sequence: Any) -> None:
        collect()
        sync(sequence)

    def removing(sequence: Any) -> None:
        collect()
        remove(sequence)

    gc.disable()
    try:
        engine._scheduler._sync = syncing  # type: ignore[method-assign]
        engine._scheduler.remove = removing  # type: ignore[method-assign]
        last = engine.add_request([9, 9], params)
        engine.step()
        if moment == "stats":
            engine.stats()
        elif moment == "abort":
            assert engine.abort(last) is not None
    finally:
        gc.enable()
    for _ in range(60):
        engine.step()
    assert streams == []
    del engine._scheduler._sync, engine._scheduler.remove
    assert_idle(engine)


def test_an_abort_in_the_middle_of_a_step_of_its_own_thread_holds_from_the_next_step_on() -> None:
    engine = make_engine("llama", **TIGHT)
    request_id = engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=50))
    run_model = engine._runner.run

    def abort_and_run(inputs: Any) -> Any:
        """As the garbage collector does, closing a stream."""
        engine._runner.run = run_model  # type: ignore[method-assign]
        assert engine.abort(request_id) is None
        return run_model(inputs)

    engine._runner.run = abort_and_run  # type: ignore[method-assign]
    assert [output for _ in range(3) for output in engine.step()] == []
    assert_idle(engine)
