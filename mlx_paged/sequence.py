"""Requests and their sequences: what the engine knows of each while it runs. No tensors, no blocks."""

from dataclasses import dataclass, field
from typing import Any

from mlx_paged.outputs import CompletionOutput, RequestMetrics
from mlx_paged.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One sample of a request: its tokens, how many of them have K/V, and its text so far."""

    seq_id: int
    request: "Request"
    index: int
    token_ids: list[int]
    num_computed: int = 0
    output: CompletionOutput = None  # type: ignore[assignment]
    counts: Any = None  # sampler.TokenCounts, where penalties ask for it
    text_stream: Any = None  # detokenizer.TextStream, where there is a tokenizer
    num_sent_tokens: int = 0  # of a stream
    num_sent_chars: int = 0

    def __post_init__(self) -> None:
        self.output = CompletionOutput(self.index, "", [], 0.0, None if self.params.logprobs is None else [])

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None


@dataclass(eq=False)
class Request:
    """A prompt, its parameters and the sequences made of it: one at first, `params.n` once the prompt is computed."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stream: bool
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return len(self.sequences) == self.params.n and all(sequence.finished for sequence in self.sequences)
