"""With drafts every request has the tokens that it has without: in any batch, with any parameters, in any pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.budget import budget
from helpers.families import family_model

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.errors import EngineWarning
from mlx_paged.outputs import RequestOutput

ALWAYS = {"adaptive": False}
LOOP = [7, 3, 9, 7, 3, 9, 7, 3]


def answers(outputs: list[RequestOutput]) -> list[Any]:
    return [
        [(o.token_ids, o.finish_reason, o.stop_reason, [list(each) for each in o.logprobs or ()]) for o in r.outputs]
        for r in outputs
    ]


def draw(rng: np.random.Generator) -> tuple[list[int], SamplingParams]:
    """A prompt that repeats itself, and parameters that leave outputs that often do."""
    base = rng.integers(0, 60, int(rng.integers(2, 12))).tolist()
    prompt = (base * int(rng.integers(1, 6)))[: int(rng.integers(2, 60))]
    return prompt, SamplingParams(
        temperature=float(rng.choice([0, 0, 0.05])),
        seed=int(rng.integers(0, 99)),
        max_tokens=int(rng.integers(1, 50)),
        ignore_eos=True,
        n=int(rng.choice([1, 1, 2])),
        top_k=int(rng.choice([0, 3])),
        repetition_penalty=float(rng.choice([1, 1, 1.1])),
        frequency_penalty=float(rng.choice([0, 0, 0.1])),
        logprobs=rng.choice([None, 2]),
        min_tokens=int(rng.choice([0, 1])),
        stop_token_ids=[int(rng.integers(0, 60))] if rng.random() < 0.4 else None,
        logit_bias={int(rng.integers(0, 60)): 4.0} if rng.random() < 0.4 else None,
    )


@pytest.mark.parametrize("seed", range(budget(6, 200)))
def test_answers_are_those_without_drafts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    families = ["llama", "gemma3_text", "gpt_oss", "gemma2", "llama4", "qwen3"]
    model = family_model(families[seed % len(families)])
    prompts, params = zip(*(draw(rng) for _ in range(int(rng.integers(1, 8)))), strict=True)
    settings = {
        "block_size": int(rng.choice([4, 8, 16])),
        "num_kv_blocks": int(rng.choice([40, 64, 200])),
        "max_num_seqs": int(rng.choice([2, 4, 16])),
        "max_num_batched_tokens": int(rng.choice([16, 40, 512])),
        "pipelining": str(rng.choice(["auto", "off", "submit"])),
        "check_invariants": True,
    }
    found = []
    always = ALWAYS | {"num_speculative_tokens": int(rng.integers(1, 9))}
    draft = model if rng.random() < 0.3 else family_model(families[(seed + 1) % 4])
    drafting = {"model": draft, "num_speculative_tokens": int(rng.integers(1, 4))}
    for config in (None, always, {}, ALWAYS | drafting, drafting):
        llm = LLM.from_model(model, speculative_config=config, **settings)
        found.append(answers(llm.generate(list(prompts), list(params))))
        assert llm.engine.block_manager.num_free_blocks == settings["num_kv_blocks"], "no draft leaks a block"
    assert all(each == found[0] for each in found)


@pytest.fixture
def both(tiny_model: Callable[..., Any]) -> Callable[..., tuple[LLM, LLM]]:
    """An engine without drafts, and one that always has some."""

    def make(**settings: Any) -> tuple[LLM, LLM]:
        model = tiny_model("llama")
        settings = {"num_kv_blocks": 64, "block_size": 8} | settings
        return LLM.from_model(model, **settings), LLM.from_model(model, speculative_config=ALWAYS, **settings)

    return make


def test_what_repeats_itself_takes_fewer_steps(both: Callable[..., tuple[LLM, LLM]]) -> None:
    plain, drafting = both()
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias=dict.fromkeys(LOOP[:3], 30.0))
    before, after = (answers(llm.generate([LOOP], params)) for llm in (plain, drafting))
    assert before == after
    stats = drafting.stats()
    assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens
    assert stats.num_steps == plain.stats().num_steps - stats.num_accepted_tokens
    assert stats.num_steps < 40 and stats.num_output_tokens == 60
    assert plain.stats().num_draft_tokens == 0


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
def test_streams_samples_and_beams_go_on_beside_drafts(
    kv_cache_dtype: str | None, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("llama", head_dim=32)
    found = []
    for config in (None, ALWAYS):
        llm = LLM.from_model(
            model, num_kv_blocks=128, block_size=8, speculative_config=config, kv_cache_dtype=kv_cache_dtype
        )
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        for prompt in (LOOP, [4, 5, 4, 5, 4], [1, 2, 3]):
            llm.engine.add_request(prompt, params, stream=prompt == LOOP)
        llm.engine.add_request(LOOP[:5], BeamSearchParams(beam_width=3, max_tokens=8))
        outputs: dict[int, list[Any]] = {}
        while llm.engine.has_unfinished():
            for output in llm.engine.step():
                sequences = getattr(output, "sequences", None) or output.outputs
                outputs.setdefault(output.request_id, []).extend(sequences[0].token_ids)
        found.append(outputs)
        assert config is None or llm.stats().num_draft_tokens > 0
    assert found[0] == found[1] and [len(found[0][i]) for i in range(3)] == [24] * 3


def test_bad_words_and_fewest_tokens_hold_within_a_run_of_drafts(both: Callable[..., tuple[LLM, LLM]]) -> None:
    stop = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[9], min_tokens=11, logit_bias={9: 8.0})
    found = [answers(llm.generate([LOOP, [9, 9, 9, 9]], stop)) for llm in both()]
    assert found[0] == found[1]
    assert all(len(sample[0][0]) >= 11 for sample in found[0])


def test_the_form_of_an_output_holds_within_a_run_of_drafts() -> None:
    pytest.importorskip("llguidance")
    point = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    schema = {"type": "array", "items": point, "minItems": 4, "maxItems": 4}
    params = SamplingParams(temperature=0, max_tokens=80, json_schema=schema)
    found, steps = [], []
    for config in (None, ALWAYS):
        llm = LLM(num_kv_blocks=64, speculative_config=config)
        found.append([output.outputs[0].text for output in llm.generate(['[{"x": 1}, {"x": 1}', "A list:"], params)])
        steps.append(llm.stats().num_steps)
    assert found[0] == found[1] and all(len(json.loads(text)) == 4 for text in found[0])
    assert steps[1] < steps[0]


def test_a_processor_is_told_of_no_token_that_does_not_come(both: Callable[..., tuple[LLM, LLM]]) -> None:
    told: list[list[int]] = []

    def process(token_ids: list[int], logits: Any) -> Any:
        told.append(list(token_ids))
        return logits

    _, drafting = both()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logits_processors=[process])
    (output,) = drafting.generate([LOOP], params)
    tokens = output.outputs[0].token_ids
    assert told == [tokens[:i] for i in range(12)]


def test_a_preempted_sequence_with_drafts_goes_on_as_before(both: Callable[..., tuple[LLM, LLM]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [LOOP, [4, 5, 4, 5, 4], [1, 2, 3, 1, 2], [8, 8, 8]]
    engines = both(num_kv_blocks=12, check_invariants=True)
    found = [answers(llm.generate(prompts, params)) for llm in engines]
    assert found[0] == found[1]
    assert engines[1].stats().num_preemptions > 0


def test_a_model_with_recurrent_layers_says_that_it_has_no_drafts(tiny_model: Callable[..., Any]) -> None:
    for config in (ALWAYS, {"model": tiny_model("llama")}):  # which takes none of the memory then
        with pytest.warns(EngineWarning, match=r"^mamba2 models run without drafts \(speculative_config\)") as warned:
            llm = LLM.from_model(family_model("mamba2"), speculative_config=config, num_kv_blocks=32)
        assert [Path(each.filename).name for each in warned] == [Path(__file__).name]
        assert "draft model" not in llm.describe_memory()
        llm.generate([LOOP], SamplingParams(temperature=0, max_tokens=8))
        assert llm.stats().num_draft_tokens == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "eagle"}, "speculative_config: method must be ngram or draft_model, got 'eagle'"),
        ({"method": "draft_model"}, "method draft_model needs a model: a name or a folder"),
        ({"method": "ngram", "model": "x"}, "method ngram takes no model"),
        ({"model": "/no/such/folder"}, "draft model /no/such/folder: "),
        ({"method": ""}, "method must be ngram or draft_model, got ''"),
        ({"model": " "}, "speculative_config: the model's name is empty: give a name or a folder"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be a whole number of at least 1, got 0"),
        ({"prompt_lookup_min": 6}, "prompt_lookup_min (6) is more than prompt_lookup_max (5)"),
        ({"prompt_lookup_maxx": 6}, "there is no argument 'prompt_lookup_maxx': did you mean prompt_lookup_max?"),
        ({"adaptive": 1}, "adaptive must be True or False, got 1"),
        ("ngram", "speculative_config must be a dictionary with some of method, model, num_speculative_tokens"),
    ],
)
def test_a_config_out_of_range_is_refused_in_one_line(
    config: Any, message: str, tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError) as caught:
        LLM.from_model(tiny_model("llama"), speculative_config=config)
    assert message in str(caught.value) and "\n" not in str(caught.value)
