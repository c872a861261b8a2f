"""Requests and their sequences: what the engine knows of each. No arrays, no blocks."""

from dataclasses import dataclass, field
from typing import Any

from mlx_paged.outputs import RequestMetrics
from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.sampling_params import BeamSearchParams, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One sample of a request, or one of its beams."""

    seq_id: int
    request: "Request"
    index: int
    token_ids: list[int]
    """Prompt and output: the one list of them, which the block managers read too."""
    row: int = -1
    """Its row in the running batch; -1: it does not run."""
    num_shared_tokens: int | None = None
    """While it is computed for its siblings too, how many tokens they share; else None."""
    cumulative_logprob: float = 0.0
    """As of its last token that was checked."""
    logprobs: list[dict[int, float]] | None = None
    text_stream: Any = None
    """A TextStream, where there is a tokenizer."""
    matcher: Any = None
    """A GrammarMatcher or a ThinkingMatcher, where not every token may come next."""
    beam_candidates: Any = None
    """Of a beam: token ids and log-probabilities to go on with, until its siblings have theirs."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def num_target_tokens(self) -> int:
        """How many of its tokens are to be computed before something else happens to it."""
        return len(self.token_ids) if self.num_shared_tokens is None else self.num_shared_tokens

    @property
    def num_pending_forks(self) -> int:
        """How many sequences will be forked from this one, and need rows kept for them."""
        if self.num_shared_tokens is not None:
            return len(self.request.sequences) - 1
        return 0 if self.request.is_forked else self.request.max_num_sequences - 1

    @property
    def num_rows_needed(self) -> int:
        """How many sequences may run once this one does."""
        return self.request.max_num_sequences if self.request.search is not None else self.num_pending_forks + 1

    @property
    def preempted_with(self) -> "list[Sequence]":
        """The sequences that lose their blocks when this one does: beams go together."""
        return self.request.sequences if self.request.search is not None else [self]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(eq=False)
class Request:
    """A prompt, its parameters and the sequences made of it: one at first, more once the prompt is computed."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams | BeamSearchParams
    seed: int
    max_tokens: int
    stream: bool
    metrics: RequestMetrics
    search: BeamSearch | None = None
    matcher: Any = None
    """The state from which those of its sequences start."""
    bad_words: Any = None
    """A BadWords, where its texts must not contain some."""
    prompt_logprobs: list[dict[int, float] | None] | None = None
    """Those of the first tokens of the prompt, as far as they are known; None if they are not asked for."""
    sequences: list[Sequence] = field(default_factory=list)
    """Of a beam search those that are kept, best first."""
    num_sequences_made: int = 0
    in_waves: bool = False
    """It has more samples than can run at once: each starts as soon as there is a row for it."""
    is_forked: bool = False
    """The sequences that start from its prompt have been made."""
    num_streamed: list[tuple[int, int]] = field(default_factory=list)
    """Of a stream: how many tokens and characters of each sequence have been handed out."""
    num_opening: int = 0
    """Of its prompt's tokens: how many of the first ones other conversations may begin with too."""
    num_cached_tokens: int = 0
    num_blocks: int = 0
    """Of a beam search: the most blocks that it held at once."""
    num_unshared_blocks: int = 0
    """What that would have been without sharing."""
    error: str | None = None
    has_dead_end: bool = False
    """A sequence ended by an error since what the request asks of its output left no token."""
    client_id: str | None = None
    """What its client calls it."""
    prefix_match: Any = None
    """A PrefixMatch as of its arrival, if that was asked for."""

    @property
    def max_num_sequences(self) -> int:
        """The most sequences that have to run at once."""
        if isinstance(self.params, SamplingParams):
            return 1 if self.in_waves else self.params.n
        return self.params.beam_width

    @property
    def max_cached_tokens(self) -> int | None:
        """The most of its tokens that need not be computed if they are cached; None: all that are."""
        known = self.prompt_logprobs
        return None if known is None or len(known) == len(self.prompt_token_ids) else len(known) - 1

    @property
    def finished(self) -> bool:
        return self.is_forked and all(sequence.finished for sequence in self.sequences)


def common_prefix_len(token_ids: list[list[int]]) -> int:
    """Count the tokens that lists of one length have in common at their start, short of the last."""
    first, *others = token_ids
    return min(next(i for i in range(len(first)) if i == len(first) - 1 or o[i] != first[i]) for o in others)
