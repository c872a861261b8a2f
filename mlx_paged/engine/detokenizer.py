"""From token ids to text: all of them at once, as the tokenizer decodes them, or one by one as they come."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHORT_WINDOW = 8  # tokens; more only where they can't be cut
LONGEST_PARTIAL = 3  # characters that the bytes of an unfinished one may decode to
# The end of a text in which transformers' clean_up_tokenization may still take spaces away: all that its patterns say.
_UNCLEAN = re.compile(r" +(?:[.?!,'n][ .?!,'ntmsver]*)?\Z")


class Detokenizer:
    """Decode as a tokenizer does, and know how much of a text stays as it is when more tokens come.

    Ids that the tokenizer has no token for are no text: models often have more logits than that.
    """

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: mlx-lm's TokenizerWrapper, made `readable`."""
        hf_tokenizer = tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer
        self._tokenizer = hf_tokenizer
        self._num_ids = len(hf_tokenizer)
        self.special_ids = frozenset(hf_tokenizer.all_special_ids)
        self._cleans_up = bool(getattr(hf_tokenizer, "clean_up_tokenization_spaces", False))
        self._decode: Callable[..., str] = hf_tokenizer.decode
        self._is_fast = isinstance(hf_tokenizer, PreTrainedTokenizerFast)
        if self._is_fast:
            backend = hf_tokenizer.backend_tokenizer
            added = backend.get_added_tokens_decoder()
            self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
            self._piece_of = backend.id_to_token
            corrupts = hf_tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
            self._cleans_up = self._cleans_up and (type(backend.model).__name__ != "BPE" or corrupts)
            is_plain = getattr(hf_tokenizer.decode, "__func__", None) is PreTrainedTokenizerBase.decode
            if is_plain and type(hf_tokenizer)._decode is PreTrainedTokenizerFast._decode and not self._cleans_up:
                self._decode = backend.decode  # the same, without transformers' own work on ids
        self._byte_ids = self._find_byte_ids()
        self.plain_texts: dict[int, str] = {}
        """What `plain_text_of` has found out."""

    def _find_byte_ids(self) -> frozenset[int]:
        """Find the tokens that `decode` reads as single bytes, such as <0x0A>."""
        newline = _id_of(self._tokenizer, "<0x0A>")
        if newline is None or self.decode([newline], skip_special_tokens=False) != "\n":
            return frozenset()
        ids = (_id_of(self._tokenizer, f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token_id for token_id in ids if token_id is not None)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Turn tokens into their text, without its special tokens if they are to be skipped."""
        if not self._is_fast:
            token_ids = [token_id for token_id in token_ids if token_id < self._num_ids]
        return self._decode(token_ids, skip_special_tokens=skip_special_tokens) if token_ids else ""

    def plain_text_of(self, token_id: int) -> str:
        """Decode a token by itself, if what its text is depends on nothing behind it; else "" is returned."""
        text = self.plain_texts.get(token_id)
        if text is None:
            text = self.decode([token_id], skip_special_tokens=False)
            is_plain = not (text.endswith("\ufffd") or self.is_byte(token_id) or self._cleans_up)
            self.plain_texts[token_id] = text = text if is_plain else ""
        return text

    def is_unknown(self, token_id: int) -> bool:
        """Say whether the tokenizer has no such token."""
        return self._piece_of(token_id) is None if self._is_fast else token_id >= self._num_ids

    def is_byte(self, token_id: int) -> bool:
        """Say whether a token is a single byte. One that fits no character makes its whole row of bytes unreadable."""
        return token_id in self._byte_ids

    def look(self, token_ids: Sequence[int], skip_special_tokens: bool) -> tuple[str, int]:
        """Turn tokens into text. Returns it, and how many of its characters no token that follows will change.

        The last token must not be a single byte.
        """
        text = self.decode(token_ids, skip_special_tokens)
        num_partial = min(LONGEST_PARTIAL, len(text) - len(text.rstrip("\ufffd")))
        if self._cleans_up:
            raw = self._decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
            raw = raw[: len(raw) - num_partial]
            unclean = _UNCLEAN.search(raw)
            return text, len(self._tokenizer.clean_up_tokenization(raw[: unclean.start()] if unclean else raw))
        return text, len(text) - num_partial


class DecodeStream:
    """The text of tokens that come one by one. Each costs the decoding of a few tokens, however long the text is.

    Those are a window of the last tokens. It begins with one whose text is known, or with more, which make `decode`
    treat the next ones as it does in the middle of a text.
    """

    tail: str
    """What the text ends with if nothing follows, behind all that is known; other tokens may change it."""

    def __init__(self, detokenizer: Detokenizer, skip_special_tokens: bool) -> None:
        self._detokenizer = detokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = detokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._known = ""  # of the window's text
        self._look_at = 0  # the length at which the window is decoded again
        self._cut_at = SHORT_WINDOW
        self.tail = ""

    def copy(self) -> "DecodeStream":
        """Make a stream that goes on by itself from here."""
        return copy.copy(self)  # windows are not changed but replaced

    def add(self, token_id: int) -> str:
        """Take in a token. Returns the text that is known since."""
        if token_id in self._skipped:
            return ""
        detokenizer = self._detokenizer
        plain = detokenizer.plain_texts.get(token_id) or detokenizer.plain_text_of(token_id)
        if not plain and detokenizer.is_unknown(token_id):
            return ""
        window, known = [*self._window, token_id], self._known
        if len(window) < self._look_at:
            self._window = window
            return ""
        if plain and not self.tail:  # as nearly always
            text = detokenizer.decode(window, self._skip_special_tokens)
            if text.startswith(known) and text.endswith(plain):
                self._window, self._known = [token_id], plain
                self._look_at, self._cut_at = 0, SHORT_WINDOW
                return text[len(known) :]
        return self._look(window, is_byte=detokenizer.is_byte(token_id))

    def _look(self, window: list[int], is_byte: bool) -> str:
        """Decode a window whose end the next token may change. Returns the text that is known since."""
        text, num_known = self._detokenizer.look(window, self._skip_special_tokens)
        before = len(self._known)
        if is_byte or num_known < before:
            num_known = before
        self._window, new = window, ""
        fits = text.startswith(self._known)  # else a decoder takes back what it said: wait
        if fits:
            new = text[before:num_known]
            self._known, self.tail = text[:num_known], text[num_known:]
        if len(window) >= self._cut_at and not (fits and not is_byte and self._cut(text)):
            self._look_at = len(window) * 9 // 8  # so that the work is in proportion to the length
        return new

    def _cut(self, text: str) -> bool:
        """Leave out the window's first tokens, if the others decode to the same end. Returns whether it could."""
        length = 1
        while length < len(self._window):
            last = self._window[-length:]
            end = self._detokenizer.decode(last, self._skip_special_tokens)
            if len(end) > len(self.tail) and text.endswith(end):
                self._window, self._known = last, end[: len(end) - len(self.tail)]
                self._look_at, self._cut_at = 0, SHORT_WINDOW
                return True
            length *= 2
        self._cut_at = 2 * len(self._window)
        return False


def readable(tokenizer: Any) -> Any:
    """Return mlx-lm's TokenizerWrapper with a decoder that fits its vocabulary: nearly always the one given.

    A byte-level vocabulary may have been loaded by a class that decodes as SentencePiece does: its "Ġ" and "Ċ" would
    be letters of the text. Such a tokenizer is copied, and the copy reads tokens as bytes.
    """
    hf_tokenizer = tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else None
    if not isinstance(hf_tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    space = _id_of(hf_tokenizer, "Ġ")
    if space is None or hf_tokenizer.backend_tokenizer.decode([space]) != "Ġ":
        return tokenizer
    is_byte_level = isinstance(tokenizer._detokenizer, BPEStreamingDetokenizer) or (  # as its tokenizer.json has it
        type(hf_tokenizer.backend_tokenizer.model).__name__ == "BPE"
        and _id_of(hf_tokenizer, "▁") is None
        and all(_id_of(hf_tokenizer, letter) is not None for letter in pre_tokenizers.ByteLevel.alphabet())
    )
    if not is_byte_level:
        return tokenizer
    backend = copy.copy(hf_tokenizer.backend_tokenizer)
    backend.decoder = decoders.ByteLevel()
    repaired = copy.copy(tokenizer)
    repaired._tokenizer = copy.copy(hf_tokenizer)
    repaired._tokenizer._tokenizer = backend
    return repaired


def _id_of(hf_tokenizer: Any, piece: str) -> int | None:
    token_id = hf_tokenizer.convert_tokens_to_ids(piece)
    return None if token_id is None or hf_tokenizer.convert_ids_to_tokens(token_id) != piece else int(token_id)
