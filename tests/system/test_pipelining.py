"""Steps overlap: nothing is copied for it, nobody's tokens change by it, and nothing is left of a step too many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.tiny_models import make_model
from mlx_lm.utils import load_tokenizer

from mlx_paged import LLM, BeamSearchParams, EngineConfig, SamplingParams
from mlx_paged.attention.backend import Backend
from mlx_paged.attention.reference import ReferenceBackend
from mlx_paged.cache.kv_cache import LayerShape, PagedKVCache
from mlx_paged.config import PIPELINING
from mlx_paged.engine.engine import Engine
from mlx_paged.models.patch import patch_model
from mlx_paged.outputs import BeamSearchOutput, RequestOutput
from mlx_paged.runner.warmup import may_submit_early

END = 4  # the demo tokenizer's end token
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
OVERLAPPING = ("build", "submit")
MEGABYTE = 1 << 20

Output = RequestOutput | BeamSearchOutput


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    return load_tokenizer(demo_folder, eos_token_ids=END)


def make_engine(model: nn.Module, tokenizer: Any = None, **config: Any) -> Engine:
    settings = {"block_size": 4, "num_kv_blocks": 200, "max_num_seqs": 16, "check_invariants": True}
    return LLM.from_model(model, tokenizer, **(settings | config)).engine


def run(engine: Engine) -> list[Output]:
    """Step until nothing is left; everything that was handed out."""
    outputs = []
    for _ in range(1000):
        if not engine.has_unfinished():
            return outputs
        outputs += engine.step()
    raise AssertionError("the engine does not come to an end")


def assert_idle(engine: Engine) -> None:
    """Nothing is held, of tokens, rows or blocks; and another step does nothing."""
    assert engine.step() == []
    stats = engine.stats()
    assert (stats.num_free_blocks, stats.kv_tokens) == (stats.num_blocks, 0)
    assert engine.block_manager.seq_ids == []
    assert engine._batch.sequences == [None] * engine.config.max_num_seqs
    assert engine._scheduler._num_reserved_rows == 0
    assert engine._in_flight is None and engine._steps.unfinished == []


# -- memory -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flat_model() -> nn.Module:
    """One layer, so that nothing stands between the reads of a step and the writes of the next."""
    return make_model("llama", num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32)


def steps_of_all_kinds(engine: Engine) -> int:
    """Decodes, chunks, forks, beams and preemptions; the bytes held at most beyond what was held before."""

    def serve() -> None:
        for length in (3, 40, 70):
            engine.add_request([length % 90] * length, SamplingParams(seed=1, max_tokens=24, n=2))
        engine.add_request([5, 6, 7], BeamSearchParams(beam_width=3, max_tokens=12))
        run(engine)

    manager = engine.block_manager
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    serve()
    manager.allocate("somebody else", range((manager.num_blocks - 14) * manager.block_size))
    serve()
    manager.free("somebody else")
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("pipelining", PIPELINING)
def test_no_step_of_a_one_layer_model_copies_the_pool(flat_model: nn.Module, pipelining: str) -> None:
    engine = make_engine(
        flat_model, num_kv_blocks=8192, block_size=16, max_num_batched_tokens=32, pipelining=pipelining,
        check_invariants=False,
    )  # fmt: skip
    layer_bytes = engine.stats().kv_bytes
    assert layer_bytes >= 32 * MEGABYTE
    assert steps_of_all_kinds(engine) < layer_bytes / 4
    stats = engine.stats()
    assert stats.num_preemptions > 3
    assert stats.num_cow_copies > 6


@pytest.mark.parametrize("pipelining", ["off", "build"])
def test_a_copy_of_the_pool_would_be_seen(
    flat_model: nn.Module, pipelining: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(flat_model, num_kv_blocks=8192, block_size=16, pipelining=pipelining, check_invariants=False)
    views = []
    write = Backend.write

    def write_with_a_view_around(self: Backend, k_cache: mx.array, *arguments: Any) -> None:
        view = k_cache[0]
        write(self, k_cache, *arguments)
        views[:] = [view]

    monkeypatch.setattr(Backend, "write", write_with_a_view_around)
    assert steps_of_all_kinds(engine) > engine.stats().kv_bytes / 4


# -- how far to go ----------------------------------------------------------------------------------------------


class FewOperations:
    """Stands for a patched model whose whole step is a write and two reads: the next write would come too early."""

    layers = [LayerShape(2, 32, 32, mx.float32)]  # noqa: RUF012
    groups = [None]  # noqa: RUF012
    stored_layers = [(layers[0], 0)]  # noqa: RUF012
    vocab_size = 8

    def __call__(self, cache: PagedKVCache, step: Any) -> mx.array:
        block_ids = step.groups[0].slot_block_ids
        rows = mx.zeros((step.token_ids.shape[0], 2, 32))
        ReferenceBackend().write(cache.keys[0], cache.values[0], step.groups[0], rows, rows)
        return sum(pool[block_ids].sum(axis=(1, 2))[:, :8] for pool in (cache.keys[0], cache.values[0]))


def test_a_write_that_would_copy_while_the_step_before_reads_is_found_out() -> None:
    assert not may_submit_early(FewOperations(), EngineConfig())  # type: ignore[arg-type]


def test_a_deep_model_may_be_submitted_early() -> None:
    model = patch_model(make_model("llama", num_hidden_layers=16, hidden_size=32, intermediate_size=32))
    assert may_submit_early(model, EngineConfig())


@pytest.mark.parametrize(("pipelining", "expected"), [("submit", True), ("build", False), ("off", False)])
def test_what_is_asked_for_is_done_without_trying(pipelining: str, expected: bool) -> None:
    assert may_submit_early(None, EngineConfig(pipelining=pipelining)) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize("pipelining", ["on", "", "Auto", None, True])
def test_another_word_than_the_four_is_refused(pipelining: Any) -> None:
    with pytest.raises(ValueError, match="pipelining must be one of auto, submit, build, off"):
        EngineConfig(pipelining=pipelining)


# -- the order of things ----------------------------------------------------------------------------------------


def order_of_events(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an engine does in four steps of one request: builds, gives to the device and reads, by step."""
    events: list[str] = []
    steps: list[Any] = []
    logits: list[mx.array] = []
    run_model, wait, async_eval = engine._runner.run, engine._wait, mx.async_eval

    def recorded_run(inputs: Any) -> mx.array:
        events.append(f"build {len(logits)}")
        logits.append(run_model(inputs))
        return logits[-1]

    def recorded_eval(*arrays: Any) -> None:
        events.extend(f"submit {i}" for i, array in enumerate(logits) if any(array is each for each in arrays))
        async_eval(*arrays)

    def recorded_wait(step: Any) -> Any:
        if step is not None:
            steps.append(step)
            events.append(f"read {[each is step.logits for each in logits].index(True)}")
        return wait(step)

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", recorded_run)
        patch.setattr(engine, "_wait", recorded_wait)
        patch.setattr(mx, "async_eval", recorded_eval)
        engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=3))
        run(engine)
    return events


@pytest.mark.parametrize(
    ("pipelining", "expected"),
    [
        ("off", "build 0, submit 0, read 0, build 1, submit 1, read 1, build 2, submit 2, read 2"),
        ("build", "build 0, submit 0, build 1, read 0, submit 1, build 2, read 1, submit 2, read 2"),
        ("submit", "build 0, submit 0, build 1, submit 1, read 0, build 2, submit 2, read 1, read 2"),
    ],
)
def test_the_next_step_is_built_before_the_tokens_of_the_one_before_are_read(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch, pipelining: str, expected: str
) -> None:
    engine = make_engine(tiny_model("llama", **SMALL), pipelining=pipelining)
    assert ", ".join(order_of_events(engine, monkeypatch)) == expected


# -- a step too many --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", PIPELINING)
def test_a_sequence_found_ended_one_step_late_costs_one_step_and_leaves_nothing(
    tiny_model: Callable[..., nn.Module], pipelining: str
) -> None:
    engine = make_engine(tiny_model("llama", **SMALL), pipelining=pipelining)
    engine.add_request([9, 8, 7], SamplingParams(temperature=0, max_tokens=12))
    (whole,) = run(engine)
    assert engine.stats().num_steps == 12, "max_tokens is known beforehand: no step too many"
    tokens = whole.outputs[0].token_ids
    for count in range(1, 12):
        if tokens[count - 1] in tokens[: count - 1]:
            continue
        before = engine.stats().num_steps
        params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[tokens[count - 1]], logprobs=0)
        engine.add_request([9, 8, 7], params)
        (output,) = run(engine)
        sample = output.outputs[0]
        assert (sample.token_ids, sample.finish_reason) == (tokens[:count], "stop")
        assert sample.logprobs is not None and len(sample.logprobs) == count
        assert sample.cumulative_logprob == pytest.approx(sum(each[t] for each, t in zip(
            sample.logprobs, sample.token_ids, strict=True)), abs=1e-5)  # fmt: skip
        assert engine.stats().num_steps - before == count + (pipelining != "off")
        assert_idle(engine)


@pytest.mark.parametrize("pipelining", OVERLAPPING)
def test_a_batch_that_ends_costs_one_step_more_however_many_end_in_it(
    tiny_model: Callable[..., nn.Module], pipelining: str
) -> None:
    def num_steps(pipelining: str) -> tuple[int, list[int]]:
        engine = make_engine(tiny_model("llama", **SMALL), pipelining=pipelining)
        for i in range(8):
            params = SamplingParams(seed=i, n=2, max_tokens=40, stop_token_ids=list(range(0, 97, 8)))
            engine.add_request([i + 1] * (i + 2), params)
        outputs = run(engine)
        assert_idle(engine)
        return engine.stats().num_steps, [len(s.token_ids) for output in outputs for s in output.outputs]

    plain, lengths = num_steps("off")
    overlapped, same_lengths = num_steps(pipelining)
    assert sorted(lengths) == sorted(same_lengths)
    assert len(set(lengths)) > 5, "the premise: they end at different times"
    assert plain <= overlapped <= plain + 1


@pytest.mark.parametrize("pipelining", OVERLAPPING)
def test_who_goes_on_from_what_a_step_too_many_left_behind_gets_the_same_as_anybody(
    tiny_model: Callable[..., nn.Module], pipelining: str
) -> None:
    def complete(engine: Engine, prompt: list[int], **values: Any) -> RequestOutput:
        engine.add_request(prompt, SamplingParams(seed=3, temperature=3.0, max_tokens=12, **values))
        (output,) = run(engine)
        return output  # type: ignore[return-value]

    model = tiny_model("llama", **SMALL)
    tokens = complete(make_engine(model), [9, 8, 7]).outputs[0].token_ids
    for count in range(2, 12):
        engine = make_engine(model, pipelining=pipelining)
        stopped = complete(engine, [9, 8, 7], stop_token_ids=[tokens[count - 1]]).outputs[0].token_ids
        assert stopped == tokens[: len(stopped)]
        turn = [9, 8, 7, *stopped, 50, 51]
        again, fresh = complete(engine, turn), complete(make_engine(model), turn)
        assert again.num_cached_tokens >= (3 + len(stopped) - 1) // 4 * 4
        assert again.outputs[0].token_ids == fresh.outputs[0].token_ids


# -- the same results -------------------------------------------------------------------------------------------


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


def test_a_form_is_kept_in_all_modes(worded_model: nn.Module, tokenizer: Any) -> None:
    pytest.importorskip("llguidance")
    forms = [SamplingParams(seed=i, max_tokens=30, regex=r"[a-c]{2,5}( cat| dog)?", n=1 + i % 2) for i in range(4)]
    requests = [
        *((f"Anna {i}", params, i == 3) for i, params in enumerate(forms)),
        ("Once", SamplingParams(seed=9, max_tokens=20), False),
        ("Once", dataclasses.replace(forms[0], logit_bias={END: 5.0}), False),
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
