"""Beam search over one prompt, on the host: which beams go on, which are finished, and when the search is over.

The outcome is that of Hugging Face's `generate(num_beams=beam_width, do_sample=False)`. Knows nothing of models and
caches: it is given the best next tokens of its running beams and answers with the parent of each new one.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mlx_paged.sampling_params import BeamSearchParams


@dataclass(slots=True)
class Beam:
    """A hypothesis that still grows."""

    token_ids: list[int] = field(default_factory=list)
    """Its output tokens."""
    cum_logprob: float = 0.0
    """Sum of their log-probabilities."""
    text_stream: Any = None
    """Their text, where stop strings are looked for in it."""


class Hypothesis(NamedTuple):
    """A hypothesis that is finished."""

    token_ids: list[int]
    """Its output tokens, the end token or the stop string included."""
    cum_logprob: float
    """Sum of their log-probabilities."""
    score: float
    """cum_logprob / len(token_ids)**length_penalty."""


class BeamSearch:
    """Search the continuations of one prompt: call `advance` with the best next tokens of `beams` until `finished`.

    max_tokens, at least 1, is the most tokens of a hypothesis, the model's context considered. Of equal candidates the
    lower token id comes first, then the better parent; of equal scores what finished earlier.
    """

    def __init__(
        self, params: BeamSearchParams, max_tokens: int, eos_token_ids: Collection[int], text_stream: Any = None
    ) -> None:
        """text_stream: an empty TextStream that knows the stop strings; None: there are none.

        A hypothesis that has come to a stop string, or to one of stop_token_ids, is finished as by an end token.
        """
        self._params = params
        self._max_tokens = max_tokens
        self._eos_token_ids = frozenset(eos_token_ids).union(params.stop_token_ids or ())
        self._width = params.beam_width
        # With one beam it is greedy decoding, which ends at the first end token whatever early_stopping says.
        self._stops_when_full = self._width == 1 or (params.early_stopping != "never" and bool(params.early_stopping))
        self._num_tokens = 0
        self._hypotheses: list[Hypothesis] = []
        self.num_candidates = max(2, 1 + len(self._eos_token_ids) + len(params.stop_strings)) * self._width
        """Next tokens that `advance` takes per beam: beam_width of them are no end tokens whatever the model says, and
        rarely are they the ends of stop strings."""
        self.beams = [Beam(text_stream=text_stream)]
        """The running beams, best first, all of one length: a single empty one at the start, none at the end."""
        self.finished = False
        """Whether the search is over."""

    def advance(self, token_ids: np.ndarray, logprobs: np.ndarray) -> list[int]:
        """Grow the beams by a token. Returns the parent of each new beam, an index into the beams before.

        token_ids: int [len(beams), k]; logprobs: float [len(beams), k]. They are the best next tokens of each beam in
        any order, k = num_candidates or the whole vocabulary. The new beams are in rank order; none are left when the
        search is over. Raises ValueError, with nothing changed, for NaN or another number of rows.
        """
        if len(token_ids) != len(self.beams) or token_ids.shape != logprobs.shape:
            raise ValueError(
                f"{len(self.beams)} beams need as many rows of candidates, got token_ids {token_ids.shape} "
                f"and logprobs {logprobs.shape}"
            )
        total = (logprobs.astype(np.float64) + np.array([[beam.cum_logprob] for beam in self.beams])).ravel()
        if np.isnan(total).any():
            raise ValueError("the model's logits are not numbers (NaN)")
        self._num_tokens += 1
        beams: list[Beam] = []
        parents: list[int] = []
        for rank, (index, token, cum_logprob) in enumerate(self._ranked(token_ids.ravel(), total)):
            if len(beams) == self._width:
                break
            parent = index // token_ids.shape[1]
            tokens = [*self.beams[parent].token_ids, token]
            text_stream, ends = self._extend_text(self.beams[parent], token)
            if self._num_tokens < self._max_tokens and not ends:
                beams.append(Beam(tokens, cum_logprob, text_stream))
                parents.append(parent)
            elif rank < self._width:  # end tokens further down only made room for others
                self._hypotheses.append(self._hypothesis(tokens, cum_logprob))
        self._hypotheses = self._best(self._hypotheses)
        self.finished = self._is_over(beams)
        self.beams = [] if self.finished else beams
        return [] if self.finished else parents

    def _extend_text(self, beam: Beam, token: int) -> tuple[Any, bool]:
        """Add a token to the text of a beam. Returns that of the child, and whether the child ends with it."""
        if token in self._eos_token_ids or beam.text_stream is None:
            return None, token in self._eos_token_ids
        text_stream = beam.text_stream.copy()
        return text_stream, text_stream.add(token) is not None

    def hypotheses(self) -> list[Hypothesis]:
        """Return the num_return_sequences best hypotheses, best first.

        A search that was given up before its end returns what it would if the tokens so far were max_tokens: its
        running beams count too. Without a token yet there are none.
        """
        running = [self._hypothesis(beam.token_ids, beam.cum_logprob) for beam in self.beams if beam.token_ids]
        return self._best(self._hypotheses + running)[: self._params.num_return_sequences]

    def _ranked(self, token_ids: np.ndarray, total: np.ndarray) -> list[tuple[int, int, float]]:
        """Rank the candidates. Returns (index, token id, total) of those that matter, best first; none of -inf."""
        kept = total > -np.inf
        if len(total) > self.num_candidates:
            kept &= total >= np.partition(total, -self.num_candidates)[-self.num_candidates]
        indices = np.flatnonzero(kept)
        token_ids, total = token_ids[indices], total[indices]
        order = np.lexsort((token_ids, -total))
        return list(zip(indices[order].tolist(), token_ids[order].tolist(), total[order].tolist(), strict=True))

    def _hypothesis(self, token_ids: list[int], cum_logprob: float) -> Hypothesis:
        return Hypothesis(token_ids, cum_logprob, self._score(cum_logprob, len(token_ids)))

    def _score(self, cum_logprob: float, num_tokens: int) -> float:
        try:
            divisor = float(num_tokens) ** self._params.length_penalty
        except OverflowError:
            divisor = sys.float_info.max
        return cum_logprob / max(divisor, sys.float_info.min)

    def _best(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """Keep the beam_width best, best first; sorting is stable, so the earlier one of equals."""
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)[: self._width]

    def _is_over(self, beams: list[Beam]) -> bool:
        """Tell whether nothing can grow, or what grows is not expected to beat what is finished."""
        if not beams:
            return True
        if len(self._hypotheses) < self._width:
            return False
        if self._stops_when_full:
            return True
        # A running beam only gets less likely. "never" grants it the length that divides its sum by most; the
        # default takes its length of now, which for a length_penalty above 0 may stop too early: a heuristic.
        grants_most = self._params.early_stopping == "never" and self._params.length_penalty > 0
        length = self._max_tokens if grants_most else self._num_tokens
        return self._score(beams[0].cum_logprob, length) <= self._hypotheses[-1].score
