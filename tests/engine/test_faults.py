"""What goes wrong in the middle of a step: whose error it becomes, and that everybody else is unharmed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.budget import LONG
from helpers.faults import PIPELINING, TIGHT, Run, alone, broken, requests
from helpers.workload import FAMILIES, Asked, make_engine

from mlx_paged import BeamSearchParams, SamplingParams
from mlx_paged.cache import block_store as block_store

_FIRST, *_OTHERS = FAMILIES
IN_TURN = [*((_FIRST, each) for each in PIPELINING), *((each, "submit") for each in _OTHERS)]


@pytest.mark.parametrize(("family", "pipelining"), IN_TURN)
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
def test_an_error_that_comes_with_the_results_is_that_of_the_steps_in_flight(pipelining: str) -> None:
    engine = make_engine("llama", **TIGHT, pipelining=pipelining)
    errors = 0
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
        errors += len(run.results.errors)
    assert errors > 0


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
