"""Grammars are kept with tokenizers of every kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from helpers.grammars import closed, ids, is_int, walk
from helpers.other_tokenizers import byte_level, llama_style, unigram
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_paged import SamplingParams
from mlx_paged.sampling.grammar import GrammarCompiler


@pytest.mark.parametrize("make", [llama_style, unigram, byte_level])
def test_tokenizers_of_other_kinds_write_the_grammar_too(make: Callable[[], TokenizerWrapper]) -> None:
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
    assert len(tokens) == 7 + tokenizer.convert_ids_to_tokens(tokens[0]).startswith("▁")  # which decode leaves out
    assert tokenizer.decode(tokens) == "🙂日"


def test_a_space_at_the_start_of_a_grammar_stands_behind_the_one_that_decode_leaves_out() -> None:
    tokenizer = llama_style()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), tokenizer.eos_token_ids)
    space, th, spaced_the = tokenizer.convert_tokens_to_ids(["▁", "th", "▁the"])
    assert ids(compiler.matcher(SamplingParams(regex=" (the|at|x) x")).mask()) == [space]
    first = ids(compiler.matcher(SamplingParams(regex="(the|at|x) x")).mask())
    assert {space, th, spaced_the} < set(first)


def test_a_text_that_the_tokenizer_has_no_tokens_for_is_refused() -> None:
    tokenizer = unigram()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), tokenizer.eos_token_ids)
    with pytest.raises(ValueError, match="regex can't be used: no token leads on"):
        compiler.matcher(SamplingParams(regex="🙂"))
    matcher = compiler.matcher(SamplingParams(regex="[xy]🙂"))
    matcher.advance(tokenizer.convert_tokens_to_ids("x"))
    with pytest.raises(ValueError, match="can't be completed: no token leads on"):
        matcher.mask()
