"""How the tokens of a request are chosen and when it stops: by sampling, or by beam search."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class _RequestParams:
    """Parameters that are checked one by one, and those that sampling and beam search have in common."""

    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    skip_special_tokens: bool

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _check_text(self) -> None:
        self._require("stop", all(isinstance(s, str) and s for s in self.stop_strings), "non-empty strings")
        ids = self.stop_token_ids or ()
        self._require("stop_token_ids", all(is_count(token, 0) for token in ids), "token ids of 0 or more")
        self._require("skip_special_tokens", isinstance(self.skip_special_tokens, bool), "True or False")

    def _require(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class SamplingParams(_RequestParams):
    """Sampling parameters of one request. Raises ValueError for a value out of range.

    Applied in vLLM's order: logit_bias, penalties, temperature, min_p, top_k, top_p.
    """

    n: int = 1
    """Samples of the prompt, each with random numbers of its own."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Keeps the fewest of the most likely tokens whose probabilities sum to at least this."""
    top_k: int = 0
    """Keeps this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keeps tokens whose probability is at least this share of the most likely one's."""
    repetition_penalty: float = 1.0
    """Above 1 it discourages tokens of prompt and output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens that the output has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of a token for each time the output has it."""
    max_tokens: int | None = None
    """Most tokens of an output; None runs to the end of the context."""
    stop: str | Sequence[str] | None = None
    """Strings that end the text, which ends before them."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the output and stay in its `token_ids`."""
    ignore_eos: bool = False
    """Run on past the end token."""
    seed: int | None = None
    """Makes the request repeatable whatever else runs."""
    logprobs: int | None = None
    """How many of the most likely tokens to report per token, beside the one taken; None reports nothing."""
    logit_bias: Mapping[int, float] | None = None
    """Numbers to add to the logits of token ids."""
    cache_salt: str | None = None
    """Cached prefixes are shared only with requests of an equal salt."""
    priority: int = 0
    """Higher ones are served first and preempted last."""
    json_schema: Mapping[str, Any] | bool | str | None = None
    """JSON schema of the output, as text or as Python objects. It, `regex` and `grammar` need the extra `structured`;
    at most one of them is given."""
    regex: str | None = None
    """Regular expression of the output, in Rust's syntax."""
    grammar: str | None = None
    """Grammar of the output, in Lark's syntax."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text. The token that ends an output is never in it."""

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
        self._check_text()
        self._require("seed", self.seed is None or is_count(self.seed), "a whole number")
        self._require("logprobs", self.logprobs is None or is_count(self.logprobs, 0), "a whole number >= 0")
        bias = self.logit_bias or {}
        valid = all(is_count(token, 0) and is_number(value) for token, value in bias.items())
        self._require("logit_bias", valid, "a mapping of token ids to finite numbers")
        self._require("priority", is_count(self.priority), "a whole number")
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of json_schema, regex and grammar, got {' and '.join(given)}")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            self._require(name, value is None or (isinstance(value, str) and value != ""), "text that is not empty")
        self._require("json_schema", _is_schema(self.json_schema), "a JSON schema: an object, or its text")

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken and none is drawn."""
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        """Whether a penalty changes anything."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_constrained(self) -> bool:
        """Whether the output must fit a grammar: a JSON schema, a regex or a Lark grammar."""
        return any(given is not None for given in (self.json_schema, self.regex, self.grammar))


@dataclass(frozen=True)
class BeamSearchParams(_RequestParams):
    """Parameters of a beam search, with the meaning they have in Hugging Face's `generate(num_beams=...)`.

    Raises ValueError for a value out of range.
    """

    beam_width: int = 4
    """Hypotheses kept while searching."""
    max_tokens: int = 64
    """Most tokens of a hypothesis."""
    length_penalty: float = 1.0
    """Hypotheses are ranked by cum_logprob / num_tokens**length_penalty, so above 0 favours longer ones."""
    early_stopping: bool | str = False
    """False stops when no running beam is likely to beat the worst of beam_width finished ones, True as soon as there
    are so many, "never" when none can."""
    num_return_sequences: int | None = None
    """How many hypotheses come back, best first; None: beam_width."""
    cache_salt: str | None = None
    """Cached prefixes are shared only with requests of an equal salt."""
    priority: int = 0
    """Higher ones are served first and preempted last."""
    stop: str | Sequence[str] | None = None
    """Strings that end a hypothesis as an end token does. Its text ends before them, its `token_ids` keep them."""
    stop_token_ids: Sequence[int] | None = None
    """More end tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the texts. The token that ends a hypothesis is never in its text."""

    def __post_init__(self) -> None:
        self._require("beam_width", is_count(self.beam_width, 1), "a whole number of at least 1")
        self._require("max_tokens", is_count(self.max_tokens, 1), "a whole number of at least 1")
        self._require("length_penalty", is_number(self.length_penalty), "a finite number")
        self._require("early_stopping", self.early_stopping in (True, False, "never"), 'True, False or "never"')
        num = self.num_return_sequences
        valid = num is None or (is_count(num, 1) and num <= self.beam_width)
        self._require("num_return_sequences", valid, f"between 1 and beam_width={self.beam_width}")
        self._require("priority", is_count(self.priority), "a whole number")
        self._check_text()


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
