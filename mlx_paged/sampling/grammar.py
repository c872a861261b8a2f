"""Grammars of outputs: which tokens may come next, by llguidance, for a JSON schema, a regex or a Lark grammar.

Whichever of the three a request gives is its grammar here. A sequence ends with reason "stop" as soon as its grammar is
complete and can't go on, or with an end token where the grammar may end, also under ignore_eos. Stop strings,
stop_token_ids, max_tokens and the end of the context cut it short as they cut any text: look at finish_reason and
stop_reason before parsing.

JSON comes compact, `{"a":[1,2]}`, because a model may go on with optional whitespace for ever; properties come in the
schema's order. A schema's "x-guidance" (llguidance's options, at its top level) can ask for another layout. A keyword
that llguidance does not know how to keep is an error, unless JSON Schema does not know it either.
"""

import functools
import json
import re
import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_paged.errors import DeadEnd
from mlx_paged.sampling.compilations import TIMEOUT_S, Compilations, run_apart
from mlx_paged.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED_GRAMMARS = 64
_GRAMMAR_KINDS = ("json_schema", "regex", "grammar")


class GrammarCompiler:
    """Compile the grammars of requests, for one model. May be used from several threads.

    tokenizer: mlx-lm's TokenizerWrapper, or None. vocab_size: the model's number of logits, which may exceed the
    tokenizer's. eos_token_ids: the end tokens; in a grammar they mean its end even if they also stand for text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocabulary: _Vocabulary | None = None
        self._compiled: Compilations[GrammarMatcher] = Compilations(MAX_CACHED_GRAMMARS)
        self._lock = threading.Lock()

    def matcher(self, params: SamplingParams) -> "GrammarMatcher":
        """Make a matcher at the beginning of the grammar that `params` ask for.

        Raises ValueError, in one line, for a grammar that can't be used, or is not compiled in time, and for an engine
        without tokenizer. Raises ImportError without llguidance.
        """
        key = _grammar_of(params)
        if self._tokenizer is None:
            raise ValueError(f"{key[0]} needs a tokenizer, and this engine has none")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
        vocabulary = self._vocabulary
        try:
            matcher = self._compiled.get(key, lambda: _compile(vocabulary, *key))
        except TimeoutError:
            raise ValueError(f"{key[0]} can't be used: it is not compiled within {TIMEOUT_S:g} seconds") from None
        with self._lock:
            return matcher.copy()


class GrammarMatcher:
    """Follow a sequence through its grammar. Made by `GrammarCompiler.matcher`; belongs to one thread at a time."""

    def __init__(self, vocabulary: "_Vocabulary", matcher: "LLMatcher", after_space: "LLMatcher | None" = None) -> None:
        """after_space: that of the grammar behind a space, while a first token may lose one; None: it loses nothing."""
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._after_space = after_space
        # llguidance writes a bit for every token of the tokenizer, the model may have fewer.
        self._written = np.zeros(vocabulary.num_written_words, np.uint32)
        self._address = self._written.ctypes.data
        self._allowed = self._written[: vocabulary.text_tokens.size]
        self._is_current = False
        self._can_go_on = True
        self._has_ended = False

    def mask(self) -> np.ndarray:
        """Tell which tokens may come next. Returns uint32 [ceil(vocab_size / 32)]: t is bit t % 32 of word t // 32.

        End tokens are allowed exactly where the grammar may end, ids that the tokenizer does not know never. Raises
        DeadEnd, in one line, where nothing is allowed: the grammar leads nowhere, or is too complex for llguidance.
        """
        self._update()
        return self._allowed.copy()

    def advance(self, token_id: int) -> None:
        """Take in the next token. Raises ValueError, with nothing changed, if the mask does not allow it."""
        self._update()
        word, bit = divmod(token_id, 32)
        if not 0 <= word < self._allowed.size or not self._allowed[word] >> np.uint32(bit) & np.uint32(1):
            raise ValueError(f"the form of this output does not allow token {token_id} here")
        if token_id in self._vocabulary.eos_token_ids:
            self._has_ended = True
        else:
            if self._after_space is not None and self._vocabulary.first_tokens[word] >> np.uint32(bit) & np.uint32(1):
                self._matcher = self._after_space
            self._after_space = None
            if not self._matcher.consume_token(token_id):
                raise DeadEnd(f"the form of this output can't be completed: {_dead_end(self._matcher)}")
        self._is_current = False

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is complete and nothing but an end token may follow."""
        if self._has_ended:
            return True
        if not self._matcher.is_accepting():
            return False
        self._update()
        return not self._can_go_on

    def begin_within_text(self) -> None:
        """Say that there is text before this grammar's: no space is lost at its start."""
        if self._after_space is not None:
            self._after_space, self._is_current = None, False

    def copy(self) -> "GrammarMatcher":
        """Make a matcher that is as far in its grammar and goes on by itself."""
        after_space = None if self._after_space is None else self._after_space.deep_copy()
        copy = GrammarMatcher(self._vocabulary, self._matcher.deep_copy(), after_space)
        np.copyto(copy._written, self._written)
        copy._is_current, copy._can_go_on, copy._has_ended = self._is_current, self._can_go_on, self._has_ended
        return copy

    def _update(self) -> None:
        if self._is_current:
            return
        may_end = self._has_ended or self._matcher.is_accepting()
        if self._has_ended:
            self._allowed[:] = 0
        else:
            self._compute(self._matcher)
            if self._after_space is not None:
                plain = self._allowed & ~self._vocabulary.spaced_tokens
                self._compute(self._after_space)
                np.bitwise_and(self._allowed, self._vocabulary.first_tokens, out=self._allowed)
                np.bitwise_or(self._allowed, plain, out=self._allowed)
        self._can_go_on = bool(self._allowed.any())
        if may_end:
            np.bitwise_or(self._allowed, self._vocabulary.end_tokens, out=self._allowed)
        elif not self._can_go_on:
            raise DeadEnd(f"the form of this output can't be completed: {_dead_end(self._matcher)}")
        self._is_current = True

    def _compute(self, matcher: "LLMatcher") -> None:
        """Have a matcher compute the mask, without end tokens."""
        matcher.unsafe_compute_mask_ptr(self._address, self._written.nbytes)
        # End tokens are set by `_update`: llguidance also allows them where they stand for fitting text.
        np.bitwise_and(self._allowed, self._vocabulary.text_tokens, out=self._allowed)
        # Where no token can write the only text that fits, llguidance allows one nevertheless.
        if np.count_nonzero(self._allowed) != 1:
            return
        word = int(self._allowed.argmax())
        bits = int(self._allowed[word])
        if bits.bit_count() == 1 and not matcher.validate_tokens([word * 32 + bits.bit_length() - 1]):
            self._allowed[word] = 0


class _Vocabulary:
    """The tokens of a model, as llguidance sees them."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        hf_tokenizer = tokenizer._tokenizer
        vocab = hf_tokenizer.get_vocab()
        known = np.unique(list(vocab.values()))
        num_ids = max(vocab_size, int(known[-1]) + 1)
        known = known[known < vocab_size]
        self.eos_token_ids = sorted(set(known.tolist()).intersection(eos_token_ids))
        if not self.eos_token_ids:
            raise ValueError("an output of a given form needs an end token, and the model's tokenizer has none")
        self.num_written_words = -(-num_ids // 32)
        """Words in a mask that llguidance writes: it has a bit for every token of the tokenizer."""
        self.end_tokens = _bits(self.eos_token_ids, vocab_size)
        """uint32 [ceil(vocab_size / 32)], a bit for each end token."""
        self.text_tokens = _bits(known, vocab_size) & ~self.end_tokens
        """uint32 [ceil(vocab_size / 32)], a bit for each other token that the tokenizer knows."""
        self.ll_tokenizer = _ll_tokenizer(hf_tokenizer, num_ids, self.eos_token_ids)
        # SentencePiece's decoders leave the space out that the first token of a text begins with.
        backend = hf_tokenizer.backend_tokenizer
        spaced = [i for piece, i in vocab.items() if piece.startswith(("\u2581", "<0x20>")) and i < vocab_size]
        self.drops_space = bool(spaced) and not backend.decode(spaced[:1]).startswith(" ")
        first = spaced if self.drops_space else []
        first = [i for i in first if backend.decode([i]) == self.ll_tokenizer.decode_str([i])[1:]]
        self.spaced_tokens = _bits(spaced, vocab_size)
        """uint32 [ceil(vocab_size / 32)], a bit for each token that begins with a space."""
        self.first_tokens = _bits(first, vocab_size)
        """uint32 [ceil(vocab_size / 32)], a bit for each that loses just this space at the start of a text."""


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        message = "json_schema, regex and grammar need llguidance: pip install 'mlx-paged[structured]'"
        raise ImportError(message) from None
    return llguidance


def _ll_tokenizer(hf_tokenizer: Any, num_ids: int, eos_token_ids: list[int]) -> "LLTokenizer":
    _llguidance()
    import llguidance.hf

    try:
        return llguidance.hf.from_tokenizer(hf_tokenizer, num_ids, eos_token_ids)
    except ValueError as error:
        raise ValueError(f"llguidance can't use this model's tokenizer: {_one_line(str(error))}") from None


def check(params: SamplingParams) -> None:
    """Check the grammar that `params` ask for, without a model: ValueError and ImportError as `matcher` raises them."""
    _byte_matcher(*_grammar_of(params))


def is_whole(params: SamplingParams, text: str) -> bool:
    """Whether a text is all that its grammar asks for, and not cut short."""
    matcher, in_bytes = _byte_matcher(*_grammar_of(params)).deep_copy(), list(text.encode())
    return bool(matcher.try_consume_tokens(in_bytes) == len(in_bytes) and matcher.is_accepting())


@functools.lru_cache(MAX_CACHED_GRAMMARS)
def _byte_matcher(kind: str, text: str) -> "LLMatcher":
    """Compile a grammar for a vocabulary whose tokens are the bytes."""
    tokenizer = _llguidance().LLTokenizer("byte")
    return run_apart(lambda: _matcher(tokenizer, kind, text)[0]).result()


def _compile(vocabulary: _Vocabulary, kind: str, text: str) -> GrammarMatcher:
    """Compile a grammar into a matcher, with its first mask computed. Raises ValueError if it can't be used."""
    from llguidance import LLMatcher

    matcher, grammar = _matcher(vocabulary.ll_tokenizer, kind, text)
    after_space = None
    if vocabulary.drops_space:
        after_space = LLMatcher(vocabulary.ll_tokenizer, _behind_space(kind, grammar), log_level=0)
    compiled = GrammarMatcher(vocabulary, matcher, after_space)
    try:
        compiled.mask()
    except ValueError:
        raise ValueError(f"{kind} can't be used: {_dead_end(matcher)}") from None
    return compiled


def _matcher(ll_tokenizer: "LLTokenizer", kind: str, text: str) -> tuple["LLMatcher", str]:
    """Compile a grammar. Returns its matcher, and the grammar as llguidance writes it."""
    from llguidance import LLMatcher

    try:
        if kind == "json_schema":
            layout: Any = {"whitespace_flexible": False}
            if "\\u" not in text:
                # Nothing in this schema needs \u, and {"\u0061":..} would come as another property than a declared "a".
                layout["json_allowed_escapes"] = 'nrbtf\\"'
            grammar = LLMatcher.grammar_from_json_schema(text, layout, {"lenient": False})
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            grammar = LLMatcher.grammar_from_lark(text)
        matcher = LLMatcher(ll_tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
    except ValueError as error:
        raise ValueError(f"{kind} can't be used: {_one_line(str(error))}") from None
    return matcher, grammar


def _behind_space(kind: str, grammar: str) -> str:
    """Write the grammar of the same texts with a space before them."""
    inner = {"lark_grammar": grammar} if kind == "grammar" else json.loads(grammar)["grammars"][0]
    outer = {"name": "outer", "lark_grammar": 'start: " " @inner'}
    return json.dumps({"grammars": [outer, inner | {"name": "inner"}]})


def _grammar_of(params: SamplingParams) -> tuple[str, str]:
    """Find the grammar that `params` ask for. Returns its kind and its text."""
    for kind in _GRAMMAR_KINDS:
        if (value := getattr(params, kind)) is not None:
            return kind, _schema_text(value) if kind == "json_schema" else value
    raise ValueError(f"the parameters ask for no form: give one of {', '.join(_GRAMMAR_KINDS)}")


def _schema_text(schema: Mapping[str, Any] | bool | str) -> str:
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if value is False:
            raise ValueError("the schema false allows nothing")
        return json.dumps({} if value is True else value, ensure_ascii=False, allow_nan=False, default=_as_dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema can't be used: {_one_line(str(error))}") from None


def _as_dict(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no part of JSON")


def _bits(token_ids: Any, vocab_size: int) -> np.ndarray:
    """Set the bits of some tokens. Returns uint32 [ceil(vocab_size / 32)]."""
    is_set = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    is_set[token_ids] = 1
    return np.packbits(is_set, bitorder="little").view("<u4").astype(np.uint32)


def _dead_end(matcher: "LLMatcher") -> str:
    """Say why nothing may follow."""
    reason = _one_line(matcher.get_error())
    return "no token leads on to a text that fits" if reason in ("", "NoExtension", "NoExtensionBias") else reason


def _one_line(error: str) -> str:
    """Take llguidance's reason out of its message, without excerpts of the grammar and of the parser's state."""
    error = error.split("\n<state>")[0]
    reason = re.search(r"^error: (.+)$", error, re.MULTILINE)
    if reason is not None:
        return reason[1]
    lines = (line.strip() for line in error.splitlines() if not re.match(r"\s+(\d+ \||\^)", line))
    line = " ".join(filter(None, lines))
    return line if len(line) <= 200 else f"{line[:197]}..."
