"""An answer taken apart: in whatever pieces it comes, its parts joined are those of the whole."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder

from mlx_paged.server.answer_parts import AnswerParts, Part, join_parts, require_readable

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"], "b": {}}}\n</tool_call>'
ARGUMENTS = '{"a": [1, "}"], "b": {}}'
PIECES = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_", "call>", "</", "<", "\n", " ", "a < b"),
    *(
        '{"name": "f", ',
        '"arguments": {',
        '"a": 1',
        '"b": "x',
        '"',
        "\\",
        "\\n",
        "}",
        "{",
        "}}",
        ", ",
        "nope",
        "é\U0001f600",
    ),
    *('{"name": "g", "arguments": {"path": "x.py", "text": "a\\nb"}}', "<function=f>", "<parameter=a>", "</function>"),
    *("[TOOL_CALLS]", "f[ARGS]", CALL),
]
ANSWERS = st.lists(st.sampled_from(PIECES)).map("".join)


def tokenizer_of(parser: Any) -> Any:
    """What a tokenizer of mlx-lm tells of thinking and calls."""
    return SimpleNamespace(
        has_thinking=True,
        think_start="<think>",
        think_end="</think>",
        has_tool_calling=parser is not None,
        tool_parser=parser and parser.parse_tool_call,
        tool_call_start=parser and parser.tool_call_start,
        tool_call_end=parser and parser.tool_call_end,
    )


def take_apart(*pieces: str, parser: Any = json_tools, cut: bool = False, **options: Any) -> list[Part]:
    parts = AnswerParts(tokenizer_of(parser), TOOLS, **options)
    found = [part for piece in pieces for part in parts.feed(piece)] + parts.finish(cut=cut)
    assert parts.num_calls == len([part for part in found if part.name])
    return found


def whole(*pieces: str, **options: Any) -> list[tuple[str, ...]]:
    return [tuple(filter(None, part)) for part in join_parts(take_apart(*pieces, **options))]


@pytest.mark.parametrize("parser", [json_tools, qwen3_coder, mistral, None])
@pytest.mark.parametrize("is_plain_call", [False, True])
@example(text=CALL, cuts=[3, 30, 31, 50], is_thinking=False, cut=False)
@given(text=ANSWERS, cuts=st.lists(st.integers(0, 400)), is_thinking=st.booleans(), cut=st.booleans())
def test_the_parts_of_an_answer_do_not_depend_on_its_pieces(
    text: str, cuts: list[int], is_thinking: bool, cut: bool, parser: Any, is_plain_call: bool
) -> None:
    places = [0, *sorted(place for place in cuts if place < len(text)), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(places)]
    options = {"parser": parser, "is_thinking": is_thinking, "is_plain_call": is_plain_call, "cut": cut}
    assert whole(*pieces, **options) == whole(text, **options) == whole(*text, **options)


@given(ANSWERS, st.booleans())
def test_nothing_but_markers_and_spaces_is_lost(text: str, cut: bool) -> None:
    parts = take_apart(text, parser=None, cut=cut)
    left = text.replace("<think>", "").replace("</think>", "")
    got = "".join(part.text for part in parts)
    assert "".join(got.replace("<think>", "").replace("</think>", "").split()) == "".join(left.split())


def test_a_call_in_json_comes_by_its_name_and_then_letter_by_letter() -> None:
    parts = take_apart(*CALL)
    assert parts[0] == Part("call", '{"', "f")
    assert [part.text for part in parts[1:]] == list(ARGUMENTS[2:])


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Hm.\n" + CALL + "\n" + CALL, [("text", "Hm."), ("call", ARGUMENTS, "f"), ("call", ARGUMENTS, "f")]),
        ("<think>\nSo.</think>\n\n" + CALL, [("thinking", "So."), ("call", ARGUMENTS, "f")]),
        ("<think>So." + CALL, [("thinking", "So."), ("call", ARGUMENTS, "f")]),
        # Its name comes last: it is handed out when it is whole.
        ('<tool_call>{"arguments": {"a":1}, "name": "f"}</tool_call>', [("call", '{"a": 1}', "f")]),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', [("call", "{}", "f")]),
        ('<tool_call>{"name": "f", "arguments": {}, "id": 7}</tool_call>!', [("call", "{}", "f"), ("text", "!")]),
        # What is no call is text.
        ("x <tool_call>nope</tool_call> y", [("text", "x <tool_call>nope</tool_call> y")]),
        ('<tool_call>{"name": "f", "arguments": {x}}', [("text", '<tool_call>{"name": "f", "arguments": {x}}')]),
        ('<tool_call>{"name": "f"', [("text", '<tool_call>{"name": "f"')]),
        # What stops being JSON once it has been handed out goes on as text.
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', [("call", '{"a": ', "f"), ("text", "NaN}}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "x', [("call", '{"a": "x', "f")]),
        ('<tool_call>{"name": "f", "arguments": {}', [("call", "{}", "f")]),
        ("a <tool_cal", [("text", "a <tool_cal")]),
    ],
)
def test_what_is_a_call_and_what_is_text(answer: str, expected: list[tuple[str, ...]]) -> None:
    assert whole(answer) == whole(*answer) == expected


def test_a_call_of_another_form_comes_when_it_is_whole() -> None:
    call = "<tool_call>\n<function=f>\n<parameter=a>\nx\ny\n</parameter>\n</function>\n</tool_call>"
    assert take_apart(*call, parser=qwen3_coder) == [Part("call", '{"a": "x\\ny"}', "f")]
    assert whole(call[:-1], parser=qwen3_coder, cut=True) == [("text", call[:-1])]


def test_a_plain_call_is_all_of_the_answer_but_its_thinking() -> None:
    call = '{"name": "f", "arguments": {"a": "<think>{"}}'
    for pieces in ([call], list(call)):
        options: dict[str, Any] = {"parser": None, "is_plain_call": True}
        assert whole("<think>Well {", "</think>", *pieces, **options) == [
            ("thinking", "Well {"),
            ("call", '{"a": "<think>{"}', "f"),
        ]
        assert whole(*pieces[:20], **options, cut=True)[0][0] == ("call" if len(pieces) == 1 else "text")


def test_a_very_long_name_is_no_reason_to_wait_for_ever() -> None:
    name = "n" * 5000
    answer = f"<tool_call>{json.dumps({'name': name, 'arguments': {'a': 1}})}</tool_call>"
    assert whole(answer) == whole(*answer) == [("call", '{"a": 1}', name)]


def test_without_tools_a_call_is_text() -> None:
    parts = AnswerParts(tokenizer_of(json_tools), [])
    assert join_parts(parts.feed(CALL) + parts.finish(cut=False)) == [Part("text", CALL)]


def test_models_that_write_in_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="harmony"):
        require_readable(SimpleNamespace(get_vocab=lambda: {"<|channel|>": 1, "<|message|>": 2}))
    require_readable(SimpleNamespace(get_vocab=lambda: {"<|channel>": 1, "a": 2}))
