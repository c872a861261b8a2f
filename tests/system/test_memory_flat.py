"""Memory stays flat however many requests come, and requests may come from any thread."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.budget import budget
from helpers.tiny_models import make_model
from mlx_lm.utils import load_tokenizer

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import RequestMetrics

END = 4  # the demo tokenizer's end token
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}


def make_engine(model: nn.Module, tokenizer: Any = None, **config: Any) -> Engine:
    settings = {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8}
    return LLM.from_model(model, tokenizer, **(settings | config)).engine


# -- flat memory ------------------------------------------------------------------------------------------------


def add_request(engine: Engine, i: int) -> None:
    """The i-th request: all kinds in turn, prompts of random lengths that are partly the same."""
    prompt = [(i // 3 * 7 + j) % 97 for j in range(1 + 5 * i % 23)]
    kinds: list[SamplingParams | BeamSearchParams] = [
        SamplingParams(temperature=0, max_tokens=3),
        SamplingParams(seed=i, n=2, max_tokens=4, logprobs=2, cache_salt=f"salt {i}"),
        SamplingParams(seed=i, max_tokens=6, logit_bias={END: 8.0, i % 97: 1.0}, stop_token_ids=[i % 97]),
        SamplingParams(seed=i, max_tokens=4, repetition_penalty=1.3, frequency_penalty=0.2, stop=f"word {i}"),
        BeamSearchParams(beam_width=2, max_tokens=3),
        SamplingParams(temperature=0, max_tokens=2, priority=i % 3, top_k=5),
    ]
    params = kinds[i % len(kinds)]
    request_id = engine.add_request(prompt, params, stream=i % 4 == 1 and isinstance(params, SamplingParams))
    if i % 17 == 5:
        engine.step()
        engine.abort(request_id)


def measure(engine: Engine) -> tuple[int, int]:
    """Bytes of arrays and number of Python objects when nothing runs."""
    while engine.has_unfinished():
        engine.step()
    engine.step()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory(), len(gc.get_objects())


@pytest.mark.parametrize("pipelining", ["off", "submit"])
def test_memory_is_flat_from_the_tenth_request_to_the_last(demo_folder: Path, pipelining: str) -> None:
    tokenizer = load_tokenizer(demo_folder, eos_token_ids=END)
    model = make_model("llama", **SMALL, vocab_size=len(tokenizer))
    engine = make_engine(model, tokenizer, pipelining=pipelining)
    measured = []
    middle, last = 250, budget(400, 10_000)
    for i in range(last):
        add_request(engine, i)
        while len(engine._outputs.requests) > 12:
            engine.step()
        if i + 1 in (10, 100, middle, last):
            measured.append(measure(engine))
        prefixes = engine.block_manager._tree
        assert len(prefixes._node_of_block) <= 64
    num_nodes = len(prefixes._nodes)
    assert num_nodes <= 64 * 6, "the chain above each cached block: prompts are of at most 6 blocks"
    (first_bytes, _), (later_bytes, _), (_, middle_objects), (last_bytes, last_objects) = measured
    # What grows at first is what is made at first use: penalties, counts of tokens, the pool's prefixes.
    assert max(later_bytes, last_bytes) - first_bytes < 1 << 18
    assert last_bytes - later_bytes < 1 << 14
    assert last_objects - middle_objects < 60, "at least 150 requests left nothing"


def test_what_a_request_leaves_would_be_seen(tiny_model: Callable[..., nn.Module]) -> None:
    engine = make_engine(tiny_model("llama", **SMALL))
    _, before = measure(engine)
    kept = []
    for i in range(200):
        kept.append(engine.make_request([i % 97], SamplingParams(max_tokens=1)))
        engine.submit(kept[-1])
    assert measure(engine)[1] - before > 400


# -- threads ----------------------------------------------------------------------------------------------------


def test_requests_from_many_threads_are_all_served_under_ids_of_their_own(
    tiny_model: Callable[..., nn.Module],
) -> None:
    engine = make_engine(tiny_model("llama", **SMALL), check_invariants=True)
    num_threads, num_requests = 6, 25
    ids: list[list[int]] = [[] for _ in range(num_threads)]
    errors: list[BaseException] = []

    def add_many(thread: int) -> None:
        try:
            for i in range(num_requests):
                params = SamplingParams(temperature=0, max_tokens=1 + i % 3, n=1 + i % 2)
                ids[thread].append(engine.add_request([thread + 1, i + 1], params))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add_many, args=(thread,)) for thread in range(num_threads)]
    for thread in threads:
        thread.start()
    prompts: dict[int, list[int]] = {}
    while engine.has_unfinished() or any(thread.is_alive() for thread in threads):
        for output in engine.step():
            assert output.request_id not in prompts, "each of them once"
            prompts[output.request_id] = output.prompt_token_ids
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(i for own in ids for i in own) == list(range(num_threads * num_requests))
    for thread, own in enumerate(ids):
        assert own == sorted(own)
        assert [prompts[i] for i in own] == [[thread + 1, i + 1] for i in range(num_requests)]


def test_a_request_that_arrives_while_an_idle_engine_steps_is_taken_in_by_the_next_step(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama", **SMALL))
    schedule = engine._scheduler.schedule

    def schedule_while_another_thread_adds(*options: Any) -> Any:
        monkeypatch.undo()
        thread = threading.Thread(target=engine.add_request, args=([1, 2], SamplingParams(max_tokens=1)))
        thread.start()
        thread.join()
        return schedule(*options)

    monkeypatch.setattr(engine._scheduler, "schedule", schedule_while_another_thread_adds)
    assert engine.step() == []
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [output.request_id for output in outputs] == [0]


def test_a_request_that_arrives_while_the_engine_starts_over_is_served_once(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_model("llama", **SMALL), check_invariants=True)
    engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=2))
    reset = engine._runner.reset

    def failing(_: Any) -> mx.array:
        raise RuntimeError("out of memory")

    def reset_while_another_thread_adds(unfinished: list[mx.array]) -> None:
        reset(unfinished)
        thread = threading.Thread(target=engine.add_request, args=([4, 5], SamplingParams(max_tokens=2)))
        thread.start()
        thread.join()

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", failing)
        patch.setattr(engine._runner, "reset", reset_while_another_thread_adds)
        (failed,) = engine.step()
    assert failed.request_id == 0 and failed.outputs[0].finish_reason == "error"
    (output,) = [output for _ in range(6) for output in engine.step()]
    assert output.request_id == 1 and len(output.outputs) == 1


# -- moments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(seed=1, n=3, max_tokens=5),
    SamplingParams(temperature=0, max_tokens=5, stop_token_ids=list(range(0, 97, 2))),
    BeamSearchParams(beam_width=3, max_tokens=4),
    BeamSearchParams(beam_width=2, max_tokens=1),
], ids=["one token", "samples", "stop token", "beams", "beams of one token"])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("pipelining", ["off", "build"])
def test_every_kind_of_request_has_all_its_moments_in_order(
    tiny_model: Callable[..., nn.Module], params: SamplingParams | BeamSearchParams, stream: bool, pipelining: str
) -> None:
    if stream and isinstance(params, BeamSearchParams):
        pytest.skip("beams are not streamed")
    engine = make_engine(tiny_model("llama", **SMALL), max_num_batched_tokens=4, pipelining=pipelining)
    for i in range(3):
        engine.add_request([i + 1] * 10, params, stream=stream)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    final = [output.metrics for output in outputs if output.finished]
    assert len(final) == 3
    for metrics in final:
        assert isinstance(metrics, RequestMetrics)
        moments = [
            metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time
        ]  # fmt: skip
        assert None not in moments
        assert moments == sorted(moments, key=float)  # type: ignore[arg-type]
    scheduled = [metrics.first_scheduled_time for metrics in final]
    assert len(set(scheduled)) > 1, "with four tokens a step they can't start together"


def test_one_that_ends_before_its_turn_has_only_the_moments_that_came(tiny_model: Callable[..., nn.Module]) -> None:
    engine = make_engine(tiny_model("llama", **SMALL), max_num_seqs=1)
    engine.add_request([1], SamplingParams(max_tokens=3))
    waiting = engine.add_request([2], SamplingParams(max_tokens=3))
    engine.step()
    output = engine.abort(waiting)
    assert output is not None and output.metrics is not None
    assert output.metrics.first_scheduled_time is None and output.metrics.first_token_time is None
    assert output.metrics.finished_time is not None
