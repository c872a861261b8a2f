"""What becomes of tokens: stop checks, text, how sequences and requests end, and the outputs that are handed out."""

import time
from collections.abc import Container
from typing import NamedTuple

import numpy as np

from mlx_paged.engine.detokenizer import Detokenizer
from mlx_paged.engine.profile import Profile
from mlx_paged.engine.text_stream import TextStream
from mlx_paged.errors import DeadEnd
from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput, CompletionOutput, Output, RequestOutput
from mlx_paged.request import Request, Sequence
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.scheduler import Scheduler

MAX_STOP_IDS = 32  # that are compared with the tokens of all rows: a request with more costs nobody else time


class FinishReason(NamedTuple):
    """Why a sequence ends: its finish_reason and stop_reason."""

    finish_reason: str
    stop_reason: int | str | None = None


class OutputProcessor:
    """Follows sequences token by token where that is asked for, and else makes up for it at their end."""

    requests: dict[int, Request]
    """All that have begun and not ended, by id."""
    outputs: list[Output]
    """What waits to be handed out."""
    num_tokens: int
    """Tokens that were put out."""

    def __init__(
        self,
        detokenizer: Detokenizer | None,
        eos_token_ids: frozenset[int],
        batch: RunningBatch,
        scheduler: Scheduler,
        profile: Profile,
    ) -> None:
        self.requests = {}
        self.outputs = []
        self.num_tokens = 0
        self._detokenizer = detokenizer
        self._eos_token_ids = eos_token_ids
        self._batch = batch
        self._scheduler = scheduler
        self._profile = profile

    def take(self, wanted: Container[int] | None = None) -> list[Output]:
        """Hand out what waits; with `wanted`, the ids of requests, what waits of these."""
        taken, self.outputs = self.outputs, []
        if wanted is not None:
            self.outputs = [output for output in taken if output.request_id not in wanted]
            taken = [output for output in taken if output.request_id in wanted]
        return taken

    def abort(self, request_id: int) -> Output | None:
        """End a request. Returns its output, or None if it had ended and been handed out."""
        if request_id in self.requests:
            self.finish_request(self.requests[request_id], FinishReason("abort"))
        outputs = self.take((request_id,))
        return outputs[-1] if outputs else None

    def start(self, sequence: Sequence) -> None:
        """Give a new sequence what its request asks for beside tokens."""
        request, params = sequence.request, sequence.request.params
        if isinstance(params, SamplingParams) and params.logprobs is not None:
            sequence.logprobs = []
        if self._detokenizer is not None:
            sequence.text_stream = TextStream.of(self._detokenizer, params)
        if request.matcher is not None:
            sequence.matcher = request.matcher.copy()

    def stop_ids(self, request: Request) -> list[int]:
        """Return the tokens that end a request's sequences."""
        params = request.params
        if not isinstance(params, SamplingParams):
            return []
        asked = params.stop_token_ids or ()
        asked = asked if len(asked) <= MAX_STOP_IDS else ()  # then each token is checked
        return [*(() if self._ignores_eos(params) else self._eos_token_ids), *asked]

    def needs_every_token(self, sequence: Sequence) -> bool:
        """Say whether each token of a sequence has to be checked when it comes: the first one always has."""
        params = sequence.request.params
        return isinstance(params, SamplingParams) and (
            sequence.request.metrics.first_token_time is None
            or sequence.request.stream
            or params.logprobs is not None
            or bool(params.stop_strings)
            or len(params.stop_token_ids or ()) > MAX_STOP_IDS
            or sequence.matcher is not None
        )

    def process_tokens(self, rows: np.ndarray, version: int, results: list[np.ndarray]) -> None:
        """Take the tokens drawn for rows as they were at a version; emit what has ended or is new in a stream.

        results: token_ids and logprobs, [len(rows)], and perhaps the best tokens and their logprobs, [len(rows), k].
        """
        batch, requests = self._batch, dict[Request, None]()
        if batch.version != version:  # some may have been aborted meanwhile
            current = np.nonzero(batch.row_version[rows] <= version)[0]
            rows, results = rows[current], [array[current] for array in results]
        self.num_tokens += len(rows)
        token_ids, logprobs, *top = results
        for i in np.nonzero(batch.append_tokens(rows, token_ids, logprobs))[0].tolist():
            sequence = batch.sequences[rows[i]]
            assert sequence is not None
            request = sequence.request
            requests[request] = None
            sequence.cumulative_logprob = float(batch.cumulative_logprob[rows[i]])
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = time.monotonic()
            top_logprobs: dict[int, float] = {}
            if sequence.logprobs is not None and top:
                pairs = (array[i, : request.params.logprobs].tolist() for array in top)
                top_logprobs = dict(zip(*pairs, strict=True))
            stop = self._check_token(sequence, float(logprobs[i]), top_logprobs)
            if stop is not None:
                self._finish_sequence(sequence, stop)
            else:
                batch.check_every_token(sequence.row, self.needs_every_token(sequence))
        for request in requests:
            if request.finished:
                self._emit_final(request)
            elif request.stream:
                self._emit(request, False)

    def _check_token(self, sequence: Sequence, logprob: float, top_logprobs: dict[int, float]) -> FinishReason | None:
        """Look at the last token of a sequence. Returns why the sequence ends, if it does.

        top_logprobs: the best tokens' log-probabilities. What raises here, such as a tokenizer's code, is the error
        of this sequence alone.
        """
        if logprob != logprob:
            del sequence.token_ids[-1]
            return FinishReason("error", "the model's logits are not numbers (NaN)")
        token_id = sequence.token_ids[-1]
        if sequence.logprobs is not None:
            sequence.logprobs.append({token_id: logprob} | top_logprobs)
        try:
            return self._find_stop(sequence, token_id)
        except Exception as error:
            return _error(sequence.request, error)

    def _find_stop(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        params = sequence.request.params
        assert isinstance(params, SamplingParams)
        if token_id in self._eos_token_ids and not self._ignores_eos(params):
            return FinishReason("stop")
        if token_id in (params.stop_token_ids or ()):
            return FinishReason("stop", token_id)
        if params.stop_strings or sequence.request.stream:
            stop_string = self._detokenize(sequence, token_id)
            if stop_string is not None:
                return FinishReason("stop", stop_string)
        if sequence.matcher is not None:
            sequence.matcher.advance(token_id)
            if sequence.matcher.is_finished:
                return FinishReason("stop")
        if sequence.num_output_tokens >= sequence.request.max_tokens:
            return FinishReason("length")
        return None

    def fail_sequence(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence that can't go on, and its request if it was the last one."""
        self._finish_sequence(sequence, _error(sequence.request, error))
        if sequence.request.finished:
            self._emit_final(sequence.request)

    def finish_request(self, request: Request, stop: FinishReason) -> None:
        """End a request, with all its sequences."""
        if stop.finish_reason == "error":
            request.error = str(stop.stop_reason)
        for sequence in request.sequences:
            if not sequence.finished:
                self._finish_sequence(sequence, stop)
        self._emit_final(request)

    def fail_request(self, request: Request, error: Exception) -> None:
        """End a request, with all its sequences, by an error that is its own."""
        self.finish_request(request, _error(request, error))

    def _finish_sequence(self, sequence: Sequence, stop: FinishReason) -> None:
        """End a sequence, wherever it is, and complete its text."""
        self._scheduler.remove(sequence)
        if sequence.text_stream is not None and not (
            stop.finish_reason == "stop" and isinstance(stop.stop_reason, str)
        ):
            try:
                stop = self._complete_text(sequence, stop)
            except Exception as error:  # of the tokenizer's code
                stop = _error(sequence.request, error)
        sequence.finish_reason, sequence.stop_reason = stop

    def _complete_text(self, sequence: Sequence, stop: FinishReason) -> FinishReason:
        """Decode the output of a sequence. Returns why it ended: a stop string may turn up.

        The token that ended it is no text of it, except one that completed a grammar.
        """
        params, token_ids = sequence.request.params, sequence.output_token_ids
        ended_by_token = stop.finish_reason == "stop" and (
            stop.stop_reason is not None or token_ids[-1] in self.stop_ids(sequence.request)
        )
        with self._profile.part("detokenise"):
            assert self._detokenizer is not None
            whole = self._detokenizer.decode(token_ids[: -1 if ended_by_token else None], params.skip_special_tokens)
            stop_string = sequence.text_stream.finish(whole)
        return stop if stop_string is None else FinishReason("stop", stop_string)

    def _ignores_eos(self, params: SamplingParams) -> bool:
        return params.ignore_eos and not params.is_constrained  # what is complete by its grammar can't go on

    def _detokenize(self, sequence: Sequence, token_id: int) -> str | None:
        """Add a token to the text of a sequence. Returns the stop string that it completes, if it does."""
        if sequence.text_stream is None:
            return None
        with self._profile.part("detokenise"):
            return str(stop) if (stop := sequence.text_stream.add(token_id)) is not None else None

    def _emit(self, request: Request, finished: bool) -> None:
        self.outputs.append(self._output(request, finished))
        request.num_streamed = self._num_streamed(request)

    def _emit_final(self, request: Request) -> None:
        request.metrics.finished_time = time.monotonic()
        self._emit(request, True)
        del self.requests[request.request_id]

    def _output(self, request: Request, finished: bool) -> Output:
        """Return what the request has, or in a stream what it has gained since this was last emitted."""
        if request.search is not None:
            return self._beam_search_output(request)
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            [self._completion(sequence) for sequence in request.sequences],
            finished,
            request.num_cached_tokens,
            request.metrics,
            request.prompt_logprobs,
        )

    def _num_streamed(self, request: Request) -> list[tuple[int, int]]:
        """Count how much of a stream has been handed out once the output of now has."""
        if not request.stream:
            return []
        streams = [(sequence, sequence.text_stream) for sequence in request.sequences]
        return [(sequence.num_output_tokens, 0 if stream is None else len(stream.text)) for sequence, stream in streams]

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        text = sequence.text_stream.text if sequence.text_stream is not None else ""
        num_streamed = sequence.request.num_streamed
        first, begin = num_streamed[sequence.index] if sequence.index < len(num_streamed) else (0, 0)
        return CompletionOutput(
            sequence.index,
            text[begin:],
            sequence.token_ids[len(sequence.request.prompt_token_ids) + first :],
            sequence.cumulative_logprob,
            None if sequence.logprobs is None else sequence.logprobs[first:],
            sequence.finish_reason,
            sequence.stop_reason,
        )

    def _beam_search_output(self, request: Request) -> BeamSearchOutput:
        assert request.search is not None and isinstance(request.params, BeamSearchParams)
        params, found = request.params, request.search.hypotheses() if request.error is None else []
        hypotheses: list[BeamHypothesis] = []
        try:
            hypotheses = [
                BeamHypothesis(list(ids), self._text_of(ids, params), logprob, score) for ids, logprob, score in found
            ]
        except Exception as error:  # of the tokenizer's code
            request.error = str(_error(request, error).stop_reason)
        return BeamSearchOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            hypotheses,
            True,
            request.num_cached_tokens,
            request.metrics,
            request.num_blocks,
            request.num_unshared_blocks,
            request.error,
            any(sequence.finish_reason == "abort" for sequence in request.sequences),
        )

    def _text_of(self, token_ids: list[int], params: BeamSearchParams) -> str:
        """Decode a hypothesis. The token that ended it is no text of it, nor are a stop string and what follows it."""
        if self._detokenizer is None:
            return ""
        with self._profile.part("detokenise"):
            if token_ids[-1] in self._eos_token_ids or token_ids[-1] in (params.stop_token_ids or ()):
                token_ids = token_ids[:-1]
            text_stream = TextStream.of(self._detokenizer, params)
            text_stream.finish(self._detokenizer.decode(token_ids, params.skip_special_tokens))
            return text_stream.text


def _error(request: Request, error: Exception) -> FinishReason:
    request.has_dead_end = isinstance(error, DeadEnd)
    reason = str(error) if request.has_dead_end else f"{type(error).__name__}: {error}"
    return FinishReason("error", " ".join(reason.split()))
