"""The Python API as a user sees it: generate, beam_search and from_model."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from helpers.llms import GREEDY, SMALL, MakeLLM, all_free, samples
from helpers.tiny_models import unpaged_greedy

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.outputs import BeamSearchOutput


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(num_kv_blocks=128, max_num_batched_tokens=256, check_invariants=True)


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

    def step(self, wanted: object) -> list[BeamSearchOutput]:
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
