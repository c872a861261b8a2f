"""Ctrl-C and its like wait for the end of a step, and what they break off can go on."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.nn as nn
import pytest
from helpers.budget import LONG
from helpers.faults import GREEDY, PIPELINING, TIGHT, Run
from helpers.interrupts import ctrl_c
from helpers.workload import make_engine

from mlx_paged import LLM, SamplingParams
from mlx_paged.engine import interrupts
from mlx_paged.engine.interrupts import defer_interrupts


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that came through to the program's own handler, which raises like Python's for Ctrl-C."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handled_when_the_block_is_over(number: int, handled: list[int]) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(number)
        reached = handled == []
    assert reached and handled == [number]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)  # the program's handler is back


def test_a_second_signal_is_handled_at_once_and_the_first_one_not_again(handled: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")
    assert handled == [signal.SIGTERM]


def test_a_block_that_lasts_long_is_broken_off(handled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_MAX_DELAY_S", 0.01)
    deadline, was_broken_off = time.monotonic() + 30, True
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        while time.monotonic() < deadline:
            pass
        was_broken_off = False  # what waits is raised at the block's end, too
    assert was_broken_off and handled == [signal.SIGINT]


def test_an_error_in_the_block_does_not_swallow_the_signal(handled: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, defer_interrupts():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the block")
    assert isinstance(caught.value.__context__, ValueError)
    assert handled == [signal.SIGINT]


def test_signals_that_python_does_not_handle_are_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with defer_interrupts():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_touch_no_handler() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def look() -> None:
        with defer_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("pipelining", PIPELINING)
@pytest.mark.parametrize(
    "point",
    ["_runner.run", "_sampling._sampler.sample", "_steps.wait", "_block_mover.run", "_scheduler.schedule"]
    + ["_forking.fork_samples", "_forking._advance_beams", "_outputs._check_token", "_admit_arrivals"],
)
def test_an_interruption_in_any_call_of_a_step_loses_nothing(point: str, pipelining: str) -> None:
    engine = make_engine("llama", **TIGHT, pipelining=pipelining)
    *path, name = point.split(".")
    happened = []
    for number in range(0, 40, 1 if LONG else 11):
        run = Run(engine)
        with ctrl_c(functools.reduce(getattr, path, engine), name, number, after=number % 2 == 1) as pressed:
            run.to_the_end()
        run.check("llama")
        assert run.num_interruptions == pressed.happened
        assert run.results.errors == {}
        happened.append(pressed.happened)
    assert happened[0], "the premise: there is such a call"


def test_a_second_ctrl_c_tears_the_step_and_the_engine_says_so_from_then_on(
    tiny_model: Callable[..., nn.Module],
) -> None:
    llm = LLM.from_model(tiny_model("llama"), num_kv_blocks=16)
    stream = llm.stream([1, 2, 3], GREEDY)
    with ctrl_c(llm._runner, "run", 0, times=2), pytest.raises(KeyboardInterrupt):
        next(stream)
    for call in (llm.engine.step, lambda: llm.generate([[1]], GREEDY), llm.engine.compact):
        with pytest.raises(RuntimeError, match="interrupted in the middle of a step") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("moment", [0, 1, 2, 4])
def test_an_interrupted_generate_frees_everything_and_the_next_one_works(
    moment: int, tiny_model: Callable[..., nn.Module]
) -> None:
    prompts, params = [[1] * 9, [1] * 9 + [2], [5] * 3], SamplingParams(seed=1, n=2, max_tokens=7)

    def samples(llm: LLM) -> list[list[list[int]]]:
        return [[one.token_ids for one in output.outputs] for output in llm.generate(prompts, params)]

    options: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 64, "check_invariants": True}
    expected = samples(LLM.from_model(tiny_model("llama"), **options))
    llm = LLM.from_model(tiny_model("llama"), max_num_batched_tokens=8, **options)
    with ctrl_c(llm._runner, "run", moment), pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, params)
    assert llm.stats().num_free_blocks == 64
    assert samples(llm) == expected
    assert llm.stats().num_free_blocks == 64
