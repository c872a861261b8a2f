"""What goes wrong in the middle of a step, anywhere: whose error it becomes, and that everybody else is unharmed.

MLX_PAGED_LONG_TESTS=<number> interrupts the engine at so many times as many places.
"""

from __future__ import annotations

import errno
import functools
import gc
import inspect
import itertools
import os
import random
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.workload import FAMILIES, Alone, Asked, Results, assert_idle, make_engine, tiny, tiny_tokenizer

import mlx_paged
from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.cache import block_store as block_store
from mlx_paged.engine import engine as engine_module
from mlx_paged.engine.engine import Engine
from mlx_paged.engine.forking import LiveRequests
from mlx_paged.engine.output_processor import Completer
from mlx_paged.errors import EngineWarning
from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.scheduler.running_batch import Rows

LONG = max(1, int(os.environ.get("MLX_PAGED_LONG_TESTS") or 0))
PIPELINING = ["off", "build", "submit"]
MOST_STEPS = 2000
Place = tuple[str, int]  # file and line
PACKAGE = os.path.dirname(mlx_paged.__file__) + os.sep
TIGHT = {"block_size": 2, "num_kv_blocks": 40, "max_num_seqs": 6, "max_num_batched_tokens": 16}

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
TRUNK = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]


def requests() -> list[Asked]:
    """One of each kind: samples, a beam search, streams, a form, a prompt of several chunks."""
    return [
        Asked(TRUNK, SamplingParams(temperature=0, max_tokens=9, logprobs=2, ignore_eos=True)),
        Asked([*TRUNK, 5], SamplingParams(n=3, seed=3, max_tokens=8, ignore_eos=True, repetition_penalty=1.2)),
        Asked(TRUNK[:7], BeamSearchParams(beam_width=3, max_tokens=7)),
        Asked(TRUNK[::-1], SamplingParams(seed=5, max_tokens=10, stop=["a", "xy"], ignore_eos=True), stream=True),
        Asked([50, 51], SamplingParams(seed=6, max_tokens=12, regex="[a-h]{2,9}", logprobs=0)),
        Asked([8 + i * i % 50 for i in range(37)], SamplingParams(n=2, seed=7, max_tokens=5), stream=True),
        Asked([*TRUNK, 9, 9, 9], BeamSearchParams(beam_width=4, max_tokens=6, early_stopping=True, length_penalty=0.0)),
    ]


@cache
def alone(family: str) -> Alone:
    return Alone(family)


class Run:
    """The requests in an engine, one of them more at every second step."""

    def __init__(self, engine: Engine, asked: list[Asked] | None = None) -> None:
        self.engine = engine
        self.asked: dict[int, Asked] = {}
        self.results = Results()
        self.num_interruptions = 0
        self._to_come = requests() if asked is None else asked
        self._num_steps = 0

    @property
    def goes_on(self) -> bool:
        return bool(self._to_come) or self.engine.has_unfinished()

    def step(self) -> None:
        if self._to_come and self._num_steps % 2 == 0:
            asked = self._to_come.pop(0)
            self.asked[self.engine.add_request(asked.prompt, asked.params, stream=asked.stream)] = asked
        self._num_steps += 1
        assert self._num_steps < MOST_STEPS, "it does not come to an end"
        try:
            self.results.take(self.engine.step())
        except KeyboardInterrupt:
            self.num_interruptions += 1
            self.engine.cache_groups.check()

    def to_the_end(self) -> Run:
        while self.goes_on:
            self.step()
        return self

    def check(self, family: str) -> None:
        """Those that did not fail gave what they give alone; the engine holds nothing and goes on serving."""
        for request_id, asked in self.asked.items():
            if request_id not in self.results.errors:
                alone(family).compare(asked, self.results.finished[request_id])
        assert_idle(self.engine)
        if self.results.errors:
            later = Run(self.engine, requests()[::-2]).to_the_end()
            assert later.results.errors == {}
            later.check(family)


# -- interruptions ----------------------------------------------------------------------------------------------


class Interrupter:
    """Makes the steps of an engine, and raises KeyboardInterrupt in them as it reaches lines of the package.

    targets: (line, number): before the line is executed for that time, counted from the last interruption. Without
    targets it counts how often each line is executed.
    """

    def __init__(self, targets: list[tuple[Place, int]]) -> None:
        self.counts: Counter[Place] = Counter()
        self.places: list[Place] = []
        self._targets = targets[::-1]
        self._counting = not targets

    def step(self, engine: Engine) -> Any:
        sys.settrace(self._enter)
        try:
            return Engine.step(engine)
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        if self._counting:
            return self._count
        (name, line), _ = self._targets[-1] if self._targets else (("", 0), 0)
        return self._line if code.co_filename.endswith(name) and line in _lines(code) else None

    def _count(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.counts[frame.f_code.co_filename[len(PACKAGE) :], frame.f_lineno] += 1
        return self._count

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        place, left = self._targets[-1]
        if event == "line" and frame.f_lineno == place[1]:
            self._targets[-1] = place, left - 1
            if left <= 1:
                self.places.append(self._targets.pop()[0])
                raise KeyboardInterrupt  # which also ends the tracing
        return self._line


@cache
def _lines(code: CodeType) -> frozenset[int]:
    return frozenset(line for _, _, line in code.co_lines() if line is not None)


@cache
def executed_lines(family: str, pipelining: str) -> Counter[Place]:
    """How often the steps of an undisturbed run execute each line of the package."""
    engine, interrupter = make_engine(family, **TIGHT, pipelining=pipelining), Interrupter([])
    engine.step = lambda: interrupter.step(engine)  # type: ignore[method-assign]
    run = Run(engine).to_the_end()
    del engine.step
    run.check(family)
    return interrupter.counts


def is_past_saving(place: Place) -> bool:
    """Whether a step that is interrupted there has let its outputs go already: they are on the way to the caller."""
    source, start = inspect.getsourcelines(Engine.step)
    end = next(i for i, line in enumerate(source) if "self._live.outputs = self._live.outputs, []" in line)
    gate, gate_start = inspect.getsourcelines(Engine._alone)
    with_line = next(i for i, line in enumerate(source) if "with self._alone()" in line)
    lines = {start + with_line, *range(start + end + 1, start + len(source))}
    lines |= {gate_start + i for i in range(len(gate))}
    return place[0] == "engine.py" and place[1] in lines


def run_interrupted(targets: list[tuple[Place, int]], family: str, pipelining: str) -> None:
    """Nobody notices, whatever the lines."""
    engine, interrupter = make_engine(family, **TIGHT, pipelining=pipelining), Interrupter(targets)
    engine.step = lambda: interrupter.step(engine)  # type: ignore[method-assign]
    run = Run(engine)
    try:
        run.to_the_end()
        del engine.step
        run.check(family)
    except BaseException:
        print("interrupted at", *interrupter.places, sep="\n  ")  # shown if it fails
        raise
    assert run.results.errors == {}
    assert run.num_interruptions == len(interrupter.places) > 0


@pytest.mark.parametrize("pipelining", PIPELINING)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(LONG))
def test_an_interruption_at_any_line_loses_nothing(seed: int, family: str, pipelining: str) -> None:
    chance = random.Random(f"{seed} {family} {pipelining}")
    counts = executed_lines(family, pipelining)
    places = [place for place in sorted(counts) if not is_past_saving(place)]
    targets = [(place, chance.randrange(counts[place]) // 3 + 1) for place in chance.sample(places, 10)]
    run_interrupted(targets, family, pipelining)


@pytest.mark.parametrize(
    "function",
    [Engine._take_in, LiveRequests.begin, LiveRequests.take_tokens, LiveRequests.take_candidates, LiveRequests._branch]
    + [LiveRequests._new_sequence, LiveRequests._put_out, LiveRequests._hand_out, LiveRequests.fork_samples]
    + [BeamSearch.advance, Completer.take, Rows.flush, Rows.add_tokens],
    ids=lambda function: function.__qualname__,
)
def test_an_interruption_while_something_changes_hands_loses_nothing(function: Any) -> None:
    source, start = inspect.getsourcelines(function)
    name = os.path.basename(inspect.getsourcefile(function) or "")
    counts = executed_lines("llama", "build")
    places = [place for place in sorted(counts) if place[0] == name and start <= place[1] < start + len(source)]
    targets = [(place, 1 + number % 2 * (counts[place] > 8)) for number, place in enumerate(places)]
    for first in range(0, len(targets), 12):
        run_interrupted(targets[first : first + 12], "llama", "build")


def test_room_is_kept_for_the_beams_of_a_search_that_is_interrupted_as_it_forks() -> None:
    engine = make_engine("llama", block_size=2, num_kv_blocks=400, max_num_seqs=4, max_num_batched_tokens=64)
    run = Run(engine, [])
    for asked in [requests()[-1], *requests()[:3]]:
        run.asked[engine.add_request(asked.prompt, asked.params)] = asked
    with broken(engine, "_live._count_blocks", 0, KeyboardInterrupt()):
        run.to_the_end()
    assert run.num_interruptions == 1
    run.check("llama")


@pytest.mark.parametrize("pipelining", PIPELINING)
@pytest.mark.parametrize("point", ["_runner.run", "_sampler.sample", "_wait", "_mover.run", "_scheduler.schedule"])
def test_an_interruption_before_or_after_any_call_of_a_step_loses_nothing(point: str, pipelining: str) -> None:
    engine = make_engine("llama", **TIGHT, pipelining=pipelining)
    for number in range(0, 40, 1 if LONG > 1 else 7):
        run = Run(engine)
        with broken(engine, point, number, KeyboardInterrupt(), after=number % 2 == 1) as fault:
            run.to_the_end()
        run.check("llama")
        assert run.num_interruptions == fault.happened
        assert run.results.errors == {}


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
@pytest.mark.parametrize("point", ["_runner.run", "_wait", "_sampler.sample"])
def test_an_error_ends_the_requests_of_its_steps_and_no_others(point: str, family: str, pipelining: str) -> None:
    engine = make_engine(family, **TIGHT, pipelining=pipelining)
    errors = 0
    for number in range(1, 40, 1 if LONG > 1 else 9):
        run = Run(engine)
        after = number % 4 == 1 and point != "_wait"  # once it has returned, the step is over
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
    for number in range(0, 60, 1 if LONG > 1 else 8):
        run, count = Run(engine), itertools.count()

        def failing(*arrays: Any, count: Iterator[int] = count, number: int = number) -> None:
            if next(count) == number:
                raise RuntimeError("the device is gone")
            mx.eval(*arrays)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module.mx, "async_eval", failing)
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
    build, num_tokens = engine._build, len(requests()[victim].prompt) + 3

    def poisoned(step: Any) -> None:
        build(step)
        sequences = [engine._rows.sequences[row] for row in step.rows]
        rows = [i for i, one in enumerate(sequences) if one is not None and is_poisoned(one)]
        if rows:
            step.logits[mx.array(rows), 5] = value

    def is_poisoned(sequence: Any) -> bool:
        is_late = engine._rows.num_tokens[sequence.row] >= num_tokens
        return sequence.request.request_id == victim and is_late and sequence is sequence.request.sequences[-1]

    engine._build = poisoned  # type: ignore[method-assign]
    run.to_the_end()
    del engine._build
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
        num_own = len(first.token_ids) - first.num_wanted
        if num_own < 2:
            continue
        run.step()
        engine.cache_groups.allocate("hog", [60] * (engine.block_manager.num_free_blocks - num_own - 2))
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
        engine._scheduler.start_over([])  # so that nothing is in the pool any more
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
    for num_steps in range(2 * victim + 1, 2 * victim + 30, 1 if LONG > 1 else 9):
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


@pytest.mark.parametrize("point", ["_scheduler.schedule", "_start_over", "_live._mend"])
def test_a_request_that_arrives_at_an_awkward_moment_is_served(point: str) -> None:
    """While a step looks at the queue; while the engine gathers what there is after an interruption."""
    engine = make_engine("llama", **TIGHT)
    *path, name = point.split(".")
    owner = functools.reduce(getattr, path, engine)
    original, late, run = getattr(owner, name), requests(), Run(engine, [])

    def arrive() -> None:
        asked = late.pop()
        run.asked[engine.add_request(asked.prompt, asked.params, stream=asked.stream)] = asked

    def interrupted(*arguments: Any, **values: Any) -> Any:
        if late:
            thread = threading.Thread(target=arrive)
            thread.start()
            thread.join()
        return original(*arguments, **values)

    setattr(owner, name, interrupted)
    if point == "_scheduler.schedule":
        while late:
            run.step()  # at first of an engine that has nothing to do
    else:
        while late:
            run.asked[engine.add_request([3], GREEDY)] = Asked([3], GREEDY)
            with broken(engine, "_runner.run", 1, KeyboardInterrupt()):
                run.step()
                run.step()
    run.to_the_end()
    delattr(owner, name)
    run.check("llama")


@pytest.mark.parametrize("moment", ["step", "stats", "abort"])
def test_a_stream_may_be_closed_by_the_garbage_collector_at_any_moment(moment: str) -> None:
    llm = LLM.from_model(tiny("llama"), tiny_tokenizer(), **TIGHT)
    engine = llm.engine
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    streams = [llm.stream(TRUNK[i:], params) for i in range(3)]
    for stream in streams:
        next(stream)
    settle, remove = engine._scheduler.settle, engine._scheduler.remove

    def collect() -> None:
        if streams:
            cycle: list[Any] = [streams.pop(0)]
            cycle.append(cycle)
            del cycle
            gc.collect()

    def settling(sequence: Any) -> None:
        collect()
        settle(sequence)

    def removing(sequence: Any) -> None:
        collect()
        remove(sequence)

    gc.disable()
    try:
        engine._scheduler.settle = settling  # type: ignore[method-assign]
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
    del engine._scheduler.settle, engine._scheduler.remove
    assert_idle(engine)
