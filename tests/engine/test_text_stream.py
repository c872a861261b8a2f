"""Text as it comes: stop strings across tokens, nothing held back for good, characters whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from mlx_paged.engine.text_stream import TextStream


class Pieces:
    """A detokenizer whose token i is the text pieces[i]; the text of the last token may wait for `finalize`."""

    def __init__(self, pieces: list[str], waits: bool = False) -> None:
        self._pieces = pieces
        self._waits = waits
        self._waiting = ""
        self.last_segment = ""

    def add_token(self, token: int) -> None:
        self.last_segment = self._waiting if self._waits else ""
        self._waiting = self._pieces[token]
        if not self._waits:
            self.last_segment, self._waiting = self._waiting, ""

    def finalize(self) -> None:
        self.last_segment, self._waiting = self._waiting, ""


def feed(pieces: list[str], stops: list[str], waits: bool = False) -> tuple[TextStream, list[str], str | None]:
    """The stream after all pieces, its text after each, and the stop string that ended it."""
    stream = TextStream(Pieces(pieces, waits), stops)
    texts = []
    for token in range(len(pieces)):
        stopped_by = stream.add(token)
        texts.append(stream.text)
        if stopped_by is not None:
            return stream, texts, stopped_by
    stopped_by = stream.finish()
    return stream, texts, stopped_by


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    return load_tokenizer(demo_folder, eos_token_ids=None)


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
    stream = TextStream(Pieces(pieces), stops)
    so_far = ""
    for token, piece in enumerate(pieces):
        so_far += piece
        if stream.add(token) is not None:
            return
        held_back = so_far[len(stream.text) :]
        assert held_back == "" or any(stop.startswith(held_back) for stop in stops)


# -- with the demo model's byte-level tokenizer -----------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["Once upon a time, Anna had a red ball.", "naïve häß — 日本語 🙂🙃 end", "🙂", "tab\tand\nnewline", "a  b   c"],
)
def test_text_in_pieces_is_the_text_in_one(tokenizer: Any, text: str) -> None:
    token_ids = tokenizer.encode(text)
    stream = TextStream(tokenizer.detokenizer, [])
    seen = [""]
    for token in token_ids:
        assert stream.add(token) is None
        assert stream.text.startswith(seen[-1])
        seen.append(stream.text)
    stream.finish()
    assert stream.text == tokenizer.decode(token_ids) == text
    assert not any("\ufffd" in piece for piece in seen), "half a character was handed out"


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Any) -> None:
    token_ids = tokenizer.encode("so 🙂")
    assert len(tokenizer.encode("🙂")) > 1, "the premise: the character takes several tokens"
    stream = TextStream(tokenizer.detokenizer, [])
    for token in token_ids[:-1]:
        stream.add(token)
    assert "\ufffd" not in stream.text
    stream.finish()
    assert stream.text.startswith("so") and "\ufffd" in stream.text


@pytest.mark.parametrize(
    "stop, expected", [("🙂", "smile "), ("日本", "smile 🙂 at "), (" at 日", "smile 🙂"), ("本語", "smile 🙂 at 日")]
)
def test_stop_strings_of_characters_that_take_several_tokens(tokenizer: Any, stop: str, expected: str) -> None:
    stream = TextStream(tokenizer.detokenizer, [stop])
    for token in tokenizer.encode("smile 🙂 at 日本語 now"):
        if stream.add(token) == stop:
            break
    else:
        pytest.fail("the stop string was not found")
    assert stream.text == expected


def test_streams_of_one_tokenizer_do_not_mix(tokenizer: Any) -> None:
    texts = ["Anna went home.", "日本語 🙂", "the red ball"]
    encoded = [tokenizer.encode(text) for text in texts]
    streams = [TextStream(tokenizer.detokenizer, []) for _ in texts]
    for position in range(max(map(len, encoded))):
        for stream, token_ids in zip(streams, encoded, strict=True):
            if position < len(token_ids):
                stream.add(token_ids[position])
    for stream in streams:
        stream.finish()
    assert [stream.text for stream in streams] == texts


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_tokens_give_the_text_that_decode_gives(tokenizer: Any, data: st.DataObject) -> None:
    # mlx-lm's streaming detokenizer writes the zero byte as the letter that stands for it in the vocabulary.
    tokens = st.integers(5, len(tokenizer) - 1).filter(lambda token: "\0" not in tokenizer.decode([token]))
    token_ids = data.draw(st.lists(tokens, min_size=1, max_size=20))
    stream = TextStream(tokenizer.detokenizer, [])
    for token in token_ids:
        stream.add(token)
    stream.finish()
    # A completion does not begin with the space that separates it from the prompt, as in mlx-lm.
    assert stream.text in (tokenizer.decode(token_ids), tokenizer.decode(token_ids).removeprefix(" "))
