"""Conversations as servers and clients write them: what a template is given, and every way in which it can refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from mlx_paged.engine.chat_template import ChatTemplate

MakeTemplate = Callable[..., ChatTemplate]
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def own_tokenizer(demo_folder: Path) -> Any:
    return load_tokenizer(demo_folder)


@pytest.fixture
def make(own_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> MakeTemplate:
    """A chat template of some Jinja text, None for the demo model's own."""

    def make(text: str | None = None) -> ChatTemplate:
        if text is not None:
            monkeypatch.setattr(own_tokenizer._tokenizer, "chat_template", text)
        return ChatTemplate(own_tokenizer, threading.Lock())

    return make


def written(template: ChatTemplate, messages: Any, **options: Any) -> str:
    """The text that the model reads."""
    return str(template._tokenizer.decode(template.encode(messages, **options)))


def test_parts_of_text_are_joined(make: MakeTemplate) -> None:
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the ball?"}]
    template = make()
    assert written(template, [{"role": "user", "content": parts}]) == "<|user|>Where is the ball?<|end|><|assistant|>"
    whole = template.encode([{"role": "user", "content": "Where is the ball?"}])
    assert template.encode([{"role": "user", "content": tuple(parts)}]) == whole


@pytest.mark.parametrize(
    "content, words",
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], ["messages[1]: content[0]", "'image_url'", "reads text"]),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], ["messages[1]: content[1]", "'input_audio'"]),
        ([{"text": "a"}], ["content[0]", "{'text': 'a'}"]),
        (["a"], ["content[0]", "'a'"]),
        ([{"type": "text", "text": 5}], ["content[0]: text must be text, got 5"]),
        ([{"type": "text"}], ["got None"]),
        (5, ["messages[1]: content must be text or a list of parts, got 5"]),
        (b"a", ["content must be text", "b'a'"]),
        ({"type": "text", "text": "a"}, ["content must be text or a list of parts"]),
    ],
    ids=ascii,
)
def test_other_content_than_text_is_refused_by_name(make: MakeTemplate, content: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make().encode([USER, {"role": "user", "content": content}])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


OPENING = (
    "{% if tools %}T{{ tools[0].function.name }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
CALLED = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


@pytest.mark.parametrize(
    "messages, tools, opening",
    [
        ([{"role": "system", "content": "Be kind."}, USER], None, "<system>Be kind.<user>"),
        ([{"role": "developer", "content": "Be kind."}, USER, USER], CALLED, "Tlook<developer>Be kind.<user>"),
        ([USER], CALLED, "Tlook<user>"),
        ([{"role": "system", "content": "Be kind."}], None, "<system>Be kind."),
        ([{"role": "assistant", "content": "Yes?"}, USER], None, "<"),
    ],
)
def test_what_comes_before_all_that_is_said_is_counted_for_who_wants_to_know(
    make: MakeTemplate, messages: Any, tools: Any, opening: str
) -> None:
    """Up to one token less, which may be one with what follows."""
    template = make(OPENING)
    assert template.encode(messages, tools).num_opening == 0
    template.finds_openings = True
    tokens = template.encode(messages, tools)
    assert template._tokenizer.decode(tokens[: tokens.num_opening + 1]) == opening
    assert tokens == template.encode(messages, tools)


def test_a_template_that_asks_for_more_than_one_message_has_no_opening(make: MakeTemplate) -> None:
    template = make("{% if messages | length < 2 %}{{ raise_exception('two at least') }}{% endif %}" + OPENING)
    template.finds_openings = True
    assert template.encode([USER, USER]).num_opening == 0


NO_MESSAGES: list[Any] = [
    "Hi", 5, None, ["role", "user"], {}, {"role": "user"}, {"content": "Hi"}, {"role": 5, "content": "Hi"},
    {"role": "assistant", "tool_calls": 5},
]  # fmt: skip


@pytest.mark.parametrize("message", NO_MESSAGES, ids=ascii)
def test_what_is_no_message_is_refused_with_its_place(make: MakeTemplate, message: Any) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\]"):
        make().encode([USER, message])


@pytest.mark.parametrize("messages", ["hello", b"hello", USER, 5, None, {1, 2}], ids=ascii)
def test_what_is_no_conversation_is_a_type_error_that_shows_one(make: MakeTemplate, messages: Any) -> None:
    with pytest.raises(TypeError) as caught:
        make().encode(messages)
    assert '[{"role": "user", "content": ' in str(caught.value)
    assert ("'hello'}]" in str(caught.value)) == (messages == "hello")


def test_a_call_of_a_tool_reaches_the_template_with_its_arguments_as_an_object(make: MakeTemplate) -> None:
    template = make(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "add", "arguments": "{"}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call, broken]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "1"},
    ]
    first = 'assistant:[add {"a": 1}]'
    assert written(template, messages) == f'{first}[add "{{"];{first};tool:1;'
    assert call["function"]["arguments"] == '{"a": 1}', "what was given stays as it was"  # type: ignore[index]


@pytest.mark.parametrize("given, expected", [("", {}), (None, {}), ("[1]", "[1]"), ("3", "3"), ({"a": 1}, {"a": 1})])
def test_arguments_that_are_no_object_stay_what_they_are_and_none_are_an_empty_one(
    make: MakeTemplate, given: Any, expected: Any
) -> None:
    template = make("{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    call = {"type": "function", "function": {"name": "add", "arguments": given}}
    assert json.loads(written(template, [{"role": "assistant", "tool_calls": [call]}])) == expected


def test_a_template_that_knows_no_tools_has_calls_and_results_in_the_text(make: MakeTemplate) -> None:
    template = make("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": "Wait.", "tool_calls": [call, 5]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "1"},
    ]
    one = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert written(template, messages) == (
        f"assistant:Wait.\n{one}\n<tool_call>\n5\n</tool_call>;assistant:{one};"
        "user:<tool_response>\n1\n</tool_response>;"
    )


def test_tools_documents_and_other_variables_reach_the_template(make: MakeTemplate) -> None:
    template = make("{{ tools[0].function.name }} {{ documents[0].text }} {{ style }} {{ messages[0].mood }}")
    options: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "documents": [{"title": "t", "text": "doc"}],
        "chat_template_kwargs": {"style": "short"},
    }
    assert written(template, [USER | {"mood": "glad"}], **options) == "add doc short glad"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content + 5 }}", "str"),
        ("{{ messages[7].content.strip() }}", "7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(messages) }}", "unsafe"),
        ("{{ messages[0]['content'].nothing() }}", "nothing"),
        ("{% for x in 5 %}{% endfor %}", "int"),
        ("{{ unclosed", "end of"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_every_error_of_a_template_is_a_value_error_with_its_reason(make: MakeTemplate, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="the model's chat template does not take this conversation: ") as caught:
        make(text).encode([USER])
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_variable_that_is_the_tokenizers_own_is_refused_and_the_answers_beginning_may_be_left_out(
    make: MakeTemplate,
) -> None:
    with pytest.raises(ValueError, match="tokenize"):
        make().encode([USER], chat_template_kwargs={"tokenize": False})
    with_beginning = make().encode([USER])
    without = make().encode([USER], chat_template_kwargs={"add_generation_prompt": False})
    assert with_beginning[: len(without)] == without


@pytest.mark.parametrize("options", [{"chat_template_kwargs": 5}, {"tools": 5}, {"documents": ["a"]}], ids=str)
def test_options_of_another_kind_are_refused(make: MakeTemplate, options: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"chat_template_kwargs|chat template"):
        make().encode([USER], **options)


def test_half_of_a_surrogate_pair_in_a_conversation_is_refused(make: MakeTemplate) -> None:
    with pytest.raises(ValueError, match="the conversation is not UTF-8 text"):
        make().encode([{"role": "user", "content": "a \udcff"}])
