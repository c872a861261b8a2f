"""Requests of every kind in one engine, some of which fail or are interrupted on the way."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

from helpers.workload import Alone, Asked, Results, assert_idle
from mlx_paged import BeamSearchParams, SamplingParams
from mlx_paged.engine.engine import Engine

PIPELINING = ["off", "build", "submit"]
MOST_STEPS = 2000
TIGHT = {"block_size": 2, "num_kv_blocks": 40, "max_num_seqs": 6, "max_num_batched_tokens": 16}

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PREFIX = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]


def requests() -> list[Asked]:
    """One of each kind: samples, many of them too, beam searches, streams, a grammar, a prompt of several chunks."""
    return [
        Asked(PREFIX, SamplingParams(temperature=0, max_tokens=9, logprobs=2, ignore_eos=True)),
        Asked([*PREFIX, 5], SamplingParams(n=3, seed=3, max_tokens=8, ignore_eos=True, repetition_penalty=1.2)),
        Asked(PREFIX[:7], BeamSearchParams(beam_width=3, max_tokens=7)),
        Asked(PREFIX[::-1], SamplingParams(seed=5, max_tokens=10, stop=["a", "xy"], ignore_eos=True), stream=True),
        Asked([50, 51], SamplingParams(seed=6, max_tokens=12, regex="[a-h]{2,9}", logprobs=0)),
        Asked([8 + i * i % 50 for i in range(37)], SamplingParams(n=2, seed=7, max_tokens=5), stream=True),
        Asked(
            [*PREFIX, 9, 9, 9], BeamSearchParams(beam_width=4, max_tokens=6, early_stopping=True, length_penalty=0.0)
        ),
        Asked(PREFIX[3:10], SamplingParams(n=7, seed=8, max_tokens=4, ignore_eos=True)),  # more than run at once
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
