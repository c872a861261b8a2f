"""The bytes that tokens stand for in a text, for tokenizers of bytes and of SentencePiece's pieces."""

from __future__ import annotations

import re
from functools import cache

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of_piece(piece: str, *, is_byte_level: bool) -> bytes:
    """The bytes of an ordinary token, whose name in the vocabulary is `piece`."""
    if (byte := _BYTE_TOKEN.fullmatch(piece)) is not None:
        return bytes([int(byte[1], 16)])
    alphabet = byte_alphabet()
    if is_byte_level and all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.replace("\u2581", " ").encode()


@cache
def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
