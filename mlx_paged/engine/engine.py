"""The engine: requests in, steps, outputs out. One step is schedule -> run -> sample -> hand out.

Steps overlap: while the device computes one, the next is scheduled and its graph built, with tokens that are not
known yet; then the first one's tokens are looked at while the second runs. A sequence that turns out to have ended
has been computed one token too far, which is never sampled.
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.cache.block_mover import BlockMover
from mlx_paged.cache.block_store import open_stores
from mlx_paged.config import EngineConfig
from mlx_paged.engine.forking import LiveRequests
from mlx_paged.engine.input_processor import RequestMaker
from mlx_paged.engine.output_processor import Completer, Stop
from mlx_paged.engine.profile import NoProfile, Profile
from mlx_paged.outputs import BeamSearchOutput, EngineStats, RequestOutput
from mlx_paged.request import Request, Sequence
from mlx_paged.runner.input_builder import BatchBuilder, Drawn
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.sampling.sampler import SampledTokens, Sampler, best_tokens, sample_seed
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams
from mlx_paged.scheduler.running_batch import Rows
from mlx_paged.scheduler.scheduler import Schedule, Scheduler

_LOG = logging.getLogger(__name__)
_UNSEEDED = 1 << 40  # a sample index that no request has: keeps the engine's own seeds apart from users'


@dataclass(eq=False)
class _Step:
    """A step that is given to the device, and what it will tell.

    rows: of the logits. drawn, sampled: rows whose next tokens are drawn from them, and these; beams, candidates: the
    same of beam searches. results: all that it tells, on the device; the logits if nothing is drawn. version,
    drawn_version: of the rows, when those of the step and those drawn were chosen, since a row may change hands.
    """

    schedule: Schedule
    rows: np.ndarray
    version: int
    logits: mx.array | None = None
    drawn: np.ndarray | None = None
    drawn_version: int = 0
    sampled: SampledTokens | None = None
    beams: list[Sequence] = field(default_factory=list)
    candidates: tuple[mx.array, mx.array] | None = None
    results: list[mx.array] = field(default_factory=list)


class Engine:
    """Runs any number of requests over one model and one pool of blocks.

    tokenizer: mlx-lm's TokenizerWrapper, or None for requests in token ids only. max_model_len: the most tokens of
    prompt and output together, None if only the pool bounds them. `step` belongs to one thread at a time, and with
    MLX to the one that made the model; requests may come from any thread, and be aborted from any.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Any, config: EngineConfig, max_model_len: int | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.profile = Profile() if config.profile else NoProfile()
        self._runner = runner
        stores = open_stores(config.swap_space, config.prefix_cache_dir, runner.fingerprint)
        self.cache_groups = CacheGroups.make(
            runner.plan.num_blocks,
            runner.plan.windows,
            config.block_size,
            stored=stores,
            allocator=config.allocator,
            prefix_caching=config.prefix_caching,
        )
        longest = self.block_manager.num_blocks
        if max_model_len is not None:
            longest = min(longest, -(-max_model_len // config.block_size))
        self._rows = Rows(config.max_num_seqs, len(runner.plan.windows), longest, config.block_size)
        self._mover = BlockMover(self.cache_groups, runner, stores)
        self._scheduler = Scheduler(self.cache_groups, self._rows, config.max_num_seqs, config.max_num_batched_tokens)
        self._batch = BatchBuilder(self._rows)
        self._sampler = Sampler(config.max_num_seqs, runner.vocab_size)
        num_blocks = self.block_manager.num_blocks
        self._maker = RequestMaker(tokenizer, runner.vocab_size, num_blocks, max_model_len, config)
        self._completer = Completer(tokenizer, self._maker.eos_token_ids, self.profile)
        self._live = LiveRequests(self.cache_groups, self._rows, self._scheduler, self._mover, self._completer)
        self._arrived: deque[Request] = deque()
        self._to_abort: deque[int] = deque()
        self._under_way: _Step | None = None
        self._at_work: list[_Step] = []  # steps that an error would be the error of
        self._lock = threading.RLock()
        self._arrival_lock = threading.Lock()
        self._is_busy = False
        self._next_request_id = 0
        self._num_steps = 0
        self._host_time = 0.0
        self._model_time = 0.0
        self._seconds_per_token: float | None = None  # of steps with prompts, a moving average

    @property
    def block_manager(self) -> BlockManager:
        """That of the layers that keep the whole context: it decides what fits."""
        return self.cache_groups.managers[0]

    # -- requests -----------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: str | SequenceOf[int],
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        stream: bool = False,
    ) -> int:
        """Queue a prompt, from any thread; returns the request's id. With `stream`, its output comes piece by piece.

        Raises ValueError for a prompt that is empty, not of this vocabulary, or could never fit; TypeError for one
        that is neither text nor token ids.
        """
        return self.submit(self.make_request(prompt, params or SamplingParams(), stream=stream))

    def make_request(
        self, prompt: str | SequenceOf[int], params: SamplingParams | BeamSearchParams, *, stream: bool = False
    ) -> Request:
        """A validated request that is not queued yet. Raises as `add_request` does."""
        return self._maker.make(prompt, params, stream=stream)

    def submit(self, request: Request) -> int:
        """Queue a request that `make_request` made, from any thread; returns its id. The next step takes it in."""
        with self._arrival_lock:
            request.request_id = self._next_request_id
            self._next_request_id += 1
            seed = getattr(request.params, "seed", None)
            request.seed = sample_seed(self.config.seed, _UNSEEDED + request.request_id) if seed is None else seed
            self._arrived.append(request)
        return request.request_id

    def abort(self, request_id: int) -> RequestOutput | BeamSearchOutput | None:
        """End a request and free what it holds; what it has so far, or None if it had ended before.

        May be called from any thread: waits for a step that is being made. Raises KeyError for an id that was never
        given out.
        """
        if not 0 <= request_id < self._next_request_id:
            raise KeyError(f"no request {request_id}: ids up to {self._next_request_id - 1} were given out")
        with self._alone() as was_busy:
            if was_busy:  # in this very thread: a stream was closed by the garbage collector
                self._to_abort.append(request_id)
                return None
            self._take_in()
            request = self._live.by_id.get(request_id)
            if request is None:
                return None
            self._live.end(request, Stop("abort"))
            return self._live.outputs.pop()

    def has_unfinished(self) -> bool:
        """Whether any request still waits or runs, or has ended without being handed out."""
        return bool(self._arrived or self._live.by_id or self._live.outputs)

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput | BeamSearchOutput]:
        """Have the next tokens of what is scheduled computed.

        Returns the requests that have finished, and for those added with `stream` what is new of them; this may be
        nothing for several steps. An error while computing ends the requests that took part, with finish_reason
        "error"; the others go on. After a KeyboardInterrupt everything can go on.
        """
        with self._alone():
            with self.profile.step():
                self._advance_or_start_over()
            outputs, self._live.outputs = self._live.outputs, []
            return outputs

    def compact(self) -> int:
        """Move the blocks in use to the start of the pool, so that the free space is one run; how many moved."""
        with self._alone():
            num_moves = self._scheduler.compact()
            self._mover.run()
            return num_moves

    def stats(self) -> EngineStats:
        """The engine's counters and the pool's state at this moment."""
        with self._alone():
            self._scheduler.settle_all()
            manager = self.block_manager
            num_used = manager.num_blocks - manager.num_free_blocks
            kv_tokens = manager.num_kv_tokens()
            return EngineStats(
                num_blocks=manager.num_blocks,
                num_free_blocks=manager.num_free_blocks,
                block_size=manager.block_size,
                kv_bytes=self._runner.kv_bytes,
                kv_tokens=kv_tokens,
                kv_waste=1 - kv_tokens / (num_used * manager.block_size) if num_used else 0.0,
                prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
                prefix_query_tokens=self._scheduler.prefix_query_tokens,
                num_preemptions=self._scheduler.num_preemptions,
                num_cow_copies=self.cache_groups.num_cow_copies,
                num_swapped_blocks=self._mover.num_swapped_blocks,
                num_steps=self._num_steps,
                host_time_s=self._host_time,
                model_time_s=self._model_time,
            )

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep other threads out; whether this one was in already, in a call that the garbage collector interrupts."""
        with self._lock:
            was_busy = self._is_busy
            try:
                self._is_busy = True
                yield was_busy
            finally:
                self._is_busy = was_busy

    # -- a step -------------------------------------------------------------------------------------------------

    def _take_in(self) -> None:
        """Requests that have arrived start to wait; those that were aborted in the middle of a step end."""
        while self._arrived:
            request = self._arrived[0]
            self._live.by_id[request.request_id] = request
            self._arrived.popleft()
            self._live.begin(request)
        while self._to_abort:
            request_or_none = self._live.by_id.get(self._to_abort.popleft())
            if request_or_none is not None:
                self._live.end(request_or_none, Stop("abort"))
                self._live.outputs.pop()

    def _advance_or_start_over(self) -> None:
        """Make a step; if it breaks off, leave an engine that can go on. Raises what is not an error of the step."""
        started, model_time = time.perf_counter(), self._model_time
        try:
            self._take_in()
            self._advance()
            if self.config.check_invariants:
                self._scheduler.settle_all()
                self.cache_groups.check()
        except BaseException as error:
            if not self._start_over(error):
                raise
        self._host_time += time.perf_counter() - started - (self._model_time - model_time)

    def _advance(self) -> None:
        """Give the device the next step, and take in the one before it."""
        part = self.profile.part
        with part("schedule"):
            schedule = self._scheduler.schedule(may_preempt=self._under_way is None)
        if schedule is None:  # a decode needs blocks, and it is not known yet whose to take
            self._collect()
            with part("schedule"):
                schedule = self._scheduler.schedule()
            assert schedule is not None
        self.profile.describe(
            num_tokens=schedule.num_tokens, num_decodes=len(schedule.decodes), num_chunks=len(schedule.chunks)
        )
        self._seat_new_rows()
        started = time.perf_counter()
        if not schedule.num_tokens:
            is_idle = not (self._scheduler.waiting or self._scheduler.running)
            assert self._under_way or is_idle, "requests wait, and none of them can be served"
            self._collect()
            return
        step = self._begin(schedule)
        with part("move"):
            is_whole = self._mover.run()
        if not is_whole:
            self._at_work.remove(step)
            self._scheduler.fail(schedule)
            return
        with part("build"):
            self._build(step)
        if self._runner.may_submit_early:
            self._submit(step)
        before, self._under_way = self._under_way, None
        values = self._wait(before)
        if not self._runner.may_submit_early:
            self._submit(step)
        if before is not None:
            self._receive(before, values)
        with part("sample"):
            self._draw(step)
        self._under_way = step
        self._num_steps += 1
        if self.config.pipelining == "off" or step.beams or schedule.is_short:
            self._collect()
        if schedule.chunks:
            self._note_speed((time.perf_counter() - started) / schedule.num_tokens)

    def _note_speed(self, seconds_per_token: float) -> None:
        """Decide whether preempted sequences are worth swapping: whether moving a block is faster than computing it."""
        before = self._seconds_per_token
        self._seconds_per_token = seconds_per_token if before is None else 0.8 * before + 0.2 * seconds_per_token
        moving = self._mover.seconds_per_block
        if moving is not None:
            self._scheduler.swap_pays = moving < self._seconds_per_token * self.config.block_size

    def _begin(self, schedule: Schedule) -> _Step:
        """From here on an error is that of the step's sequences."""
        step = _Step(schedule, schedule.decodes, self._rows.version)
        self._at_work.append(step)
        for sequence, _, _ in schedule.chunks:
            metrics = sequence.request.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = time.monotonic()
        return step

    def _build(self, step: _Step) -> None:
        """The graph of a step, up to its logits."""
        before, drawn = self._under_way, None
        if before is not None and before.drawn is not None and before.sampled is not None:
            drawn = Drawn(before.drawn, before.drawn_version, before.sampled.token_ids)
        inputs, step.rows = self._batch.build(step.schedule, drawn)
        started = time.perf_counter()
        step.logits = self._runner.run(inputs)
        self._model_time += time.perf_counter() - started
        self._scheduler.complete(step.schedule)
        self._seat_new_rows()

    def _submit(self, step: _Step) -> None:
        """Give a step to the device. A CPU has computed most of it when this returns: not the host's own time."""
        started = time.perf_counter()
        with self.profile.part("submit"):
            mx.async_eval(step.logits)
        self._model_time += time.perf_counter() - started

    def _draw(self, step: _Step) -> None:
        """Have the next tokens of the rows chosen that still run."""
        rows, drawn = self._rows, step.rows
        sources = beams = masks = None  # sources: the logits of `drawn`; None: all
        if rows.version != step.version or rows.needs_care:
            alive = rows.stamp[step.rows] <= step.version
            is_beam = rows.is_beam[step.rows]
            sources = np.nonzero(alive & ~is_beam)[0]
            beams = np.nonzero(alive & is_beam)[0]
            drawn = step.rows[sources]
            if rows.is_unforked[drawn].any():
                sources, drawn = self._live.fork_samples(sources, drawn)
                self._seat_new_rows()
            if rows.is_constrained[drawn].any():
                masks, faulty = self._masks(drawn)
                sources, drawn, masks = (np.delete(array, faulty, axis=0) for array in (sources, drawn, masks))
        started = time.perf_counter()
        assert step.logits is not None
        if len(drawn):
            logits = step.logits
            if sources is not None and not np.array_equal(sources, np.arange(len(logits))):
                logits = logits[mx.array(sources)]
            num_tokens = rows.num_tokens[drawn]
            step.sampled = self._sampler.sample(logits, drawn, num_tokens - rows.num_prompt[drawn], masks)
            rows.num_tokens[drawn] = num_tokens + 1
            step.drawn, step.drawn_version = drawn, rows.version
        if beams is not None and len(beams):
            step.beams = [beam for row in step.rows[beams].tolist() if (beam := rows.sequences[row]) is not None]
            searches = {beam.request.search for beam in step.beams}
            count = max(search.num_candidates for search in searches if search is not None)
            step.candidates = best_tokens(step.logits[mx.array(beams)], count)
        told = [array for array in (*(step.sampled or ()), *(step.candidates or ())) if array is not None]
        step.results = told or [step.logits]
        with self.profile.part("submit"):
            mx.async_eval(step.results)
        self._model_time += time.perf_counter() - started

    def _masks(self, drawn: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The tokens that rows with a form may take, made while the device computes their logits.

        Also the indices of rows whose form turns out to be a dead end; they have ended.
        """
        constrained = np.nonzero(self._rows.is_constrained[drawn])[0]
        faulty = []
        masks = np.full((len(drawn), -(-self._runner.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for i in constrained.tolist():
            sequence = self._rows.sequences[drawn[i]]
            assert sequence is not None
            try:
                sequence.matcher.fill(masks[i])
            except ValueError as error:
                faulty.append(i)
                self._live.fail(sequence, str(error))
        return masks, faulty

    def _wait(self, step: _Step | None) -> list[np.ndarray]:
        """The results of a step, on the host."""
        if step is None:
            return []
        started = time.perf_counter()
        with self.profile.part("wait"):
            values = [np.array(array) for array in step.results] if step.sampled or step.candidates else []
            if not (values and self._runner.may_submit_early):
                mx.eval(step.results)
                mx.synchronize()  # nothing reads the pool any more: the next step may write it in place
        self._model_time += time.perf_counter() - started
        self._at_work.remove(step)
        return values

    def _collect(self) -> None:
        """Wait for the step under way and take it in."""
        step, self._under_way = self._under_way, None
        if step is not None:
            self._receive(step, self._wait(step))

    def _receive(self, step: _Step, values: list[np.ndarray]) -> None:
        """Give the sequences of a step what it tells."""
        with self.profile.part("tokens"):
            if step.drawn is not None:
                self._live.take_tokens(step.drawn, step.drawn_version, values[:-2] if step.beams else values)
            if step.beams:
                self._live.take_candidates(step.beams, *values[-2:])
                self._seat_new_rows()

    def _seat_new_rows(self) -> None:
        """Tell who keeps things by rows about the sequences that have got one."""
        for sequence in self._rows.take_joined():
            request, params = sequence.request, sequence.request.params
            if isinstance(params, SamplingParams):
                stream = sample_seed(request.seed, sequence.index)
                output = sequence.output_token_ids
                self._sampler.set_row(sequence.row, params, stream, request.prompt_token_ids, output)
            watched = self._completer.has_to_watch(sequence)
            self._rows.watch(sequence.row, watched, self._completer.stop_ids(request))

    # -- after an error -----------------------------------------------------------------------------------------

    def _start_over(self, error: BaseException) -> bool:
        """A step broke off, anywhere: what was computed is forgotten, and every sequence waits to be computed again.

        The requests of the steps at work end with the error. False if it has to be raised: it is no step's.
        """
        at_fault: dict[Request, None] = {}
        is_of_a_step = isinstance(error, Exception) and not isinstance(error, AssertionError) and bool(self._at_work)
        if is_of_a_step:
            at_fault = dict.fromkeys(sequence.request for step in self._at_work for sequence in self._members(step))
        self._under_way, self._at_work = None, []
        traceback.clear_frames(error.__traceback__)  # they hold what was being computed, and with it the pools
        self._runner.reset()
        self._rows.clear()
        self._batch = BatchBuilder(self._rows)
        self._sampler = Sampler(self.config.max_num_seqs, self._runner.vocab_size)
        reason = " ".join(f"the step failed: {type(error).__name__}: {error}".split())
        _LOG.debug(reason, exc_info=error)
        self._live.start_over(at_fault, reason)
        return is_of_a_step

    def _members(self, step: _Step) -> list[Sequence]:
        """The sequences of a step that still run."""
        rows, decodes = self._rows, step.schedule.decodes
        current = decodes[rows.stamp[decodes] <= step.version]
        chunks = [sequence for sequence, _, _ in step.schedule.chunks if sequence.row >= 0]
        return [*filter(None, (rows.sequences[row] for row in current.tolist())), *chunks]
