"""Requests and their sequences: what the engine knows of each. No tensors, no blocks.

While a sequence runs it has a row (rows.py), which also holds its latest tokens until they are flushed to it.
"""

from dataclasses import dataclass, field
from typing import Any

from mlx_paged.outputs import RequestMetrics
from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One sample of a request, or one of its beams: its tokens, prompt included, and its text so far.

    trunk: while it is computed for its siblings too, how many of its tokens they share; else None.
    """

    seq_id: int
    request: "Request"
    index: int
    token_ids: list[int]
    row: int = -1  # among those that run
    trunk: int | None = None
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, float]] | None = None
    text_stream: Any = None  # detokenizer.TextStream, where there is a tokenizer
    num_read: int = 0  # output tokens that text_stream has
    matcher: Any = None  # structured_output.GrammarMatcher, where the output must have a form
    candidates: Any = None  # of a beam: token ids and log-probabilities to go on with, until its siblings have theirs
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_output(self) -> int:
        """Tokens put out so far, those not flushed yet not counted."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def num_wanted(self) -> int:
        """How many of its tokens are to be computed before something else happens to it."""
        return len(self.token_ids) if self.trunk is None else self.trunk

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(eq=False)
class Request:
    """A prompt, its parameters and the sequences made of it: one at first, `width` once the prompt is computed."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams | BeamSearchParams
    seed: int
    max_tokens: int
    stream: bool
    metrics: RequestMetrics
    search: BeamSearch | None = None
    matcher: Any = None  # the state from which its sequences start, where the output must have a form
    sequences: list[Sequence] = field(default_factory=list)  # beams: those that are kept, best first
    num_made: int = 0
    is_forked: bool = False  # the sequences that start from its prompt have been made
    num_sent: list[tuple[int, int]] = field(default_factory=list)  # of a stream: each sequence's tokens and characters
    num_cached_tokens: int = 0
    num_blocks: int = 0  # of a beam search: the most that it held at once,
    num_unshared_blocks: int = 0  # and what that would have been without sharing
    error: str | None = None

    @property
    def width(self) -> int:
        """The most sequences that it runs at once."""
        return self.params.n if isinstance(self.params, SamplingParams) else self.params.beam_width

    @property
    def finished(self) -> bool:
        return self.is_forked and all(sequence.finished for sequence in self.sequences)
