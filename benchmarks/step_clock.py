"""The time of each part of an engine's steps, on the CPU and by the wall."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from report import Row

from mlx_paged.engine.engine import Engine

OWN_PARTS = ("scheduling", "block management", "batch arrays", "tokens and stops", "rest of the step")
SUM = "sum of these"
OTHER_PARTS = ("model graph", "sampling graph", "submitting", "waiting", "detokenising")
CLOCKS: dict[str, Callable[[], int]] = {"cpu": time.thread_time_ns, "wall": time.perf_counter_ns}
PARTS_OF_A_STEP = (*OWN_PARTS, SUM, *OTHER_PARTS)


class Clock:
    """The time of each part of an engine's steps, its own: what it calls of other parts is theirs.

    Each step reads one clock, that of the CPU or of the wall, drawn at random. What this takes is left out: a call of
    an empty function is measured first, and what it seems to cost the function and its caller is subtracted from each.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps: list[tuple[str, str, dict[str, float]]] = []  # (kind, clock, {part: seconds})
        self._engine = engine
        self._rng = random.Random(0)
        self._times: dict[str, int] = dict.fromkeys(PARTS_OF_A_STEP, 0)
        self._now = time.perf_counter_ns
        self._part = OWN_PARTS[-1]
        self._last = 0
        self._outer_cost = self._inner_cost = 0
        self._to_subtract = {name: self._cost_of_a_call(clock) for name, clock in CLOCKS.items()}
        self._wrap(engine._scheduler, "scheduling", "schedule", "complete", "remove")
        self._wrap(engine.cache_groups, "block management", "attach", "reserve", "append_blocks", "publish")
        self._wrap(engine.cache_groups, "block management", "mark_computed", "free")
        self._wrap(engine._input_builder, "batch arrays", "build")
        self._wrap(engine._outputs, "tokens and stops", "process_tokens")
        self._wrap(engine._steps, "waiting", "wait")
        self._wrap(engine._sampling._sampler, "sampling graph", "sample")
        self._wrap(engine._runner, "model graph", "run")
        self._wrap(engine._outputs, "detokenising", "_detokenize")

    def _cost_of_a_call(self, clock: Callable[[], int]) -> tuple[int, int]:
        """Nanoseconds that a call seems to cost the caller, and the function."""
        self._now, costs = clock, []
        call = self._timed("waiting", lambda: None)
        for _ in range(1000):
            self._times = dict.fromkeys(PARTS_OF_A_STEP, 0)
            self._last = clock()
            call()
            self._times[self._part] += clock() - self._last
            costs.append((self._times[self._part], self._times["waiting"]))
        outer, inner = zip(*costs, strict=True)
        return int(statistics.median(outer)), int(statistics.median(inner))

    def step(self, kind: str = "decode") -> int:
        """One step of the engine; how many requests have ended with it."""
        clock = self._rng.choice(list(CLOCKS))
        self._now = CLOCKS[clock]
        self._outer_cost, self._inner_cost = self._to_subtract[clock]
        self._times = dict.fromkeys(PARTS_OF_A_STEP, 0)
        submit = mx.async_eval
        self._wrap(mx, "submitting", "async_eval")
        try:
            self._last = self._now()
            outputs = self._timed("rest of the step", self._engine.step)()
        finally:
            mx.async_eval = submit
        num_ended = sum(output.finished for output in outputs)
        times = {part: taken / 1e9 for part, taken in self._times.items()}
        times[SUM] = sum(times[part] for part in OWN_PARTS)
        self.steps.append(("leave" if num_ended else kind, clock, times))
        return num_ended

    def times(self, kind: str, clock: str, part: str) -> list[float]:
        """Seconds that a part took in each step of a kind that was measured with this clock."""
        return [times[part] for step, by, times in self.steps if (step, by) == (kind, clock)]

    def rows(self, kind: str = "decode") -> Iterator[Row]:
        """Of the steps of a kind: the parts, and the sum of those that are the engine's own work."""
        for part in PARTS_OF_A_STEP:
            row: Row = {"part": part}
            for clock in CLOCKS:
                seconds = self.times(kind, clock, part)
                row[f"{clock}_median_us"] = 1e6 * statistics.median(seconds)
                row[f"{clock}_p95_us"] = 1e6 * float(np.quantile(seconds, 0.95))
            yield row

    def _wrap(self, owner: Any, part: str, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, now = self._part, self._now
            self._times[outer] += now() - self._last - self._outer_cost
            self._part = part
            self._last = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._times[part] += now() - self._last - self._inner_cost
                self._part = outer
                self._last = now()

        return timed


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Its pauses depend on what else the process holds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
