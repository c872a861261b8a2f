"""The profile of an engine: where the time of each step goes, as a table and as a trace for Chrome and Perfetto."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

MAX_EVENTS = 1 << 20  # the trace has the latest ones, the table all

# In the order of the table, with what belongs to them. What is left of a step is the last one.
PARTS = {
    "schedule": "tokens and blocks of the step",
    "move": "copies of blocks, to and from swap too",
    "build": "the step's arrays, the model's graph",
    "submit": "handing graphs to the device",
    "wait": "for the device",
    "sample": "the graph of the draw, masks of structured output",
    "tokens": "tokens taken in, stops, requests that end",
    "detokenise": "text, stop strings",
    "rest": "everything else",
}
_STEP = "step"
_NOTHING = nullcontext()


class _Event(NamedTuple):
    """Something that took time, in nanoseconds of the clock, and what is said about it."""

    name: str
    started: int
    taken: int
    about: dict[str, int]


class Profile:
    """The time of an engine's steps, by part.

    A part's time is its own: what it spends in a part inside it is that one's. So the parts of a step add up to it.
    """

    def __init__(self, enabled: bool = True, now: Callable[[], int] = time.perf_counter_ns) -> None:
        """enabled: if not, nothing is measured or kept. now: the clock, in nanoseconds."""
        self.enabled = enabled
        self.num_steps = 0
        """Calls of Engine.step: the last ones may only wait for what is in flight."""
        self._now = now
        self._began = now()
        self._total = dict.fromkeys(PARTS, 0)
        self._longest = dict.fromkeys(PARTS, 0)
        self._of_step = dict.fromkeys(PARTS, 0)
        self._inside: list[int] = []  # for each part that is open, the time of the parts in it; empty between steps
        self._about: dict[str, int] = {}
        self._events: deque[_Event] = deque(maxlen=MAX_EVENTS)

    def step(self) -> AbstractContextManager[None]:
        """Measure a step, which ends with the block."""
        return self._measure_step() if self.enabled else _NOTHING

    @contextmanager
    def _measure_step(self) -> Iterator[None]:
        self._inside, self._of_step, self._about = [0], dict.fromkeys(PARTS, 0), {}
        started = self._now()
        try:
            yield
        finally:
            taken = self._now() - started
            self._of_step["rest"] = taken - self._inside[0]
            self._inside = []
            self.num_steps += 1
            for name, own in self._of_step.items():
                self._total[name] += own
                self._longest[name] = max(self._longest[name], own)
            self._events.append(_Event(_STEP, started, taken, {"number": self.num_steps, **self._about}))

    def part(self, name: str) -> AbstractContextManager[None]:
        """Measure a part of a step, one of PARTS, which may contain others. Between steps nothing is kept."""
        return self._measure_part(name) if self._inside else _NOTHING

    @contextmanager
    def _measure_part(self, name: str) -> Iterator[None]:
        self._inside.append(0)
        started = self._now()
        try:
            yield
        finally:
            taken = self._now() - started
            self._of_step[name] += taken - self._inside.pop()
            self._inside[-1] += taken
            self._events.append(_Event(name, started, taken, {}))

    def describe(self, **about: int) -> None:
        """Add numbers that the trace shows with this step."""
        if self.enabled:
            self._about |= about

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part in all steps together."""
        return {name: total / 1e9 for name, total in self._total.items()}

    def table(self) -> str:
        """Return a table of each part's time in all steps together, its mean and most in one step, and its share."""
        whole = sum(self._total.values())
        rows: list[tuple[str, ...]] = [("", "total, s", "per step, ms", "longest, ms", "share")]
        for name, total in self._total.items():
            rows.append(self._row(name, total, self._longest[name], whole))
        rows.append(self._row(f"{self.num_steps:,} steps", whole, None, whole))
        return "\n".join(f"{row[0]:14}" + "".join(f"{cell:>14}" for cell in row[1:]).rstrip() for row in rows)

    def _row(self, name: str, total: int, longest: int | None, whole: int) -> tuple[str, ...]:
        mean = total / self.num_steps if self.num_steps else 0.0
        most = "" if longest is None else f"{longest / 1e6:.3f}"
        return name, f"{total / 1e9:.3f}", f"{mean / 1e6:.3f}", most, f"{total / whole if whole else 0.0:.1%}"

    def write(self, path: str | PathLike[str]) -> None:
        """Save a trace: JSON that chrome://tracing and https://ui.perfetto.dev open. Raises OSError."""
        about_process = {"ph": "M", "pid": 1, "tid": 1, "name": "process_name", "args": {"name": "mlx-paged"}}
        about_thread = {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "engine"}}
        # What contains others ended, and was kept, after them, and comes before them in the file.
        outer_first = list(self._events)[::-1]
        outer_first.sort(key=lambda event: event.started)
        events = [about_process, about_thread, *map(self._as_json, outer_first)]
        Path(path).write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n", encoding="utf-8")

    def _as_json(self, event: _Event) -> dict[str, Any]:
        begin = (event.started - self._began) / 1e3  # microseconds, as the format has them
        where = {"ph": "X", "pid": 1, "tid": 1, "ts": begin, "dur": event.taken / 1e3}
        return {"name": event.name, **where, "args": event.about}
