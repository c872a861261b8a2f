"""Streams: deltas that come to the whole, and nothing held by one that is closed."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.llms import GREEDY, MakeLLM, all_free, samples

from mlx_paged import SamplingParams


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [None, "e", "and the"])
def test_deltas_put_together_are_the_whole_result(make_llm: MakeLLM, tokenizer: Any, n: int, stop: str | None) -> None:
    llm = make_llm(tokenizer)
    params = SamplingParams(seed=11, n=n, max_tokens=25, logprobs=1, stop=stop)
    (whole,) = llm.generate("Anna had a", params)
    deltas = list(llm.stream("Anna had a", params))
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    logprobs = [list(map(set, one.logprobs or [])) for one in whole.outputs]
    for index, expected in enumerate(whole.outputs):
        parts = [one for delta in deltas for one in delta.outputs if one.index == index]
        assert "".join(one.text for one in parts) == expected.text
        assert [token for one in parts for token in one.token_ids] == expected.token_ids
        assert [set(entry) for one in parts for entry in one.logprobs or []] == logprobs[index]
        assert (parts[-1].finish_reason, parts[-1].stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert all_free(llm)


def test_a_stream_never_hands_out_text_that_a_stop_string_takes_back(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    plain = llm.generate("Anna had a", SamplingParams(seed=3, max_tokens=30, ignore_eos=True))[0].outputs[0].text
    stop = plain[12:18]
    params = SamplingParams(seed=3, max_tokens=30, ignore_eos=True, stop=stop)
    text = "".join(delta.outputs[0].text for delta in llm.stream("Anna had a", params))
    assert text == plain[: plain.find(stop)]


def test_closing_a_stream_frees_its_blocks(make_llm: MakeLLM) -> None:
    llm = make_llm()
    stream = llm.stream([1] * 10, SamplingParams(temperature=0, max_tokens=50))
    next(stream)
    next(stream)
    assert not all_free(llm)
    stream.close()  # type: ignore[attr-defined]
    assert all_free(llm)


def test_a_stream_that_is_never_begun_holds_nothing(make_llm: MakeLLM) -> None:
    llm = make_llm()
    stream = llm.stream([1] * 10, GREEDY)
    assert all_free(llm)
    del stream
    assert all_free(llm)


def test_a_bad_prompt_is_refused_before_the_stream_is_read(make_llm: MakeLLM) -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match="empty"):
        llm.stream([])
    with pytest.raises(ValueError, match="tokenizer"):
        llm.stream("text")
    assert all_free(llm)


def test_interleaved_streams_and_a_generate_between_them_lose_nothing(make_llm: MakeLLM) -> None:
    llm = make_llm()
    params = SamplingParams(temperature=0, max_tokens=10)
    prompts = [[1] * 5, [2] * 6, [3] * 7]
    expected = [samples(output)[0] for output in llm.generate(prompts, params)]
    first, second = llm.stream(prompts[0], params), llm.stream(prompts[1], params)
    taken: list[list[int]] = [[], []]
    for _ in range(3):
        taken[0] += next(first).outputs[0].token_ids
        taken[1] += next(second).outputs[0].token_ids
    (between,) = llm.generate([prompts[2]], params)
    for position, stream in enumerate((first, second)):
        for delta in stream:
            taken[position] += delta.outputs[0].token_ids
    assert taken == expected[:2]
    assert samples(between) == [expected[2]]
    assert all_free(llm)


def test_closing_one_stream_leaves_the_other(make_llm: MakeLLM) -> None:
    llm = make_llm()
    expected = samples(llm.generate([[2] * 6], GREEDY)[0])[0]
    doomed, survivor = llm.stream([1] * 5, GREEDY), llm.stream([2] * 6, GREEDY)
    next(doomed)
    tokens = next(survivor).outputs[0].token_ids
    doomed.close()  # type: ignore[attr-defined]
    for delta in survivor:
        tokens = tokens + delta.outputs[0].token_ids
    assert tokens == expected
    assert all_free(llm)
