"""What the engine hands out: results of requests and its own counters."""

from dataclasses import dataclass, field


@dataclass
class CompletionOutput:
    """One sample of a request."""

    index: int
    """Which of the request's n samples it is, from 0."""
    text: str
    """What the tokenizer decodes the tokens to, without special ones and the one that ended it; it ends before the stop
    string."""
    token_ids: list[int]
    """The output's tokens, the stop token that ended it included."""
    cumulative_logprob: float
    """Sum of the tokens' log-probabilities in the model's own distribution, before penalties and temperature."""
    logprobs: list[dict[int, float]] | None = None
    """Per token, {token id: log-probability} of the token and the k most likely ones, if asked for."""
    finish_reason: str | None = None
    """Why it ended: "stop" (end token, stop token or stop string), "length" (max_tokens or the end of the context),
    "abort" or "error"; None while it runs."""
    stop_reason: int | str | None = None
    """The stop token id, the stop string, or what went wrong; None for the end token and for "length"."""


@dataclass
class RequestMetrics:
    """Moments in the life of a request, in seconds of `time.monotonic()`; None until they happen.

    The properties are the times between them, in seconds; None while one of the two is unknown.
    """

    arrival_time: float
    """When the request was added."""
    first_scheduled_time: float | None = None
    """When a step first computed some of it."""
    first_token_time: float | None = None
    """When its first token was known."""
    finished_time: float | None = None
    """When its last sample ended."""

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
        """Compute the mean seconds from one token to the next. `num_tokens` is the length of the longest sample.

        Returns None if there was no next token, or while it runs.
        """
        if self.first_token_time is None or self.finished_time is None or num_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (num_tokens - 1)

    def _since_arrival(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self.arrival_time


@dataclass
class RequestOutput:
    """The state of a request: whole, or in a stream what is new since the output before."""

    request_id: int
    """Its number in the engine, as `add_request` returns it."""
    prompt: str | None
    """The prompt's text; None if it came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    """A completion per sample."""
    finished: bool = False
    """Whether all samples have ended."""
    num_cached_tokens: int = 0
    """Prompt tokens whose K and V came from the prefix cache."""
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    """Per token of the prompt, {token id: log-probability} of the token and the k most likely ones, if asked for; None
    of the first one, which nothing predicts. Whole in each output of a stream; of a request that ended before its
    prompt was computed, what was known."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.token_ids) for sample in self.outputs)


@dataclass
class BeamHypothesis:
    """A finished hypothesis of a beam search."""

    token_ids: list[int]
    """The output's tokens, the end token or the stop string included."""
    text: str
    """What the tokenizer decodes the tokens to, without special ones and the one that ended it; it ends before the stop
    string."""
    cum_logprob: float
    """Sum of the tokens' log-probabilities."""
    score: float
    """cum_logprob / len(token_ids)**length_penalty."""


@dataclass
class BeamSearchOutput:
    """The result of a beam search. What `RequestOutput` has too means the same."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[BeamHypothesis] = field(default_factory=list)
    """The hypotheses, best first."""
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    num_blocks: int = 0
    """The most blocks that its beams held at once."""
    num_unshared_blocks: int = 0
    """What they would have held then if they shared none."""
    error: str | None = None
    """What went wrong, if something did."""
    aborted: bool = False
    """Whether `abort` ended it."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all hypotheses."""
        return sum(len(hypothesis.token_ids) for hypothesis in self.sequences)


Output = RequestOutput | BeamSearchOutput


@dataclass
class StepSizes:
    """Count steps by how many tokens they compute."""

    counts: list[int] = field(default_factory=lambda: [0] * 32)
    """Steps of 1 token, of 2, of 3 or 4, of 5 to 8, and so on: each range ends with a power of two."""
    num_tokens: int = 0
    """Tokens of all of them."""

    def add(self, num_tokens: int) -> None:
        """Count a step."""
        self.counts[max(0, num_tokens - 1).bit_length()] += 1
        self.num_tokens += num_tokens

    def copy(self) -> "StepSizes":
        """Return what is counted so far."""
        return StepSizes(list(self.counts), self.num_tokens)


@dataclass
class EngineStats:
    """Counters since the engine was made, and the state of its pool at this moment."""

    num_blocks: int
    """Blocks of the pool of the layers that keep the whole context, which the counts of blocks and tokens are of."""
    num_free_blocks: int
    """Blocks that no sequence holds; those that still cache a prefix are free too."""
    num_running: int
    """Sequences that run."""
    num_waiting: int
    """Sequences that wait for their turn."""
    peak_used_blocks: int
    """The most blocks that sequences held at once."""
    block_size: int
    """Tokens per block."""
    max_step_ms: float
    """What a step with prompts may take now while it decodes for streams, in milliseconds; inf: any time."""
    kv_bytes: int
    """Bytes of all pools."""
    num_state_slots: int
    """How many states of recurrent layers there is room for, running sequences and checkpoints; 0: there are none."""
    state_bytes: int
    """Bytes of all states that are held."""
    num_checkpoints: int
    """Of these, prefixes that a prompt can go on from."""
    kv_tokens: int
    """Tokens in blocks that sequences hold, shared ones counted once."""
    prefix_hit_tokens: int
    """Prompt tokens whose K and V were found in the prefix cache."""
    prefix_query_tokens: int
    """Prompt tokens that were looked up there."""
    num_preemptions: int
    """How often a running sequence lost its blocks to others."""
    num_cow_copies: int
    """Shared blocks that were copied before a write."""
    num_swapped_blocks: int
    """Blocks that went to a block store, in host memory or on disk."""
    num_swapped_states: int
    """States of recurrent layers that did, of prefixes and of preempted sequences."""
    num_prompt_tokens: int
    """Tokens that were computed in chunks: of prompts, and of what was preempted."""
    num_output_tokens: int
    """Tokens that were put out, those of beams that were given up too."""
    num_steps: int
    """Steps that computed something."""
    num_drafts: int
    """How often a sequence had guessed tokens that were verified."""
    num_draft_tokens: int
    """Guesses at next tokens that steps verified: see `SpeculativeConfig`."""
    num_accepted_tokens: int
    """Those that were right, and so were put out beside a step's own tokens."""
    step_sizes: "StepSizes"
    """How many tokens each of them computed, of prompts and of outputs."""
    host_time_s: float
    """Seconds of scheduling, batch building, stops and text."""
    model_time_s: float
    """Seconds of building the model's graph, running it and sampling."""
    blas: str | None = None
    """What multiplies float32 matrices on a CPU, "OpenBLAS 0.3.21" say; None where a GPU does."""

    @property
    def kv_waste(self) -> float:
        """The share of the slots of used blocks that holds no token, from 0 to 1; 0 while no block is used."""
        num_used = self.num_blocks - self.num_free_blocks
        return 1 - self.kv_tokens / (num_used * self.block_size) if num_used else 0.0


@dataclass
class PoolSnapshot:
    """The blocks of a cache group, in cells of one or more that follow each other."""

    window: int | None
    """How many tokens its layers see; None: the whole context."""
    num_blocks: int
    block_size: int
    blocks_per_cell: int
    cells: list[list[int]]
    """Of each cell: blocks that sequences hold; blocks that nobody holds and that cache a prefix; the request that
    holds most of it, or -1; the most sequences that hold one of its blocks; the place of its first block in that
    request's block table, or -1. A shared block counts as its oldest request's."""


@dataclass
class RequestSnapshot:
    """What has come of a request that has not ended."""

    id: int
    """Its number in the engine, which `abort` takes."""
    client_id: str | None
    """What its client calls it."""
    state: str
    """"running" or "waiting"."""
    kind: str
    """"sample" or "beam"."""
    num_sequences: int
    num_prompt_tokens: int
    num_computed_tokens: int
    """Of its sequence that has come farthest."""
    num_cached_tokens: int
    """Prompt tokens whose K and V came from the prefix cache."""
    num_output_tokens: int
    """Tokens of all its sequences."""
    num_blocks: int
    """Blocks of the first cache group that it holds, shared ones counted once."""
    age_s: float
    """Seconds since it arrived."""
    first_tokens: list[int]
    """The beginning of its prompt."""


@dataclass
class PrefixBar:
    """A part of the prefix tree in which it does not branch."""

    depth: int
    """How many bars it stands below."""
    num_blocks: int
    """Blocks that cache it."""
    num_tokens: int
    """The tokens in these."""
    num_holders: int
    """The most sequences that hold one of its blocks."""
    last: bool
    """Whether it is the last one below the bar that it goes on from."""
    first_tokens: list[int]
    """The beginning of its tokens."""


@dataclass
class Snapshot:
    """An engine at one moment: its counters, its pools, who holds what, what is cached."""

    stats: EngineStats
    pools: list[PoolSnapshot]
    """One per cache group; the first one's layers see the whole context."""
    requests: list[RequestSnapshot]
    """The oldest ones, oldest first."""
    num_more_requests: int
    prefixes: list[PrefixBar]
    """The prefix tree in depth-first order: the bars with most behind them."""
    num_more_prefixes: int
    """Bars that are left out; of blocks that were too many to look at, each counts as one."""
    took_s: float
    """Seconds that it took to make this."""


@dataclass
class PrefixMatch:
    """What the cache has of a prompt, and where the prompt leaves it."""

    num_tokens: int
    num_cached_tokens: int
    """Tokens that would be found."""
    num_matching_tokens: int
    """Tokens that it has in common with the cached prefix that is nearest to it."""
    tokens: list[int]
    """Where it differs from that prefix: its tokens from some before the first that differs; none: it does not."""
    cached_tokens: list[int]
    """Those of the prefix from the same place on."""
    num_tokens_before: int
    """How many of these are alike."""
    reason: str
    """Why no more is found, in one sentence."""
