"""Who serves the requests of a comparison: this engine, and mlx-lm's BatchGenerator, over the same weights."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from comparison.workloads import MlxLm, Paged, System, Task
from mlx_paged.llm import LLM
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

_PREFILL_STEP = 2048  # mlx-lm's


@dataclass
class Life:
    """Moments of a request, in seconds of one clock, and the tokens of its longest sample."""

    arrival: float
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    num_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        return self.first_token - self.arrival

    @property
    def time_per_token(self) -> float:
        """From one token to the next, on average."""
        return (self.finished - self.first_token) / max(1, self.num_tokens - 1)


@dataclass
class Run:
    """What serving all tasks of a case took. num_tokens: of all outputs. peak_bytes: beside the weights.

    cpu_seconds: of all threads of the process; where a CPU computes, a measure that other processes disturb less.
    prefix_hits: tokens; what is counted from here on is the paged engine's, 0 for others.
    """

    seconds: float
    num_tokens: int
    lives: list[Life]
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    host_ms_per_step: float = 0.0

    @property
    def most_at_once(self) -> int:
        """The most requests that were being served at one moment."""
        moments = [(life.scheduled, 1) for life in self.lives] + [(life.finished, -1) for life in self.lives]
        running = most = 0
        for _, change in sorted(moments):
            running += change
            most = max(most, running)
        return most


@dataclass
class Memory:
    """What K and V took while requests were served, looked at after every step: most bytes, and the share unused."""

    peak_bytes: int = 0
    taken: float = 0.0
    used: float = 0.0

    def look(self, taken: float, used: float) -> None:
        """taken, used: at this moment, in one unit."""
        self.taken += taken
        self.used += used

    @property
    def waste(self) -> float:
        return 1 - self.used / self.taken if self.taken else 0.0


class PagedContender:
    """This engine, with its pool resident. `fit` makes the pool what a case takes, unless its size is given."""

    def __init__(self, model: nn.Module, system: Paged, tasks: Sequence[Task]) -> None:
        """tasks: of the case; a pool without a given size first holds them all at once."""
        self.system = system
        self._model = model
        block_size = system.config.get("block_size", 16)
        blocks = [-(-task.longest // block_size) * max(1, task.num_samples, task.beam_width) for task in tasks]
        blocks.sort(reverse=True)
        self._start({"num_kv_blocks": sum(blocks[: system.config["max_num_seqs"]]) + len(blocks)} | system.config)

    def _start(self, config: dict[str, Any]) -> None:
        self._llm = LLM.from_model(self._model, **config)
        if self.system.scattered:
            self._scatter()

    def _scatter(self) -> None:
        """Have the allocator hand out blocks in random order."""
        manager = self._llm.engine.block_manager
        seqs = list(range(manager.num_blocks))
        for seq in seqs:
            manager.allocate(seq, [0])
        random.Random(0).shuffle(seqs)
        for seq in seqs:
            manager.free(seq)

    def fit(self, tasks: Sequence[Task]) -> Memory:
        """Serve the tasks once, to see what they take, and go on with a pool of that size."""
        engine, memory = self._llm.engine, Memory()
        manager = engine.block_manager
        peak = 0

        def look() -> None:
            nonlocal peak
            stats = engine.stats()
            taken = stats.num_blocks - stats.num_free_blocks
            peak = max(peak, taken)
            room, row = taken * stats.block_size, self.system.row
            lengths = [manager.num_tokens(seq_id) for seq_id in manager.seq_ids]
            if row is not None and lengths:
                room = len(lengths) * row(lengths)
            memory.look(room, stats.kv_tokens)

        self._serve(tasks, look)
        if "num_kv_blocks" not in self.system.config:
            del engine, manager
            del self._llm
            self._start(self.system.config | {"num_kv_blocks": peak})
        memory.peak_bytes = self._llm.stats().kv_bytes
        return memory

    def run(self, tasks: Sequence[Task]) -> Run:
        before = self._llm.stats()
        run = measured(lambda: self._serve(tasks, lambda: None))
        stats = self._llm.stats()
        run.peak_bytes += stats.kv_bytes
        steps = stats.num_steps - before.num_steps
        run.prefix_hits = stats.prefix_hit_tokens - before.prefix_hit_tokens
        run.preemptions = stats.num_preemptions - before.num_preemptions
        run.host_ms_per_step = 1e3 * (stats.host_time_s - before.host_time_s) / steps
        return run

    def _serve(self, tasks: Sequence[Task], look: Callable[[], None]) -> Run:
        engine = self._llm.engine
        started = time.monotonic()
        for task in tasks:
            for params in self._params(task):
                engine.add_request(task.prompt, params)
        lives = []
        num_tokens = 0
        while engine.has_unfinished():
            for output in engine.step():
                metrics = output.metrics
                assert output.finished and metrics is not None and metrics.first_scheduled_time is not None
                assert metrics.first_token_time is not None and metrics.finished_time is not None
                num_tokens += output.num_output_tokens
                samples = output.sequences if hasattr(output, "sequences") else output.outputs
                lives.append(
                    Life(
                        metrics.arrival_time,
                        metrics.first_scheduled_time,
                        metrics.first_token_time,
                        metrics.finished_time,
                        max(len(sample.token_ids) for sample in samples),
                    )
                )
            look()
        return Run(time.monotonic() - started, num_tokens, lives)

    def _params(self, task: Task) -> list[SamplingParams | BeamSearchParams]:
        if task.beam_width:
            return [BeamSearchParams(beam_width=task.beam_width, max_tokens=task.num_tokens)]
        temperature = 0.0 if task.num_samples == 1 else 1.0
        count, n = (task.num_samples, 1) if self.system.one_by_one else (1, task.num_samples)
        return [SamplingParams(n=n, temperature=temperature, max_tokens=task.num_tokens, ignore_eos=True)] * count


class MlxLmContender:
    """mlx-lm's BatchGenerator, a new one for each run. Samples of a prompt are requests of their own."""

    def __init__(self, model: nn.Module, system: MlxLm, tasks: Sequence[Task]) -> None:
        self.system = system
        self._model = model

    def fit(self, tasks: Sequence[Task]) -> Memory:
        """Serve the tasks once, to see what they take."""
        memory = Memory()

        def look(generator: BatchGenerator) -> None:
            taken = generator.prompt_cache_nbytes
            memory.peak_bytes = max(memory.peak_bytes, taken)
            batch = generator._generation_batch
            rows = batch.prompt_cache[0].keys if batch.prompt_cache else None
            if rows is not None:
                memory.look(rows.shape[0] * rows.shape[2], sum(map(len, batch.tokens)))

        self._serve(tasks, look)
        return memory

    def run(self, tasks: Sequence[Task]) -> Run:
        return measured(lambda: self._serve(tasks, lambda _: None))

    def _serve(self, tasks: Sequence[Task], look: Callable[[BatchGenerator], None]) -> Run:
        at_once = self.system.at_once
        sampler = make_sampler(temp=1.0) if any(task.num_samples > 1 for task in tasks) else None
        started = time.monotonic()
        requests = [task for task in tasks for _ in range(task.num_samples)]
        prompts, caches, cached_tokens = [task.prompt for task in requests], None, None
        if self.system.shared_prefix:
            cached_tokens = [prompt[: self.system.shared_prefix] for prompt in prompts]
            prompts, caches = self._cached(prompts)
        generator = BatchGenerator(
            self._model,
            sampler=sampler,
            completion_batch_size=at_once,
            prefill_batch_size=min(at_once, 8),
            prefill_step_size=_PREFILL_STEP,
        )
        uids = generator.insert(prompts, [task.num_tokens for task in requests], caches, cached_tokens)
        lives = {uid: Life(started) for uid in uids}
        num_left = len(uids)
        while num_left:
            progress, responses = generator.next()
            now = time.monotonic()
            for part in progress:
                life = lives[part.uid]
                life.scheduled = life.scheduled or now
            for response in responses:
                life = lives[response.uid]
                life.first_token = life.first_token or now
                life.num_tokens += 1
                if response.finish_reason is not None:
                    life.finished = now
                    num_left -= 1
            look(generator)
        generator.close()
        num_tokens = sum(life.num_tokens for life in lives.values())
        return Run(time.monotonic() - started, num_tokens, list(lives.values()))

    def _cached(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[Any]]:
        """What is left of prompts after their common beginning, which is computed once, and a cache of it for each."""
        prefix = prompts[0][: self.system.shared_prefix]
        cache = make_prompt_cache(self._model)
        for start in range(0, len(prefix), _PREFILL_STEP):
            self._model(mx.array(prefix[start : start + _PREFILL_STEP])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
        stored = LRUPromptCache()
        stored.insert_cache("model", prefix, cache)
        fetched = [stored.fetch_nearest_cache("model", prompt) for prompt in prompts]
        return [rest for _, rest in fetched], [cache for cache, _ in fetched]


Contender = PagedContender | MlxLmContender


def make_contender(model: nn.Module, system: System, tasks: Sequence[Task]) -> Contender:
    return (PagedContender if isinstance(system, Paged) else MlxLmContender)(model, system, tasks)  # type: ignore[arg-type]


def measured(serve: Callable[[], Run]) -> Run:
    """A run with the most memory that it took beside what was there before."""
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    cpu_before = time.process_time()
    run = serve()
    mx.synchronize()
    run.cpu_seconds = time.process_time() - cpu_before
    run.peak_bytes = mx.get_peak_memory() - before
    return run
