"""Thinking before an answer: its budget, what closes it, and the grammar that holds behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.grammars import ids, walk
from helpers.scripted_model import make_scripted_model
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from mlx_paged import LLM, SamplingParams
from mlx_paged.sampling.grammar import GrammarCompiler
from mlx_paged.sampling.thinking import ThinkingMatcher, starts_thinking

HEAD = "<|im_start|>assistant\n"
SIZE = 640


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted_model(tmp_path_factory.mktemp("scripted"))


@pytest.fixture(scope="module")
def thinker(folder: Path) -> Any:
    return load(folder)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def matcher(tokenizer: Any, prompt: str, budget: int, regex: str | None = None) -> ThinkingMatcher:
    compiler = GrammarCompiler(tokenizer, SIZE, tokenizer.eos_token_ids)
    grammar = None if regex is None else compiler.matcher(SamplingParams(regex=regex))
    return ThinkingMatcher(tokenizer, encode(tokenizer, prompt), SIZE, budget, grammar)


def advance(matcher: ThinkingMatcher, token_ids: list[int]) -> ThinkingMatcher:
    for token_id in token_ids:
        assert token_id in ids(matcher.mask())
        matcher.advance(token_id)
    return matcher


def closing(tokenizer: Any) -> list[int]:
    return list(tokenizer.think_end_tokens)


def test_when_the_budget_is_used_up_only_the_closing_marker_may_come_and_then_anything(thinker: Any) -> None:
    think = [*thinker.think_start_tokens, *encode(thinker, "abc")]
    for prompt, begin in ((HEAD, think), (HEAD + "<think>\n", think[1:])):
        following = advance(matcher(thinker, prompt, 3), begin)
        assert ids(following.mask()) == closing(thinker)
        assert len(ids(advance(following, closing(thinker)).mask())) == SIZE
        assert not following.is_finished


def test_thinking_that_ends_by_itself_leaves_its_rest_to_later_thinking(thinker: Any) -> None:
    following = matcher(thinker, HEAD, 3)
    again = [*thinker.think_start_tokens, *encode(thinker, "c")]
    advance(
        following, [*thinker.think_start_tokens, *encode(thinker, "ab"), *closing(thinker), *encode(thinker, "xyz")]
    )
    assert ids(advance(following, again).mask()) == closing(thinker)


def test_with_no_budget_thinking_is_closed_where_it_begins(thinker: Any) -> None:
    assert ids(matcher(thinker, HEAD + "<think>", 0).mask()) == closing(thinker)
    assert ids(advance(matcher(thinker, HEAD, 0), list(thinker.think_start_tokens)).mask()) == closing(thinker)
    assert thinker.think_start_tokens[0] not in ids(matcher(thinker, HEAD, 0, "[ab]{4}").mask())


def test_a_grammar_holds_behind_thinking_and_an_answer_can_not_end_before_it(thinker: Any) -> None:
    following = matcher(thinker, HEAD, 100, "[ab]{4}")
    start = set(thinker.think_start_tokens)
    assert start < set(ids(following.mask())) and start.isdisjoint(
        ids(advance(following.copy(), encode(thinker, "a")).mask())
    )
    advance(following, [*start, *encode(thinker, "free x")])
    assert set(thinker.eos_token_ids).isdisjoint(ids(following.mask()))
    advance(following, [*closing(thinker), *encode(thinker, "\n\n")])
    assert not following.is_finished
    texts = {thinker.decode(walk(following.copy(), seed, thinker.eos_token_ids)) for seed in range(9)}
    assert len(texts) > 3 and all(set(text) <= {"a", "b"} and len(text) == 4 for text in texts)
    with pytest.raises(ValueError, match="does not allow"):
        following.advance(encode(thinker, "x")[0])


def test_markers_may_be_several_tokens(thinker: Any) -> None:
    wrapped = TokenizerWrapper(thinker._tokenizer)
    wrapped._think_start_tokens, wrapped._think_end_tokens = (tuple(encode(thinker, text)) for text in ("[[t", "]]."))
    following = matcher(wrapped, HEAD, 2, "[ab]{4}")
    start = list(wrapped._think_start_tokens)
    assert len(start) > 1 and start[0] in ids(following.mask())
    following.advance(start[0])
    for token_id in (*start[1:], *encode(thinker, "x")):
        assert ids(following.mask()) == [token_id] or token_id not in start
        following.advance(token_id)
    following.advance(encode(thinker, "y")[0])
    for token_id in wrapped._think_end_tokens:
        assert ids(following.mask()) == [token_id]
        following.advance(token_id)
    texts = {thinker.decode([token_id]) for token_id in ids(following.mask())}
    assert {"a", "b", "\n"} <= texts and set("".join(texts)) == {"a", "b", "\n"}


def test_a_marker_that_a_message_quotes_begins_no_thinking(thinker: Any) -> None:
    quoted = "<|im_start|>user\nWhat is <think>?<|im_end|>\n"
    for prompt, expected in (
        (quoted + HEAD, False),
        (quoted + HEAD + "<think>\nLet me", True),
        (HEAD + "<think>\n\n</think>\n\n", False),
        (HEAD, False),
    ):
        assert starts_thinking(thinker, encode(thinker, prompt)) is expected


def test_the_engine_closes_thinking_and_leaves_other_requests_alone(folder: Path) -> None:
    llm = LLM(folder, num_kv_blocks=100)
    prompt = HEAD + "<|run_exec_command|>"
    free, cut = SamplingParams(max_tokens=3), SamplingParams(max_tokens=3, max_thinking_tokens=1, n=2, temperature=0)
    outputs = llm.generate([prompt, prompt], [free, cut])
    assert outputs[0].outputs[0].text == "<think>I should run it."
    assert [sample.text for sample in outputs[1].outputs] == ["<think>I should </think>"] * 2
    (formed,) = llm.generate([prompt], SamplingParams(max_thinking_tokens=9, json_schema={"const": 7}, temperature=0))
    assert formed.outputs[0].text == "<think>I should run it.</think>7"


def test_a_model_that_does_not_mark_its_thinking_has_no_budget_for_it() -> None:
    with pytest.raises(ValueError, match="max_thinking_tokens needs a model that marks its thinking"):
        LLM(num_kv_blocks=20).generate(["a"], SamplingParams(max_thinking_tokens=1))
