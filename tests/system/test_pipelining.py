"""Steps overlap: the next one is built before the tokens are read, and nothing is left of a step too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.pipelined import OVERLAPPING, SMALL, assert_idle, make_engine, run

from mlx_paged import SamplingParams
from mlx_paged.config import PIPELINING
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import RequestOutput


def order_of_events(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an engine does in four steps of one request: builds, gives to the device and reads, by step."""
    events: list[str] = []
    steps: list[Any] = []
    logits: list[mx.array] = []
    run_model, wait, async_eval = engine._runner.run, engine._steps.wait, mx.async_eval

    def recorded_run(inputs: Any) -> mx.array:
        events.append(f"build {len(logits)}")
        logits.append(run_model(inputs))
        return logits[-1]

    def recorded_eval(*arrays: Any) -> None:
        events.extend(f"submit {i}" for i, array in enumerate(logits) if any(array is each for each in arrays))
        async_eval(*arrays)

    def recorded_wait(step: Any) -> Any:
        if step is not None:
            steps.append(step)
            events.append(f"read {[each is step.logits for each in logits].index(True)}")
        return wait(step)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", recorded_run)
        patch.setattr(engine._steps, "wait", recorded_wait)
        patch.setattr(mx, "async_eval", recorded_eval)
        engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=3))
        run(engine)
    return events


@pytest.mark.parametrize(
    ("pipelining", "expected"),
    [
        ("off", "build 0, submit 0, read 0, build 1, submit 1, read 1, build 2, submit 2, read 2"),
        ("build", "build 0, submit 0, build 1, read 0, submit 1, build 2, read 1, submit 2, read 2"),
        ("submit", "build 0, submit 0, build 1, submit 1, read 0, build 2, submit 2, read 1, read 2"),
    ],
)
def test_the_next_step_is_built_before_the_tokens_of_the_one_before_are_read(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch, pipelining: str, expected: str
) -> None:
    engine = make_engine(tiny_model("llama", **SMALL), pipelining=pipelining)
    assert ", ".join(order_of_events(engine, monkeypatch)) == expected


@pytest.mark.parametrize("pipelining", PIPELINING)
def test_a_sequence_found_ended_one_step_late_costs_one_step_and_leaves_nothing(
    tiny_model: Callable[..., nn.Module], pipelining: str
) -> None:
    engine = make_engine(tiny_model("llama", **SMALL), pipelining=pipelining)
    engine.add_request([9, 8, 7], SamplingParams(temperature=0, max_tokens=12))
    (whole,) = run(engine)
    assert engine.stats().num_steps == 12, "max_tokens is known beforehand: no step too many"
    tokens = whole.outputs[0].token_ids
    for count in range(1, 13):
        if tokens[count - 1] in tokens[: count - 1]:
            continue
        before = engine.stats().num_steps
        params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[tokens[count - 1]], logprobs=0)
        engine.add_request([9, 8, 7], params)
        (output,) = run(engine)
        sample = output.outputs[0]
        assert (sample.token_ids, sample.finish_reason) == (tokens[:count], "stop")
        assert sample.logprobs is not None and len(sample.logprobs) == count
        assert sample.cumulative_logprob == pytest.approx(sum(each[t] for each, t in zip(
            sample.logprobs, sample.token_ids, strict=True)), abs=1e-5)  # fmt: skip
        assert engine.stats().num_steps - before == count + (pipelining != "off" and count < 12)
        assert_idle(engine)


@pytest.mark.parametrize("pipelining", OVERLAPPING)
def test_a_batch_that_ends_costs_one_step_more_however_many_end_in_it(
    tiny_model: Callable[..., nn.Module], pipelining: str
) -> None:
    def num_steps(pipelining: str) -> tuple[int, list[int]]:
        engine = make_engine(tiny_model("llama", **SMALL), pipelining=pipelining)
        for i in range(8):
            params = SamplingParams(seed=i, n=2, max_tokens=40, stop_token_ids=list(range(0, 97, 8)))
            engine.add_request([i + 1] * (i + 2), params)
        outputs = run(engine)
        assert_idle(engine)
        return engine.stats().num_steps, [len(s.token_ids) for output in outputs for s in output.outputs]

    plain, lengths = num_steps("off")
    overlapped, same_lengths = num_steps(pipelining)
    assert sorted(lengths) == sorted(same_lengths)
    assert len(set(lengths)) > 5, "the premise: they end at different times"
    assert plain <= overlapped <= plain + 1


@pytest.mark.parametrize("pipelining", OVERLAPPING)
def test_who_goes_on_from_what_a_step_too_many_left_behind_gets_the_same_as_anybody(
    tiny_model: Callable[..., nn.Module], pipelining: str
) -> None:
    def complete(engine: Engine, prompt: list[int], **values: Any) -> RequestOutput:
        engine.add_request(prompt, SamplingParams(seed=3, temperature=3.0, max_tokens=12, **values))
        (output,) = run(engine)
        return output  # type: ignore[return-value]

    model = tiny_model("llama", **SMALL)
    tokens = complete(make_engine(model), [9, 8, 7]).outputs[0].token_ids
    for count in range(2, 12):
        engine = make_engine(model, pipelining=pipelining)
        stopped = complete(engine, [9, 8, 7], stop_token_ids=[tokens[count - 1]]).outputs[0].token_ids
        assert stopped == tokens[: len(stopped)]
        turn = [9, 8, 7, *stopped, 50, 51]
        again, fresh = complete(engine, turn), complete(make_engine(model), turn)
        assert again.num_cached_tokens >= (3 + len(stopped) - 1) // 4 * 4
        assert again.outputs[0].token_ids == fresh.outputs[0].token_ids
