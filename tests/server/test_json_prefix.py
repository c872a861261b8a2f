"""JSON that is still being written, held to Python's own reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_paged.server.json_prefix import JsonPrefix

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=8)
OBJECTS = st.dictionaries(st.text(), VALUES) | st.lists(VALUES)


def fits(text: str) -> tuple[int, bool]:
    prefix = JsonPrefix()
    return prefix.feed(text), prefix.is_whole


@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]), st.data())
def test_all_of_a_value_fits_in_any_pieces_and_it_is_whole_at_its_end_only(
    value: Any, ascii: bool, indent: int | None, data: st.DataObject
) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    prefix = JsonPrefix()
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        assert not prefix.is_whole or begin == len(text)
        assert prefix.feed(text[begin:end]) == end - begin
    assert prefix.is_whole
    assert fits(text + " x") == (len(text), True)


@given(OBJECTS, st.characters(codec="utf-8"), st.data())
def test_what_does_not_fit_is_no_beginning_of_json(value: Any, wrong: str, data: st.DataObject) -> None:
    text = json.dumps(value)
    place = data.draw(st.integers(0, len(text) - 1))
    text = text[:place] + wrong + text[place + data.draw(st.integers(0, 1)) :]
    try:
        json.loads(text)
        is_json = text.lstrip(" \t\n\r")[0] in "{["
    except ValueError:
        is_json = False
    num, is_whole = fits(text)
    assert (is_whole and not text[num:].strip(" \t\n\r")) == is_json


@pytest.mark.parametrize(
    "text, num",
    [
        ("7", 0),
        ('"a"', 0),
        ("{a", 1),
        ('{"a" 1', 5),
        ('{"a": 01', 7),
        ('{"a": 1.}', 8),
        ('{"a": -}', 7),
        ('{"a": 1e}', 8),
        ('{"a": NaN', 6),
        ('{"a": trux', 9),
        ('{"a": "\\x', 8),
        ('{"a": "\\u00g', 11),
        ('{"a": "\n', 7),
        ("[1,]", 3),
        ('{"a": 1,}', 8),
        ("[}", 1),
        ('{"a": [1}', 8),
    ],
)
def test_it_fits_up_to_the_first_wrong_character(text: str, num: int) -> None:
    assert fits(text) == (num, False)
