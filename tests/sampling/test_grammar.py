"""Random tokens under a grammar always give text that fits it. Needs the extra `structured`."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from helpers.grammars import POINT, SCHEMAS, accepts, closed, texts

from mlx_paged import SamplingParams
from mlx_paged.sampling.grammar import GrammarCompiler


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_under_a_schema_always_give_json_that_fits_it(
    compiler: GrammarCompiler, tokenizer: Any, name: str
) -> None:
    schema, fits = SCHEMAS[name]
    written = texts(compiler, tokenizer, json_schema=schema)
    wrong = [text for text in written if not fits(json.loads(text))]
    assert not wrong
    assert len(set(written)) > 1 or name == "awkward names"


def test_a_schema_may_be_text_or_objects_of_any_kind(compiler: GrammarCompiler, tokenizer: Any) -> None:
    from types import MappingProxyType

    for schema in (POINT, json.dumps(POINT), MappingProxyType(POINT)):
        assert accepts(compiler, tokenizer, '{"x":1,"y":7}', json_schema=schema)
        assert not accepts(compiler, tokenizer, '{"x":1,"y":6}', json_schema=schema)
    for schema in (True, "true", {}):
        assert accepts(compiler, tokenizer, '[{"x":1.5e3},"a",null]', json_schema=schema)


def test_json_is_compact_so_that_whitespace_can_not_go_on_for_ever(compiler: GrammarCompiler, tokenizer: Any) -> None:
    schema = {"type": "array", "items": closed({"a": {"type": "integer"}})}
    assert accepts(compiler, tokenizer, '[{"a":1},{"a":2}]', json_schema=schema)
    for text in (" []", "[] ", '[{"a": 1}]', '[{"a":1}, {"a":2}]', "[\n]"):
        assert not accepts(compiler, tokenizer, text, json_schema=schema)


def test_a_schema_can_ask_for_another_layout_but_not_for_ignored_keywords(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    spaced = {"type": "array", "x-guidance": {"item_separator": ", "}}
    assert accepts(compiler, tokenizer, "[1, 2]", json_schema=spaced)
    with pytest.raises(ValueError, match="uniqueItems"):
        compiler.matcher(SamplingParams(json_schema={"uniqueItems": True, "x-guidance": {"lenient": True}}))


def test_a_declared_property_has_no_second_spelling(compiler: GrammarCompiler, tokenizer: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert accepts(compiler, tokenizer, '{"a":1,"b":"x"}', json_schema=schema)
    assert not accepts(compiler, tokenizer, '{"a":"x"}', json_schema=schema)
    assert not accepts(compiler, tokenizer, '{"\\u0061":"x"}', json_schema=schema)


REGEXES = {
    "alternatives": r"(yes|no|maybe) ?[!?]{0,2}",
    "a telephone number": r"\+[0-9]{2} [0-9]{3,5}(-[0-9]{2})*",
    "only the end is open": r"a+b*",
    "anchored": r"^[a-f0-9]{8}$",
    "quotes, slashes and lines": r'("/|\\\n){2,4}',
    "other scripts": r"[äöü🙂日本]{1,12}",
    "anything": r".{0,40}",
}


@pytest.mark.parametrize("name", REGEXES)
def test_random_tokens_under_a_regex_always_give_text_that_matches_it(
    compiler: GrammarCompiler, tokenizer: Any, name: str
) -> None:
    written = texts(compiler, tokenizer, regex=REGEXES[name])
    assert [text for text in written if not re.fullmatch(REGEXES[name], text)] == []
    assert len(set(written)) > 1


def test_random_tokens_under_a_lark_grammar_give_balanced_expressions(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    grammar = """
        start: product ("+" product)*
        product: value ("*" value)?
        value: NUMBER | "(" start ")"
        NUMBER: /[1-9][0-9]?/
    """
    for text in texts(compiler, tokenizer, num=40, grammar=grammar):
        assert re.fullmatch(r"[0-9+*()]+", text)
        assert isinstance(eval(text), int)
