"""The Python API: generate, stream, chat and from_model, as a user sees them."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.tiny_models import unpaged_greedy
from mlx_lm.utils import load_tokenizer

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.outputs import BeamSearchOutput, RequestOutput

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
GREEDY = SamplingParams(temperature=0, max_tokens=8)

MakeLLM = Callable[..., LLM]


@pytest.fixture
def make_llm(tiny_model: Callable[..., nn.Module]) -> MakeLLM:
    """An LLM over a tiny random model, in blocks of 4, that verifies itself after every step."""

    def make(tokenizer: Any = None, **config: Any) -> LLM:
        model = tiny_model("llama", **SMALL, **({"vocab_size": len(tokenizer)} if tokenizer else {}))
        config = {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8, "check_invariants": True} | config
        return LLM.from_model(model, tokenizer, **config)

    return make


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    return load_tokenizer(demo_folder, eos_token_ids=4)


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(num_kv_blocks=128, max_num_batched_tokens=256, check_invariants=True)


def samples(output: RequestOutput) -> list[list[int]]:
    return [one.token_ids for one in output.outputs]


def all_free(llm: LLM) -> bool:
    stats = llm.stats()
    return stats.num_free_blocks == stats.num_blocks and not llm.engine.has_unfinished() and not llm._outputs


# -- generate ---------------------------------------------------------------------------------------------------


def test_no_prompts_give_no_outputs(make_llm: MakeLLM) -> None:
    assert make_llm().generate([]) == []


def test_outputs_come_in_the_order_of_the_prompts_whatever_finishes_first(make_llm: MakeLLM) -> None:
    prompts = [[i + 1] * (1 + i % 3) for i in range(12)]
    params = [SamplingParams(temperature=0, max_tokens=12 - i) for i in range(12)]
    outputs = make_llm().generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(samples(output)[0]) for output in outputs] == [12 - i for i in range(12)]
    assert all(output.finished for output in outputs)


def test_a_single_prompt_may_come_without_a_list_around_it(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    (from_ids,) = llm.generate(tokenizer.encode("Anna had"), GREEDY)
    (from_text,) = llm.generate("Anna had", GREEDY)
    assert samples(from_ids) == samples(from_text)
    assert (from_ids.prompt, from_text.prompt) == (None, "Anna had")
    assert from_text.prompt_token_ids == tokenizer.encode("Anna had")


def test_greedy_tokens_are_those_of_the_unpaged_model(make_llm: MakeLLM, tiny_model: Callable[..., nn.Module]) -> None:
    prompt = [5, 9, 2, 7, 30]
    expected = unpaged_greedy(tiny_model("llama", **SMALL), prompt, 8)
    assert min(expected.margins) > 1e-3, "the premise: no near-ties"
    assert samples(make_llm().generate(prompt, GREEDY)[0]) == [expected.token_ids]


BAD_PROMPTS: list[tuple[Any, str]] = [
    ([], "empty"),
    ([1, 97], "97"),
    ([1] * 300, "300"),
    ("text", "tokenizer"),
]


@pytest.mark.parametrize("bad, message", BAD_PROMPTS, ids=["empty", "outside the vocabulary", "too long", "text"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_bad_prompt_among_good_ones_stops_all_before_anything_runs(
    make_llm: MakeLLM, bad: Any, message: str, position: int
) -> None:
    llm = make_llm()
    prompts: list[Any] = [[1, 2], [3, 4]]
    prompts.insert(position, bad)
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, SamplingParams(max_tokens=2))
    assert all_free(llm)
    assert llm.stats().num_steps == 0
    assert len(llm.generate([[1, 2], [3, 4]], GREEDY)) == 2


@pytest.mark.parametrize("num_params", [0, 1, 3])
def test_lists_of_unequal_length_are_refused_with_both_numbers(make_llm: MakeLLM, num_params: int) -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match=f"2 prompts but {num_params} sampling parameters"):
        llm.generate([[1], [2]], [GREEDY] * num_params)
    assert llm.stats().num_steps == 0


def test_text_without_a_tokenizer_is_refused_naming_the_tokenizer(make_llm: MakeLLM) -> None:
    for call in (make_llm().generate, make_llm().stream):
        with pytest.raises(ValueError, match="tokenizer"):
            call("Once")


# -- beam search ------------------------------------------------------------------------------------------------


class BeamEngine:
    """Finishes the searches asked of it in the third step, the last one first."""

    def __init__(self, engine: Any) -> None:
        self.make_request = lambda prompt, params: engine.make_request(prompt, GREEDY) and (prompt, params)
        self.asked: list[tuple[list[int], BeamSearchParams]] = []
        self.aborted: list[int] = []
        self.num_steps = 0

    def submit(self, request: Any) -> int:
        self.asked.append(request)
        return len(self.asked) - 1

    def abort(self, request_id: int) -> None:
        self.aborted.append(request_id)

    def step(self) -> list[BeamSearchOutput]:
        self.num_steps += 1
        if self.num_steps < 3:
            return []
        return [BeamSearchOutput(i, None, prompt, [], True) for i, (prompt, _) in enumerate(self.asked)][::-1]


def test_searches_come_in_the_order_of_the_prompts_with_one_parameter_for_all_or_each(make_llm: MakeLLM) -> None:
    one, two = BeamSearchParams(beam_width=2), BeamSearchParams(beam_width=3)
    for prompts, params, expected in (
        ([[1], [2, 3]], None, [BeamSearchParams()] * 2),
        ([[1], [2, 3]], one, [one] * 2),
        ([[1], [2, 3]], [one, two], [one, two]),
        ([4, 5], one, [one]),
        ([], one, []),
    ):
        llm = make_llm()
        engine: Any = BeamEngine(llm.engine)
        llm.engine = engine
        found = llm.beam_search(prompts, params)
        assert [output.prompt_token_ids for output in found] == [prompt for prompt, _ in engine.asked]
        assert [p for _, p in engine.asked] == expected
        assert engine.aborted == [] and not llm._outputs


def test_nothing_is_searched_if_one_prompt_or_parameter_is_bad(make_llm: MakeLLM) -> None:
    llm = make_llm()
    engine: Any = BeamEngine(llm.engine)
    llm.engine = engine
    for prompt, message in BAD_PROMPTS:
        with pytest.raises(ValueError, match=message):
            llm.beam_search([[1, 2], prompt])
    with pytest.raises(ValueError, match="2 prompts but 1"):
        llm.beam_search([[1], [2]], [BeamSearchParams()])
    with pytest.raises(TypeError, match="must be BeamSearchParams, got SamplingParams"):
        llm.beam_search([[1]], SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be SamplingParams, got BeamSearchParams"):
        llm.generate([[1]], BeamSearchParams())  # type: ignore[arg-type]
    assert engine.asked == [] and engine.num_steps == 0


def test_a_beam_search_of_width_one_is_greedy_and_frees_its_blocks(make_llm: MakeLLM) -> None:
    llm = make_llm()
    expected = [samples(output)[0] for output in llm.generate([[5, 9, 2, 7], [3, 1]], GREEDY)]
    found = llm.beam_search([[5, 9, 2, 7], [3, 1]], BeamSearchParams(beam_width=1, max_tokens=8))
    assert [[one.token_ids for one in output.sequences] for output in found] == [[tokens] for tokens in expected]
    assert all_free(llm)


# -- progress ---------------------------------------------------------------------------------------------------


def test_progress_is_shown_on_a_terminal_only_and_counts_the_prompts_of_this_call(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    prompts = [[1] * 3, [2] * 4, [3] * 5]
    params = [SamplingParams(temperature=0, max_tokens=i + 2) for i in range(3)]
    expected = [samples(output) for output in make_llm().generate(prompts, params, progress=True)]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", Screen())
    llm = make_llm()
    begun = llm.stream([4] * 3, SamplingParams(temperature=0, max_tokens=3))
    next(begun)
    assert [samples(output) for output in llm.generate(prompts, params, progress=True)] == expected
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())  # type: ignore[attr-defined]
    assert "3/3 prompts, 9 tokens" in shown and "4/3" not in shown
    monkeypatch.setattr(sys, "stderr", Screen())
    llm.generate(prompts, params)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


# -- random streams ---------------------------------------------------------------------------------------------


def test_samples_of_a_seed_differ_from_each_other_and_repeat(make_llm: MakeLLM) -> None:
    llm = make_llm()
    params = SamplingParams(seed=7, n=4, max_tokens=12)
    first, again = (samples(llm.generate([3, 1, 4], params)[0]) for _ in range(2))
    assert first == again
    assert len({tuple(sample) for sample in first}) == 4
    other = samples(llm.generate([3, 1, 4], SamplingParams(seed=8, n=4, max_tokens=12))[0])
    assert not {tuple(sample) for sample in first} & {tuple(sample) for sample in other}


def test_fewer_samples_of_a_seed_are_the_first_ones(make_llm: MakeLLM) -> None:
    llm = make_llm()
    four, two = (samples(llm.generate([3, 1, 4], SamplingParams(seed=7, n=n, max_tokens=9))[0]) for n in (4, 2))
    assert two == four[:2]


@pytest.mark.parametrize(
    "config",
    [
        {"block_size": 1, "num_kv_blocks": 300},
        {"block_size": 3},
        {"block_size": 16},
        {"max_num_batched_tokens": 3},
        {"max_num_batched_tokens": 7, "block_size": 5},
        {"max_num_seqs": 3},
        {"num_kv_blocks": 7},
        {"num_kv_blocks": 7, "allocator": "fifo"},
        {"num_kv_blocks": 7, "allocator": "buddy"},
        {"num_kv_blocks": 7, "prefix_caching": False, "max_num_batched_tokens": 5},
        {"seed": 99},
    ],
    ids=str,
)
def test_seeded_tokens_do_not_depend_on_blocks_chunks_places_or_preemption(
    make_llm: MakeLLM, config: dict[str, Any]
) -> None:
    prompts = [[i + 1] * (2 + 3 * i) for i in range(5)]
    params = [SamplingParams(seed=i, n=1 + i % 3, max_tokens=6 + i) for i in range(5)]
    alone = [samples(make_llm().generate([prompt], p)[0]) for prompt, p in zip(prompts, params, strict=True)]
    llm = make_llm(**config)
    assert [samples(output) for output in llm.generate(prompts, params)] == alone
    if "num_kv_blocks" in config and config["num_kv_blocks"] == 7:
        assert llm.stats().num_preemptions > 0
    backwards = llm.generate(prompts[::-1], params[::-1])[::-1]
    assert [samples(output) for output in backwards] == alone
    assert all_free(llm)


def test_without_a_seed_successive_calls_differ_and_a_new_engine_repeats_them(make_llm: MakeLLM) -> None:
    params = SamplingParams(max_tokens=12)
    first, second = (
        [samples(llm.generate([2, 7], params)[0]) for _ in range(3)] for llm in (make_llm(seed=5), make_llm(seed=5))
    )
    assert first == second
    assert len({str(one) for one in first}) == 3
    assert samples(make_llm(seed=6).generate([2, 7], params)[0]) not in first


def test_equal_prompts_without_a_seed_are_sampled_apart(make_llm: MakeLLM) -> None:
    outputs = make_llm().generate([[2, 7]] * 6, SamplingParams(max_tokens=12))
    assert len({str(samples(output)) for output in outputs}) == 6


def test_mlx_own_random_state_is_neither_used_nor_changed(make_llm: MakeLLM) -> None:
    params = SamplingParams(seed=1, max_tokens=6)
    llm = make_llm()
    mx.random.seed(1)
    first, drawn = samples(llm.generate([2, 7], params)[0]), mx.random.uniform().item()
    mx.random.seed(1)
    assert mx.random.uniform().item() == drawn
    mx.random.seed(2)
    assert samples(llm.generate([2, 7], params)[0]) == first


# -- stream -----------------------------------------------------------------------------------------------------


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


# -- chat -------------------------------------------------------------------------------------------------------


def test_chat_applies_the_models_template(make_llm: MakeLLM, tokenizer: Any) -> None:
    llm = make_llm(tokenizer)
    messages = [{"role": "user", "content": "Where is the ball?"}]
    output = llm.chat(messages, GREEDY)
    text = "<|user|>Where is the ball?<|end|><|assistant|>"
    assert output.prompt_token_ids == tokenizer.encode(text, add_special_tokens=False)
    assert samples(output) == samples(llm.generate([output.prompt_token_ids], GREEDY)[0])


def test_the_second_turn_of_a_conversation_starts_from_the_blocks_of_the_first(
    make_llm: MakeLLM, tokenizer: Any
) -> None:
    llm = make_llm(tokenizer)
    messages = [{"role": "user", "content": "Anna had a red ball. Where is the ball?"}]
    first = llm.chat(messages, GREEDY)
    assert first.num_cached_tokens == 0
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": "And Anna?"},
    ]
    second = llm.chat(messages, GREEDY)
    assert second.num_cached_tokens >= len(first.prompt_token_ids) // 4 * 4


def test_an_empty_conversation_and_a_model_without_template_are_refused(make_llm: MakeLLM, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        make_llm(tokenizer).chat([])
    with pytest.raises(ValueError, match="chat template"):
        make_llm().chat([{"role": "user", "content": "Hi"}])


# -- from_model -------------------------------------------------------------------------------------------------


def test_the_model_goes_on_working_in_mlx_lm(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("qwen3", **SMALL)
    prompt = [5, 9, 2, 7]
    before = unpaged_greedy(model, prompt, 6)
    llm = LLM.from_model(model, block_size=4, num_kv_blocks=16)
    assert samples(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=6))[0]) == [before.token_ids]
    after = unpaged_greedy(model, prompt, 6)
    assert after == before
    assert samples(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=6))[0]) == [before.token_ids]


def test_two_engines_share_one_model_without_sharing_a_cache(make_llm: MakeLLM) -> None:
    one, two = make_llm(), make_llm(block_size=8)
    streams = [llm.stream([i + 4] * 9, GREEDY) for i, llm in enumerate((one, two))]
    expected = [samples(make_llm().generate([[i + 4] * 9], GREEDY)[0])[0] for i in range(2)]
    tokens: list[list[int]] = [[], []]
    for _ in range(8):
        for i, stream in enumerate(streams):
            tokens[i] += next(stream).outputs[0].token_ids
    assert tokens == expected


def test_an_unknown_option_or_a_bad_value_is_refused_by_name(make_llm: MakeLLM) -> None:
    with pytest.raises(TypeError, match="page_size"):
        make_llm(page_size=4)
    with pytest.raises(ValueError, match="block_size"):
        make_llm(block_size=0)
    with pytest.raises(ValueError, match=r"max_model_len=5000 .* 2048"):
        make_llm(max_model_len=5000)


# -- the bundled model ------------------------------------------------------------------------------------------


def test_the_bundled_model_tells_a_story(demo: LLM) -> None:
    (output,) = demo.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40))
    text = output.outputs[0].text
    assert len(text.split()) > 15
    assert "\ufffd" not in text
    assert all_free(demo)


def test_the_bundled_models_text_is_the_same_alone_and_in_a_batch(demo: LLM) -> None:
    prompts = ["Once upon a time", "Anna had a", "The ball is", "One day Tom went to the"]
    params = [SamplingParams(seed=i, max_tokens=20, n=2) for i in range(4)]
    together = [[one.text for one in output.outputs] for output in demo.generate(prompts, params)]
    alone = [
        [one.text for one in demo.generate(prompt, p)[0].outputs] for prompt, p in zip(prompts, params, strict=True)
    ]
    assert together == alone


def test_memory_is_described_in_one_line(make_llm: MakeLLM) -> None:
    line = make_llm().describe_memory()
    assert "64 blocks of 4 tokens" in line and "\n" not in line
