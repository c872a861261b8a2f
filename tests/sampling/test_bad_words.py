"""Which tokens bad words forbid: those with which the tokenizer's own text would contain one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from mlx_paged.sampling.bad_words import BadWords, TokenTexts

WORDS = ["the", " cat", "aa", "\u00e9", "a dog", "<|end|>"]


def allowed(bad_words: BadWords, token_ids: list[int], first: int, vocab_size: int) -> set[int]:
    mask = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
    bad_words.forbid(token_ids, first, mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size]).tolist())


@pytest.mark.parametrize("beginning", ["", "on", "I saw a c", "I saw t", "th", "a", "ba do", "x a d"])
def test_a_token_is_forbidden_exactly_if_the_text_would_contain_a_word(tokenizer: Any, beginning: str) -> None:
    vocab_size = len(tokenizer)
    bad_words = BadWords(TokenTexts(tokenizer, vocab_size), WORDS, True)
    output = tokenizer.encode(beginning, add_special_tokens=False) if beginning else []
    prompt = tokenizer.encode("He had a ca", add_special_tokens=False)
    found = allowed(bad_words, prompt + output, len(prompt), vocab_size)
    words = [word.strip() for word in WORDS]
    for token in [*range(20), *random.Random(5).sample(range(vocab_size), min(400, vocab_size))]:
        text = tokenizer.decode([*output, token], skip_special_tokens=True)
        assert (token in found) == (not any(word in text for word in words)), (token, text)
