"""How long a stream waits for its next token while a long prompt is computed, on a device that takes a told time."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from helpers.engines import GREEDY, MakeEngine, run

from mlx_paged import SamplingParams
from mlx_paged.engine.engine import Engine
from mlx_paged.runner.in_flight import StepInFlight
from mlx_paged.scheduler.schedule import Schedule

LONG = [1 + i % 50 for i in range(900)]
STREAM = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


class Device:
    """Computes steps one after another: 10 ms each, `token_s` a token, and more the further a prompt has come.

    blocks: the host waits for a step in launching it, as for a CPU, and not when it asks for what came of it.
    """

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, blocks: bool, token_s: float = 1e-3) -> None:
        self.token_s = token_s
        self.now = self.free_at = 0.0
        self.chunks: list[int] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        steps, ends = engine._steps, dict[StepInFlight, float]()
        launch, wait = steps.submit_results, steps.wait

        def submit(step: StepInFlight) -> None:
            ends[step] = self.free_at = max(self.now, self.free_at) + self.seconds(step.schedule)
            self.chunks += [chunk.num_tokens for chunk in step.schedule.chunks]
            launch(step)
            if blocks:
                self.now = self.free_at

        def wait_for(step: StepInFlight):  # type: ignore[no-untyped-def]
            self.now = max(self.now, ends.pop(step))
            return wait(step)

        monkeypatch.setattr(steps, "submit_results", submit)
        monkeypatch.setattr(steps, "wait", wait_for)

    def seconds(self, schedule: Schedule) -> float:
        return 0.01 + sum(self.token_s * (1 + chunk.start / 300) * chunk.num_tokens for chunk in schedule.chunks)


def gaps(engine: Engine, device: Device, most_steps: int = 400) -> list[float]:
    """The times between outputs of a stream, from the arrival of a long prompt to that one's first token."""
    stream = engine.add_request([7, 8], STREAM, stream=True)
    for _ in range(20):
        engine.step()
    long = engine.add_request(LONG, SamplingParams(temperature=0, max_tokens=1))
    times = [device.now]
    for _ in range(most_steps):
        outputs = engine.step()
        times += [device.now for output in outputs if output.request_id == stream]
        if any(output.request_id == long for output in outputs):
            engine.abort(stream)
            return [after - before for before, after in pairwise(times)]
    raise AssertionError("the long prompt does not come to its end")


@pytest.mark.parametrize("blocks", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize("pipelining", ["off", "build", "submit"])
def test_no_step_takes_much_longer_than_it_may_while_a_stream_waits_for_it(
    pipelining: str, blocks: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(pipelining=pipelining, num_kv_blocks=400, max_step_ms=60)
    device = Device(engine, monkeypatch, blocks)
    assert max(gaps(engine, device)) <= 0.09
    assert len(device.chunks) > 900 / 50
    assert device.chunks[4] > 2 * device.chunks[-2], "what costs more is computed in smaller chunks"


@pytest.mark.parametrize("blocks", [True, False], ids=["cpu", "gpu"])
def test_by_default_a_step_may_take_as_long_as_five_of_decodes_or_a_chunk_that_pays(
    blocks: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(pipelining="submit", num_kv_blocks=400)
    device = Device(engine, monkeypatch, blocks, token_s=2e-4)
    assert engine.stats().max_step_ms == 500
    assert max(gaps(engine, device)) <= 0.08
    assert 50 <= engine.stats().max_step_ms <= 70


def test_without_a_limit_or_a_reader_the_prompt_is_computed_in_whole_chunks(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(num_kv_blocks=400, max_step_ms=0)
    device = Device(engine, monkeypatch, blocks=False)
    assert max(gaps(engine, device)) > 0.9
    assert device.chunks == [2, 900] and engine.stats().max_step_ms == float("inf")
    unread = make_engine(num_kv_blocks=400, max_step_ms=20)
    device = Device(unread, monkeypatch, blocks=False)
    unread.add_request([7, 8], STREAM)
    for _ in range(5):
        unread.step()
    unread.add_request(LONG, GREEDY)
    run(unread)
    assert device.chunks == [2, 900]
