"""Rules of single outputs in the engine: fewest tokens, bad words, logits processors, and all of them with grammars."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.engines import END, GREEDY, MakeEngine, complete, is_idle, run, steered, tokens_of

from mlx_paged import LLM, SamplingParams

PROMPT = "Once upon a time"
ASKED = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_kv_blocks=400, max_num_seqs=8, check_invariants=True)


# -- min_tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fewest", [0, 1, 3, 5])
def test_end_tokens_and_stop_ids_are_not_drawn_before_the_fewest_tokens(
    make_engine: MakeEngine, tokenizer: Any, fewest: int
) -> None:
    engine = make_engine(tokenizer)
    wants_to_end = SamplingParams(temperature=0, logit_bias={END: 1e5, 7: 1e4, 9: 1e3}, stop_token_ids=[7])
    tokens = tokens_of(complete(engine, [5, 6], replace(wants_to_end, max_tokens=6, min_tokens=fewest)))
    assert tokens == [9] * fewest + [END]
    many = [7, *range(10, 60)]  # more than are compared with the tokens of all rows
    params = replace(wants_to_end, max_tokens=6, min_tokens=fewest, stop_token_ids=many)
    tokens = tokens_of(complete(engine, [5, 6], replace(params, logit_bias={7: 1e5, 9: 1e4})))
    assert tokens == [9] * fewest + [7]
    assert tokens_of(complete(engine, [5, 6], replace(params, ignore_eos=True))) == [END] * 6  # it ends nothing here
    assert is_idle(engine)


def test_a_row_that_has_its_fewest_tokens_has_no_rule_any_more(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request([1, 2, 3], replace(GREEDY, max_tokens=20, min_tokens=3))
    for _ in range(8):
        engine.step()
    assert engine._scheduler.running and not engine._batch.has_rules.any()
    run(engine)


def test_fewest_tokens_hold_after_a_preemption(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=9)
    params = replace(steered(7, 9, stop_token_ids=[7]), min_tokens=12, max_tokens=13, logit_bias={7: 1e4, 9: 1e3})
    ids = [engine.add_request([i] * 6, params) for i in range(3)]
    outputs = run(engine)
    assert engine.stats().num_preemptions > 0
    assert [tokens_of(outputs[i]) for i in ids] == [[9] * 12 + [7]] * 3


def test_where_all_tokens_end_the_output_too_early_the_request_ends_with_one_line(make_engine: MakeEngine) -> None:
    (sample,) = complete(make_engine(), [1], replace(GREEDY, stop_token_ids=range(97), min_tokens=1)).outputs
    assert sample.finish_reason == "error" and str(sample.stop_reason).endswith("leave no token that could come here")


def test_more_fewest_than_most_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^min_tokens=5 is more than max_tokens=4$"):
        SamplingParams(min_tokens=5, max_tokens=4)


# -- bad words --------------------------------------------------------------------------------------------------


def test_bad_words_do_not_appear_whatever_the_model_would_write(llm: LLM) -> None:
    free = llm.generate([PROMPT], ASKED)[0].outputs[0].text
    words = [word.strip(".,") for word in free.split()]
    for word in dict.fromkeys([words[1], words[3], words[4], words[-1]]):
        text = llm.generate([PROMPT], replace(ASKED, bad_words=[word]))[0].outputs[0].text
        assert word not in text and text != free and len(text) > 20


@pytest.mark.parametrize("seed", range(4))
def test_bad_words_are_found_across_the_borders_of_tokens(llm: LLM, seed: int) -> None:
    bad = ["th", "  he", "s a", "e ", "\u00e9"]
    params = SamplingParams(temperature=2.5, max_tokens=60, seed=seed, bad_words=bad, n=2)
    for sample in llm.generate([PROMPT], params)[0].outputs:
        assert len(sample.token_ids) == 60 or sample.finish_reason == "stop"
        assert not [word for word in bad if word.strip(" ") in sample.text and word.lstrip(" ") in sample.text]
    free = llm.generate([PROMPT], replace(params, bad_words=None))[0].outputs
    assert all("th" in sample.text or "he" in sample.text for sample in free)


def test_bad_words_need_a_tokenizer(make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match=r"^bad_words need a tokenizer, and this engine has none$"):
        make_engine().add_request([1], SamplingParams(bad_words=["a"]))


def test_where_no_token_is_left_the_request_ends_with_one_line(llm: LLM) -> None:
    letters = [chr(i) for i in range(33, 127)]
    pytest.importorskip("llguidance")
    params = SamplingParams(regex="ab", bad_words=["b", *letters], max_tokens=5)
    failed, fine = llm.generate([PROMPT] * 2, [params, ASKED])
    assert failed.outputs[0].finish_reason == "error"
    assert failed.outputs[0].stop_reason == (
        "bad_words, min_tokens and the form of this output leave no token that could come here"
    )
    assert fine.outputs[0].finish_reason in ("stop", "length")


def test_rules_and_grammars_hold_together(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(
        regex="(a|b|c)*", bad_words=["ab", "bc"], min_tokens=6, max_tokens=30, temperature=2, seed=1
    )
    for sample in llm.generate([PROMPT], replace(params, n=6))[0].outputs:
        assert set(sample.text) <= set("abc") and "ab" not in sample.text and "bc" not in sample.text
        assert len(sample.token_ids) >= 6


# -- logits processors ------------------------------------------------------------------------------------------


def test_a_processor_sees_the_tokens_so_far_and_its_row_and_says_what_to_draw_from(make_engine: MakeEngine) -> None:
    engine = make_engine()
    seen: list[list[int]] = []

    def count_up(tokens: list[int], row: mx.array) -> mx.array:
        assert row.shape == (97,) and row.dtype == mx.float32
        seen.append(list(tokens))
        tokens.append(-1)  # its own list
        return mx.where(mx.arange(97) == 10 + len(tokens), 0.0, -mx.inf)

    alone = tokens_of(complete(engine, [4, 5], GREEDY))
    first = engine.add_request([1, 2, 3], replace(GREEDY, temperature=1, logits_processors=[count_up], logprobs=0))
    second = engine.add_request([4, 5], GREEDY)
    outputs = run(engine)
    assert tokens_of(outputs[first]) == [11, 12, 13, 14, 15, 16]
    assert seen == [[*range(11, 11 + i)] for i in range(6)]
    assert tokens_of(outputs[second]) == alone
    logprobs = outputs[first].outputs[0].logprobs
    assert logprobs is not None and all(-100 < value < -0.01 for entry in logprobs for value in entry.values())


def test_each_processor_gets_what_the_one_before_made_and_masks_come_after(make_engine: MakeEngine) -> None:
    engine = make_engine()
    processors = [lambda tokens, row: np.zeros(97), lambda tokens, row: mx.where(mx.arange(97) == 7, mx.inf, row)]
    params = replace(GREEDY, max_tokens=4, logits_processors=processors, stop_token_ids=[7], min_tokens=2)
    assert tokens_of(complete(engine, [1, 2], params)) == [0, 0, 7]
    drawn = SamplingParams(temperature=2, top_p=0.5, seed=1, max_tokens=4, logits_processors=processors)
    assert tokens_of(complete(engine, [1, 2], drawn)) == [7] * 4


def _raises(tokens: list[int], row: mx.array) -> mx.array:
    if len(tokens) == 2:
        raise KeyError("nothing here")
    return row


@pytest.mark.parametrize(
    "process, reason",
    [
        (_raises, "KeyError: 'nothing here'"),
        (lambda tokens, row: row[:5], "ValueError: a logits processor must return a row of 97 logits, got shape (5,)"),
        (lambda tokens, row: row - mx.inf, "ValueError: the logits processors leave no token that could be drawn: "),
        (lambda tokens, row: None, "TypeError: "),
        (lambda row: row, "TypeError: "),
    ],
)
def test_what_a_processor_raises_ends_its_request_alone(make_engine: MakeEngine, process: Any, reason: str) -> None:
    engine = make_engine()
    alone = tokens_of(complete(engine, [4, 5], GREEDY))
    bad = engine.add_request([1, 2, 3], replace(GREEDY, temperature=1, n=3, seed=1, logits_processors=[process]))
    others = [engine.add_request([4, 5], GREEDY) for _ in range(2)]
    outputs = run(engine)
    for sample in outputs[bad].outputs:
        assert sample.finish_reason == "error" and str(sample.stop_reason).startswith(reason)
    assert [tokens_of(outputs[i]) for i in others] == [alone] * 2
    assert is_idle(engine)
