"""Steps in flight: launched on the device, submitted to it, waited for."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.outputs import StepSizes
from mlx_paged.request import Sequence
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.runner.prompt_logprobs import PromptLogprobs
from mlx_paged.sampling.sampler import SampledTokens
from mlx_paged.scheduler.schedule import Schedule, offsets_of


class Timer(Protocol):
    """What is told when a part of a step begins and ends."""

    def part(self, name: str) -> AbstractContextManager[None]: ...


@dataclass(eq=False)
class StepInFlight:
    """A step, from its launch until its results are on the host."""

    schedule: Schedule
    rows: np.ndarray
    """The row of the running batch that each row of the logits belongs to."""
    version: int
    """Of the running batch when these were chosen: a row that changes later is another sequence's."""
    logits: mx.array | None = None
    launched: list[mx.array] = field(default_factory=list)
    """The logits, and the states that recurrent layers come to."""
    sampled_rows: np.ndarray | None = None
    """The rows whose next tokens are drawn."""
    sampled_version: int = 0
    """Of the running batch when these were chosen."""
    sampled_tokens: SampledTokens | None = None
    beams: list[Sequence] = field(default_factory=list)
    beam_candidates: tuple[mx.array, mx.array] | None = None
    """Token ids and log-probabilities to go on with, [len(beams), k]."""
    prompt_logprobs: PromptLogprobs | None = None
    """Those that it computes, if any are asked for."""
    begun_at: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    """From then, or from the end of the step before it, to its own."""
    device_results: list[mx.array] = field(default_factory=list)
    """All that is to come to the host; the logits if nothing is drawn."""

    @property
    def drafts_ahead(self) -> list[list[int]]:
        """Of each row of the logits the drafts that its token comes after; nothing if there are none at all."""
        drafts = self.schedule.drafts
        places = zip(self.rows.tolist(), offsets_of(self.rows).tolist(), strict=True) if drafts else ()
        return [drafts.get(row, [])[:offset] for row, offset in places]


class StepRunner:
    """Runs steps on a model, one in flight while the next is launched where that is safe."""

    def __init__(self, runner: ModelRunner, timer: Timer) -> None:
        self.unfinished: list[StepInFlight] = []
        """The steps that an error would be the error of."""
        self.sizes = StepSizes()
        """Of the steps that are over."""
        self.model_time_s = 0.0
        """Host time spent in building graphs, submitting them and waiting for the device."""
        self._runner = runner
        self._timer = timer
        self._ended_at = 0.0

    def begin(self, schedule: Schedule, version: int) -> StepInFlight:
        """Return the step of a schedule; from here on an error is that of its sequences."""
        step = StepInFlight(schedule, schedule.rows, version)
        self.unfinished.append(step)
        return step

    def launch(self, step: StepInFlight, inputs: ModelInputs) -> None:
        """Build the step's graph up to its logits, and submit it unless a write could meet a reader of the pools."""
        started = time.perf_counter()
        asked = step.prompt_logprobs = PromptLogprobs.of(step.schedule) if step.schedule.chunks else None
        step.logits = self._runner.run(inputs) if asked is None else asked.run(self._runner, inputs)
        self.model_time_s += time.perf_counter() - started
        step.launched = [step.logits, *(() if self._runner.states is None else self._runner.states.to_compute)]
        if self._runner.overlap_is_safe:
            self._submit_launched(step)

    def submit(self, step: StepInFlight) -> None:
        """Submit a launched step, if `launch` did not, now that the step before it is over."""
        if not self._runner.overlap_is_safe:
            self._submit_launched(step)

    def submit_results(self, step: StepInFlight) -> None:
        """Submit what is drawn from a step's logits."""
        drawn = [*(step.sampled_tokens or ()), *(step.beam_candidates or ())]
        assert step.logits is not None
        step.device_results = [array for array in drawn if array is not None] or [step.logits]
        self._submit(step.device_results)
        if step.prompt_logprobs is not None:
            self._submit(step.prompt_logprobs.arrays)

    def _submit_launched(self, step: StepInFlight) -> None:
        """Submit a launched step, and let go of its states, so that the next step may make its own in their place."""
        self._submit(step.launched)
        step.launched = []

    def _submit(self, arrays: list[mx.array]) -> None:
        """Give arrays to the device. A CPU has computed most of them when this returns: not the host's own time."""
        started = time.perf_counter()
        with self._timer.part("submit"):
            mx.async_eval(*arrays)
        self.model_time_s += time.perf_counter() - started

    def wait(self, step: StepInFlight) -> list[np.ndarray]:
        """Wait for a step. Returns its results on the host: nothing if nothing was drawn."""
        started = time.perf_counter()
        with self._timer.part("wait"):
            is_drawn = step.sampled_tokens is not None or step.beam_candidates is not None
            results = [np.array(array) for array in step.device_results] if is_drawn else []
            if not (results and self._runner.overlap_is_safe):
                mx.eval(step.device_results)
                mx.synchronize()  # nothing reads the pools any more: the next step may write them in place
            if step.prompt_logprobs is not None:
                step.prompt_logprobs.hand_out()
        now = time.perf_counter()
        self.model_time_s += now - started
        step.seconds, self._ended_at = now - max(self._ended_at, step.begun_at), now
        self.sizes.add(step.schedule.num_tokens)
        self.unfinished.remove(step)
        if not self.unfinished:
            self._runner.rest()
        return results

    def reset(self) -> None:
        """Forget all steps after an error, of which the pools may be part."""
        unfinished, self.unfinished = self.unfinished, []
        self._runner.reset([step.logits for step in unfinished if step.logits is not None])
