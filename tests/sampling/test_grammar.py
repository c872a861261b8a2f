"""Forms of output: which tokens are allowed, where they end, and what is refused. Needs the extra `structured`."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_paged import SamplingParams
from mlx_paged.sampling import grammar as structured_output
from mlx_paged.sampling.grammar import GrammarCompiler, GrammarMatcher

END, OTHER_END = 4, 0  # <|end|> and <|endoftext|> of the demo tokenizer
VOCAB_SIZE = 1600
PADDED = 1637  # logits of a model that has more of them than its tokenizer has tokens


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    return load_tokenizer(demo_folder, eos_token_ids=END)


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, PADDED, [END])


def ids(mask: np.ndarray) -> list[int]:
    """The token ids that a mask allows."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def after(compiler: GrammarCompiler, tokenizer: Any, text: str, **form: Any) -> GrammarMatcher:
    """A matcher that has taken in `text`."""
    matcher = compiler.matcher(SamplingParams(**form))
    for token in tokenizer.encode(text, add_special_tokens=False) if text else []:
        matcher.advance(token)
    return matcher


def accepts(compiler: GrammarCompiler, tokenizer: Any, text: str, **form: Any) -> bool:
    """Whether `text` is complete in a form."""
    try:
        return bool(set(ids(after(compiler, tokenizer, text, **form).mask())) & {END, OTHER_END})
    except ValueError:
        return False


def walk(matcher: GrammarMatcher, seed: int, ends: Collection[int] = (END,), most_tokens: int = 3000) -> list[int]:
    """A random way through a form: tokens chosen uniformly among those allowed, without the end token."""
    chance = random.Random(seed)
    out = np.zeros_like(matcher.mask())
    tokens: list[int] = []
    while len(tokens) < most_tokens:
        if matcher.is_finished:
            assert set(ids(matcher.mask())) == set(ends)
            return tokens
        matcher.fill(out)
        token = chance.choice(ids(out))
        matcher.advance(token)
        if token in ends:
            assert matcher.is_finished
            return tokens
        tokens.append(token)
    raise AssertionError("the form does not come to an end")


def texts(compiler: GrammarCompiler, tokenizer: Any, num: int = 25, **form: Any) -> list[str]:
    """The texts of random ways through a form."""
    params = SamplingParams(**form)
    return [tokenizer.decode(walk(compiler.matcher(params), seed)) for seed in range(num)]


# -- JSON schemas -----------------------------------------------------------------------------------------------


def closed(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    """The schema of an object with these properties and no others, all required but the `optional` ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_text(value: object, shortest: int, longest: int) -> bool:
    return isinstance(value, str) and shortest <= len(value) <= longest


ENUM = ["red", "re", 7, None, [1, {"a": True}]]
POINT = closed({"x": {"type": "integer", "minimum": -12, "maximum": 305}, "y": {"type": "integer", "minimum": 7}})
TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": closed(
            {"leaf": {"enum": ["a", "b"]}, "sub": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}},
            "sub",
        )
    },
}


def is_point(value: Any) -> bool:
    return list(value) == ["x", "y"] and is_int(value["x"], -12, 305) and is_int(value["y"], 7, 10**400)


def is_tree(value: Any) -> bool:
    return (
        list(value) in (["leaf"], ["leaf", "sub"])
        and value["leaf"] in ("a", "b")
        and len(value.get("sub", [])) <= 1
        and all(map(is_tree, value.get("sub", [])))
    )


SCHEMAS: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "integers in ranges": (POINT, is_point),
    "enum of several types": ({"enum": ENUM}, lambda v: v in ENUM),
    "boolean or null": ({"type": ["boolean", "null"]}, lambda v: v is None or isinstance(v, bool)),
    "array of lengths": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
        lambda v: 2 <= len(v) <= 5 and all(isinstance(item, bool) for item in v),
    ),
    "tuple": (
        {"type": "array", "prefixItems": [{"const": "p"}, {"type": "integer"}], "items": False, "minItems": 2},
        lambda v: len(v) == 2 and v[0] == "p" and isinstance(v[1], int),
    ),
    "string of any characters": ({"type": "string", "minLength": 4, "maxLength": 30}, lambda v: is_text(v, 4, 30)),
    "string of a pattern": (
        {"type": "string", "pattern": '^["\\\\\\n/]{3,9}$'},
        lambda v: bool(re.fullmatch(r'["\\\n/]{3,9}', v)),
    ),
    "date": ({"type": "string", "format": "date"}, lambda v: bool(re.fullmatch(r"\d{4}-\d\d-\d\d", v))),
    "number": (
        {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
        lambda v: isinstance(v, int | float) and 0 < v <= 2.5,
    ),
    "nested": (
        closed({"name": {"type": "string", "maxLength": 8}, "at": POINT, "note": {"type": "null"}}, "note"),
        lambda v: (
            list(v) in (["name", "at"], ["name", "at", "note"])
            and is_text(v["name"], 0, 8)
            and is_point(v["at"])
            and v.get("note") is None
        ),
    ),
    "reference to itself": (TREE, is_tree),
    "any of": (
        {"anyOf": [closed({"a": {"const": 1}}), closed({"a": {"const": 2}, "b": {"const": 3}})]},
        lambda v: v in ({"a": 1}, {"a": 2, "b": 3}),
    ),
    "awkward names": (
        closed({'"\\\n': {"const": 1}, "é🙂": {"const": "\u0001 é🙂"}}),
        lambda v: v == {'"\\\n': 1, "é🙂": "\u0001 é🙂"},
    ),
}


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


# -- regexes and grammars ---------------------------------------------------------------------------------------

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


# -- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1600, 1601, 1632, 1637, 4096])
def test_a_mask_has_the_width_of_the_model_and_allows_no_token_that_the_tokenizer_does_not_know(
    tokenizer: Any, vocab_size: int
) -> None:
    matcher = after(GrammarCompiler(tokenizer, vocab_size, [END]), tokenizer, '"', json_schema={"type": "string"})
    mask = matcher.mask()
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-vocab_size // 32),)
    assert VOCAB_SIZE - 200 < len(ids(mask)) < VOCAB_SIZE
    assert max(ids(mask)) < VOCAB_SIZE


@pytest.mark.parametrize("vocab_size", [700, 704, 1599])
def test_a_model_with_fewer_logits_than_tokens_is_only_allowed_those_it_has(tokenizer: Any, vocab_size: int) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size, [END])
    matcher = after(compiler, tokenizer, '"', json_schema={"type": "string"})
    assert matcher.mask().shape == (-(-vocab_size // 32),)
    assert vocab_size - 200 < len(ids(matcher.mask()))
    assert max(ids(matcher.mask())) < vocab_size
    with pytest.raises(ValueError, match=f"token {vocab_size} "):
        matcher.advance(vocab_size)


def test_special_tokens_are_never_text(compiler: GrammarCompiler, tokenizer: Any) -> None:
    matcher = after(compiler, tokenizer, '"', json_schema={"type": "string"})
    assert not set(ids(matcher.mask())) & {0, 1, 2, 3, 4}
    matcher = after(compiler, tokenizer, "", regex=r"(?s).*")
    assert set(ids(matcher.mask())) & {0, 1, 2, 3, 4} == {END}


def test_even_a_grammar_of_any_token_allows_none_beyond_the_tokenizer(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    matcher = after(compiler, tokenizer, "a", grammar='start: "a" <[*]> "b"')
    assert ids(matcher.mask()) == [token for token in range(VOCAB_SIZE) if token != END]


def test_fill_writes_one_row_of_a_larger_array(compiler: GrammarCompiler, tokenizer: Any) -> None:
    matcher = after(compiler, tokenizer, "", regex="[0-9]+")
    rows = np.full((3, -(-PADDED // 32)), 0xDEADBEEF, np.uint32)
    matcher.fill(rows[1])
    assert np.array_equal(rows[1], matcher.mask())
    assert (rows[[0, 2]] == 0xDEADBEEF).all()
    with pytest.raises(ValueError):
        matcher.fill(np.zeros(3, np.uint32))


def test_a_mask_that_was_handed_out_does_not_change(compiler: GrammarCompiler, tokenizer: Any) -> None:
    matcher = after(compiler, tokenizer, "", regex="ab")
    first = matcher.mask()
    before = first.copy()
    matcher.advance(ids(first)[0])
    matcher.mask()
    assert np.array_equal(first, before)
    assert matcher.mask() is not matcher.mask()


# -- advance and copy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, END, 1, 300, VOCAB_SIZE, PADDED - 1, PADDED, 10**6, 2**40])
def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing(
    compiler: GrammarCompiler, tokenizer: Any, token: int
) -> None:
    matcher = after(compiler, tokenizer, "1", regex=r"[0-9]{3}")
    before = matcher.mask()
    with pytest.raises(ValueError, match=f"does not allow token {token} here"):
        matcher.advance(token)
    assert np.array_equal(matcher.mask(), before)
    assert not matcher.is_finished
    for token in tokenizer.encode("23", add_special_tokens=False):
        matcher.advance(token)
    assert matcher.is_finished


def test_what_is_allowed_does_not_depend_on_whether_the_mask_was_asked_for(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    params = SamplingParams(json_schema=SCHEMAS["nested"][0])
    tokens = walk(compiler.matcher(params), seed=3)
    asked, silent = compiler.matcher(params), compiler.matcher(params)
    for token in tokens:
        asked.mask()
        asked.advance(token)
        silent.advance(token)
    assert silent.is_finished
    assert asked.is_finished
    assert np.array_equal(asked.mask(), silent.mask())


def test_copies_go_their_own_ways(compiler: GrammarCompiler, tokenizer: Any) -> None:
    matcher = after(compiler, tokenizer, "a", regex="a(b+|c)")
    before = matcher.mask()
    copies = [matcher.copy() for _ in range(3)]
    letters = {letter: tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "bc"}
    copies[0].advance(letters["c"])
    copies[1].advance(letters["b"])
    assert [copy.is_finished for copy in copies] == [True, False, False]
    assert not matcher.is_finished
    assert np.array_equal(matcher.mask(), before)
    assert np.array_equal(copies[2].mask(), before)
    assert END in ids(copies[1].mask())
    with pytest.raises(ValueError):
        copies[0].advance(letters["b"])
    copies[1].copy().advance(END)
    assert not copies[1].is_finished
    copies[2].advance(letters["b"])
    copies[2].advance(END)
    assert copies[2].copy().is_finished
    matcher.advance(letters["b"])
    assert np.array_equal(matcher.mask(), copies[1].mask())


# -- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[END], [END, OTHER_END]])
@pytest.mark.parametrize("last", [END, OTHER_END])
def test_every_end_token_is_allowed_exactly_where_the_form_may_end(tokenizer: Any, ends: list[int], last: int) -> None:
    compiler = GrammarCompiler(tokenizer, PADDED, ends)
    matcher = compiler.matcher(SamplingParams(regex="ab+"))
    for letter, may_end in (("", False), ("a", False), ("b", True), ("b", True)):
        for token in tokenizer.encode(letter, add_special_tokens=False) if letter else []:
            matcher.advance(token)
        allowed = set(ids(matcher.mask()))
        assert allowed & {END, OTHER_END} == (set(ends) if may_end else set())
        assert allowed - {END, OTHER_END}
        assert not matcher.is_finished
    if last not in ends:
        with pytest.raises(ValueError):
            matcher.advance(last)
        return
    matcher.advance(last)
    assert matcher.is_finished
    assert set(ids(matcher.mask())) == set(ends)
    matcher.advance(last)
    assert matcher.is_finished


@pytest.mark.parametrize(
    "form, text",
    [
        ({"regex": "ab?"}, "ab"),
        ({"regex": "a{0,3}"}, "aaa"),
        ({"regex": "a{0}"}, ""),
        ({"grammar": 'start: "a" b\nb: "c"?'}, "ac"),
        ({"json_schema": {"enum": ["a", "ab"]}}, '"a"'),
        ({"json_schema": {"enum": [1, 12]}}, "12"),
        ({"json_schema": POINT}, '{"x":1,"y":7}'),
        ({"json_schema": {"type": "integer", "minimum": 0, "maximum": 9}}, "7"),
    ],
)
def test_a_form_is_finished_as_soon_as_nothing_can_follow(
    compiler: GrammarCompiler, tokenizer: Any, form: dict[str, Any], text: str
) -> None:
    if text:
        assert not after(compiler, tokenizer, text[:-1], **form).is_finished
    matcher = after(compiler, tokenizer, text, **form)
    assert matcher.is_finished
    assert ids(matcher.mask()) == [END]


def test_an_end_token_that_also_stands_for_text_always_means_the_end(tokenizer: Any) -> None:
    dot = tokenizer.encode(".", add_special_tokens=False)[0]
    compiler = GrammarCompiler(tokenizer, PADDED, [END, dot])
    matcher = after(compiler, tokenizer, "a", regex="a[.b]*c?")
    assert {END, dot} <= set(ids(matcher.mask()))
    matcher.advance(dot)
    assert matcher.is_finished
    matcher = after(compiler, tokenizer, "a", regex="a[.b]*c")
    assert not {END, dot} & set(ids(matcher.mask()))


def test_end_tokens_that_the_tokenizer_does_not_know_do_not_count(tokenizer: Any) -> None:
    matcher = GrammarCompiler(tokenizer, PADDED, [END, 1630, 5000]).matcher(SamplingParams(regex="a{0}"))
    assert ids(matcher.mask()) == [END]
    for ends in ([], [1630]):
        with pytest.raises(ValueError, match="needs an end token"):
            GrammarCompiler(tokenizer, PADDED, ends).matcher(SamplingParams(regex="a"))


def test_a_form_that_leads_nowhere_says_so_where_it_does(compiler: GrammarCompiler, tokenizer: Any) -> None:
    matcher = after(compiler, tokenizer, "a", grammar=f'start: "a" <[{PADDED - 1}]> "b"')
    for ask in (matcher.mask, lambda: matcher.advance(END)):
        with pytest.raises(ValueError, match="can't be completed: no token leads on") as info:
            ask()
        assert "\n" not in str(info.value)
    assert not matcher.is_finished


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, message",
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
def test_a_form_that_can_not_be_used_is_refused_in_one_line(
    compiler: GrammarCompiler, form: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as info:
        compiler.matcher(SamplingParams(**form))
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


def test_parameters_without_a_form_and_an_engine_without_tokenizer_are_refused(compiler: GrammarCompiler) -> None:
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


# -- the cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms that were compiled, in order."""
    texts: list[str] = []
    compile_ = structured_output._compile

    def count(vocabulary: Any, form: str, text: str) -> GrammarMatcher:
        texts.append(text)
        return compile_(vocabulary, form, text)

    monkeypatch.setattr(structured_output, "_compile", count)
    return texts


def test_a_form_is_compiled_once_and_every_matcher_starts_at_its_beginning(
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


def test_the_same_text_as_a_regex_and_as_a_grammar_are_two_forms(tokenizer: Any, compilations: list[str]) -> None:
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


def test_the_cache_forgets_the_form_that_was_not_used_for_longest(
    tokenizer: Any, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured_output, "MAX_CACHED_GRAMMARS", 3)
    compiler = GrammarCompiler(tokenizer, PADDED, [END])
    for regex in ("a", "b", "c", "a", "d", "a", "c", "b"):
        compiler.matcher(SamplingParams(regex=regex))
    assert compilations == ["a", "b", "c", "d", "b"]
    assert len(compiler._compiled) == 3


def test_a_form_that_was_refused_leaves_nothing_behind(tokenizer: Any, compilations: list[str]) -> None:
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


# -- other tokenizers -------------------------------------------------------------------------------------------

WORDS = ["▁", "▁a", "▁the", "th", "at", "▁12", "12", '{"', '":', '"}', "x", "true", "▁true", "false", "é"]


def llama_style() -> TokenizerWrapper:
    """Pieces with ▁ for a space and a token for every byte."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += WORDS + [chr(c) for c in range(33, 127) if chr(c) != "x"]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(backend)


def unigram() -> TokenizerWrapper:
    """A sentencepiece model of whole pieces with scores, without tokens for bytes."""
    pieces = ["<unk>", "<s>", "</s>"] + WORDS + [chr(c) for c in range(33, 127) if chr(c) != "x"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(backend)


def byte_level() -> TokenizerWrapper:
    """GPT-2's alphabet of bytes, with few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ('"', ":"), ("{", '"'), ("Ġ", "a"), ("1", "2")]
    pieces = ["<unk>", "<s>", "</s>", *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> TokenizerWrapper:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return TokenizerWrapper(fast)


@pytest.mark.parametrize("make", [llama_style, unigram, byte_level])
def test_tokenizers_of_other_kinds_write_the_form_too(make: Callable[[], TokenizerWrapper]) -> None:
    tokenizer = make()
    vocab_size = len(tokenizer) + 5
    compiler = GrammarCompiler(tokenizer, vocab_size, tokenizer.eos_token_ids)
    (end,) = tokenizer.eos_token_ids
    schema = closed({"true": {"type": "boolean"}, "x y": {"type": "integer", "minimum": 3, "maximum": 150}})
    for seed in range(20):
        matcher = compiler.matcher(SamplingParams(json_schema=schema))
        assert matcher.mask().shape == (-(-vocab_size // 32),)
        value = json.loads(tokenizer.decode(walk(matcher, seed, ends=[end])))
        assert list(value) == ["true", "x y"]
        assert isinstance(value["true"], bool) and is_int(value["x y"], 3, 150)
        text = tokenizer.decode(walk(compiler.matcher(SamplingParams(regex=r"the( a|12)+ x")), seed, ends=[end]))
        assert re.fullmatch(r"the( a|12)+ x", text)


@pytest.mark.parametrize("make", [llama_style, byte_level])
def test_characters_without_a_token_of_their_own_are_spelled_in_bytes(make: Callable[[], TokenizerWrapper]) -> None:
    tokenizer = make()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), tokenizer.eos_token_ids)
    tokens = walk(compiler.matcher(SamplingParams(regex="🙂日")), 0, ends=tokenizer.eos_token_ids)
    assert len(tokens) == 7
    assert tokenizer.decode(tokens) == "🙂日"


def test_a_text_that_the_tokenizer_has_no_tokens_for_is_refused() -> None:
    tokenizer = unigram()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), tokenizer.eos_token_ids)
    with pytest.raises(ValueError, match="regex can't be used: no token leads on"):
        compiler.matcher(SamplingParams(regex="🙂"))
    matcher = compiler.matcher(SamplingParams(regex="[xy]🙂"))
    matcher.advance(tokenizer.convert_tokens_to_ids("x"))
    with pytest.raises(ValueError, match="can't be completed: no token leads on"):
        matcher.mask()
