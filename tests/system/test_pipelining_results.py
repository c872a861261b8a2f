"""Nobody's tokens change because steps overlap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from helpers.pipelined import END, OVERLAPPING, SMALL, Output, assert_idle, make_engine, run
from helpers.tiny_models import make_model

from mlx_paged import BeamSearchParams, SamplingParams
from mlx_paged.config import PIPELINING
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import BeamSearchOutput


@pytest.fixture(scope="module")
def worded_model(tokenizer: Any) -> nn.Module:
    return make_model("llama", **SMALL, vocab_size=len(tokenizer))


def mixed_requests(tokenizer: Any) -> list[tuple[Any, SamplingParams | BeamSearchParams, bool]]:
    """Prompts, parameters and whether they are streamed: every kind of request and of ending, at random times."""
    often_ends = {END: 9.0}
    params = [
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(seed=1, max_tokens=40, logit_bias=often_ends),
        SamplingParams(seed=2, max_tokens=40, n=4, logit_bias=often_ends, logprobs=3),
        SamplingParams(seed=3, max_tokens=25, n=2, stop_token_ids=list(range(0, len(tokenizer), 9))),
        SamplingParams(seed=4, max_tokens=30, stop=["the", "a", "e"], temperature=1.5),
        SamplingParams(seed=5, max_tokens=1, n=3),
        SamplingParams(seed=6, max_tokens=15, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3),
        SamplingParams(seed=7, max_tokens=12, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, logprobs=0),
        SamplingParams(seed=8, max_tokens=2, logit_bias=often_ends),
        SamplingParams(max_tokens=9, n=2),
        SamplingParams(temperature=0, max_tokens=8, logit_bias={END: 1e4}, ignore_eos=True),
        BeamSearchParams(beam_width=3, max_tokens=10),
        BeamSearchParams(beam_width=2, max_tokens=1),
    ]
    prompts: list[Any] = [[30 + 7 * i + j % 5 for j in range(1 + 11 * i % 37)] for i in range(len(params))]
    prompts[4] = "Anna had a"
    requests = [
        (prompt, each, stream)
        for prompt, each in zip(prompts, params, strict=True)
        for stream in (False, True)
        if not (stream and isinstance(each, BeamSearchParams))
    ]
    return requests[::2] + requests[1::2]


def serve(engine: Engine, requests: list[tuple[Any, Any, bool]]) -> list[Any]:
    """Requests that come a few at a time; what became of each, deltas put together."""
    outputs: list[Output] = []
    for i, (prompt, params, stream) in enumerate(requests):
        engine.add_request(prompt, params, stream=stream)
        if i % 3 == 2:
            outputs += engine.step()
    outputs += run(engine)
    results: list[Any] = [[] for _ in requests]
    for output in outputs:
        if isinstance(output, BeamSearchOutput):
            results[output.request_id] = [(one.token_ids, one.text, one.score) for one in output.sequences]
            continue
        samples = results[output.request_id] = results[output.request_id] or [([], "", [], None)] * len(output.outputs)
        samples += [([], "", [], None)] * (len(output.outputs) - len(samples))
        for i, sample in enumerate(output.outputs):
            tokens, text, logprobs, _ = samples[i]
            end = (sample.finish_reason, sample.stop_reason, sample.cumulative_logprob)
            samples[i] = (tokens + sample.token_ids, text + sample.text, logprobs + (sample.logprobs or []), end)
    return results


def assert_same(found: Any, expected: Any) -> None:
    """Equal, but for rounding in log-probabilities."""
    assert type(found) is type(expected)
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), (found, expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, dict):
        assert_same(sorted(found.items()), sorted(expected.items()))
    else:
        assert found == expected


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 5},
        {"num_kv_blocks": 20, "max_num_batched_tokens": 16},
        {"num_kv_blocks": 24, "swap_space": "8MB", "allocator": "buddy"},
        {"prefix_caching": False, "block_size": 1, "num_kv_blocks": 90},
    ],
    ids=["roomy", "few tokens a step", "few blocks", "swap", "no prefix cache"],
)
def test_a_mixed_workload_gives_the_same_in_all_modes(
    worded_model: nn.Module, tokenizer: Any, config: dict[str, Any]
) -> None:
    requests = mixed_requests(tokenizer)
    results = {}
    for pipelining in ("off", *OVERLAPPING):  # "auto" is one of them
        engine = make_engine(worded_model, tokenizer, pipelining=pipelining, **config)
        results[pipelining] = serve(engine, requests)
        assert_idle(engine)
        if config.get("num_kv_blocks", 90) < 90:
            assert engine.stats().num_preemptions > 0
    ends = [end for request in results["off"] for (*_, end) in request if isinstance(end, tuple)]
    assert {reason for reason, _, _ in ends} == {"stop", "length"}
    assert {type(stop) for reason, stop, _ in ends if reason == "stop"} == {int, str, type(None)}
    for pipelining in OVERLAPPING:
        assert_same(results[pipelining], results["off"])


def test_a_grammar_is_kept_in_all_modes(worded_model: nn.Module, tokenizer: Any) -> None:
    pytest.importorskip("llguidance")
    asked = [SamplingParams(seed=i, max_tokens=30, regex=r"[a-c]{2,5}( cat| dog)?", n=1 + i % 2) for i in range(4)]
    requests = [
        *((f"Anna {i}", params, i == 3) for i, params in enumerate(asked)),
        ("Once", SamplingParams(seed=9, max_tokens=20), False),
        ("Once", dataclasses.replace(asked[0], logit_bias={END: 5.0}), False),
    ]
    results = [
        serve(make_engine(worded_model, tokenizer, pipelining=pipelining), requests) for pipelining in PIPELINING
    ]
    for result in results:
        assert_same(result, results[-1])


@pytest.mark.parametrize("with_beams", [False, True], ids=["samples", "samples and beams"])
@pytest.mark.parametrize("pipelining", ["off", *OVERLAPPING])
def test_an_abort_while_a_step_is_under_way_leaves_the_others_and_nothing_else(
    tiny_model: Callable[..., nn.Module], pipelining: str, with_beams: bool
) -> None:
    def requests(engine: Engine) -> list[int]:
        kinds: list[Any] = [SamplingParams(seed=1, n=3, max_tokens=9), SamplingParams(seed=2, max_tokens=9)]
        if with_beams:  # their steps are looked at before the next one is made
            kinds[1] = BeamSearchParams(beam_width=3, max_tokens=9)
        return [engine.add_request([3 + i] * 6, kinds[i % 2]) for i in range(4)]

    def tokens_of(outputs: list[Output]) -> dict[int, list[list[int]]]:
        return {
            output.request_id: [one.token_ids for one in getattr(output, "outputs", None) or output.sequences]
            for output in outputs
        }

    model = tiny_model("llama", **SMALL)
    calm = make_engine(model, pipelining="off")
    requests(calm)
    expected = tokens_of(run(calm))
    for num_steps in range(5):
        engine = make_engine(model, pipelining=pipelining)
        ids = requests(engine)
        outputs = [output for _ in range(num_steps) for output in engine.step()]
        for request_id in ids[:2]:
            aborted = engine.abort(request_id)
            assert aborted is not None and aborted.finished
        requests(engine)  # they take the rows for which tokens are still being drawn
        outputs += run(engine)
        found = tokens_of(outputs)
        assert sorted(found) == [*ids[2:], *range(4, 8)]
        assert all(found[i] == expected[i % 4] for i in found)
        assert_idle(engine)
