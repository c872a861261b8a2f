"""The engine: requests in, steps, outputs out. One step is schedule -> launch -> receive -> draw.

Steps overlap: while the device computes one, the next is scheduled and its graph built, with tokens that are not
known yet; then the first one's tokens are looked at while the second runs. A sequence that turns out to have ended
has been computed one token too far, which is never sampled.
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Container, Hashable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import Any

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.cache.block_mover import BlockMover
from mlx_paged.cache.block_store import open_stores
from mlx_paged.config import EngineConfig
from mlx_paged.engine.forking import Forking
from mlx_paged.engine.input_processor import InputProcessor
from mlx_paged.engine.interrupts import defer_interrupts
from mlx_paged.engine.output_processor import FinishReason, OutputProcessor
from mlx_paged.engine.own_process import OwnProcess
from mlx_paged.engine.profile import Profile
from mlx_paged.engine.sampling_step import SamplingStep
from mlx_paged.engine.snapshot import EngineView
from mlx_paged.outputs import EngineStats, Output, PrefixMatch, Snapshot
from mlx_paged.request import Request, Sequence
from mlx_paged.runner.in_flight import StepInFlight, StepRunner
from mlx_paged.runner.input_builder import InputBuilder
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.sampling.sampler import sample_seed
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Schedule
from mlx_paged.scheduler.scheduler import Scheduler
from mlx_paged.speculation.speculator import make_speculator

_LOG = logging.getLogger(__name__)
_UNSEEDED = 1 << 40  # a sample index that no request has: keeps the engine's own seeds apart from users'


class Engine:
    """Runs any number of requests over one model and one pool of blocks.

    `step` belongs to one thread at a time, and with MLX to the one that made the model; requests may come from any
    thread, and be aborted from any.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Any, config: EngineConfig, max_model_len: int | None) -> None:
        """tokenizer: mlx-lm's TokenizerWrapper, or None for requests in token ids only.

        max_model_len: the most tokens of prompt and output together, None if only the pool bounds them.
        """
        self.config, self.tokenizer, self.max_model_len = config, tokenizer, max_model_len
        self.profile = Profile(config.profile)
        self._runner = runner
        stores = open_stores(config, runner.fingerprint)
        self.cache_groups = CacheGroups.make(
            runner.plan.num_blocks,
            runner.plan.windows,
            config.block_size,
            stored_keys=stores,
            states=runner.states,
            num_checkpoints=runner.plan.num_checkpoints(config.max_num_seqs),
            chunked=runner.plan.chunked,
            allocator=config.allocator,
            prefix_caching=config.prefix_caching,
        )
        num_blocks = self.block_manager.num_blocks
        max_blocks = min(num_blocks, -(-(max_model_len or num_blocks * config.block_size) // config.block_size))
        num_seqs = config.max_num_seqs
        self._batch = RunningBatch(num_seqs, len(runner.plan.windows), max_blocks, config.block_size)
        self._scheduler = Scheduler(self.cache_groups, self._batch, config)
        self._block_mover = BlockMover(self.cache_groups, runner.kv_cache, stores, runner.states)
        self.input_processor = InputProcessor(tokenizer, runner.vocab_size, num_blocks, max_model_len, config)
        self.input_processor.chat_template.finds_openings = runner.states is not None
        self._input_builder = InputBuilder(self._batch, self.cache_groups.checkpoints)
        self._steps = StepRunner(runner, self.profile)
        detokenizer, eos_token_ids = self.input_processor.detokenizer, self.input_processor.eos_token_ids
        self._outputs = OutputProcessor(detokenizer, eos_token_ids, self._batch, self._scheduler, self.profile)
        self._forking = Forking(self.block_manager, self._batch, self._scheduler, self._block_mover, self._outputs)
        parts = self._forking, self._outputs, self._steps, self.profile
        self._sampling = SamplingStep(self._batch, runner.vocab_size, *parts)
        self._speculator = make_speculator(runner, config, self._batch)
        self._view = EngineView(self.cache_groups, self._scheduler, self._outputs, runner)
        self._arrivals: deque[Request] = deque()
        self._pending_aborts: deque[int] = deque()
        self._in_flight: StepInFlight | None = None
        self._process = OwnProcess()
        self._lock = threading.RLock()
        self._arrival_lock = threading.Lock()
        self._is_busy = self._is_torn = False
        self._next_request_id = self._num_steps = self._peak_used_blocks = 0
        self._host_time_s = 0.0

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
        """Queue a prompt, from any thread. Returns the request's id. With `stream`, its output comes piece by piece.

        Raises ValueError for a prompt that is empty, not of this vocabulary, or could never fit; TypeError for one
        that is neither text nor token ids.
        """
        return self.submit(self.make_request(prompt, params or SamplingParams(), stream=stream))

    def make_request(
        self, prompt: str | SequenceOf[int], params: SamplingParams | BeamSearchParams, *, stream: bool = False
    ) -> Request:
        """Return a validated request that is not queued yet. Raises what `add_request` does."""
        return self.input_processor.make_request(prompt, params, stream=stream)

    def submit(self, request: Request) -> int:
        """Queue a request that `make_request` made, from any thread. Returns its id. The next step admits it."""
        self._process.require_own()
        with self._arrival_lock:
            request.request_id = self._next_request_id
            self._next_request_id += 1
            seed = getattr(request.params, "seed", None)
            request.seed = sample_seed(self.config.seed, _UNSEEDED + request.request_id) if seed is None else seed
            self._arrivals.append(request)
        return request.request_id

    def abort(self, request_id: int) -> Output | None:
        """End a request and free its blocks. Returns its output so far, or None if it had ended and been handed out.

        Nothing more comes of it. May be called from any thread: waits for a step that is being made. Raises KeyError
        for an id that was never given out.
        """
        if not 0 <= request_id < self._next_request_id:
            raise KeyError(f"no request {request_id}: ids up to {self._next_request_id - 1} were given out")
        if self._process.is_fork:  # where a stream that was inherited is closed
            return None
        with self._exclusive() as was_busy:
            if was_busy:  # in this very thread: a stream was closed by the garbage collector
                self._pending_aborts.append(request_id)
                return None
            if self._is_torn:
                return None
            self._admit_arrivals()
            return self._outputs.abort(request_id)

    def has_unfinished(self) -> bool:
        """Say whether any request still waits or runs, or has ended without being handed out."""
        return bool(self._arrivals or self._outputs.requests or self._outputs.outputs)

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self, wanted: Container[int] | None = None) -> list[Output]:
        """Launch the next step, then process the one before it. Returns finished outputs and stream deltas.

        wanted: the ids of requests, if the outputs of others are to be kept for another call. An error while computing
        ends the requests that took part, with finish_reason "error". After a KeyboardInterrupt, which waits for the end
        of the step, everything can go on. Raises RuntimeError if a step was torn by a second one, or in a fork.
        """
        with self._exclusive(), defer_interrupts(), self.profile.step():
            self._require_whole()
            started, model_time_s = time.perf_counter(), self._steps.model_time_s
            try:
                self._admit_arrivals()
                before = self._in_flight.schedule if self._in_flight is not None else None
                step = self._launch(self._schedule())
                self._receive(self._in_flight, launched=step)
                self._in_flight = self._sampling.draw(step)  # forks, grammar masks, draw: tokens stay on the device
                if step is not None:
                    if is_over := self._must_finish(step):
                        self._receive(self._in_flight)
                    seconds = time.perf_counter() - started - self._block_mover.last_run_s
                    self._count(step.schedule, before, is_over, seconds)
                if self.config.check_invariants:
                    self._scheduler.sync_blocks()
                    self.cache_groups.check()
            except Exception as error:  # of the steps in flight
                self._recover(error)
            except BaseException:
                self._is_torn = True
                raise
            self._host_time_s += time.perf_counter() - started - (self._steps.model_time_s - model_time_s)
        return self._outputs.take(wanted)

    def _schedule(self) -> Schedule:
        """Choose the next step's tokens. If that takes somebody's blocks, it has to be known first who has ended."""
        with self.profile.part("schedule"):
            drafts = self._speculator.propose(self.block_manager.num_free_blocks)
            schedule = self._scheduler.schedule(self._in_flight is None, drafts)
        if schedule is None:
            self._receive(self._in_flight)
            with self.profile.part("schedule"):
                schedule = self._scheduler.schedule()
            assert schedule is not None
        num_used = self.block_manager.num_blocks - self.block_manager.num_free_blocks
        self._peak_used_blocks = max(self._peak_used_blocks, num_used)  # the step's blocks are taken, none given back
        self.profile.describe(
            num_tokens=schedule.num_tokens, num_decodes=len(schedule.rows), num_chunks=len(schedule.chunks)
        )
        return schedule

    def _launch(self, schedule: Schedule) -> StepInFlight | None:
        """Have the device compute a schedule's logits. Returns None if there is nothing to compute."""
        self._sampling.register_rows()
        if not schedule.num_tokens:
            is_idle = not (self._scheduler.waiting or self._scheduler.running)
            assert self._in_flight or is_idle, "requests wait, and none of them can be served"
            return None
        step = self._steps.begin(schedule, self._batch.version)
        with self.profile.part("move"):
            all_read_back = self._block_mover.run()
        if not all_read_back:  # those that counted on a stored block wait again
            self._steps.unfinished.remove(step)
            self._scheduler.cancel(schedule)
            return None
        with self.profile.part("build"):
            # Tokens that are not known yet go from the graph in flight to this one.
            inputs, step.rows = self._input_builder.build(schedule, self._in_flight)
            self._steps.launch(step, inputs)
            self._scheduler.complete(schedule)  # from here on these tokens count as computed
            self._sampling.register_rows()
        return step

    def _receive(self, step: StepInFlight | None, launched: StepInFlight | None = None) -> None:
        """Wait for a step and give its tokens to its sequences, while the device computes the launched one."""
        self._in_flight = None
        results = self._steps.wait(step) if step is not None else []
        if launched is not None:
            self._steps.submit(launched)
        if step is None:
            return
        with self.profile.part("tokens"):
            if step.sampled_rows is not None:
                tokens = results[:-2] if step.beams else results
                self._speculator.process(step, tokens, self._outputs.process_tokens, self._sampling.count)
            if step.beams:
                self._forking.process_beams(step.beams, *results[-2:])
                self._sampling.register_rows()

    def _must_finish(self, step: StepInFlight) -> bool:
        """Say whether a step's tokens have to be known before the next one is scheduled."""
        must = self.config.pipelining == "off" or bool(step.beams) or step.schedule.is_short_of_blocks
        return must or self._scheduler.step_budget.must_time(step.schedule)

    def _count(self, schedule: Schedule, before: Schedule | None, is_over: bool, seconds: float) -> None:
        """Count a step, which `StepBudget.add` is told of, and decide whether storing blocks beats computing them."""
        self._num_steps += 1
        self._scheduler.step_budget.add(schedule, before, is_over, seconds)
        s_per_token, round_trip_s = self._scheduler.step_budget.s_per_token, self._block_mover.round_trip_s
        if s_per_token is not None and round_trip_s is not None:
            self._scheduler.storing_pays = round_trip_s < s_per_token * self.config.block_size

    def _admit_arrivals(self) -> None:
        """Let requests that have arrived wait, and end those that were aborted in the middle of a step."""
        while self._arrivals:
            self._forking.begin(self._arrivals.popleft())
        while self._pending_aborts:
            self._outputs.abort(self._pending_aborts.popleft())

    def _recover(self, error: Exception) -> None:
        """Forget all that was computed after an error in a step: every sequence waits to be computed again.

        The requests of the steps in flight end with the error. Raises it if there were none, so that it is nobody's.
        """
        steps, self._in_flight = self._steps.unfinished, None
        is_of_steps = bool(steps) and not isinstance(error, AssertionError)
        failed = {s.request: None for step in steps for s in self._sequences_of(step)} if is_of_steps else {}
        traceback.clear_frames(error.__traceback__)  # they hold what was being computed, and with it the pools
        self._steps.reset()
        self._input_builder = InputBuilder(self._batch, self.cache_groups.checkpoints)
        self._sampling.reset()
        self._scheduler.restart([s for r in self._outputs.requests.values() for s in r.sequences if not s.finished])
        reason = " ".join(f"the step failed: {type(error).__name__}: {error}".split())
        _LOG.debug(reason, exc_info=error)
        for request in failed:
            self._outputs.finish_request(request, FinishReason("error", reason))
        if not is_of_steps:
            raise error

    def _sequences_of(self, step: StepInFlight) -> list[Sequence]:
        """Return the sequences of a step that still run."""
        rows = step.schedule.rows
        current = rows[self._batch.row_version[rows] <= step.version]
        chunks = [chunk.sequence for chunk in step.schedule.chunks if chunk.sequence.row >= 0]
        return [*filter(None, (self._batch.sequences[row] for row in current.tolist())), *chunks]

    # -- the pool, from outside ---------------------------------------------------------------------------------

    def compact(self) -> int:
        """Move the blocks in use to the start of the pool: the free space is one run then. Returns how many moved."""
        with self._exclusive():
            self._require_whole()
            num_moves = self._scheduler.compact()
            self._block_mover.run()
            return num_moves

    def stats(self) -> EngineStats:
        """Return the engine's counters and the pool's state at this moment."""
        with self._exclusive():
            self._require_whole()
            self._admit_arrivals()
            self._scheduler.sync_blocks()
            return self._view.stats(
                peak_used_blocks=self._peak_used_blocks,
                num_swapped_blocks=self._block_mover.num_swapped_blocks,
                num_swapped_states=self._block_mover.num_swapped_states,
                num_steps=self._num_steps,
                **self._speculator.counts,
                step_sizes=self._steps.sizes.copy(),
                host_time_s=self._host_time_s,
                model_time_s=self._steps.model_time_s,
            )

    def snapshot(self) -> Snapshot:
        """Return all that a page shows of the engine at this moment."""
        with self._exclusive():
            return self._view.snapshot(self.stats)

    def match_prefix(self, token_ids: list[int], salt: Hashable, limit: int | None = None) -> PrefixMatch:
        """Compare a prompt with what is cached under its salt. limit: the most of its tokens that may be found."""
        with self._exclusive():
            self._require_whole()
            return self._view.match(token_ids, salt, limit)

    @contextmanager
    def _exclusive(self) -> Iterator[bool]:
        """Keep other threads out. Yields whether this one was in already, in a call that the garbage collector made."""
        self._process.require_own()  # before the lock, which another thread may have held in the moment of a fork
        with self._lock:
            was_busy, self._is_busy = self._is_busy, True
            try:
                yield was_busy
            finally:
                self._is_busy = was_busy

    def _require_whole(self) -> None:
        if self._is_torn:
            raise RuntimeError("this engine was interrupted in the middle of a step, and can't go on: make a new one")
