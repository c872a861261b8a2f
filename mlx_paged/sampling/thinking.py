"""Thinking that comes before an answer: where it begins and ends, its budget, and the grammar behind it.

Models that think write a marker before it and one behind it; which ones is mlx-lm's knowledge, by tokenizer.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_paged.sampling.grammar import GrammarMatcher

_MAX_NEWLINES = 2  # tokens of them, between thinking and what follows a grammar


class ThinkingMatcher:
    """Follow a sequence through its thinking and, behind it, through its grammar, if it has one.

    While a model thinks, it may write anything; with a grammar to come, anything but an end token. Made at the
    beginning of an output; belongs to one thread at a time. It is asked as a `GrammarMatcher` is.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], vocab_size: int, budget: int, grammar: GrammarMatcher | None
    ) -> None:
        """tokenizer: mlx-lm's TokenizerWrapper, one that knows thinking. budget: tokens, without the markers."""
        self._start, self._end = tuple(tokenizer.think_start_tokens), tuple(tokenizer.think_end_tokens)
        self._newlines = [ids[0] for text in ("\n", "\n\n") if len(ids := _encode(tokenizer, text)) == 1]
        self._ends = [i for i in tokenizer.eos_token_ids if i < vocab_size]
        self._all = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
        self._budget = budget
        self._grammar = grammar
        self._has_begun = False
        """Something of the answer itself has come."""
        self._has_thought = False
        self._newlines_left = 0
        self._forced: deque[int] = deque()
        self._tail: deque[int] = deque(maxlen=max(len(self._start), len(self._end)))
        self._is_thinking = False
        if starts_thinking(tokenizer, prompt):
            self._begin()

    def mask(self) -> np.ndarray:
        """Tell which tokens may come next, as `GrammarMatcher.mask` does."""
        if self._forced:
            return self._only([self._forced[0]])
        if self._is_thinking:
            return self._all if self._grammar is None else self._all & ~self._only(self._ends)
        if self._grammar is None:
            return self._all
        allowed = self._grammar.mask()
        if not self._has_begun:
            if self._newlines_left:
                allowed |= self._only(self._newlines)
            elif self._may_begin:
                allowed |= self._only([self._start[0]])
        return allowed

    def advance(self, token_id: int) -> None:
        """Take in the next token. Raises ValueError, with nothing changed, if the grammar does not allow it."""
        if self._is_thinking:
            self._think(token_id)
        elif self._grammar is None:
            self._tail.append(token_id)
            if self._ends_with(self._start):
                self._begin()
        elif self._may_begin and token_id == self._start[0]:
            self._begin()
            self._forced.extendleft(reversed(self._start[1:]))
        elif self._newlines_left and not self._has_begun and token_id in self._newlines:
            self._newlines_left -= 1
        else:
            self._grammar.advance(token_id)
            self._has_begun = True

    @property
    def _may_begin(self) -> bool:
        return not self._has_begun and not self._has_thought and self._budget > 0

    def _begin(self) -> None:
        self._is_thinking = self._has_thought = True
        self._tail.clear()
        self._spend(0)

    def _think(self, token_id: int) -> None:
        is_forced = bool(self._forced) and self._forced.popleft() == token_id
        self._tail.append(token_id)
        if self._ends_with(self._end):
            self._is_thinking, self._newlines_left = False, _MAX_NEWLINES
            self._tail.clear()
            if self._grammar is not None:
                self._grammar.begin_within_text()
        elif not is_forced:
            self._spend(1)

    def _spend(self, num_tokens: int) -> None:
        self._budget -= num_tokens
        if self._budget <= 0:
            self._forced = deque(self._end)

    def _ends_with(self, marker: tuple[int, ...]) -> bool:
        return tuple(self._tail)[-len(marker) :] == marker

    def _only(self, token_ids: Sequence[int]) -> np.ndarray:
        mask = np.zeros_like(self._all)
        for token_id in token_ids:
            mask[token_id // 32] |= np.uint32(1 << token_id % 32)
        return mask

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is complete and nothing but an end token may follow."""
        return self._has_begun and self._grammar is not None and self._grammar.is_finished

    def copy(self) -> "ThinkingMatcher":
        """Make a matcher that is as far and goes on by itself."""
        copy = object.__new__(ThinkingMatcher)
        copy.__dict__ |= self.__dict__
        copy._forced, copy._tail = self._forced.copy(), self._tail.copy()
        copy._grammar = None if self._grammar is None else self._grammar.copy()
        return copy


def starts_thinking(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends within thinking, as where the template opens it.

    A marker that a message quotes has an end of a turn behind it.
    """
    if not tokenizer.has_thinking:
        return False
    prompt = list(prompt)
    start = tokenizer.rfind_think_start(prompt)
    if start < 0 or start < tokenizer.rfind_think_end(prompt):
        return False
    ends = {*tokenizer.eos_token_ids, *tokenizer.all_special_ids}
    return ends.isdisjoint(prompt[start + len(tokenizer.think_start_tokens) :])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
