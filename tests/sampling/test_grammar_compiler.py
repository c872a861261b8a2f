"""What can't be compiled is refused in one line; what can is compiled once."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers.grammars import END, PADDED, POINT, accepts, closed, walk
from helpers.other_tokenizers import unigram
from tokenizers import decoders

from mlx_paged import SamplingParams
from mlx_paged.sampling import grammar as grammar_module
from mlx_paged.sampling.grammar import GrammarCompiler, GrammarMatcher


@pytest.mark.parametrize(
    "grammar, message",
    [
        ({"regex": "("}, "regex can't be used: unclosed group"),
        ({"regex": "a(?=b)"}, "regex can't be used: look-around"),
        ({"regex": "(a)\\1"}, "regex can't be used: backreferences are not supported"),
        ({"regex": "a^b"}, "regex can't be used: .*lookarounds not supported"),
        ({"regex": "(" * 3000 + "a" + ")" * 3000}, "regex can't be used: .*nested"),
        ({"regex": r"[^\x00-\x{10FFFF}]"}, "regex can't be used: no token leads on"),
        ({"grammar": 'start: "a'}, "grammar can't be used: .*lexer error"),
        ({"grammar": 'begin: "a"'}, "grammar can't be used: no start rule"),
        ({"grammar": "start: end"}, 'grammar can\'t be used: .*unknown name: "end"'),
        ({"grammar": "start: " + "(" * 9999 + '"a"' + ")" * 9999}, "grammar can't be used: .*too deeply nested"),
        ({"json_schema": False}, "json_schema can't be used: the schema false allows nothing"),
        ({"json_schema": {"type": "text"}}, "json_schema can't be used: Invalid type: text"),
        ({"json_schema": {"enum": []}}, "json_schema can't be used: Unsatisfiable"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, r"minimum \(5\) .* maximum \(3\)"),
        ({"json_schema": {"const": float("nan")}}, "json_schema can't be used: .*not JSON"),
        ({"json_schema": {"enum": {1, 2}}}, "json_schema can't be used: set is no part of JSON"),
        ({"json_schema": {"$ref": "#/$defs/x"}}, r"json_schema can't be used: .*/\$defs/x"),
        ({"json_schema": {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}}, "no token leads on"),
        ({"json_schema": {"$ref": "https://example.com/x.json"}}, "json_schema can't be used: .*example.com"),
    ],
)
def test_a_grammar_that_can_not_be_used_is_refused_in_one_line(
    compiler: GrammarCompiler, grammar: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as info:
        compiler.matcher(SamplingParams(**grammar))
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 300
    assert info.value.__cause__ is None and info.value.__suppress_context__


@pytest.mark.parametrize(
    "keyword, value",
    [
        ("not", {"type": "string"}),
        ("uniqueItems", True),
        ("contains", {}),
        ("minContains", 1),
        ("if", {}),
        ("then", {}),
        ("propertyNames", {"maxLength": 3}),
        ("dependencies", {"a": ["b"]}),
        ("dependentRequired", {"a": ["b"]}),
        ("dependentSchemas", {"a": {}}),
        ("unevaluatedProperties", False),
        ("unevaluatedItems", False),
        ("$dynamicRef", "#x"),
        ("format", "postcode"),
        ("oneOf", [{"type": "number"}, {"type": "integer"}]),
        ("type", "date"),
    ],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_keyword_that_can_not_be_kept_is_refused_by_name_and_never_ignored(
    compiler: GrammarCompiler, keyword: str, value: Any, is_nested: bool
) -> None:
    schema: dict[str, Any] = {"$defs": {"x": {"type": "string"}}, keyword: value}
    if is_nested:
        schema = closed({"a": {"type": "array", "items": schema}}, "a")
    with pytest.raises(ValueError, match=re.escape(keyword)):
        compiler.matcher(SamplingParams(json_schema=schema))


def test_parameters_without_a_grammar_and_an_engine_without_tokenizer_are_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match="no form"):
        compiler.matcher(SamplingParams())
    for name in ("regex", "grammar", "json_schema"):
        with pytest.raises(ValueError, match=f"^{name} needs a tokenizer, and this engine has none$"):
            GrammarCompiler(None, PADDED, [END]).matcher(SamplingParams(**{name: "{}"}))


def test_a_tokenizer_that_llguidance_can_not_read_is_refused_in_one_line() -> None:
    tokenizer = unigram()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match=r"^llguidance can't use this model's tokenizer: .*decoder") as info:
        GrammarCompiler(tokenizer, len(tokenizer), tokenizer.eos_token_ids).matcher(SamplingParams(regex="a"))
    assert "\n" not in str(info.value)


def test_without_llguidance_one_line_says_what_to_install(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llguidance", "llguidance.hf"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'mlx-paged\[structured\]'$") as info:
        GrammarCompiler(tokenizer, PADDED, [END]).matcher(SamplingParams(regex="a"))
    assert "\n" not in str(info.value)
    assert info.value.__suppress_context__


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars that were compiled, in order."""
    texts: list[str] = []
    compile_ = grammar_module._compile

    def count(vocabulary: Any, kind: str, text: str) -> GrammarMatcher:
        texts.append(text)
        return compile_(vocabulary, kind, text)

    monkeypatch.setattr(grammar_module, "_compile", count)
    return texts


def test_a_grammar_is_compiled_once_and_every_matcher_starts_at_its_beginning(
    tokenizer: Any, compilations: list[str]
) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, [END])
    start = compiler.matcher(SamplingParams(json_schema=POINT)).mask()
    for seed in range(4):
        matcher = compiler.matcher(SamplingParams(json_schema=dict(POINT), seed=seed))
        assert np.array_equal(matcher.mask(), start)
        walk(matcher, seed)
    compiler.matcher(SamplingParams(json_schema=json.dumps(POINT, indent=2)))
    assert len(compilations) == 1
    compiler.matcher(SamplingParams(json_schema=POINT | {"required": ["x"]}))
    assert len(compilations) == 2


def test_the_same_text_as_a_regex_and_as_a_grammar_are_two_grammars(tokenizer: Any, compilations: list[str]) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, [END])
    text = 'start: "a"'
    assert accepts(compiler, tokenizer, text, regex=text)
    assert accepts(compiler, tokenizer, "a", grammar=text)
    assert compilations == [text, text]


def test_the_order_of_properties_is_part_of_a_schema(tokenizer: Any, compilations: list[str]) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, [END])
    one = {"const": 1}
    assert accepts(compiler, tokenizer, '{"a":1,"b":1}', json_schema=closed({"a": one, "b": one}))
    assert accepts(compiler, tokenizer, '{"b":1,"a":1}', json_schema=closed({"b": one, "a": one}))
    assert len(compilations) == 2


def test_the_cache_forgets_the_grammar_that_was_not_used_for_longest(
    tokenizer: Any, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "MAX_CACHED_GRAMMARS", 3)
    compiler = GrammarCompiler(tokenizer, PADDED, [END])
    for regex in ("a", "b", "c", "a", "d", "a", "c", "b"):
        compiler.matcher(SamplingParams(regex=regex))
    assert compilations == ["a", "b", "c", "d", "b"]
    assert len(compiler._compiled) == 3


def test_a_grammar_that_was_refused_leaves_nothing_behind(tokenizer: Any, compilations: list[str]) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, [END])
    for _ in range(2):
        with pytest.raises(ValueError):
            compiler.matcher(SamplingParams(regex="("))
    assert compilations == ["(", "("]
    assert not compiler._compiled
    assert accepts(compiler, tokenizer, "a", regex="a")


def test_threads_share_the_compiler_and_get_matchers_of_their_own(tokenizer: Any, compilations: list[str]) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, [END])
    params = [SamplingParams(regex=f"[ab]{{{num},9}}") for num in range(1, 4)] + [SamplingParams(json_schema=POINT)]
    expected = [walk(GrammarCompiler(tokenizer, PADDED, [END]).matcher(p), seed=5) for p in params]
    compilations.clear()
    with ThreadPoolExecutor(8) as pool:
        walks = list(pool.map(lambda number: walk(compiler.matcher(params[number % 4]), seed=5), range(64)))
    assert [walks[number] == expected[number % 4] for number in range(64)] == [True] * 64
    assert len(compilations) == 4
