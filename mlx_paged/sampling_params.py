"""How the tokens of a request are chosen and when it stops: by sampling, or by beam search."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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
    logits of token ids. cache_salt: requests share cached prefixes only with those of an equal salt. priority: higher
    ones are served first and preempted last. json_schema (a JSON schema, as text or as Python objects), regex (Rust
    syntax), grammar (Lark syntax): the output's form, at most one of them; needs the extra `structured`.
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
    priority: int = 0
    json_schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    grammar: str | None = None

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
        self._require("priority", is_count(self.priority), "a whole number")
        forms = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(forms) > 1:
            raise ValueError(f"give one of json_schema, regex and grammar, got {' and '.join(forms)}")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            self._require(name, value is None or (isinstance(value, str) and value != ""), "text that is not empty")
        self._require("json_schema", _is_schema(self.json_schema), "a JSON schema: an object, or its text")

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

    @property
    def is_constrained(self) -> bool:
        """Whether the output must have a form."""
        return any(form is not None for form in (self.json_schema, self.regex, self.grammar))

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class BeamSearchParams:
    """Parameters of a beam search, with the meaning they have in Hugging Face's `generate(num_beams=...)`.

    beam_width: hypotheses kept while searching. max_tokens: most tokens of a hypothesis. length_penalty: hypotheses
    are ranked by cum_logprob / num_tokens**length_penalty, so above 0 favours longer ones. early_stopping: False
    stops when no running beam is likely to beat the worst of beam_width finished ones, True as soon as there are so
    many, "never" when none can. num_return_sequences: how many come back, best first (None: beam_width).
    cache_salt, priority: as in SamplingParams. Raises ValueError for a value out of range.
    """

    beam_width: int = 4
    max_tokens: int = 64
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int | None = None
    cache_salt: str | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        self._require("beam_width", is_count(self.beam_width, 1), "a whole number of at least 1")
        self._require("max_tokens", is_count(self.max_tokens, 1), "a whole number of at least 1")
        self._require("length_penalty", is_number(self.length_penalty), "a finite number")
        self._require("early_stopping", self.early_stopping in (True, False, "never"), 'True, False or "never"')
        num = self.num_return_sequences
        valid = num is None or (is_count(num, 1) and num <= self.beam_width)
        self._require("num_return_sequences", valid, f"between 1 and beam_width={self.beam_width}")
        self._require("priority", is_count(self.priority), "a whole number")

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def _is_schema(schema: object) -> bool:
    if not isinstance(schema, str):
        return schema is None or isinstance(schema, bool | Mapping)
    try:
        return isinstance(json.loads(schema), bool | dict)
    except ValueError:
        return False


def is_count(value: object, least: int | None = None) -> bool:
    """Whether `value` is a whole number, and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
