"""The engine's steps: validation, joining and leaving, stops, aborts, interruptions, and what its counters mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer

from mlx_paged import LLM, SamplingParams
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import RequestOutput

END = 4  # the demo tokenizer's end token
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
GREEDY = SamplingParams(temperature=0, max_tokens=6)

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tiny_model: Callable[..., nn.Module]) -> MakeEngine:
    """An engine without tokenizer, in blocks of 4, that verifies itself after every step."""

    def make(tokenizer: Any = None, **config: Any) -> Engine:
        model = tiny_model("llama", **SMALL, **({"vocab_size": len(tokenizer)} if tokenizer else {}))
        config = {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8, "check_invariants": True} | config
        return LLM.from_model(model, tokenizer, **config).engine

    return make


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    return load_tokenizer(demo_folder, eos_token_ids=END)


def run(engine: Engine, most_steps: int = 500) -> dict[int, RequestOutput]:
    """Step until nothing is left; the finished outputs by request id."""
    finished = {}
    for _ in range(most_steps):
        if not engine.has_unfinished():
            return finished
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    raise AssertionError("the engine does not come to an end")


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def complete(engine: Engine, prompt: Any, params: SamplingParams) -> RequestOutput:
    request_id = engine.add_request(prompt, params)
    return run(engine)[request_id]


def is_idle(engine: Engine) -> bool:
    """Nothing queued, nothing held: every block free and every row of the batch given back."""
    stats = engine.stats()
    return (
        not engine.has_unfinished()
        and stats.num_free_blocks == stats.num_blocks
        and stats.kv_tokens == 0
        and stats.kv_waste == 0
        and engine.step() == []
    )


def steered(*tokens: int, **values: Any) -> SamplingParams:
    """Greedy parameters that leave only `tokens` to choose among."""
    return SamplingParams(temperature=0, logit_bias=dict.fromkeys(tokens, 1e4), **values)


# -- validation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "empty"),
        ("", "empty|tokenizer"),
        ([3, 97], "97 is outside the model's vocabulary of 97"),
        ([-1], "-1 is outside the model's vocabulary of 97"),
        ([1] * 33, "33 tokens.*32"),
        ("text", "no tokenizer"),
    ],
    ids=["no tokens", "no text", "above the vocabulary", "negative", "too long for the context", "text"],
)
def test_a_bad_prompt_is_refused_when_it_arrives_and_changes_nothing(
    make_engine: MakeEngine, prompt: Any, message: str
) -> None:
    engine = make_engine(max_model_len=32)
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt)
    assert is_idle(engine)
    assert engine.add_request([1, 2]) == 0


@pytest.mark.parametrize("prompt", [[1.0], ["a"], [True], [1, None]])
def test_a_prompt_of_other_things_than_token_ids_is_a_type_error(make_engine: MakeEngine, prompt: Any) -> None:
    with pytest.raises(TypeError, match="token ids"):
        make_engine().add_request(prompt)


def test_token_ids_may_be_numpy_integers(make_engine: MakeEngine) -> None:
    engine = make_engine()
    plain = complete(engine, [5, 6, 7], GREEDY)
    array = complete(engine, np.array([5, 6, 7], np.int32), GREEDY)
    assert tokens_of(array) == tokens_of(plain)
    assert all(type(token) is int for token in array.prompt_token_ids)


def test_a_prompt_that_can_never_fit_the_pool_is_refused_with_both_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=4)
    with pytest.raises(ValueError, match=r"17 tokens .* need 5 blocks of 4 tokens and the pool has 4"):
        engine.add_request([1] * 17)
    with pytest.raises(ValueError, match=r"10 tokens and 8 more need 5 blocks of 4 tokens and the pool has 4"):
        engine.add_request([1] * 10, SamplingParams(max_tokens=8))
    assert len(tokens_of(complete(engine, [1] * 10, SamplingParams(temperature=0, max_tokens=7)))) == 7
    assert len(tokens_of(complete(engine, [1] * 16, SamplingParams(temperature=0)))) == 1
    assert is_idle(engine)


def test_a_prompt_as_long_as_the_context_leaves_no_room_and_one_shorter_leaves_a_token(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=20)
    with pytest.raises(ValueError, match="20 tokens and the context is 20"):
        engine.add_request([1] * 20)
    output = complete(engine, [1] * 19, SamplingParams(temperature=0)).outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_parameters_that_the_engine_can_never_serve_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=3)
    for params, message in (
        (SamplingParams(n=4), "n=4 .* max_num_seqs is 3"),
        (SamplingParams(stop="x"), "tokenizer"),
        (SamplingParams(logit_bias={97: 1.0}), "97 is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_request([1], params)
    assert is_idle(engine)


# -- stops ------------------------------------------------------------------------------------------------------


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


def test_text_is_what_the_tokens_say(make_engine: MakeEngine, tokenizer: Any) -> None:
    for seed in range(4):
        params = SamplingParams(seed=seed, max_tokens=25, temperature=1.5, ignore_eos=True)
        output = complete(make_engine(tokenizer), "Anna had a", params).outputs[0]
        decoded = tokenizer.decode(output.token_ids)
        assert output.text in (decoded, decoded.removeprefix(" "))


# -- logprobs, bias, penalties ----------------------------------------------------------------------------------


def test_a_logit_bias_forces_a_token_and_leaves_the_models_logprobs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    output = complete(engine, [1, 2], steered(55, max_tokens=4, logprobs=0)).outputs[0]
    assert output.token_ids == [55] * 4
    assert output.logprobs is not None
    assert all(list(entry) == [55] and entry[55] < -0.01 for entry in output.logprobs)


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


def test_a_strong_repetition_penalty_lets_no_token_come_twice(make_engine: MakeEngine) -> None:
    candidates = [10, 20, 30, 40]
    output = complete(make_engine(), [1], steered(*candidates, max_tokens=4, repetition_penalty=1e6))
    assert sorted(tokens_of(output)) == candidates


@pytest.mark.parametrize("values", [(2.0, 0.0), (0.0, 1.5), (-0.5, 0.4)], ids=str)
def test_each_token_is_the_best_after_penalties_on_those_put_out_before(
    make_engine: MakeEngine, values: tuple[float, float]
) -> None:
    """Both penalties are subtracted, so the model's log-probabilities are as good as its logits to check them with."""
    presence, frequency = values
    params = SamplingParams(
        temperature=0, max_tokens=30, logprobs=97, presence_penalty=presence, frequency_penalty=frequency
    )
    output = complete(make_engine(), [1, 2, 3], params).outputs[0]
    assert output.logprobs is not None
    for position, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        before = output.token_ids[:position]
        penalised = {t: value - presence * (t in before) - frequency * before.count(t) for t, value in entry.items()}
        assert penalised[token] >= max(penalised.values()) - 1e-4
    assert output.token_ids != tokens_of(
        complete(make_engine(), [1, 2, 3], SamplingParams(temperature=0, max_tokens=30))
    )


def test_repetition_counts_the_prompt_and_the_other_penalties_do_not(make_engine: MakeEngine) -> None:
    bias = {10: 1000.0}
    for values, expected in (
        ({"repetition_penalty": 1e6}, False),
        ({"presence_penalty": 2.0, "frequency_penalty": 2.0}, True),
    ):
        params = SamplingParams(temperature=0, max_tokens=1, logit_bias=bias, **values)
        assert (tokens_of(complete(make_engine(), [10, 11], params)) == [10]) is expected


def test_penalties_go_on_over_many_distinct_tokens(make_engine: MakeEngine) -> None:
    """More distinct tokens than the counts have room for at first."""
    params = steered(*range(97), max_tokens=90, repetition_penalty=1e9)
    output = complete(make_engine(), [1, 2, 3], params)
    assert len(set(tokens_of(output))) == 90
    assert not {1, 2, 3} & set(tokens_of(output))


# -- joining and leaving ----------------------------------------------------------------------------------------


def test_requests_join_and_leave_between_steps_without_touching_each_others_tokens(make_engine: MakeEngine) -> None:
    prompts = [[i + 1] * (3 * i + 1) for i in range(6)]
    params = [SamplingParams(seed=i, max_tokens=3 + 2 * i) for i in range(6)]
    alone = [tokens_of(complete(make_engine(), prompt, p)) for prompt, p in zip(prompts, params, strict=True)]
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=5)
    finished: dict[int, RequestOutput] = {}
    for prompt, p in zip(prompts, params, strict=True):
        engine.add_request(prompt, p)
        for _ in range(2):
            finished |= {output.request_id: output for output in engine.step() if output.finished}
    finished |= run(engine)
    assert [tokens_of(finished[i]) for i in range(6)] == alone
    assert is_idle(engine)


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


# -- abort and interruption -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("n", [1, 3])
def test_a_request_can_be_aborted_at_any_moment(make_engine: MakeEngine, num_steps: int, n: int) -> None:
    engine = make_engine(max_num_batched_tokens=5)
    other = tokens_of(complete(make_engine(), [7] * 6, GREEDY))
    doomed = engine.add_request([3] * 12, SamplingParams(seed=1, n=n, max_tokens=9))
    survivor = engine.add_request([7] * 6, GREEDY)
    finished: dict[int, RequestOutput] = {}
    for _ in range(num_steps):
        finished |= {output.request_id: output for output in engine.step()}
    aborted = engine.abort(doomed)
    assert aborted is not None and aborted.finished
    assert {output.finish_reason for output in aborted.outputs} == {"abort"}
    assert engine.abort(doomed) is None
    finished |= run(engine)
    assert tokens_of(finished[survivor]) == other
    assert doomed not in finished
    assert is_idle(engine)


def test_an_aborted_request_gives_back_what_it_has_so_far(make_engine: MakeEngine) -> None:
    engine = make_engine()
    whole = tokens_of(complete(engine, [5, 6], GREEDY))
    request_id = engine.add_request([5, 6], GREEDY)
    for _ in range(4):
        engine.step()
    aborted = engine.abort(request_id)
    assert aborted is not None
    assert tokens_of(aborted) == whole[:3]


def test_aborting_an_id_that_was_never_given_is_a_key_error_and_an_ended_one_is_none(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for request_id in (0, -1, 7):
        with pytest.raises(KeyError, match=str(request_id)):
            engine.abort(request_id)
    complete(engine, [1], GREEDY)
    assert engine.abort(0) is None
    with pytest.raises(KeyError):
        engine.abort(1)


# -- counters ---------------------------------------------------------------------------------------------------


def test_an_idle_engine_holds_nothing_and_wastes_nothing(make_engine: MakeEngine) -> None:
    stats = make_engine().stats()
    assert (stats.num_blocks, stats.num_free_blocks, stats.block_size) == (64, 64, 4)
    assert (stats.kv_tokens, stats.kv_waste, stats.num_steps, stats.peak_used_blocks) == (0, 0.0, 0, 0)
    assert (stats.host_time_s, stats.model_time_s) == (0.0, 0.0)
    # K and V in 2 layers of 2 heads of 8 float32 values.
    assert stats.kv_bytes == 64 * 4 * 2 * 2 * 2 * 8 * 4


def test_counters_of_a_running_request_say_what_it_holds(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request([1] * 9, GREEDY)
    engine.step()
    stats = engine.stats()
    assert (stats.kv_tokens, stats.num_free_blocks, stats.num_steps) == (9, 61, 1)
    assert stats.kv_waste == pytest.approx(1 - 9 / 12)
    engine.step()
    assert engine.stats().kv_tokens == 10
    assert engine.stats().kv_waste == pytest.approx(1 - 10 / 12)
    run(engine)
    assert (engine.stats().kv_waste, engine.stats().num_free_blocks) == (0.0, 64)
    assert (engine.stats().num_steps, engine.stats().peak_used_blocks) == (6, 4)
    assert engine.stats().model_time_s > 0 < engine.stats().host_time_s


@pytest.mark.parametrize("pipelining", ["submit", "build", "off"])
def test_submitting_a_step_is_the_models_time_and_not_the_hosts(
    pipelining: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, now, submit = make_engine(pipelining=pipelining), [0.0], mx.async_eval

    def slow(*arrays: object) -> None:
        now[0] += 1.0
        submit(*arrays)

    monkeypatch.setattr("mlx_paged.engine.engine.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(mx, "async_eval", slow)
    complete(engine, [1] * 9, GREEDY)
    stats = engine.stats()
    assert (stats.host_time_s, stats.model_time_s) == (0.0, now[0])
    assert now[0] >= stats.num_steps


def test_the_second_identical_prompt_is_found_but_for_its_last_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = complete(engine, list(range(18)), GREEDY)
    second = complete(engine, list(range(18)), GREEDY)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert tokens_of(first) == tokens_of(second)
    assert (engine.stats().prefix_query_tokens, engine.stats().prefix_hit_tokens) == (36, 16)


def test_without_prefix_caching_nothing_is_found(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_caching=False)
    complete(engine, list(range(18)), GREEDY)
    assert complete(engine, list(range(18)), GREEDY).num_cached_tokens == 0
    assert engine.stats().prefix_hit_tokens == 0


def test_what_was_generated_is_found_by_the_next_turn(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = list(range(10))
    first = complete(engine, prompt, SamplingParams(temperature=0, max_tokens=10))
    turn = prompt + tokens_of(first) + [50, 51]
    # The last token that was put out was never fed back: 19 tokens have K and V, 4 whole blocks of them.
    assert complete(engine, turn, GREEDY).num_cached_tokens == 16


def test_a_salt_shares_with_equal_salts_only(make_engine: MakeEngine) -> None:
    engine = make_engine()
    cached = []
    for salt in (None, "a", "b", "a", None):
        params = SamplingParams(temperature=0, max_tokens=2, cache_salt=salt)
        cached.append(complete(engine, list(range(12)), params).num_cached_tokens)
    assert cached == [0, 0, 0, 8, 8]


@pytest.mark.parametrize("prompt_len, copies", [(6, 3), (8, 0)])
def test_samples_copy_a_partly_filled_last_block_once_less_than_they_are(
    make_engine: MakeEngine, prompt_len: int, copies: int
) -> None:
    engine = make_engine()
    output = complete(engine, list(range(prompt_len)), SamplingParams(seed=5, n=4, max_tokens=6))
    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert engine.stats().num_cow_copies == copies
    assert is_idle(engine)


def test_samples_share_the_blocks_of_their_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request([2] * 40, SamplingParams(seed=5, n=4, max_tokens=6))
    engine.step()
    engine.step()
    stats = engine.stats()
    assert stats.kv_tokens == 40 + 4
    assert stats.num_blocks - stats.num_free_blocks == 10 + 4


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_pool_that_just_fits_the_longest_request_preempts_and_changes_no_token(
    make_engine: MakeEngine, prefix_caching: bool
) -> None:
    prompts = [[i + 1] * (4 + i) for i in range(5)]
    params = [SamplingParams(seed=i, max_tokens=14) for i in range(5)]
    roomy = make_engine()
    ids = [roomy.add_request(*pair) for pair in zip(prompts, params, strict=True)]
    expected = [tokens_of(output) for _, output in sorted(run(roomy).items())]
    assert roomy.stats().num_preemptions == 0
    tight = make_engine(num_kv_blocks=6, prefix_caching=prefix_caching)
    assert [tight.add_request(*pair) for pair in zip(prompts, params, strict=True)] == ids
    assert [tokens_of(output) for _, output in sorted(run(tight).items())] == expected
    assert tight.stats().num_preemptions > 0
    assert is_idle(tight)


def test_compaction_between_steps_changes_no_token(make_engine: MakeEngine) -> None:
    def serve(engine: Engine, compact: bool) -> tuple[list[list[int]], int]:
        for i in range(4):
            engine.add_request([i + 1] * (5 + i), SamplingParams(seed=i, n=2, max_tokens=4 + 3 * i))
        finished: dict[int, RequestOutput] = {}
        moved = 0
        while engine.has_unfinished():
            finished |= {output.request_id: output for output in engine.step()}
            if compact:
                moved += engine.compact()
        return [one.token_ids for _, output in sorted(finished.items()) for one in output.outputs], moved

    plain, _ = serve(make_engine(), compact=False)
    compacted, moved = serve(make_engine(), compact=True)
    assert moved > 0, "the premise: requests that end leave holes"
    assert compacted == plain
