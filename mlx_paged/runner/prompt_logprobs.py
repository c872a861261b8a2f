"""Log-probabilities of prompts: the logits that a step gives for them, and what becomes of those.

They are worked on in slices, so that nothing beside the logits themselves is as large as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.cpu.exponential import logsumexp
from mlx_paged.request import Request
from mlx_paged.sampling.sampler import likeliest
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler.schedule import Schedule

if TYPE_CHECKING:
    from mlx_paged.runner.model_runner import ModelRunner

_SLICE = 64  # rows of logits


class _Part(NamedTuple):
    """Neighbouring positions of a prompt, whose logits predict the tokens after them."""

    request: Request
    position: int
    num_tokens: int
    first_token: int
    """Of the first one among the tokens of the step."""
    num_top: int


class PromptLogprobs:
    """The log-probabilities of prompts that one step computes."""

    arrays: list[mx.array]
    """What is to come to the host."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self._num_top = max(part.num_top for part in parts)

    @classmethod
    def of(cls, schedule: Schedule) -> PromptLogprobs | None:
        """Find what a step's chunks are asked for; None if it is nothing, or is known."""
        parts, first = [], int(schedule.query_lens.sum())
        for sequence, start, num_tokens in schedule.chunks:
            request, params = sequence.request, sequence.request.params
            if request.prompt_logprobs is not None and isinstance(params, SamplingParams):
                position = max(start, len(request.prompt_logprobs) - 1)
                count = min(start + num_tokens, len(request.prompt_token_ids) - 1) - position
                if count > 0:
                    parts.append(_Part(request, position, count, first + position - start, params.prompt_logprobs or 0))
            first += num_tokens
        return cls(parts) if parts else None

    def run(self, runner: ModelRunner, inputs: ModelInputs) -> mx.array:
        """Run a step that computes these too. Returns its other logits."""
        indices, parts = inputs.logits_indices, self._parts
        assert indices is not None
        mine = np.concatenate([np.arange(p.first_token, p.first_token + p.num_tokens, dtype=np.int32) for p in parts])
        logits = runner.run(inputs._replace(logits_indices=mx.concatenate([indices, mx.array(mine)])))
        num_others = indices.shape[0]
        next_ids = [p.request.prompt_token_ids[p.position + 1 : p.position + 1 + p.num_tokens] for p in parts]
        targets = mx.array(np.concatenate(next_ids).astype(np.int32))[:, None]
        k = min(self._num_top, logits.shape[-1])
        slices = [
            _logprobs(logits[num_others + start : num_others + start + _SLICE], targets[start : start + _SLICE], k)
            for start in range(0, len(mine), _SLICE)
        ]
        self.arrays = [mx.concatenate(list(each)) for each in zip(*slices, strict=True)]
        return logits[:num_others]

    def hand_out(self) -> None:
        """Give the requests what has been computed of theirs, in the order of their prompts."""
        logprobs, *top = (np.array(array) for array in self.arrays)
        first = 0
        for request, position, count, _, num_top in self._parts:
            assert request.prompt_logprobs is not None and len(request.prompt_logprobs) == position + 1
            token_ids = request.prompt_token_ids[position + 1 : position + 1 + count]
            best = [array[first : first + count, :num_top].tolist() for array in top]
            likeliest_ones = [dict(zip(*each, strict=True)) for each in zip(*best, strict=True)] or [{}] * count
            own = logprobs[first : first + count, 0].tolist()
            entries = zip(token_ids, own, likeliest_ones, strict=True)
            request.prompt_logprobs += [{token_id: logprob} | found for token_id, logprob, found in entries]
            first += count


def _logprobs(logits: mx.array, token_ids: mx.array, k: int) -> tuple[mx.array, ...]:
    """Log-probabilities of a token per row, [n, 1]; with k, also the best k tokens and theirs, [n, k]."""
    logits = logits.astype(mx.float32)
    normaliser = logsumexp(logits)
    normaliser = mx.where(normaliser < mx.inf, normaliser, mx.nan)
    own = mx.take_along_axis(logits, token_ids, axis=-1) - normaliser
    if k == 0:
        return (own,)
    top, top_logits = likeliest(logits, k)
    return own, top, top_logits - normaliser
