"""Log-probabilities of tokens as OpenAI's clients read them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from mlx_paged.sampling.token_bytes import bytes_of_piece

_LEAST = -9999.0  # as vLLM has it


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
        "token_logprobs": [
            None if found is None else _finite(found[token]) for token, found in zip(token_ids, entries, strict=True)
        ],
        "top_logprobs": [
            None if found is None else {_text(tokenizer, token): _finite(value) for token, value in _best(found, count)}
            for found in entries
        ],
        "text_offset": [max(0, each) for each in offsets],
    }


def prompt_offsets(tokenizer: Any, token_ids: Sequence[int], text: str) -> list[int]:
    """Where in a prompt's text its tokens begin: the first one before it, if it is a start token or a dropped space."""
    texts = [_text(tokenizer, token) for token in token_ids]
    first = texts[0]
    offset = next((-i for i in range(len(first)) if text.startswith(first[i:])), -len(first))
    return [offset, *itertools.accumulate(map(len, texts[:-1]), initial=offset)][1:]


def prompt_logprobs(
    tokenizer: Any, entries: Sequence[dict[int, float] | None], count: int, num_found: int
) -> list[dict[str, Any] | None]:
    """vLLM's form of those of a prompt: nothing of the first token; of each other one, what was found, by token id.

    entries: of each token, with the `num_found` likeliest ones, of which `count` are shown. The rank of a token of the
    prompt that is none of those that were found is not known.
    """

    def entry(found: dict[int, float]) -> dict[str, Any]:
        own = next(iter(found))
        ranked = [token for token, _ in _best(found, len(found)) if token != own or len(found) <= num_found]
        return {
            str(token): {
                "logprob": _finite(found[token]),
                "rank": ranked.index(token) + 1 if token in ranked else None,
                "decoded_token": _text(tokenizer, token),
            }
            for token in dict.fromkeys([own, *ranked[:count]])
        }

    return [None if found is None else entry(found) for found in entries]


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)  # JSON has no -inf


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
    space = tokenizer.convert_tokens_to_ids("\u0120")
    is_byte_level = "\u2581" not in piece and space is not None and space != tokenizer.unk_token_id
    return bytes_of_piece(piece, is_byte_level=is_byte_level)
