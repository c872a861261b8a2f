"""Grammars in the engine: every sample fits its grammar, and nobody else notices. Needs the extra `structured`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import mlx.nn as nn
import pytest

from mlx_paged import LLM, SamplingParams
from mlx_paged.outputs import CompletionOutput, RequestOutput

END = 4  # the demo tokenizer's end token

PROMPT = "Once upon a time"
PET: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "is_tame": {"type": "boolean"},
    },
    "required": ["kind", "name", "age", "is_tame"],
    "additionalProperties": False,
}
AS_A_PET = SamplingParams(json_schema=PET, max_tokens=80)
FREE = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(num_kv_blocks=400, max_num_seqs=8, check_invariants=True)


def is_pet(text: str) -> bool:
    pet = json.loads(text)
    return (
        list(pet) == ["kind", "name", "age", "is_tame"]
        and pet["kind"] in ("cat", "dog")
        and 1 <= len(pet["name"]) <= 6
        and type(pet["age"]) is int
        and 0 <= pet["age"] <= 30
        and isinstance(pet["is_tame"], bool)
    )


def samples(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    return [sample for output in outputs for sample in output.outputs]


def ran(outputs: list[RequestOutput]) -> list[tuple[list[int], str, str | None]]:
    """What can be compared of runs: tokens, text and reason of every sample."""
    return [(sample.token_ids, sample.text, sample.finish_reason) for sample in samples(outputs)]


def assert_pets(found: list[CompletionOutput]) -> None:
    assert [sample.text for sample in found if not is_pet(sample.text)] == []
    assert {(sample.finish_reason, sample.stop_reason) for sample in found} == {("stop", None)}


def is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    return not llm.engine.has_unfinished() and stats.num_free_blocks == stats.num_blocks


# -- grammars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1, 3])
def test_whatever_the_temperature_every_sample_fits_the_schema(llm: LLM, temperature: float) -> None:
    params = [replace(AS_A_PET, temperature=temperature, seed=seed) for seed in range(6)]
    found = samples(llm.generate([PROMPT] * 6, params))
    assert_pets(found)
    assert len({sample.text for sample in found}) == (1 if temperature == 0 else 6)
    assert is_idle(llm)


def test_the_samples_of_a_prompt_go_their_own_ways_through_the_grammar(llm: LLM) -> None:
    (output,) = llm.generate(PROMPT, replace(AS_A_PET, temperature=2, n=3, seed=1))
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert_pets(output.outputs)
    assert len({sample.text for sample in output.outputs}) == 3


def test_a_regex_and_a_grammar_are_kept_too(llm: LLM) -> None:
    regex = SamplingParams(regex=r"(red|blue){2}, [0-9]{3}!", seed=1, max_tokens=40)
    grammar = SamplingParams(grammar='start: "<" ("a" | "b")~2..4 ">" | "<" start ">"', seed=1, max_tokens=60)
    by_regex, by_grammar = samples(llm.generate([PROMPT] * 2, [regex, grammar]))
    assert re.fullmatch(r"(red|blue){2}, [0-9]{3}!", by_regex.text)
    assert re.fullmatch(r"<+[ab]{2,4}>+", by_grammar.text)
    assert (by_regex.finish_reason, by_grammar.finish_reason) == ("stop", "stop")


@pytest.mark.parametrize(
    "values", [{"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}], ids=lambda values: next(iter(values))
)
def test_top_k_top_p_and_min_p_choose_among_the_allowed_tokens(llm: LLM, values: dict[str, Any]) -> None:
    assert_pets(samples(llm.generate([PROMPT] * 2, replace(AS_A_PET, seed=4, **values))))


def test_penalties_and_a_bias_for_other_tokens_do_not_break_the_grammar(llm: LLM) -> None:
    bias = {END: 1e4} | dict.fromkeys(range(300, 400), 100.0)
    params = replace(AS_A_PET, seed=2, logit_bias=bias, repetition_penalty=1.3, presence_penalty=1)
    assert_pets(samples(llm.generate([PROMPT] * 2, params)))


def test_every_reported_token_is_one_of_the_sample_and_has_a_finite_logprob(llm: LLM) -> None:
    (sample,) = samples(llm.generate(PROMPT, replace(AS_A_PET, seed=2, logprobs=3)))
    assert_pets([sample])
    assert sample.logprobs is not None
    assert len(sample.logprobs) == len(sample.token_ids)
    for token, best in zip(sample.token_ids, sample.logprobs, strict=True):
        assert -1e4 < best[token] <= 0


# -- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_complete_grammar_ends_the_sequence_also_when_end_tokens_are_ignored(llm: LLM, ignore_eos: bool) -> None:
    for grammar in ({"json_schema": PET}, {"regex": "ab{0,3}"}, {"regex": "(ab)+"}):
        params = SamplingParams(**grammar, ignore_eos=ignore_eos, logit_bias={END: 1e4}, max_tokens=80, seed=3)
        (sample,) = samples(llm.generate(PROMPT, params))
        assert (sample.finish_reason, sample.stop_reason) == ("stop", None)
        assert is_pet(sample.text) if "json_schema" in grammar else re.fullmatch(grammar["regex"], sample.text)
        assert END not in sample.token_ids[:-1]


def test_a_grammar_that_is_complete_at_once_gives_an_empty_text(llm: LLM) -> None:
    (sample,) = samples(llm.generate(PROMPT, SamplingParams(regex="a{0}", max_tokens=5)))
    assert (sample.text, sample.finish_reason) == ("", "stop")


def test_max_tokens_cut_the_grammar_short_and_the_reason_says_so(llm: LLM) -> None:
    whole = samples(llm.generate(PROMPT, replace(AS_A_PET, temperature=0)))[0]
    cut = samples(llm.generate(PROMPT, replace(AS_A_PET, temperature=0, max_tokens=5)))[0]
    assert cut.finish_reason == "length"
    assert cut.token_ids == whole.token_ids[:5]
    with pytest.raises(ValueError):
        json.loads(cut.text)


def test_a_grammar_that_is_completed_by_the_last_token_has_stopped(llm: LLM) -> None:
    whole = samples(llm.generate(PROMPT, replace(AS_A_PET, temperature=0)))[0]
    needed = len([token for token in whole.token_ids if token != END])
    exact = samples(llm.generate(PROMPT, replace(AS_A_PET, temperature=0, max_tokens=needed)))[0]
    assert exact.text == whole.text
    assert exact.finish_reason == "stop"


def test_a_stop_string_ends_the_text_before_the_grammar_does(llm: LLM) -> None:
    (sample,) = samples(llm.generate(PROMPT, replace(AS_A_PET, stop='"name"', seed=1)))
    assert re.fullmatch(r'\{"kind":"(cat|dog)",', sample.text)
    assert (sample.finish_reason, sample.stop_reason) == ("stop", '"name"')


# -- company ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", ["off", "build", "submit"])
def test_requests_with_and_without_a_grammar_in_one_batch_come_out_as_they_do_alone(pipelining: str) -> None:
    llm = LLM(num_kv_blocks=400, max_num_seqs=8, prefix_caching=False, check_invariants=True, pipelining=pipelining)
    params = [
        replace(AS_A_PET, seed=1),
        replace(FREE, seed=2),
        replace(FREE, temperature=0),
        replace(AS_A_PET, temperature=0),
        SamplingParams(regex="[a-z]{1,20}", seed=3, max_tokens=30),
        replace(FREE, seed=4, n=2, repetition_penalty=1.2),
        replace(AS_A_PET, seed=5, n=2),
    ]
    prompts = [f"{PROMPT}, {number}" for number in range(len(params))]
    together = ran(llm.generate(prompts, params))
    alone = [sample for prompt, p in zip(prompts, params, strict=True) for sample in ran(llm.generate(prompt, p))]
    assert together == alone
    assert is_idle(llm)


def test_requests_that_join_and_leave_at_any_time_keep_their_grammars(llm: LLM) -> None:
    params = [replace(AS_A_PET if number % 3 else FREE, seed=number) for number in range(14)]
    finished: dict[int, RequestOutput] = {}
    ids: list[int] = []
    for _ in range(2000):
        if len(ids) < len(params):
            ids.append(llm.engine.add_request(PROMPT, params[len(ids)]))
        finished |= {output.request_id: output for output in llm.engine.step() if output.finished}
        if len(finished) == len(params):
            break
    assert_pets([sample for number, i in enumerate(ids) if number % 3 for sample in finished[i].outputs])
    assert is_idle(llm)


@pytest.mark.parametrize("swap_space", [None, "64MB"])
def test_a_preempted_sequence_goes_on_in_its_grammar_with_the_same_tokens(swap_space: str | None) -> None:
    config: dict[str, Any] = {"block_size": 4, "max_num_seqs": 6, "check_invariants": True}
    params = [replace(AS_A_PET, seed=seed) for seed in range(4)] + [replace(AS_A_PET, seed=9, n=2)]
    roomy = LLM(num_kv_blocks=400, **config)
    tight = LLM(num_kv_blocks=28, swap_space=swap_space, **config)
    outputs = tight.generate([PROMPT] * 5, params)
    assert tight.stats().num_preemptions > 0
    assert roomy.stats().num_preemptions == 0
    assert_pets(samples(outputs))
    assert ran(outputs) == ran(roomy.generate([PROMPT] * 5, params))
    assert is_idle(tight)


def test_an_aborted_request_leaves_its_grammar_behind(llm: LLM) -> None:
    request_id = llm.engine.add_request(PROMPT, replace(AS_A_PET, seed=1))
    for _ in range(4):
        llm.engine.step()
    output = llm.engine.abort(request_id)
    assert output is not None
    assert output.outputs[0].finish_reason == "abort"
    assert '{"kind":"'.startswith(output.outputs[0].text[:9])
    assert is_idle(llm)
    assert_pets(samples(llm.generate(PROMPT, replace(AS_A_PET, seed=1))))


def test_a_stream_adds_up_to_the_whole_text(llm: LLM) -> None:
    params = replace(AS_A_PET, seed=6)
    pieces = [piece.outputs[0] for piece in llm.stream(PROMPT, params)]
    (whole,) = samples(llm.generate(PROMPT, params))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert (pieces[-1].finish_reason, is_pet(whole.text)) == ("stop", True)


# -- refusals ---------------------------------------------------------------------------------------------------


def test_a_grammar_that_can_not_be_used_is_refused_before_anything_runs(llm: LLM) -> None:
    num_steps = llm.stats().num_steps
    for params, message in (
        (SamplingParams(regex="("), "regex can't be used"),
        (SamplingParams(grammar="start: end"), "grammar can't be used"),
        (SamplingParams(json_schema={"uniqueItems": True}), "uniqueItems"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate([PROMPT] * 2, [FREE, params])
    assert llm.stats().num_steps == num_steps
    assert is_idle(llm)


def test_a_grammar_needs_a_tokenizer(tiny_model: Any) -> None:
    model: nn.Module = tiny_model("llama")
    llm = LLM.from_model(model, num_kv_blocks=16)
    with pytest.raises(ValueError, match="regex needs a tokenizer, and this engine has none"):
        llm.generate([1, 2, 3], SamplingParams(regex="a"))


def test_a_model_with_more_logits_than_tokens_never_gives_a_token_without_text(llm: LLM, tiny_model: Any) -> None:
    model = tiny_model("llama", vocab_size=len(llm.tokenizer) + 300)
    padded = LLM.from_model(model, llm.tokenizer, num_kv_blocks=64, block_size=16)
    params = [replace(AS_A_PET, temperature=3, seed=seed) for seed in range(4)]
    found = samples(padded.generate([PROMPT] * 4, params))
    assert_pets(found)
    assert max(token for sample in found for token in sample.token_ids) < len(llm.tokenizer)


def test_a_grammar_that_leads_nowhere_ends_its_request_with_an_error_and_no_other(llm: LLM) -> None:
    dead_end = SamplingParams(grammar=f'start: "a" <[{END}]> "b"', max_tokens=9)
    failed, free = samples(llm.generate([PROMPT] * 2, [dead_end, replace(FREE, seed=1)]))
    assert (failed.text, failed.finish_reason) == ("a", "error")
    assert "can't be completed" in str(failed.stop_reason)
    assert free.finish_reason in ("stop", "length")
    assert is_idle(llm)
