"""What goes wrong in the middle of a step: whose error it becomes, and that everybody else is unharmed."""

from __future__ import annotations

import errno
import functools
import gc
import itertools
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.budget import LONG
from helpers.faults import GREEDY, PIPELINING, TIGHT, TRUNK, Run, alone, requests
from helpers.workload import FAMILIES, Asked, Results, assert_idle, make_engine, tiny, tiny_tokenizer

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.cache import block_store as block_store
from mlx_paged.engine.engine import Engine
from mlx_paged.errors import EngineWarning

# -- errors -----------------------------------------------------------------------------------------------------


class Fault:
    """happened: whether it did; running, waiting: the requests that ran and waited at that moment."""

    happened = False
    running: frozenset[int] = frozenset()
    waiting: frozenset[int] = frozenset()


@contextmanager
def broken(engine: Engine, point: str, number: int, error: BaseException, after: bool = False) -> Iterator[Fault]:
    """The `number`-th call of a method raises, before or after it does what it does. point: `name` or `part.name`."""
    *path, name = point.split(".")
    fault, count = Fault(), itertools.count()

    def owner() -> Any:
        return functools.reduce(getattr, path, engine)

    original_of = getattr(type(owner()), name)

    def failing(self: Any, *arguments: Any, **values: Any) -> Any:
        fails = next(count) == number
        result = original_of(self, *arguments, **values) if after or not fails else None
        if fails:
            fault.happened = True
            fault.running, fault.waiting = (
                frozenset(sequence.request.request_id for sequence in sequences)
                for sequences in (engine._scheduler.running, engine._scheduler.waiting)
            )
            raise error
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(owner()), name, failing)
        yield fault


@pytest.mark.parametrize("pipelining", PIPELINING)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("point", ["_runner.run", "_steps.wait", "_sampling._sampler.sample"])
def test_an_error_ends_the_requests_of_its_steps_and_no_others(point: str, family: str, pipelining: str) -> None:
    engine = make_engine(family, **TIGHT, pipelining=pipelining)
    errors = 0
    for number in range(1, 40, 1 if LONG else 9):
        run = Run(engine)
        after = number % 4 == 1 and point != "_steps.wait"  # once it has returned, the step is over
        with broken(engine, point, number, RuntimeError("out of memory"), after=after) as fault:
            run.to_the_end()
        failed = run.results.errors
        assert set(failed) <= fault.running, "they were not in a step"
        assert not fault.happened or not fault.running or failed
        assert set(failed.values()) <= {"the step failed: RuntimeError: out of memory"}
        for request_id in failed:
            for result in run.results.finished[request_id]:
                assert result.reason[0] != "abort"
        run.check(family)
        errors += len(failed)
    assert errors > 0


@pytest.mark.parametrize("pipelining", PIPELINING)
def test_an_error_that_comes_with_the_results_is_that_of_the_steps_under_way(pipelining: str) -> None:
    engine = make_engine("llama", **TIGHT, pipelining=pipelining)
    for number in range(0, 60, 1 if LONG else 8):
        run, count = Run(engine), itertools.count()

        def failing(*arrays: Any, count: Iterator[int] = count, number: int = number) -> None:
            if next(count) == number:
                raise RuntimeError("the device is gone")
            mx.eval(*arrays)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mx, "async_eval", failing)
            run.to_the_end()
        assert set(run.results.errors.values()) <= {"the step failed: RuntimeError: the device is gone"}
        run.check("llama")


@pytest.mark.parametrize("pipelining", PIPELINING)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("victim", range(7))
def test_logits_that_are_no_numbers_are_the_error_of_their_request_alone(
    victim: int, value: float, pipelining: str
) -> None:
    engine = make_engine("llama", **TIGHT, pipelining=pipelining)
    run = Run(engine)
    launch, num_tokens = engine._steps.launch, len(requests()[victim].prompt) + 3

    def poisoned(step: Any, inputs: Any) -> None:
        launch(step, inputs)
        sequences = [engine._batch.sequences[row] for row in step.rows]
        rows = [i for i, one in enumerate(sequences) if one is not None and is_poisoned(one)]
        if rows:
            step.logits[mx.array(rows), 5] = value

    def is_poisoned(sequence: Any) -> bool:
        is_late = engine._batch.num_tokens[sequence.row] >= num_tokens
        return sequence.request.request_id == victim and is_late and sequence is sequence.request.sequences[-1]

    engine._steps.launch = poisoned  # type: ignore[method-assign]
    run.to_the_end()
    del engine._steps.launch
    assert set(run.results.errors) == {victim}
    assert "not numbers (NaN)" in run.results.errors[victim]
    asked = run.asked[victim]
    if isinstance(asked.params, SamplingParams):
        *others, last = run.results.finished[victim]
        expected = alone("llama")(asked)
        assert last.reason == ("error", run.results.errors[victim])
        assert last.token_ids == expected[-1].token_ids[:3]
        assert np.isfinite(last.logprob)
        assert [one.token_ids for one in others] == [one.token_ids for one in expected[:-1]]
    else:
        assert run.results.finished[victim] == []
    run.check("llama")


def test_what_a_given_up_step_would_have_computed_is_found_by_nobody() -> None:
    """Beams that come back after a preemption and, too few blocks being left for the last of them, go again."""
    num_tested = 0
    for seed in (0, 3, 4):
        chance = random.Random(seed)
        engine = make_engine("llama", block_size=1, num_kv_blocks=120, max_num_seqs=6, pipelining="off")
        other = Asked([3, 4], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, priority=1))
        search = Asked([chance.randrange(3, 60) for _ in range(4)], BeamSearchParams(beam_width=3, max_tokens=24))
        run = Run(engine, [other, search])
        for _ in range(9):
            run.step()
        beams = [sequence for sequence in engine._scheduler.running if sequence.request.search is not None]
        if len(beams) < 3:
            continue
        engine._scheduler.preempt(beams[0])
        first = beams[0].request.sequences[0]
        num_own = len(first.token_ids) - first.num_target_tokens
        if num_own < 2:
            continue
        run.step()
        engine.block_manager.allocate("hog", [60] * (engine.block_manager.num_free_blocks - num_own - 2))
        token_ids = list(first.token_ids)
        run.step()
        assert first.row < 0, "the premise: the beams have lost their blocks again"
        engine.cache_groups.free("hog")
        run._to_come.append(Asked([*token_ids, 9], SamplingParams(temperature=0, max_tokens=5, logprobs=1)))
        run.to_the_end().check("llama")
        num_tested += 1
    assert num_tested > 1


# -- disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["swap_space", "prefix_cache_dir"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("no space left")])
@pytest.mark.parametrize("method", ["save_safetensors", "replace"])
def test_a_full_disk_changes_no_result(
    method: str, error: Exception, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = mx if method == "save_safetensors" else Path
    original, count = getattr(owner, method), itertools.count()
    number = 0

    def failing(*arguments: Any) -> Any:
        if next(count) >= number:
            raise error
        return original(*arguments)

    monkeypatch.setattr(owner, method, failing)
    for number in (0, 1, 5):
        count = itertools.count()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineWarning)
            engine = make_engine("gemma3_text", **TIGHT, **{where: tmp_path / str(number)})
            Run(engine).to_the_end().check("gemma3_text")
        assert next(count) > number, "the premise: the disk was full"
        assert not list(tmp_path.rglob("*partial*"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256 + 1))


def remove(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    (path / "full").mkdir(parents=True)


def change_layout(path: Path) -> None:
    content, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[misc]
    content = {name: mx.array(np.array(array)[:, :, :1]) for name, array in content.items()}
    mx.save_safetensors(str(path), content, metadata | {"crc32": block_store.checksum(content)})


def drop_an_array(path: Path) -> None:
    content, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[misc]
    content = {"k0": mx.array(np.array(content["k0"]))}
    mx.save_safetensors(str(path), content, metadata | {"crc32": block_store.checksum(content)})


def change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40  # of the last number, its exponent
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["swap_space", "prefix_cache_dir"])
@pytest.mark.parametrize(
    "damage",
    [cut, empty, scramble, remove, replace_by_folder, change_layout, drop_an_array, change_a_bit],
    ids=lambda d: d.__name__,
)
def test_damaged_files_are_computed_again(damage: Callable[[Path], None], where: str, tmp_path: Path) -> None:
    engine = make_engine("gemma3_text", **TIGHT, **{where: tmp_path})
    Run(engine).to_the_end().check("gemma3_text")
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert files, "the premise: there is something to damage"
    for path in files[::2]:
        damage(path)
    if where == "prefix_cache_dir":
        engine = make_engine("gemma3_text", **TIGHT, **{where: tmp_path})
    else:
        engine._scheduler.restart([])  # so that nothing is in the pool any more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        run = Run(engine).to_the_end()
    assert run.results.errors == {}
    run.check("gemma3_text")


# -- aborts and threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", PIPELINING)
@pytest.mark.parametrize("victim", range(7))
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
    assert len(ids) == 3 * (7 + 5 + 3)
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
    streams = [llm.stream(TRUNK[i:], params) for i in range(3)]
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
