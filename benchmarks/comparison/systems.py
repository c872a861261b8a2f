"""Who serves the requests of a comparison: this engine, and mlx-lm's BatchGenerator, over the same weights."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from comparison.workloads import MlxLm, Paged, Task, one_by_one
from mlx_paged.llm import LLM
from mlx_paged.outputs import BeamSearchOutput, RequestMetrics
from mlx_paged.request import Request
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams

_PREFILL_STEP = 2048  # mlx-lm's


@dataclass
class RequestTimes:
    """Moments in the life of a request, whoever served it."""

    moments: RequestMetrics
    """In seconds of `time.monotonic()`."""
    num_tokens: int = 0
    """Tokens of its longest sample."""

    @property
    def time_to_first_token(self) -> float:
        return self.moments.time_to_first_token or 0.0

    @property
    def time_per_token(self) -> float:
        """Mean seconds from one token to the next; 0 if there was no next."""
        return self.moments.time_per_output_token(self.num_tokens) or 0.0


@dataclass
class Run:
    """What serving all tasks of a case took."""

    seconds: float
    num_tokens: int
    """Tokens of all outputs."""
    times: list[RequestTimes]
    cpu_seconds: float = 0.0
    """Of all threads of the process; where a CPU computes, a measure that other processes disturb less."""
    peak_bytes: int = 0
    """The most memory beside the weights."""
    prefix_hits: int = 0
    """Prompt tokens that were found cached; this and what follows is the paged engine's, 0 for others."""
    preemptions: int = 0
    host_ms_per_step: float = 0.0

    @property
    def peak_concurrency(self) -> int:
        """The most requests that were being served at one moment."""
        moments = [(one.moments.first_scheduled_time or 0.0, 1) for one in self.times]
        moments += [(one.moments.finished_time or 0.0, -1) for one in self.times]
        return max(accumulate(change for _, change in sorted(moments)))


@dataclass
class Memory:
    """What K and V took while requests were served, recorded after every step."""

    peak_bytes: int = 0
    taken: float = 0.0
    used: float = 0.0

    def record(self, taken: float, used: float) -> None:
        """Add what is taken, and how much of it is used, at this moment; both in one unit, tokens say."""
        self.taken += taken
        self.used += used

    @property
    def waste(self) -> float | None:
        """Share of what was taken that was not used, from 0 to 1; None if nothing was recorded."""
        return 1 - self.used / self.taken if self.taken else None


class PagedSystem:
    """This engine, with its pool resident. `size_pool` makes the pool what a case takes, unless its size is given."""

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

    def size_pool(self, tasks: Sequence[Task]) -> Memory:
        """Serve the tasks once, to see what they take, and go on with a pool of that size."""
        engine, memory = self._llm.engine, Memory()
        manager, row = engine.block_manager, self.system.row
        for request in self._requests(tasks):
            engine.submit(request)
        while engine.has_unfinished():
            engine.step()
            stats = engine.stats()
            taken = (stats.num_blocks - stats.num_free_blocks) * stats.block_size
            lengths = [manager.num_tokens(seq_id) for seq_id in manager.seq_ids]
            memory.record(taken if row is None or not lengths else len(lengths) * row(lengths), stats.kv_tokens)
        peak = engine.stats().peak_used_blocks
        if "num_kv_blocks" not in self.system.config:
            del engine, manager
            del self._llm
            self._start(self.system.config | {"num_kv_blocks": peak})
        memory.peak_bytes = self._llm.stats().kv_bytes
        return memory

    def run(self, tasks: Sequence[Task]) -> Run:
        """Serve the tasks, and measure what that takes."""
        before = self._llm.stats()
        run = measured(lambda: self._serve(tasks))
        stats = self._llm.stats()
        run.peak_bytes += stats.kv_bytes
        steps = stats.num_steps - before.num_steps
        run.prefix_hits = stats.prefix_hit_tokens - before.prefix_hit_tokens
        run.preemptions = stats.num_preemptions - before.num_preemptions
        run.host_ms_per_step = 1e3 * (stats.host_time_s - before.host_time_s) / steps
        return run

    def _serve(self, tasks: Sequence[Task]) -> Run:
        started = time.monotonic()
        outputs = list(self._llm.run(self._requests(tasks)))
        seconds = time.monotonic() - started
        times = []
        for output in outputs:
            assert output.metrics is not None
            samples = output.sequences if isinstance(output, BeamSearchOutput) else output.outputs
            times.append(RequestTimes(output.metrics, max(len(sample.token_ids) for sample in samples)))
        return Run(seconds, sum(output.num_output_tokens for output in outputs), times)

    def _requests(self, tasks: Sequence[Task]) -> list[Request]:
        make_request = self._llm.engine.make_request
        return [make_request(task.prompt, params) for task in tasks for params in self._params(task)]

    def _params(self, task: Task) -> list[SamplingParams | BeamSearchParams]:
        if task.beam_width:
            return [BeamSearchParams(beam_width=task.beam_width, max_tokens=task.num_tokens)]
        temperature = 0.0 if task.num_samples == 1 else 1.0
        count, n = (task.num_samples, 1) if self.system.as_separate_requests else (1, task.num_samples)
        return [SamplingParams(n=n, temperature=temperature, max_tokens=task.num_tokens, ignore_eos=True)] * count


class MlxLmSystem:
    """mlx-lm's BatchGenerator, a new one for each run. Samples of a prompt are requests of their own."""

    def __init__(self, model: nn.Module, system: MlxLm, tasks: Sequence[Task]) -> None:
        self.system = system
        self._model = model

    def size_pool(self, tasks: Sequence[Task]) -> Memory:
        """Serve the tasks once, to see what they take."""
        memory = Memory()

        def record(generator: BatchGenerator) -> None:
            taken = generator.prompt_cache_nbytes
            memory.peak_bytes = max(memory.peak_bytes, taken)
            batch = generator._generation_batch
            rows = batch.prompt_cache[0].keys if batch.prompt_cache else None
            if rows is not None:
                memory.record(rows.shape[0] * rows.shape[2], sum(map(len, batch.tokens)))

        self._serve(tasks, record)
        return memory

    def run(self, tasks: Sequence[Task]) -> Run:
        """Serve the tasks, and measure what that takes."""
        return measured(lambda: self._serve(tasks, lambda _: None))

    def _serve(self, tasks: Sequence[Task], after_step: Callable[[BatchGenerator], None]) -> Run:
        concurrency = self.system.concurrency
        sampler = make_sampler(temp=1.0) if any(task.num_samples > 1 for task in tasks) else None
        started = time.monotonic()
        requests = one_by_one(tasks)
        prompts, caches, cached_tokens = [task.prompt for task in requests], None, None
        if self.system.shared_prefix:
            cached_tokens = [prompt[: self.system.shared_prefix] for prompt in prompts]
            prompts, caches = self._cached(prompts)
        generator = BatchGenerator(
            self._model,
            sampler=sampler,
            completion_batch_size=concurrency,
            prefill_batch_size=min(concurrency, 8),
            prefill_step_size=_PREFILL_STEP,
        )
        uids = generator.insert(prompts, [task.num_tokens for task in requests], caches, cached_tokens)
        times = {uid: RequestTimes(RequestMetrics(started)) for uid in uids}
        num_left = len(uids)
        while num_left:
            progress, responses = generator.next()
            now = time.monotonic()
            for part in progress:
                moments = times[part.uid].moments
                moments.first_scheduled_time = moments.first_scheduled_time or now
            for response in responses:
                moments = times[response.uid].moments
                moments.first_token_time = moments.first_token_time or now
                times[response.uid].num_tokens += 1
                if response.finish_reason is not None:
                    moments.finished_time = now
                    num_left -= 1
            after_step(generator)
        generator.close()
        num_tokens = sum(one.num_tokens for one in times.values())
        return Run(time.monotonic() - started, num_tokens, list(times.values()))

    def _cached(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[Any]]:
        """Compute the prompts' common beginning once. Returns what is left of each, and a cache of it for each."""
        prefix = prompts[0][: self.system.shared_prefix]
        cache = make_prompt_cache(self._model)
        for start in range(0, len(prefix), _PREFILL_STEP):
            self._model(mx.array(prefix[start : start + _PREFILL_STEP])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
        stored = LRUPromptCache()
        stored.insert_cache("model", prefix, cache)
        fetched = [stored.fetch_nearest_cache("model", prompt) for prompt in prompts]
        return [rest for _, rest in fetched], [cache for cache, _ in fetched]


def measured(serve: Callable[[], Run]) -> Run:
    """Serve, and add to the run its CPU time and the most memory that it took beside what was there before."""
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
