"""Text is what the tokenizer decodes, whole and bit by bit: tokenizers of all kinds, their `decode` as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.budget import budget
from helpers.other_tokenizers import (
    byte_level,
    llama_style,
    metaspace,
    misread_byte_level,
    unigram,
    wordpiece,
    wrapped,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models

from mlx_paged.engine.detokenizer import SHORT_WINDOW, DecodeStream, Detokenizer, readable

KINDS: dict[str, Callable[[], TokenizerWrapper]] = {
    "byte-level": byte_level,
    "sentencepiece": llama_style,
    "unigram": unigram,
    "metaspace": metaspace,
    "wordpiece": lambda: wordpiece(cleans_up=False),
    "wordpiece, cleaned up": lambda: wordpiece(cleans_up=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {kind: make() for kind, make in KINDS.items()}


def watch(tokenizer: Any, token_ids: list[int], skip: bool = True) -> list[tuple[str, str]]:
    """What is known, and what else the text would have, after each token."""
    stream = DecodeStream(Detokenizer(tokenizer), skip)
    known, seen = "", []
    for token_id in token_ids:
        known += stream.add(token_id)
        seen.append((known, stream.tail))
    return seen


def ids_of(tokenizer: Any, *pieces: str) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    assert None not in ids and tokenizer.convert_ids_to_tokens(ids) == list(pieces)
    return list(ids)


@every_kind
@settings(max_examples=budget(150, 20_000), deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_what_is_known_after_a_token_is_never_taken_back_and_with_the_rest_it_is_what_decode_gives(
    kind: str, tokenizers: dict[str, Any], data: st.DataObject, skip: bool
) -> None:
    tokenizer = tokenizers[kind]
    some = st.sampled_from(data.draw(st.lists(st.integers(0, len(tokenizer) + 3), min_size=1, max_size=6)))
    tokens = some | st.integers(0, len(tokenizer) + 3)
    token_ids = data.draw(st.lists(tokens, min_size=1, max_size=40))
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert Detokenizer(tokenizer).decode(token_ids, skip) == whole
    text = ""
    for count, (known, tail) in enumerate(watch(tokenizer, token_ids, skip), 1):
        so_far = tokenizer.decode(token_ids[:count], skip_special_tokens=skip)
        assert known.startswith(text) and whole.startswith(known) and so_far.startswith(known)
        if count <= SHORT_WINDOW:
            assert known + tail == so_far
        text = known


@every_kind
def test_a_text_of_whole_words_is_known_with_its_last_token(kind: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[kind]
    token_ids = tokenizer.encode("the rest the do" if kind.startswith("wordpiece") else "the at a 12 the true")
    seen = watch(tokenizer, token_ids * 9)
    for count, (known, tail) in enumerate(seen, 1):
        assert (known, tail) == (tokenizer.decode((token_ids * 9)[:count]), "")


def test_half_a_character_is_held_back_and_shown_at_the_end(tokenizer: Any) -> None:
    text = "naïve häß — 日本語 🙂🙃 end"
    seen = watch(tokenizer, tokenizer.encode(text))
    assert seen[-1] == (text, "")
    assert not any("\ufffd" in known for known, _ in seen)
    assert watch(tokenizer, tokenizer.encode("so 🙂")[:-1])[-1] == ("so ", "\ufffd")


def test_a_row_of_single_bytes_is_known_when_it_ends(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    the, euro, x = ids_of(tokenizer, "▁the"), ids_of(tokenizer, "<0xE2>", "<0x82>", "<0xAC>"), ids_of(tokenizer, "x")
    broken = ids_of(tokenizer, "<0xFF>")
    assert watch(tokenizer, the + euro)[-1] == ("the", "€")
    assert watch(tokenizer, the + euro + x)[-1] == ("the€x", "")
    assert watch(tokenizer, the + euro + broken + x)[-1] == ("the\ufffd\ufffd\ufffd\ufffdx", "")
    special = [tokenizer.pad_token_id]
    assert watch(tokenizer, the + euro[:1] + special + euro[1:] + x)[-1] == ("the€x", "")


def test_spaces_that_the_next_word_may_take_away_are_held_back(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["wordpiece, cleaned up"]
    seen = watch(tokenizer, ids_of(tokenizer, "do", "n", "##'", "##t", "the"))
    assert seen == [("do", ""), ("do", " n"), ("do", " n'"), ("do", "n't"), ("don't the", "")]
    assert watch(tokenizer, ids_of(tokenizer, "do", "'"))[-1] == ("do", " '")


def test_one_space_is_lost_where_decode_loses_one(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    assert watch(tokenizer, ids_of(tokenizer, "▁", "▁the"))[-1] == (" the", "")
    assert watch(tokenizers["byte-level"], ids_of(tokenizers["byte-level"], "Ġa", "Ġ", "Ġa"))[-1] == (" a  a", "")


@every_kind
def test_an_added_token_is_text_as_it_is_and_a_special_one_only_if_asked_for(
    kind: str, tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers[kind]
    token_ids = tokenizer.convert_tokens_to_ids(["São Paulo", "<pad>", "São Paulo"])
    assert watch(tokenizer, token_ids)[-1][0].replace(" ", "") == "SãoPauloSãoPaulo"
    assert "<pad>" in watch(tokenizer, token_ids, skip=False)[-1][0]


@every_kind
def test_an_id_without_a_token_is_no_text(kind: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[kind]
    the = tokenizer.encode("the")
    assert watch(tokenizer, [len(tokenizer), *the, 10**6])[-1] == watch(tokenizer, the)[-1]
    assert Detokenizer(tokenizer).decode([len(tokenizer), *the, 10**6], True) == tokenizer.decode(the)


def test_an_id_in_a_gap_of_the_vocabulary_is_no_text() -> None:
    backend = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 7}, []))
    backend.decoder = decoders.ByteLevel()
    assert watch(wrapped(backend), [3, 5, 7])[-1] == ("ab", "")


def test_a_byte_level_vocabulary_with_the_decoder_of_another_kind_is_read_as_bytes() -> None:
    misread, right = misread_byte_level(), byte_level()
    token_ids = right.encode("a é 🙂\n true", add_special_tokens=False)
    assert misread.decode(token_ids) != "a é 🙂\n true", "the premise"
    assert watch(readable(misread), token_ids)[-1] == ("a é 🙂\n true", "")
    assert misread.decode(token_ids) != "a é 🙂\n true", "somebody else's tokenizer stays as it is"
    for tokenizer in (right, *(make() for make in KINDS.values())):
        assert readable(tokenizer) is tokenizer


class CountingDetokenizer(Detokenizer):
    num_decoded = 0

    def decode(self, token_ids: Any, skip_special_tokens: bool) -> str:
        self.num_decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("pieces", [["Ġa", "true", "Ġ"], ["ÿ"], ["<0x41>"], ["▁", "<0xFF>"]], ids=str)
def test_a_token_costs_the_decoding_of_a_few_however_long_the_text_is(
    pieces: list[str], tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers["sentencepiece" if "<" in str(pieces) else "byte-level"]
    detokenizer = CountingDetokenizer(tokenizer)
    stream = DecodeStream(detokenizer, True)
    for token_id in ids_of(tokenizer, *pieces) * 1000:
        stream.add(token_id)
    assert detokenizer.num_decoded < 20 * 1000 * len(pieces)
