"""A matcher allows the tokens that may come next, follows those that come, and knows where its grammar may end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.grammars import END, OTHER_END, PADDED, POINT, SCHEMAS, VOCAB_SIZE, after, ids, walk

from mlx_paged import SamplingParams
from mlx_paged.sampling.grammar import GrammarCompiler


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


def test_a_mask_that_was_handed_out_does_not_change(compiler: GrammarCompiler, tokenizer: Any) -> None:
    matcher = after(compiler, tokenizer, "", regex="ab")
    first = matcher.mask()
    before = first.copy()
    matcher.advance(ids(first)[0])
    matcher.mask()
    assert np.array_equal(first, before)
    assert matcher.mask() is not matcher.mask()


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


@pytest.mark.parametrize("ends", [[END], [END, OTHER_END]])
@pytest.mark.parametrize("last", [END, OTHER_END])
def test_every_end_token_is_allowed_exactly_where_the_grammar_may_end(
    tokenizer: Any, ends: list[int], last: int
) -> None:
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
    "grammar, text",
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
def test_a_grammar_is_finished_as_soon_as_nothing_can_follow(
    compiler: GrammarCompiler, tokenizer: Any, grammar: dict[str, Any], text: str
) -> None:
    if text:
        assert not after(compiler, tokenizer, text[:-1], **grammar).is_finished
    matcher = after(compiler, tokenizer, text, **grammar)
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


def test_a_grammar_that_leads_nowhere_says_so_where_it_does(compiler: GrammarCompiler, tokenizer: Any) -> None:
    matcher = after(compiler, tokenizer, "a", grammar=f'start: "a" <[{PADDED - 1}]> "b"')
    for ask in (matcher.mask, lambda: matcher.advance(END)):
        with pytest.raises(ValueError, match="can't be completed: no token leads on") as info:
            ask()
        assert "\n" not in str(info.value)
    assert not matcher.is_finished
