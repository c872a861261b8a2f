"""What becomes of the tokens of a sequence: stops, text, and the outputs that requests are handed out as."""

from typing import Any, NamedTuple

from mlx_paged.engine.profile import NoProfile, Profile
from mlx_paged.engine.text_stream import TextStream
from mlx_paged.outputs import BeamHypothesis, BeamSearchOutput, CompletionOutput, RequestOutput
from mlx_paged.request import Request, Sequence
from mlx_paged.sampling_params import SamplingParams


class Stop(NamedTuple):
    """Why a sequence ends: its finish_reason and stop_reason."""

    finish_reason: str
    stop_reason: int | str | None = None


class Completer:
    """Follows sequences token by token where that is asked for, and else makes up for it at their end."""

    def __init__(self, tokenizer: Any, eos_token_ids: frozenset[int], profile: Profile | NoProfile) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._profile = profile

    def start(self, sequence: Sequence) -> None:
        """Give a sequence what its request asks for beside tokens, at its state."""
        request, params = sequence.request, sequence.request.params
        if isinstance(params, SamplingParams) and params.logprobs is not None and sequence.logprobs is None:
            sequence.logprobs = []
        sequence.num_read = 0
        if self._tokenizer is not None:
            stop = params.stop_strings if isinstance(params, SamplingParams) else ()
            sequence.text_stream = TextStream(self._tokenizer.detokenizer, stop)
        if request.matcher is not None:
            sequence.matcher = request.matcher.copy()

    def restart(self, sequence: Sequence) -> Stop | None:
        """After an interruption at any point, bring what is kept beside the tokens in line with them.

        Returns why the sequence ends, if it has to.
        """
        if sequence.logprobs is not None:
            del sequence.token_ids[len(sequence.request.prompt_token_ids) + len(sequence.logprobs) :]
            del sequence.logprobs[sequence.num_output :]
            pairs = zip(sequence.logprobs, sequence.output_token_ids, strict=True)
            sequence.cumulative_logprob = sum(best[token_id] for best, token_id in pairs)
        self.start(sequence)
        tokens = sequence.output_token_ids
        for token_id in tokens[:-1] if sequence.matcher is not None else ():
            sequence.matcher.advance(token_id)
        return self._stop(sequence, tokens[-1]) if tokens else None

    def stop_ids(self, request: Request) -> list[int]:
        """The tokens that end a request's sequences."""
        params = request.params
        if not isinstance(params, SamplingParams):
            return []
        return [*(() if self._runs_past_eos(params) else self._eos_token_ids), *(params.stop_token_ids or ())]

    def has_to_watch(self, sequence: Sequence) -> bool:
        """Whether each token of a sequence has to be looked at when it comes: the first one always has."""
        params = sequence.request.params
        return isinstance(params, SamplingParams) and (
            sequence.request.metrics.first_token_time is None
            or sequence.request.stream
            or params.logprobs is not None
            or bool(params.stop_strings)
            or sequence.matcher is not None
        )

    def take(self, sequence: Sequence, logprob: float, best: dict[int, float]) -> Stop | None:
        """Look at the last token of a sequence: why the sequence ends, if it does. best: {token id: logprob}."""
        if logprob != logprob:
            del sequence.token_ids[-1]
            return Stop("error", "the model's logits are not numbers (NaN)")
        token_id = sequence.token_ids[-1]
        if sequence.logprobs is not None:
            sequence.logprobs.append({token_id: logprob} | best)
        return self._stop(sequence, token_id)

    def _stop(self, sequence: Sequence, token_id: int) -> Stop | None:
        params = sequence.request.params
        assert isinstance(params, SamplingParams)
        if token_id in self._eos_token_ids and not self._runs_past_eos(params):
            return Stop("stop")
        if token_id in (params.stop_token_ids or ()):
            return Stop("stop", token_id)
        if params.stop_strings or sequence.request.stream:
            stopped_by = self._read(sequence, sequence.num_output)
            if stopped_by is not None:
                return Stop("stop", stopped_by)
        if sequence.matcher is not None:
            sequence.matcher.advance(token_id)
            if sequence.matcher.is_finished:
                return Stop("stop")
        if sequence.num_output >= sequence.request.max_tokens:
            return Stop("length")
        return None

    def finish(self, sequence: Sequence, stop: Stop) -> None:
        """A sequence has ended: complete its text."""
        reason, stop_reason = stop
        if sequence.text_stream is not None and not (reason == "stop" and isinstance(stop_reason, str)):
            ends_in_text = reason != "stop" or (stop_reason is None and not self._ends_with_eos(sequence))
            stopped_by = self._read(sequence, sequence.num_output - (not ends_in_text))
            stopped_by = stopped_by or sequence.text_stream.finish()
            if stopped_by is not None:
                reason, stop_reason = "stop", stopped_by
        sequence.stop_reason = stop_reason
        sequence.finish_reason = reason

    def _ends_with_eos(self, sequence: Sequence) -> bool:
        params = sequence.request.params
        ignored = isinstance(params, SamplingParams) and self._runs_past_eos(params)
        return sequence.num_output > 0 and sequence.token_ids[-1] in self._eos_token_ids and not ignored

    def _runs_past_eos(self, params: SamplingParams) -> bool:
        return params.ignore_eos and not params.is_constrained  # a form that is complete can't go on

    def _read(self, sequence: Sequence, end: int) -> str | None:
        """Turn output tokens up to `end` into text; the stop string that they complete, if they do."""
        if sequence.text_stream is None:
            return None
        first = len(sequence.request.prompt_token_ids)
        with self._profile.part("detokenise"):
            for token_id in sequence.token_ids[first + sequence.num_read : first + end]:
                sequence.num_read += 1
                stopped_by = sequence.text_stream.add(token_id)
                if stopped_by is not None:
                    return str(stopped_by)
        return None

    # -- outputs ------------------------------------------------------------------------------------------------

    def output(self, request: Request, finished: bool) -> RequestOutput | BeamSearchOutput:
        """What the request has, or in a stream what it has gained since it was last asked."""
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
        )

    def num_sent(self, request: Request) -> list[tuple[int, int]]:
        """How much of a stream has been handed out once `output` of now has."""
        if not request.stream:
            return []
        streams = [(sequence, sequence.text_stream) for sequence in request.sequences]
        return [(sequence.num_output, 0 if stream is None else len(stream.text)) for sequence, stream in streams]

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        text = sequence.text_stream.text if sequence.text_stream is not None else ""
        num_sent = sequence.request.num_sent
        first, begin = num_sent[sequence.index] if sequence.index < len(num_sent) else (0, 0)
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
        assert request.search is not None
        hypotheses = request.search.hypotheses() if request.error is None else []
        return BeamSearchOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            [BeamHypothesis(list(ids), self._text_of(ids), logprob, score) for ids, logprob, score in hypotheses],
            True,
            request.num_cached_tokens,
            request.metrics,
            request.num_blocks,
            request.num_unshared_blocks,
            request.error,
            any(sequence.finish_reason == "abort" for sequence in request.sequences),
        )

    def _text_of(self, token_ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        with self._profile.part("detokenise"):
            text_stream = TextStream(self._tokenizer.detokenizer, ())
            for token_id in token_ids:
                if token_id not in self._eos_token_ids:
                    text_stream.add(token_id)
            text_stream.finish()
            return text_stream.text
