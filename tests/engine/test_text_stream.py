"""Text as it comes: stop strings across tokens, nothing held back for good, characters whole."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.other_tokenizers import byte_level, llama_style
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged import SamplingParams
from mlx_paged.engine.detokenizer import Detokenizer
from mlx_paged.engine.text_stream import TextStream


class Pieces:
    """A stream whose token i is the text pieces[i]; that of the last token may be known with the next one only."""

    def __init__(self, pieces: list[str], waits: bool = False) -> None:
        self._pieces = pieces
        self._waits = waits
        self.tail = ""

    def add(self, token: int) -> str:
        if not self._waits:
            return self._pieces[token]
        known, self.tail = self.tail, self._pieces[token]
        return known


def feed(pieces: list[str], stops: list[str], waits: bool = False) -> tuple[TextStream, list[str], str | None]:
    """The stream after all pieces, its text after each, and the stop string that ended it."""
    stream = TextStream(Pieces(pieces, waits), stops)  # type: ignore[arg-type]
    texts = []
    for token in range(len(pieces)):
        stopped_by = stream.add(token)
        texts.append(stream.text)
        if stopped_by is not None:
            return stream, texts, stopped_by
    stopped_by = stream.finish("".join(pieces))
    return stream, texts, stopped_by


def test_without_stop_strings_text_comes_at_once() -> None:
    _, texts, stopped_by = feed(["Once", " upon", " a"], [])
    assert texts == ["Once", "Once upon", "Once upon a"]
    assert stopped_by is None


@pytest.mark.parametrize(
    "pieces", [["Hello STOP more"], ["Hello ST", "OP more"], ["Hello ", "S", "T", "O", "P", "x"], ["Hello STOP"]]
)
def test_a_stop_string_is_found_wherever_tokens_end_and_the_text_ends_before_it(pieces: list[str]) -> None:
    stream, _, stopped_by = feed(pieces, ["STOP"])
    assert stopped_by == "STOP"
    assert stream.text == "Hello "


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    _, texts, stopped_by = feed(["a", "S", "T", "x", "ST", "y"], ["STOP"])
    assert texts == ["a", "a", "a", "aSTx", "aSTx", "aSTxSTy"]
    assert stopped_by is None


def test_what_was_held_back_is_released_at_the_end() -> None:
    stream, texts, stopped_by = feed(["abc", "STO"], ["STOP"])
    assert texts[-1] == "abc"
    assert stream.text == "abcSTO"
    assert stopped_by is None


def test_a_stop_string_that_only_the_end_completes_is_found() -> None:
    stream, _, stopped_by = feed(["abc ", "STOP"], ["STOP"], waits=True)
    assert stopped_by == "STOP"
    assert stream.text == "abc "


def test_candidates_that_overlap_themselves_are_followed() -> None:
    stream, texts, stopped_by = feed(["a", "a", "a", "a", "b", "c"], ["aab"])
    assert texts[:4] == ["", "", "a", "aa"]
    assert (stream.text, stopped_by) == ("aa", "aab")


def test_of_several_stop_strings_the_first_in_the_text_counts() -> None:
    assert feed(["one two"], ["two", "one"])[2] == "one"
    stream, _, stopped_by = feed(["xxabcyy"], ["c", "bcy", "zzz"])
    assert (stream.text, stopped_by) == ("xxa", "bcy")


def test_a_stop_string_that_is_complete_first_counts_even_if_another_began_before_it() -> None:
    stream, _, stopped_by = feed(["a", "b", "c", "d"], ["abcd", "bc"])
    assert (stream.text, stopped_by) == ("a", "bc")


def test_a_stop_string_in_the_first_token_leaves_no_text() -> None:
    stream, _, stopped_by = feed(["\n\nnext"], ["\n\n"])
    assert (stream.text, stopped_by) == ("", "\n\n")


def test_no_tokens_give_no_text() -> None:
    assert feed([], ["x"])[0].text == ""


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    waits=st.booleans(),
)
def test_the_result_is_that_of_searching_the_whole_text_after_each_token(
    pieces: list[str], stops: list[str], waits: bool
) -> None:
    stream, texts, stopped_by = feed(pieces, stops, waits)
    expected, expected_stop = "".join(pieces), None
    for end in range(1, len(pieces) + 1):
        text = "".join(pieces[:end])
        if found := [(text.find(stop), stop) for stop in stops if stop in text]:
            position, expected_stop = min(found)
            expected = text[:position]
            break
    assert stream.text == expected
    assert stopped_by == expected_stop
    for text in texts:
        assert expected.startswith(text), "text was handed out that is not in the result"
        assert stopped_by is not None or not any(stop in text for stop in stops)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_more_is_held_back_than_could_begin_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    stream = TextStream(Pieces(pieces), stops)  # type: ignore[arg-type]
    so_far = ""
    for token, piece in enumerate(pieces):
        so_far += piece
        if stream.add(token) is not None:
            return
        held_back = so_far[len(stream.text) :]
        assert held_back == "" or any(stop.startswith(held_back) for stop in stops)


def test_the_text_of_all_tokens_counts_at_the_end_where_nothing_else_was_handed_out() -> None:
    stream = TextStream(Pieces(["ab", "c"]), [])  # type: ignore[arg-type]
    stream.add(0)
    assert stream.finish("abcdef") is None
    assert stream.text == "abcdef"
    stream = TextStream(Pieces(["ab", "c"]), [])  # type: ignore[arg-type]
    stream.add(0)
    stream.finish("xyz")
    assert stream.text == "ab"


def test_a_copy_goes_on_by_itself() -> None:
    stream = TextStream.of(Detokenizer(byte_level()), SamplingParams(stop=["atrue"]))
    stream.add(id_of("a"))
    copy = stream.copy()
    assert copy.add(id_of("true")) == "atrue"
    assert stream.add(id_of("tr")) is None
    assert stream.finish("atr") is None
    assert (stream.text, copy.text) == ("atr", "")


def id_of(piece: str) -> int:
    return int(byte_level().convert_tokens_to_ids(piece))


# -- with the demo model's byte-level tokenizer -----------------------------------------------------------------


@pytest.mark.parametrize(
    "stop, expected", [("🙂", "smile "), ("日本", "smile 🙂 at "), (" at 日", "smile 🙂"), ("本語", "smile 🙂 at 日")]
)
def test_stop_strings_of_characters_that_take_several_tokens(tokenizer: Any, stop: str, expected: str) -> None:
    stream = TextStream.of(Detokenizer(tokenizer), SamplingParams(stop=stop))
    for token in tokenizer.encode("smile 🙂 at 日本語 now"):
        if stream.add(token) == stop:
            break
    else:
        pytest.fail("the stop string was not found")
    assert stream.text == expected


def test_a_stop_string_of_single_bytes_is_found_with_its_last_token() -> None:
    tokenizer = llama_style()
    stream = TextStream.of(Detokenizer(tokenizer), SamplingParams(stop="\n\n"))
    the, newline = tokenizer.convert_tokens_to_ids(["▁the", "<0x0A>"])
    assert [stream.add(token) for token in (the, newline, newline)] == [None, None, "\n\n"]
    assert stream.text == "the"


def test_half_a_character_completes_no_stop_string() -> None:
    tokenizer = byte_level()
    first, second, *_ = tokenizer.encode("é", add_special_tokens=False)
    stream = TextStream.of(Detokenizer(tokenizer), SamplingParams(stop="\ufffd"))
    assert stream.add(first) is None
    assert stream.add(second) is None
    assert stream.text == "é"
