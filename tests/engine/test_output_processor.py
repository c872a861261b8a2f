"""How requests end, by length, stop tokens and stop strings, and what their outputs say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.engines import END, GREEDY, MakeEngine, complete, is_idle, run, steered, tokens_of

from mlx_paged import SamplingParams


def test_max_tokens_ends_a_request_by_length(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for count in (1, 4, 5):
        output = complete(engine, [1, 2, 3], SamplingParams(temperature=0, max_tokens=count)).outputs[0]
        assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (count, "length", None)
        assert output.text == ""
    assert is_idle(engine)


def test_without_max_tokens_a_request_runs_to_the_end_of_the_context_or_the_pool(make_engine: MakeEngine) -> None:
    output = complete(make_engine(max_model_len=21), [1] * 6, SamplingParams(temperature=0)).outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (15, "length")
    output = complete(make_engine(num_kv_blocks=5), [1] * 6, SamplingParams(temperature=0)).outputs[0]
    assert len(output.token_ids) == 5 * 4 - 6 + 1  # the last token needs no slot


def test_a_larger_max_tokens_than_the_context_allows_is_cut_to_it(make_engine: MakeEngine) -> None:
    output = complete(make_engine(max_model_len=10), [1] * 6, SamplingParams(temperature=0, max_tokens=1000)).outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (4, "length")


def test_a_stop_token_ends_the_request_and_stays_in_its_token_ids(make_engine: MakeEngine) -> None:
    engine = make_engine()
    plain = tokens_of(complete(engine, [9, 8, 7], SamplingParams(temperature=0, max_tokens=12)))
    stop = plain[5]
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[96, stop])
    output = complete(engine, [9, 8, 7], params).outputs[0]
    assert output.token_ids == plain[: plain.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_the_end_token_stops_with_no_further_reason_and_no_text_of_its_own(
    make_engine: MakeEngine, tokenizer: Any
) -> None:
    engine = make_engine(tokenizer)
    output = complete(engine, "Anna", steered(END, max_tokens=5)).outputs[0]
    assert output.token_ids == [END]
    assert (output.text, output.finish_reason, output.stop_reason) == ("", "stop", None)


@pytest.mark.parametrize("stream", [False, True])
def test_the_text_ends_before_a_stop_token_and_the_token_ids_with_it(
    stream: bool, make_engine: MakeEngine, tokenizer: Any
) -> None:
    engine, words = make_engine(tokenizer), tokenizer.encode("was called Pebble and went home")
    each_once = {"max_tokens": len(words), "repetition_penalty": 1e6}
    plain = complete(engine, "Anna", steered(*words, **each_once)).outputs[0]
    for count in (1, 3, len(words)):
        params = steered(*words, **each_once, stop_token_ids=[plain.token_ids[count - 1]])
        engine.add_request("Anna", params, stream=stream)
        pieces = [output.outputs[0] for _ in range(20) for output in engine.step()]
        assert [token for piece in pieces for token in piece.token_ids] == plain.token_ids[:count]
        text = "".join(piece.text for piece in pieces)
        assert plain.text.startswith(text)
        num_left_out = len(plain.text) - len(text)
        assert num_left_out == len(tokenizer.decode(plain.token_ids)) - len(
            tokenizer.decode(plain.token_ids[: count - 1])
        )
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", plain.token_ids[count - 1])


def test_a_token_that_stops_is_the_reason_even_if_no_other_was_allowed(make_engine: MakeEngine, tokenizer: Any) -> None:
    engine = make_engine(tokenizer)
    for params, reason in (
        (steered(END, max_tokens=1), None),
        (steered(9, max_tokens=1, stop_token_ids=[9]), 9),
        (steered(END, max_tokens=1, stop_token_ids=[END], ignore_eos=True), END),
    ):
        output = complete(engine, "Anna", params).outputs[0]
        assert (output.finish_reason, output.stop_reason) == ("stop", reason)


def test_ignore_eos_runs_on_past_the_end_token(make_engine: MakeEngine, tokenizer: Any) -> None:
    output = complete(make_engine(tokenizer), "Anna", steered(END, max_tokens=5, ignore_eos=True)).outputs[0]
    assert output.token_ids == [END] * 5
    assert output.finish_reason == "length"


def test_with_ignore_eos_an_explicit_stop_token_still_stops(make_engine: MakeEngine, tokenizer: Any) -> None:
    params = steered(END, max_tokens=5, ignore_eos=True, stop_token_ids=[END])
    output = complete(make_engine(tokenizer), "Anna", params).outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([END], "stop", END)


def test_a_stop_string_across_tokens_ends_the_text_before_it_and_keeps_the_tokens(
    make_engine: MakeEngine, tokenizer: Any
) -> None:
    engine = make_engine(tokenizer)
    plain = complete(engine, "Anna went", SamplingParams(seed=3, max_tokens=30, ignore_eos=True)).outputs[0]
    border = len(tokenizer.decode(plain.token_ids[:11]))  # the stop string has two characters on either side
    stop = tokenizer.decode(plain.token_ids)[border - 2 : border + 2]
    assert stop in plain.text
    params = SamplingParams(seed=3, max_tokens=30, ignore_eos=True, stop=[stop, "never there"])
    output = complete(engine, "Anna went", params).outputs[0]
    assert output.text == plain.text[: plain.text.find(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == plain.token_ids[: len(output.token_ids)]
    assert stop in tokenizer.decode(output.token_ids)
    assert len(output.token_ids) < 30
    assert is_idle(engine)


# -- logprobs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 5, 97])
def test_logprobs_hold_the_sampled_token_and_the_k_best(make_engine: MakeEngine, k: int) -> None:
    params = SamplingParams(seed=1, temperature=3.0, max_tokens=8, logprobs=k)
    output = complete(make_engine(), [4, 5, 6], params).outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == 8
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert token in entry
        assert len(entry) in ({k} if k == 97 else {k, k + 1})
        others = sorted((value for other, value in entry.items() if other != token), reverse=True)
        assert len(entry) == k or not others or entry[token] <= others[-1] + 1e-6
    total = sum(entry[token] for token, entry in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total, abs=1e-5)
    if k == 97:
        assert sum(np.exp(list(output.logprobs[0].values()))) == pytest.approx(1, abs=1e-4)


def test_without_logprobs_there_are_none_and_the_sum_is_still_known(make_engine: MakeEngine) -> None:
    engine = make_engine()
    plain = complete(engine, [4, 5], GREEDY).outputs[0]
    with_them = complete(engine, [4, 5], SamplingParams(temperature=0, max_tokens=6, logprobs=2)).outputs[0]
    assert plain.logprobs is None
    assert plain.cumulative_logprob == pytest.approx(with_them.cumulative_logprob, abs=1e-4)
    assert plain.cumulative_logprob < 0


def test_rows_with_different_logprobs_share_a_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ids = [engine.add_request([7, 8], SamplingParams(temperature=0, max_tokens=3, logprobs=k)) for k in (None, 0, 4, 2)]
    finished = run(engine)
    sizes = [[len(entry) for entry in finished[i].outputs[0].logprobs or []] for i in ids]
    assert sizes == [[], [1] * 3, [4] * 3, [2] * 3]


# -- streams ------------------------------------------------------------------------------------------------------


def test_a_request_without_stream_is_returned_once_when_finished(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request([1, 2], GREEDY)
    outputs = [output for _ in range(7) for output in engine.step()]
    assert [output.finished for output in outputs] == [True]
    assert not engine.has_unfinished()


def test_a_streamed_request_returns_a_delta_per_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole = complete(engine, [1, 2], SamplingParams(temperature=0, max_tokens=5, logprobs=2)).outputs[0]
    engine.add_request([1, 2], SamplingParams(temperature=0, max_tokens=5, logprobs=2), stream=True)
    deltas = [output for _ in range(6) for output in engine.step()]  # those of a step come with the next
    assert [output.finished for output in deltas] == [False] * 4 + [True]
    assert [output.outputs[0].token_ids for output in deltas] == [[token] for token in whole.token_ids]
    logprobs = [entry for output in deltas for entry in output.outputs[0].logprobs or []]
    assert [list(entry) for entry in logprobs] == [list(entry) for entry in whole.logprobs or []]
    assert deltas[-1].outputs[0].cumulative_logprob == pytest.approx(whole.cumulative_logprob, abs=1e-4)


def test_request_ids_count_up_and_outputs_name_them(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ids = [engine.add_request([i + 1], SamplingParams(temperature=0, max_tokens=1)) for i in range(3)]
    assert ids == [0, 1, 2]
    assert {i: output.prompt_token_ids for i, output in run(engine).items()} == {0: [1], 1: [2], 2: [3]}


def test_moments_of_a_request_come_in_order(make_engine: MakeEngine) -> None:
    metrics = complete(make_engine(), [1, 2], GREEDY).metrics
    assert metrics is not None
    moments = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert None not in moments
    assert moments == sorted(moments, key=float)  # type: ignore[arg-type]
