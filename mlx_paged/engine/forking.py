"""The requests being served: how their sequences begin, what becomes of tokens and candidates, and how they end."""

import time
from collections.abc import Container

import numpy as np

from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.cache.block_mover import BlockMover
from mlx_paged.engine.output_processor import Completer, Stop
from mlx_paged.outputs import BeamSearchOutput, RequestOutput
from mlx_paged.request import Request, Sequence
from mlx_paged.scheduler.running_batch import Rows
from mlx_paged.scheduler.scheduler import Scheduler


class LiveRequests:
    """All requests that have begun and not ended, by id, and the outputs that wait to be taken away."""

    def __init__(
        self, groups: CacheGroups, rows: Rows, scheduler: Scheduler, mover: BlockMover, completer: Completer
    ) -> None:
        self.by_id: dict[int, Request] = {}
        self.outputs: list[RequestOutput | BeamSearchOutput] = []
        self._manager = groups.managers[0]  # that of the layers that keep the whole context
        self._rows = rows
        self._scheduler = scheduler
        self._mover = mover
        self._completer = completer
        self._next_seq_id = 0

    # -- beginnings ---------------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """A request that has arrived starts to wait."""
        self._scheduler.add(self._new_sequence(request, request.prompt_token_ids))

    def fork_samples(self, sources: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of prompts that have just been computed, make the samples; the rows to draw for, and of which logits."""
        more_sources, more_rows = [], []
        for source, row in zip(sources.tolist(), drawn.tolist(), strict=True):
            sequence = self._rows.sequences[row]
            if sequence is None or sequence.request.is_forked:
                continue
            self._mover.keep_prompt(sequence.seq_id)
            self._scheduler.set_forked(sequence)
            for _ in range(1, sequence.request.width):
                fork = self._new_sequence(sequence.request, sequence.token_ids)
                self._scheduler.add_fork(sequence, fork)
                more_sources.append(source)
                more_rows.append(fork.row)
        return np.append(sources, more_sources).astype(np.int64), np.append(drawn, more_rows).astype(np.int64)

    def _new_sequence(self, request: Request, token_ids: list[int]) -> Sequence:
        sequence = Sequence(self._next_seq_id, request, request.num_made, list(token_ids))
        self._next_seq_id += 1
        request.num_made += 1
        request.sequences.append(sequence)
        if request.search is None:
            self._completer.start(sequence)
        return sequence

    # -- tokens and candidates ----------------------------------------------------------------------------------

    def take_tokens(self, drawn: np.ndarray, version: int, values: list[np.ndarray]) -> None:
        """Tokens that were drawn for rows as they were at a version: hand out what has ended or is new in a stream.

        values: token_ids and logprobs, [len(drawn)], and if wanted the best tokens and their logprobs, [len(drawn), k].
        """
        rows, requests = self._rows, dict[Request, None]()
        if rows.version != version:  # some may have been aborted meanwhile
            current = np.nonzero(rows.stamp[drawn] <= version)[0]
            drawn, values = drawn[current], [array[current] for array in values]
        token_ids, logprobs, *top = values
        for i in np.nonzero(rows.add_tokens(drawn, token_ids, logprobs))[0].tolist():
            sequence = rows.sequences[drawn[i]]
            assert sequence is not None
            rows.flush(sequence)
            request = sequence.request
            requests[request] = None
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = time.monotonic()
            best: dict[int, float] = {}
            if sequence.logprobs is not None and top:
                best = dict(zip(*(array[i, : request.params.logprobs].tolist() for array in top), strict=True))
            stop = self._completer.take(sequence, float(logprobs[i]), best)
            if stop is not None:
                self.finish(sequence, stop)
            else:
                rows.set_watched(sequence.row, self._completer.has_to_watch(sequence))
        for request in requests:
            if request.finished:
                self._hand_out(request)
            elif request.stream:
                self._put_out(request, False)

    def take_candidates(self, beams: list[Sequence], token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        """The best continuations of each beam, [len(beams), k]: their searches go on once all beams have theirs."""
        requests: dict[Request, None] = {}
        for beam, *candidates in zip(beams, token_ids, logprobs, strict=True):
            if beam.row >= 0:
                beam.candidates = candidates
                requests[beam.request] = None
        for request in requests:
            self._branch(request)

    def _branch(self, request: Request) -> None:
        """Go on with the best continuations of a request's beams, once all of them are known."""
        search, before = request.search, request.sequences
        assert search is not None
        if not all(beam.candidates for beam in before):
            return
        if not request.is_forked:
            request.metrics.first_token_time = time.monotonic()
            self._mover.keep_prompt(before[0].seq_id)
            self._scheduler.set_forked(before[0])
        self._count_blocks(request)
        count = min(search.num_candidates, len(before[0].candidates[0]))
        token_ids, logprobs = (np.stack([beam.candidates[i][:count] for beam in before]) for i in range(2))
        try:
            parents = search.advance(token_ids, logprobs)
        except ValueError as error:
            self.end(request, Stop("error", str(error)))
            return
        if search.finished:
            self.end(request, Stop("stop"))
            return
        for i, sequence in enumerate(before):
            sequence.candidates = None
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
            self._rows.put(sequence, beam.token_ids[-1])

    def _count_blocks(self, request: Request) -> None:
        """Note what a beam search holds, and what it would hold if its beams shared nothing."""
        shared = len(request.prompt_token_ids) // self._manager.block_size
        tables = [self._manager.block_table(beam.seq_id, shared) for beam in request.sequences]
        num_blocks = shared + len({block_id for table in tables for block_id in table})
        request.num_blocks = max(request.num_blocks, num_blocks)
        num_unshared = shared * len(tables) + sum(map(len, tables))
        request.num_unshared_blocks = max(request.num_unshared_blocks, num_unshared)

    # -- ends ---------------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, stop: Stop) -> None:
        """A sequence ends, wherever it is."""
        self._scheduler.remove(sequence)
        self._completer.finish(sequence, stop)

    def fail(self, sequence: Sequence, reason: str) -> None:
        """A sequence can't go on; nor does its request if it was the last one."""
        self.finish(sequence, Stop("error", reason))
        if sequence.request.finished:
            self._hand_out(sequence.request)

    def end(self, request: Request, stop: Stop) -> None:
        """A request ends, with all its sequences."""
        if stop.finish_reason == "error":
            request.error = str(stop.stop_reason)
        for sequence in request.sequences:
            if not sequence.finished:
                self.finish(sequence, stop)
        self._hand_out(request)

    def _put_out(self, request: Request, finished: bool) -> None:
        output, num_sent = self._completer.output(request, finished), self._completer.num_sent(request)
        # At once, so that an interruption neither loses a part of a stream nor repeats it.
        self.outputs[len(self.outputs) :], request.num_sent = [output], num_sent

    def _hand_out(self, request: Request) -> None:
        """A request has ended."""
        request.metrics.finished_time = time.monotonic()
        self._put_out(request, True)
        del self.by_id[request.request_id]

    # -- after an error -----------------------------------------------------------------------------------------

    def start_over(self, at_fault: Container[Request], reason: str) -> None:
        """A step broke off, anywhere, and nothing is computed any more: all go on from what is known of them.

        Those at fault end with an error, `reason`.
        """
        for output in self.outputs:
            if output.finished:  # it may have been put out just now
                self.by_id.pop(output.request_id, None)
        requests = list(self.by_id.values())
        for request in requests:
            self._mend(request)
        self._scheduler.start_over([s for request in requests for s in request.sequences if not s.finished])
        for request in requests:
            if request in at_fault:
                self.end(request, Stop("error", reason))
            elif request.finished or (request.search is not None and request.search.finished):
                self.end(request, Stop("stop"))

    def _mend(self, request: Request) -> None:
        """Bring a request into a state from which it can go on, wherever it was interrupted."""
        request.num_made = len(request.sequences)
        if request.search is not None:
            beams = request.search.beams
            request.is_forked = request.search.finished or bool(beams[0].token_ids)
        if request.search is not None and request.is_forked:
            request.sequences = []
            for beam in request.search.beams:
                self._new_sequence(request, request.prompt_token_ids + beam.token_ids)
            return
        num_wanted = request.width if request.is_forked else 1
        while len(request.sequences) < num_wanted:
            self._new_sequence(request, request.prompt_token_ids)
        for sequence in request.sequences if request.search is None else ():
            if not sequence.finished:
                stop = self._completer.restart(sequence)
                if stop is not None:
                    self._completer.finish(sequence, stop)
