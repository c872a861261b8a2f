"""What the engine hands out: results of requests and its own counters."""

from dataclasses import dataclass, field


@dataclass
class CompletionOutput:
    """One sample of a request.

    token_ids include the stop token that ended it, text ends before the stop string. cumulative_logprob is the sum
    of the tokens' log-probabilities under the model, before penalties and temperature; logprobs has, per token,
    {token id: logprob} of the token and the k best, if asked for. finish_reason: "stop" (end token, stop token or
    stop string), "length" (max_tokens or the end of the context), "abort", "error", or None while it runs.
    stop_reason: the stop token id or string, what went wrong, None for the end token or length.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """Moments in the life of a request, in seconds of `time.monotonic()`; None until they happen.

    The properties are the times between them, in seconds; None while one of the two is unknown.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def queue_time(self) -> float | None:
        """From the arrival to the first step that computes some of the request."""
        return self._since_arrival(self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        """From the arrival to the first token, the time in the queue included."""
        return self._since_arrival(self.first_token_time)

    @property
    def total_time(self) -> float | None:
        """From the arrival to the end."""
        return self._since_arrival(self.finished_time)

    def time_per_output_token(self, num_tokens: int) -> float | None:
        """Mean seconds from one token to the next, for a longest sample of `num_tokens`; None if there was no next."""
        if self.first_token_time is None or self.finished_time is None or num_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (num_tokens - 1)

    def _since_arrival(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self.arrival_time


@dataclass
class RequestOutput:
    """The state of a request: whole, or in a stream what is new since the output before.

    num_cached_tokens: prompt tokens whose K/V came from the prefix cache.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.token_ids) for sample in self.outputs)


@dataclass
class BeamHypothesis:
    """A finished hypothesis of a beam search. token_ids: the output's, the end token included.

    cum_logprob: sum of their log-probabilities; score: that divided by len(token_ids)**length_penalty.
    """

    token_ids: list[int]
    text: str
    cum_logprob: float
    score: float


@dataclass
class BeamSearchOutput:
    """The result of a beam search: hypotheses, best first.

    num_cached_tokens: prompt tokens whose K/V came from the prefix cache. num_blocks: the most blocks that its beams
    held at once; num_unshared_blocks: what they would have held if they shared none. error: what went wrong, if
    something did; `aborted`: ended by `abort`.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[BeamHypothesis] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    num_blocks: int = 0
    num_unshared_blocks: int = 0
    error: str | None = None
    aborted: bool = False

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all hypotheses."""
        return sum(len(hypothesis.token_ids) for hypothesis in self.sequences)


@dataclass
class EngineStats:
    """Counters since the engine was made, and the state of its pool at this moment."""

    num_blocks: int
    """Blocks of the pool of the layers that keep the whole context, which the counts of blocks and tokens are of."""
    num_free_blocks: int
    """Blocks that no sequence holds; those that still cache a prefix are free too."""
    peak_used_blocks: int
    """The most blocks that sequences held at once."""
    block_size: int
    """Tokens per block."""
    kv_bytes: int
    """Bytes of all pools."""
    kv_tokens: int
    """Tokens in blocks that sequences hold, shared ones counted once."""
    kv_waste: float
    """Share of the slots of used blocks that holds no token, from 0 to 1; 0 while no block is used."""
    prefix_hit_tokens: int
    """Prompt tokens whose K and V were found in the prefix cache."""
    prefix_query_tokens: int
    """Prompt tokens that were looked up there."""
    num_preemptions: int
    """How often a running sequence lost its blocks to others."""
    num_cow_copies: int
    """Shared blocks that were copied before a write."""
    num_swapped_blocks: int
    """Blocks that went to the second tier, host memory or disk."""
    num_steps: int
    """Steps that computed something."""
    host_time_s: float
    """Seconds of scheduling, batch building, stops and text."""
    model_time_s: float
    """Seconds of building the model's graph, running it and sampling."""
