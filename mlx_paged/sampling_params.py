"""How the tokens of a request are chosen and when it stops."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. Raises ValueError for a value out of range.

    Applied in vLLM's order: logit_bias, penalties, temperature, min_p, top_k, top_p.

    n: samples of the prompt, each with a random stream of its own. temperature: 0 is greedy. top_p, min_p:
    probabilities; top_k: tokens, 0 is all. repetition_penalty: > 1 discourages tokens of prompt and output (Keskar
    et al. 2019); presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens of the output.
    max_tokens: None runs to the end of the context. stop: strings that end the text, which ends before them.
    stop_token_ids: tokens that end it and stay in `token_ids`. ignore_eos: run on past the end token. seed: makes
    the request repeatable whatever else runs. logprobs: k best tokens to report per token. logit_bias: added to the
    logits of token ids. cache_salt: requests share cached prefixes only with those of an equal salt.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        self._require("n", is_count(self.n, 1), "a whole number of at least 1")
        self._require("temperature", is_number(self.temperature) and self.temperature >= 0, "0 or more")
        self._require("top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("top_k", is_count(self.top_k, 0), "a whole number of at least 0 (0 keeps all tokens)")
        self._require("min_p", is_number(self.min_p) and 0 <= self.min_p <= 1, "between 0 and 1")
        penalty = self.repetition_penalty
        self._require("repetition_penalty", is_number(penalty) and penalty > 0, "above 0 (1 changes nothing)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._require(name, is_number(value) and -2 <= value <= 2, "between -2 and 2")
        self._require("max_tokens", self.max_tokens is None or is_count(self.max_tokens, 1), "at least 1")
        self._require("stop", all(isinstance(s, str) and s for s in self.stop_strings), "non-empty strings")
        ids = self.stop_token_ids or ()
        self._require("stop_token_ids", all(is_count(token, 0) for token in ids), "token ids of 0 or more")
        self._require("seed", self.seed is None or is_count(self.seed), "a whole number")
        self._require("logprobs", self.logprobs is None or is_count(self.logprobs, 0), "a whole number >= 0")
        bias = self.logit_bias or {}
        valid = all(is_count(token, 0) and is_number(value) for token, value in bias.items())
        self._require("logit_bias", valid, "a mapping of token ids to finite numbers")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def is_count(value: object, least: int | None = None) -> bool:
    """Whether `value` is a whole number, and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
