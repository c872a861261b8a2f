"""How the tokens of a request are chosen and when it stops: by sampling, or by beam search."""

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any

from mlx_paged.config import Settings, excerpt

Take = Callable[[Any], Any]
"""From a value as it was given to the plain Python value that is kept, None for one that can't be taken."""


class _RequestParams(Settings):
    """Parameters that are checked one by one. What is kept of numpy's numbers and of iterators are numbers, tuples."""

    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    skip_special_tokens: bool

    def _take(self, name: str, take: Take, expected: str) -> None:
        value = getattr(self, name)
        if value is None and getattr(type(self), name) is None:
            return
        if (taken := take(value)) is None:
            raise ValueError(f"{name} must be {expected}, got {excerpt(value)}")
        object.__setattr__(self, name, taken)

    def _take_text_fields(self) -> None:
        text = "text, UTF-8 and not empty, or a list of such"
        self._take("stop", _text if isinstance(self.stop, str) else _each(_text), text)
        self._take("stop_token_ids", _each(_count(0)), "a list of token ids of 0 or more")
        self._take("skip_special_tokens", _flag, "True or False")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class SamplingParams(_RequestParams):
    """Sampling parameters of one request. Raises ValueError for a value out of range.

    Applied in vLLM's order: logits_processors, grammars, bad_words and min_tokens, logit_bias, penalties, temperature,
    min_p, top_k, top_p.
    """

    n: int = 1
    """Samples of the prompt, each with random numbers of its own. Of more than `max_num_seqs`, some start later."""
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
    min_tokens: int = 0
    """End tokens and stop_token_ids can't be drawn before the output has so many tokens. A stop string and a grammar
    that is complete end it nevertheless."""
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
    prompt_logprobs: int | None = None
    """The same for each token of the prompt, as `RequestOutput.prompt_logprobs`. The prompt is computed anew then,
    whatever the prefix cache has of it."""
    logit_bias: Mapping[int, float] | None = None
    """Numbers to add to the logits of token ids."""
    bad_words: Sequence[str] | None = None
    """Strings that the text does not contain, wherever its tokens end. Spaces that they begin with don't count."""
    logits_processors: Sequence[Callable[[list[int], Any], Any]] | None = None
    """Functions of the output's tokens so far and their row of logits, an mx.array of float32 [vocab_size], that
    return the row to draw from; each gets what the one before it returned. What one raises ends its request."""
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
    max_thinking_tokens: int | None = None
    """Most tokens of thinking, after which its closing marker is forced; `json_schema`, `regex` or `grammar` hold for
    what comes behind it. None: thinking is text like other text. The model's tokenizer has to have the markers."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text. The token that ends an output is never in it."""

    def __post_init__(self) -> None:
        text, number = "text, UTF-8 and not empty", "a finite number"
        self._take("n", _count(1), "a whole number of at least 1")
        self._take("temperature", _number(lambda x: x >= 0), f"{number}, 0 or more")
        self._take("top_p", _number(lambda x: 0 < x <= 1), "above 0 and at most 1")
        self._take("top_k", _count(0), "a whole number of at least 0 (0 keeps all tokens)")
        self._take("min_p", _number(lambda x: 0 <= x <= 1), "between 0 and 1")
        self._take("repetition_penalty", _number(lambda x: x > 0), f"{number} above 0 (1 changes nothing)")
        self._take("presence_penalty", _number(lambda x: -2 <= x <= 2), "between -2 and 2")
        self._take("frequency_penalty", _number(lambda x: -2 <= x <= 2), "between -2 and 2")
        self._take("max_tokens", _count(1), "a whole number of at least 1")
        self._take("min_tokens", _count(0), "a whole number of at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        self._take_text_fields()
        self._take("ignore_eos", _flag, "True or False")
        self._take("seed", as_int, "a whole number")
        self._take("logprobs", _count(0), "a whole number of at least 0")
        self._take("prompt_logprobs", _count(0), "a whole number of at least 0")
        self._take("bad_words", _each(_word), "a list of texts, UTF-8 and more than spaces")
        self._take("logits_processors", _functions, "a list of functions")
        self._take("logit_bias", _bias, "a mapping of token ids to finite numbers")
        self._take("cache_salt", lambda salt: salt if isinstance(salt, str) else None, "text")
        self._take("priority", as_int, "a whole number")
        given = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of json_schema, regex and grammar, got {' and '.join(given)}")
        self._take("regex", _text, text)
        self._take("grammar", _text, text)
        self._take("json_schema", _schema, "a JSON schema: an object, or its text")
        self._take("max_thinking_tokens", _count(0), "a whole number of at least 0")

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

    @property
    def has_rules(self) -> bool:
        """Whether the tokens so far say which ones may come next, or change their logits."""
        is_shaped = self.is_constrained or self.max_thinking_tokens is not None
        return is_shaped or bool(self.min_tokens or self.bad_words or self.logits_processors)


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
        self._take("beam_width", _count(1), "a whole number of at least 1")
        self._take("max_tokens", _count(1), "a whole number of at least 1")
        self._take("length_penalty", as_number, "a finite number")
        is_never = isinstance(self.early_stopping, str) and self.early_stopping == "never"
        self._take("early_stopping", (lambda never: never) if is_never else _flag, 'True, False or "never"')
        fits = lambda num: None if (count := _count(1)(num)) is None or count > self.beam_width else count  # noqa: E731
        self._take("num_return_sequences", fits, f"between 1 and beam_width={self.beam_width}")
        self._take("cache_salt", lambda salt: salt if isinstance(salt, str) else None, "text")
        self._take("priority", as_int, "a whole number")
        self._take_text_fields()


def as_int(value: Any) -> int | None:
    """Return a whole number, numpy's too, as an int; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> float | None:
    """Return a finite number, numpy's too, as a float; None for anything else."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_list(values: Any) -> list[Any] | None:
    """Copy what can be read one by one, also if that can be done once. Returns None for text, bytes, mappings, others.

    Of an array come Python's numbers, and of one with two axes lists of them.
    """
    if isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set) or not isinstance(values, Iterable):
        return None
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    return values if isinstance(values, list) else None  # of an array without axes comes a number


def is_text(value: object) -> bool:
    """Say whether `value` is text that can be written as UTF-8: it has no lone surrogate."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _count(least: int) -> Take:
    return lambda value: count if (count := as_int(value)) is not None and count >= least else None


def _number(valid: Callable[[float], bool]) -> Take:
    return lambda value: number if (number := as_number(value)) is not None and valid(number) else None


def _each(take: Take) -> Take:
    def take_each(values: Any) -> tuple[Any, ...] | None:
        taken = [None] if (listed := as_list(values)) is None else list(map(take, listed))
        return None if None in taken else tuple(dict.fromkeys(taken))

    return take_each


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return value if is_text(value) and value else None


def _word(value: Any) -> str | None:
    return value if (text := _text(value)) and text.strip(" ") else None


def _functions(value: Any) -> tuple[Any, ...] | None:
    return tuple(each) if (each := as_list(value)) is not None and all(map(callable, each)) else None


def _bias(bias: Any) -> Any:
    if not isinstance(bias, Mapping):
        return None
    taken = {_count(0)(token): as_number(value) for token, value in bias.items()}
    return None if None in taken or None in taken.values() else taken


def _schema(schema: Any) -> Any:
    if not isinstance(schema, str):
        return schema if isinstance(schema, bool | Mapping) else None
    try:
        return schema if isinstance(json.loads(schema), bool | dict) else None
    except (ValueError, RecursionError):
        return None
