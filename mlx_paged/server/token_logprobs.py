"""Log-probabilities of tokens as OpenAI's clients read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def chat_logprobs(tokenizer: Any, tokens: Sequence[tuple[int, dict[int, float]]], count: int) -> list[dict[str, Any]]:
    """One entry per token, with the `count` likeliest ones, best first. Their bytes join to the text.

    tokens: each with what was found for it, {token id: log-probability}.
    """
    return [
        _entry(tokenizer, token, found[token])
        | {"top_logprobs": [_entry(tokenizer, *pair) for pair in _best(found, count)]}
        for token, found in tokens
    ]


def completion_logprobs(
    tokenizer: Any, token_ids: Sequence[int], entries: Sequence[dict[int, float] | None], count: int, offsets: list[int]
) -> dict[str, Any]:
    """The parallel lists of a completion. offsets: where in the text each token begins.

    A token that is no whole character is shown by its bytes, as OpenAI does: two of them would else have one name.
    """
    return {
        "tokens": [_text(tokenizer, token) for token in token_ids],
        "token_logprobs": [None if found is None else found[i] for i, found in zip(token_ids, entries, strict=True)],
        "top_logprobs": [
            None if found is None else {_text(tokenizer, token): value for token, value in _best(found, count)}
            for found in entries
        ],
        "text_offset": offsets,
    }


def _best(found: dict[int, float], count: int) -> list[tuple[int, float]]:
    return sorted(found.items(), key=lambda pair: -pair[1])[:count]


def _text(tokenizer: Any, token: int) -> str:
    content = token_bytes(tokenizer, token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    content = token_bytes(tokenizer, token)
    return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes that a token stands for in a text; those of its name if it is special."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # an id in a gap of the vocabulary
        return b""
    if token_id in tokenizer.added_tokens_decoder:
        return str(piece).encode()
    if (byte := _BYTE_TOKEN.fullmatch(piece)) is not None:
        return bytes([int(byte[1], 16)])
    alphabet = _byte_alphabet()
    if "\u2581" not in piece and all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return str(piece).replace("\u2581", " ").encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
