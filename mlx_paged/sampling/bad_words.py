"""Strings that an output must not contain, found across the borders of tokens.

A token is forbidden where it would complete such a string: because it contains it, or because the text so far ends with
its beginning and the token starts with all the rest. Texts are bytes here, so that a character over several tokens is
found too. Tokens are kept sorted by their bytes: those that start alike are neighbours.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from mlx_paged.sampling.token_bytes import bytes_of_piece


class TokenTexts:
    """The bytes of a model's tokens, read from the tokenizer when they are first needed, by whichever thread that is.

    tokenizer: mlx-lm's TokenizerWrapper, or None. vocab_size: the model's number of logits.
    """

    texts: list[bytes]
    """Of each token id; b"" where the tokenizer has none."""
    in_order: list[bytes]
    """The same, sorted."""
    ids_in_order: np.ndarray
    special_ids: frozenset[int]
    """Tokens that are left out of texts if a request does not want to see them."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()

    def read(self) -> None:
        """Read them, once. Raises ValueError for an engine without tokenizer."""
        if self._tokenizer is None:
            raise ValueError("bad_words need a tokenizer, and this engine has none")
        with self._lock:
            if hasattr(self, "texts"):
                return
            tokenizer = self._tokenizer._tokenizer
            vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
            space = vocabulary.get("\u0120")
            is_byte_level = space is not None and tokenizer.decode([space]) == " "
            texts = [b""] * self._vocab_size
            for piece, token_id in vocabulary.items():
                if token_id < self._vocab_size:
                    is_added = token_id in added
                    texts[token_id] = piece.encode() if is_added else bytes_of_piece(piece, is_byte_level=is_byte_level)
            self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
            ids = sorted(range(self._vocab_size), key=texts.__getitem__)
            self.in_order, self.ids_in_order = [texts[token_id] for token_id in ids], np.array(ids)
            self.texts = texts


class BadWords:
    """The words that a request's outputs must not contain. Says which tokens may not come next."""

    def __init__(self, token_texts: TokenTexts, bad_words: Sequence[str], skip_special_tokens: bool) -> None:
        """Raises ValueError for an engine without tokenizer."""
        token_texts.read()
        self._texts = token_texts
        self._hidden = token_texts.special_ids if skip_special_tokens else frozenset()
        words = {word.lstrip(" ").encode() for word in bad_words}
        self._longest = max(map(len, words))
        self._rests: dict[bytes, list[bytes]] = {}  # of the words that begin like this
        for word in words:
            for length in range(1, len(word)):
                self._rests.setdefault(word[:length], []).append(word[length:])
        contains = re.compile(b"|".join(map(re.escape, words))).search
        found = [token_id for token_id, text in enumerate(token_texts.texts) if contains(text)]
        self._never = ~self._bits([token_id for token_id in found if token_id not in self._hidden])

    def forbid(self, token_ids: list[int], first: int, allowed: np.ndarray) -> None:
        """Clear the bits of tokens that would complete a word.

        token_ids: those so far; the output begins at `first`. allowed: uint32 [ceil(vocab_size / 32)], where bit t % 32
        of word t // 32 is for token t.
        """
        allowed &= self._never
        tail, i = b"", len(token_ids)
        while i > first and len(tail) < self._longest:
            i -= 1
            tail = (b"" if token_ids[i] in self._hidden else self._texts.texts[token_ids[i]]) + tail
        for start in range(max(0, len(tail) - self._longest), len(tail)):
            for rest in self._rests.get(tail[start:], ()):
                low = bisect_left(self._texts.in_order, rest)
                high = bisect_left(self._texts.in_order, True, low, key=partial(_is_behind, rest))
                completing = self._texts.ids_in_order[low:high].tolist()
                allowed &= ~self._bits([token_id for token_id in completing if token_id not in self._hidden])

    def _bits(self, token_ids: list[int]) -> np.ndarray:
        """Set the bits of some tokens. Returns uint32 [ceil(vocab_size / 32)]."""
        is_set = np.zeros(-(-len(self._texts.texts) // 32) * 32, np.uint8)
        is_set[token_ids] = 1
        return np.packbits(is_set, bitorder="little").view("<u4").astype(np.uint32)


def _is_behind(beginning: bytes, text: bytes) -> bool:
    """Say whether a text that sorts after `beginning` does not start with it."""
    return not text.startswith(beginning)
