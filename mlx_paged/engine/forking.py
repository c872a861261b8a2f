"""How sequences begin: requests that arrive, samples of a prompt, beams that branch."""

import time

import numpy as np

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.cache.block_mover import BlockMover
from mlx_paged.engine.output_processor import FinishReason, OutputProcessor
from mlx_paged.request import Request, Sequence
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.scheduler import Scheduler


class Forking:
    """Makes sequences, and has them wait or run."""

    def __init__(
        self,
        manager: BlockManager,
        batch: RunningBatch,
        scheduler: Scheduler,
        block_mover: BlockMover,
        outputs: OutputProcessor,
    ) -> None:
        """manager: that of the layers that keep the whole context."""
        self._manager = manager
        self._batch = batch
        self._scheduler = scheduler
        self._block_mover = block_mover
        self._outputs = outputs
        self._next_seq_id = 0

    def begin(self, request: Request) -> None:
        """Let a request that has arrived wait, or end if it can't begin."""
        self._outputs.requests[request.request_id] = request
        try:
            first = self._new_sequence(request, request.prompt_token_ids)
            if request.in_waves and len(request.prompt_token_ids) > 1:
                first.num_shared_tokens = len(request.prompt_token_ids) - 1
            self._scheduler.add(first)
        except Exception as error:  # of what it asks for
            self._outputs.fail_request(request, error)

    def fork_samples(self, sources: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make the samples of prompts that have just been computed.

        sources: the row of the logits that each of `rows` is drawn from. Returns both with the new rows.
        """
        more_sources, more_rows = [], []
        for source, row in zip(sources.tolist(), rows.tolist(), strict=True):
            sequence = self._batch.sequences[row]
            if sequence is None or sequence.request.is_forked:
                continue
            self._block_mover.store_prompt(sequence.seq_id)
            self._scheduler.release_fork_rows(sequence)
            if sequence.request.in_waves:
                self._add_samples(sequence)
            for _ in range(1, sequence.request.max_num_sequences):
                fork = self._new_sequence(sequence.request, sequence.token_ids)
                self._scheduler.add_fork(sequence, fork)
                more_sources.append(source)
                more_rows.append(fork.row)
        return np.append(sources, more_sources).astype(np.int64), np.append(rows, more_rows).astype(np.int64)

    def _add_samples(self, sequence: Sequence) -> None:
        """Let the other samples of a request wait, of which there are too many to run at once."""
        request = sequence.request
        assert isinstance(request.params, SamplingParams)
        samples = [self._new_sequence(request, request.prompt_token_ids) for _ in range(1, request.params.n)]
        self._scheduler.kept_prompts.wait(samples)
        for sample in samples:
            self._scheduler.add(sample)

    def _new_sequence(self, request: Request, token_ids: list[int]) -> Sequence:
        sequence = Sequence(self._next_seq_id, request, request.num_sequences_made, list(token_ids))
        self._next_seq_id += 1
        request.num_sequences_made += 1
        request.sequences.append(sequence)
        if request.search is None:
            self._outputs.start(sequence)
        return sequence

    def process_beams(self, beams: list[Sequence], token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Take the best continuations of beams, [len(beams), k]. A search goes on once all its beams have theirs."""
        requests: dict[Request, None] = {}
        for beam, *candidates in zip(beams, token_ids, logprobs, strict=True):
            if beam.row >= 0:
                beam.beam_candidates = candidates
                requests[beam.request] = None
        for request in requests:
            if all(beam.beam_candidates for beam in request.sequences):
                self._advance_beams(request)

    def _advance_beams(self, request: Request) -> None:
        """Go on with the best continuations of a request's beams."""
        search, before = request.search, request.sequences
        assert search is not None
        if not request.is_forked:
            request.metrics.first_token_time = time.monotonic()
            self._block_mover.store_prompt(before[0].seq_id)
            self._scheduler.release_fork_rows(before[0])
        self._count_blocks(request)
        count = min(search.num_candidates, len(before[0].beam_candidates[0]))
        token_ids, logprobs = (np.stack([beam.beam_candidates[i][:count] for beam in before]) for i in range(2))
        try:
            parents = search.advance(token_ids, logprobs)
        except ValueError as error:
            self._outputs.finish_request(request, FinishReason("error", " ".join(str(error).split())))
            return
        except Exception as error:  # of the tokenizer's code
            self._outputs.fail_request(request, error)
            return
        if search.finished:
            self._outputs.finish_request(request, FinishReason("stop"))
            return
        for i, sequence in enumerate(before):
            sequence.beam_candidates = None
            if i not in parents:
                self._scheduler.remove(sequence)
        request.sequences = []
        for i, parent in enumerate(parents):
            if parent in parents[:i]:
                fork = self._new_sequence(request, before[parent].token_ids)
                self._scheduler.add_fork(before[parent], fork)
            else:
                request.sequences.append(before[parent])
        for beam, sequence in zip(search.beams, request.sequences, strict=True):
            self._batch.append_token(sequence, beam.token_ids[-1])
        self._outputs.num_tokens += len(parents)

    def _count_blocks(self, request: Request) -> None:
        """Note what a beam search holds, and what it would hold if its beams shared nothing."""
        shared = len(request.prompt_token_ids) // self._manager.block_size
        tables = [self._manager.block_table(beam.seq_id, shared) for beam in request.sequences]
        num_blocks = shared + len({block_id for table in tables for block_id in table})
        request.num_blocks = max(request.num_blocks, num_blocks)
        num_unshared = shared * len(tables) + sum(map(len, tables))
        request.num_unshared_blocks = max(request.num_unshared_blocks, num_unshared)
