"""The engine: requests in, steps, outputs out. One step is schedule -> run -> sample -> hand out."""

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.batch import BatchBuilder, StepInputs
from mlx_paged.block_manager import BlockManager
from mlx_paged.block_mover import BlockMover
from mlx_paged.block_store import open_stores
from mlx_paged.cache_groups import CacheGroups
from mlx_paged.config import EngineConfig
from mlx_paged.detokenizer import TextStream
from mlx_paged.model_runner import ModelRunner
from mlx_paged.outputs import EngineStats, RequestMetrics, RequestOutput
from mlx_paged.sampler import SampledTokens, SampleRow, TokenCounts, draw_id, sample
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler import Schedule, Scheduler
from mlx_paged.sequence import Request, Sequence

_UNSEEDED = 1 << 40  # a sample index that no request has: keeps the engine's own seeds apart from users'


class Engine:
    """Runs any number of requests over one model and one pool of blocks.

    tokenizer: mlx-lm's TokenizerWrapper, or None for requests in token ids only. max_model_len: the most tokens of
    prompt and output together, None if only the pool bounds them.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Any, config: EngineConfig, max_model_len: int | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
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
        self._mover = BlockMover(self.cache_groups, runner, stores)
        self._scheduler = Scheduler(self.cache_groups, config.max_num_seqs, config.max_num_batched_tokens)
        longest = self.block_manager.num_blocks
        if max_model_len is not None:
            longest = min(longest, -(-max_model_len // config.block_size))
        self._batch = BatchBuilder(self.cache_groups, config.max_num_seqs, longest)
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids) if tokenizer is not None else frozenset()
        self._requests: dict[int, Request] = {}
        self._next_request_id = 0
        self._next_seq_id = 0
        self._num_steps = 0
        self._host_time = 0.0
        self._model_time = 0.0

    @property
    def block_manager(self) -> BlockManager:
        """That of the layers that keep the whole context: it decides what fits."""
        return self.cache_groups.managers[0]

    # -- requests -----------------------------------------------------------------------------------------------

    def add_request(
        self, prompt: str | SequenceOf[int], params: SamplingParams | None = None, *, stream: bool = False
    ) -> int:
        """Queue a prompt; returns the request's id. With `stream`, `step` returns its output piece by piece.

        Raises ValueError for a prompt that is empty, not of this vocabulary, or could never fit; TypeError for one
        that is neither text nor token ids.
        """
        return self.submit(self.make_request(prompt, params or SamplingParams(), stream=stream))

    def make_request(self, prompt: str | SequenceOf[int], params: SamplingParams, *, stream: bool = False) -> Request:
        """A validated request that is not queued yet. Raises as `add_request` does."""
        token_ids = self._encode(prompt)
        vocab_size = self._runner.vocab_size
        outside = [token for token in token_ids if not 0 <= token < vocab_size]
        outside += [token for token in params.logit_bias or () if token >= vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the model's vocabulary of {vocab_size}")
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this engine has none: use stop_token_ids")
        if params.n > self.config.max_num_seqs:
            raise ValueError(f"n={params.n} samples can't run at once: max_num_seqs is {self.config.max_num_seqs}")
        return Request(
            request_id=-1,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            params=params,
            seed=0,
            max_tokens=self._max_new_tokens(len(token_ids), params),
            stream=stream,
            metrics=RequestMetrics(time.monotonic()),
        )

    def submit(self, request: Request) -> int:
        """Queue a request that `make_request` made; returns its id."""
        request.request_id = self._next_request_id
        self._next_request_id += 1
        seed = request.params.seed
        request.seed = draw_id(self.config.seed, _UNSEEDED, request.request_id) if seed is None else seed
        self._requests[request.request_id] = request
        self._scheduler.add(self._new_sequence(request))
        return request.request_id

    def abort(self, request_id: int) -> RequestOutput | None:
        """End a request at once and free what it holds; what it has so far, or None if it had ended before.

        Raises KeyError for an id that was never given out.
        """
        if not 0 <= request_id < self._next_request_id:
            raise KeyError(f"no request {request_id}: ids up to {self._next_request_id - 1} were given out")
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            if not sequence.finished:
                self._finish(sequence, "abort", None)
        request.metrics.finished_time = time.monotonic()
        return self._output(request, finished=True)

    def has_unfinished(self) -> bool:
        """Whether any request still waits or runs."""
        return bool(self._requests)

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute the next tokens of what is scheduled.

        Returns the requests that finished, and for those added with `stream` what is new of them.
        """
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        if not schedule.sequences:
            assert not self._requests, "requests wait, and none of them can be served"
            return []
        samples = self._samples(schedule)
        try:
            inputs = self._batch.build(schedule)
            built = time.perf_counter()
            if not self._mover.run():
                self._fail(schedule)
                return []
            sampled = self._run(inputs, samples)
        except BaseException:
            self._fail(schedule)
            raise
        computed = time.perf_counter()

        self._scheduler.complete(schedule)
        outputs = self._hand_out(samples, sampled) if sampled is not None else []
        if self.config.check_invariants:
            self.cache_groups.check()
        self._num_steps += 1
        self._model_time += computed - built
        self._host_time += built - started + time.perf_counter() - computed
        return outputs

    def compact(self) -> int:
        """Move the blocks in use to the start of the pool, so that the free space is one run; how many moved."""
        num_moves = self.cache_groups.compact()
        self._mover.run()
        self._batch.rewrite()
        return num_moves

    def stats(self) -> EngineStats:
        """The engine's counters and the pool's state at this moment."""
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

    # -- helpers ------------------------------------------------------------------------------------------------

    def _encode(self, prompt: str | SequenceOf[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this engine has no tokenizer: give the prompt as token ids")
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not prompt.startswith(bos)
            token_ids = list(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)) if prompt else []
        else:
            token_ids = list(prompt)
            if not all(isinstance(token, int | np.integer) and not isinstance(token, bool) for token in token_ids):
                raise TypeError("a prompt is text or a list of token ids")
            token_ids = [int(token) for token in token_ids]
        if not token_ids:
            raise ValueError("the prompt is empty: give it at least one token")
        return token_ids

    def _max_new_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """How many tokens a request may put out. Raises ValueError if its prompt, or what it asks for, can't fit."""
        manager = self.block_manager
        # The last token put out is never fed back, so it needs a place in the context but no slot in the pool.
        room = manager.num_blocks * manager.block_size - num_prompt + 1
        wanted = params.max_tokens or 1
        if self.max_model_len is not None:
            if num_prompt >= self.max_model_len:
                raise ValueError(
                    f"the prompt has {num_prompt} tokens and the context is {self.max_model_len}: shorten the prompt "
                    "or raise max_model_len if the model allows it"
                )
            wanted = min(wanted, self.max_model_len - num_prompt)
        if wanted > room:
            needed = -(-(num_prompt + wanted - 1) // manager.block_size)
            raise ValueError(
                f"a prompt of {num_prompt} tokens and {wanted} more need {needed} blocks of {manager.block_size} "
                f"tokens and the pool has {manager.num_blocks}: shorten the prompt, lower max_tokens, or raise "
                "num_kv_blocks or kv_cache_memory"
            )
        if params.max_tokens is not None:
            return wanted
        return room if self.max_model_len is None else min(room, self.max_model_len - num_prompt)

    def _new_sequence(self, request: Request) -> Sequence:
        sequence = Sequence(self._next_seq_id, request, len(request.sequences), list(request.prompt_token_ids))
        self._next_seq_id += 1
        if request.params.has_penalties:
            sequence.counts = TokenCounts(request.prompt_token_ids)
        if self.tokenizer is not None:
            sequence.text_stream = TextStream(self.tokenizer.detokenizer, request.params.stop_strings)
        request.sequences.append(sequence)
        return sequence

    def _fail(self, schedule: Schedule) -> None:
        """A step broke off: what it had scheduled starts again."""
        self._scheduler.fail(schedule)
        for item in schedule.sequences:
            self._batch.forget(item.sequence.seq_id)

    def _samples(self, schedule: Schedule) -> list["_Sample"]:
        """The tokens to choose after this step: one per sequence, `n` where a prompt has just been computed."""
        now = time.monotonic()
        samples: list[_Sample] = []
        row = 0
        for item in schedule.sequences:
            sequence, request = item.sequence, item.sequence.request
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
            if not item.needs_logits:
                continue
            not_forked = len(request.sequences) < request.params.n
            for number in range(request.params.n) if not_forked else (sequence.index,):
                samples.append(_Sample(sequence, number, row))
            row += 1
        return samples

    def _run(self, inputs: StepInputs, samples: list["_Sample"]) -> SampledTokens | None:
        """Compute a step and choose its tokens; None if no sequence is far enough to need one."""
        logits = self._runner.run(inputs)
        if not samples:
            self._runner.wait(logits)
            return None
        if len(samples) != logits.shape[0]:
            logits = logits[mx.array([row for _, _, row in samples])]
        rows = []
        for sequence, number, _ in samples:
            draw = draw_id(sequence.request.seed, number, len(sequence.output.token_ids))
            rows.append(SampleRow(sequence.params, draw, sequence.counts))
        return sample(logits, rows)

    def _hand_out(self, samples: list["_Sample"], sampled: SampledTokens) -> list[RequestOutput]:
        """Give each sequence its token and return what is finished or new."""
        now = time.monotonic()
        sequences = []
        for sequence, number, _ in samples:
            if number != sequence.index:
                fork = self._new_sequence(sequence.request)
                self._scheduler.add_fork(sequence, fork)
                sequences.append(fork)
            else:
                sequences.append(sequence)
        for row, sequence in enumerate(sequences):
            if not sequence.output.token_ids and sequence.index == 0:
                self._mover.keep_prompt(sequence.seq_id)
            self._append_token(sequence, row, sampled)
        outputs = []
        for request in dict.fromkeys(sequence.request for sequence in sequences):
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
            finished = request.finished
            if finished:
                request.metrics.finished_time = now
                del self._requests[request.request_id]
            if finished or request.stream:
                outputs.append(self._output(request, finished))
        return outputs

    def _append_token(self, sequence: Sequence, row: int, sampled: SampledTokens) -> None:
        token_id = int(sampled.token_ids[row])
        params, output = sequence.params, sequence.output
        sequence.token_ids.append(token_id)
        output.token_ids.append(token_id)
        output.cumulative_logprob += float(sampled.logprobs[row])
        if output.logprobs is not None:
            best = {token_id: float(sampled.logprobs[row])}
            if params.logprobs and sampled.top_token_ids is not None and sampled.top_logprobs is not None:
                top_ids, top_logprobs = sampled.top_token_ids[row], sampled.top_logprobs[row]
                best |= dict(zip(top_ids[: params.logprobs].tolist(), top_logprobs.tolist(), strict=False))
            output.logprobs.append(best)
        if sequence.counts is not None:
            sequence.counts.add(token_id)
        if token_id in self._eos_token_ids and not params.ignore_eos:
            self._finish(sequence, "stop", None)
            return
        if token_id in (params.stop_token_ids or ()):
            self._finish(sequence, "stop", token_id)
            return
        stopped_by = sequence.text_stream.add(token_id) if sequence.text_stream is not None else None
        if stopped_by is not None:
            self._finish(sequence, "stop", stopped_by)
        elif len(output.token_ids) == sequence.request.max_tokens:
            self._finish(sequence, "length", None)

    def _finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None) -> None:
        self._scheduler.remove(sequence)
        self._batch.forget(sequence.seq_id)
        if sequence.text_stream is not None and not isinstance(stop_reason, str):
            stopped_by = sequence.text_stream.finish()
            if stopped_by is not None:
                reason, stop_reason = "stop", stopped_by
        sequence.output.finish_reason, sequence.output.stop_reason = reason, stop_reason

    def _output(self, request: Request, finished: bool) -> RequestOutput:
        """What the request has, or in a stream what it has gained since it was last asked."""
        outputs = []
        for sequence in request.sequences:
            output = sequence.output
            output.text = sequence.text_stream.text if sequence.text_stream is not None else ""
            if request.stream:
                output, first, begin = replace(output), sequence.num_sent_tokens, sequence.num_sent_chars
                sequence.num_sent_tokens, sequence.num_sent_chars = len(output.token_ids), len(output.text)
                output.token_ids, output.text = output.token_ids[first:], output.text[begin:]
                output.logprobs = output.logprobs and output.logprobs[first:]
            outputs.append(output)
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            outputs,
            finished,
            request.num_cached_tokens,
            request.metrics,
        )


class _Sample(NamedTuple):
    """A token to choose: for sample `number` of a request, after the last token of `sequence`, from a logits row."""

    sequence: Sequence
    number: int
    row: int
