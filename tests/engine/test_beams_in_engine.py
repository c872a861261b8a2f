"""Beam searches in an engine find what they find without a cache, whatever else the engine does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers import hugging_face
from helpers.beam_lab import (
    FAMILIES,
    NEAR_TIE,
    PROMPTS,
    EndTokens,
    Lab,
    assert_same,
    lab_of,
    run,
    search,
)
from helpers.beam_oracle import dense_beam_search
from helpers.tiny_models import unpaged_greedy

from mlx_paged import LLM, BeamSearchParams, SamplingParams


@pytest.fixture(params=FAMILIES)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = lab_of(request.param)
    lab.num_compared = lab.num_near_ties = 0
    yield lab
    assert lab.num_near_ties <= max(1, lab.num_compared // 10)


@pytest.fixture
def llama() -> Lab:
    return lab_of("llama")


@pytest.mark.parametrize(("num_end_tokens", "early_stopping"), [(1, False), (2, True), (1, "never"), (2, False)])
def test_searches_in_one_batch_give_what_they_give_without_a_cache(
    lab: Lab, num_end_tokens: int, early_stopping: bool | str
) -> None:
    eos = lab.common[:num_end_tokens]
    engine = lab.engine(eos, max_num_seqs=12, num_kv_blocks=150)
    all_params = [
        BeamSearchParams(
            width, max_tokens, penalty, early_stopping, num_return_sequences=1 + width // 2 if width % 2 else None
        )
        for width, max_tokens, penalty in [
            (1, 9, 1.0), (2, 12, 0.0), (3, 10, -0.5), (4, 1, 1.0), (5, 8, 2.0), (6, 3, 0.8), (7, 7, 1.0), (8, 11, 1.0),
        ]
    ]  # fmt: skip
    requests = [(PROMPTS[i % 4], params) for i, params in enumerate(all_params)]
    ids = [engine.add_request(prompt, params) for prompt, params in requests]
    outputs = run(engine)
    assert [outputs[i].request_id for i in ids] == ids
    for i, (_, params) in zip(ids, requests, strict=True):
        assert len(outputs[i].sequences) == (params.num_return_sequences or params.beam_width)
        assert outputs[i].num_blocks <= outputs[i].num_unshared_blocks
        lab.compare(outputs[i], params, eos)


@pytest.mark.parametrize("config", [
    {"block_size": 1, "num_kv_blocks": 500},
    {"block_size": 16, "num_kv_blocks": 40},
    {"max_num_batched_tokens": 4, "prefix_caching": False},
    {"pipelining": "off"},
    {"pipelining": "submit", "allocator": "buddy"},
], ids=str)  # fmt: skip
def test_neither_blocks_nor_budgets_nor_company_change_a_search(lab: Lab, config: dict[str, Any]) -> None:
    eos = lab.common[:1]
    engine = lab.engine(eos, **config)
    wide, narrow = BeamSearchParams(5, 9), BeamSearchParams(2, 14, 0.5, "never")
    samples = SamplingParams(seed=3, n=2, max_tokens=11)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    first = engine.add_request(PROMPTS[0], samples)
    searches = [engine.add_request(PROMPTS[1], wide), engine.add_request(PROMPTS[2], narrow)]
    outputs = {}
    for _ in range(2):
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    searches.append(engine.add_request(PROMPTS[3], wide))
    last = engine.add_request(PROMPTS[3], greedy)
    outputs |= run(engine)
    for i, params in zip(searches, (wide, narrow, wide), strict=True):
        lab.compare(outputs[i], params, eos)
    assert outputs[last].outputs[0].token_ids == unpaged_greedy(lab.model, PROMPTS[3], 12).token_ids
    alone = lab.engine(eos)
    alone.add_request(PROMPTS[0], samples)
    (expected,) = run(alone).values()
    assert [s.token_ids for s in outputs[first].outputs] == [s.token_ids for s in expected.outputs]


@pytest.mark.parametrize("config", [
    {},
    {"prefix_caching": False},
    {"swap_space": "8MB"},
    {"max_num_batched_tokens": 4},
    {"allocator": "buddy", "pipelining": "submit"},
    {"allocator": "fifo", "block_size": 2, "num_kv_blocks": 44, "pipelining": "off"},
], ids=str)  # fmt: skip
def test_beams_that_lose_their_blocks_come_back_by_what_they_share(lab: Lab, config: dict[str, Any]) -> None:
    engine = lab.engine(**({"num_kv_blocks": 22} | config))
    params = [BeamSearchParams(4, 14, 0.0), BeamSearchParams(3, 16, 0.7), BeamSearchParams(5, 11)]
    samples = engine.add_request(PROMPTS[0], SamplingParams(temperature=0, max_tokens=25))
    ids = [engine.add_request(PROMPTS[i], each) for i, each in enumerate(params)]
    shared = []
    split_beams = engine._scheduler._split

    def recorded_split(sequence: Any) -> None:
        shared.append((sequence.num_shared_tokens, len(sequence.request.prompt_token_ids)))
        split_beams(sequence)

    engine._scheduler._split = recorded_split  # type: ignore[method-assign]
    outputs = run(engine)
    for i, each in zip(ids, params, strict=True):
        lab.compare(outputs[i], each)
    assert outputs[samples].outputs[0].token_ids == unpaged_greedy(lab.model, PROMPTS[0], 25).token_ids
    assert engine.stats().num_preemptions > 0
    assert shared, "the premise: beams were preempted, not only prompts and samples"
    if not config:
        assert any(common > prompt for common, prompt in shared), "what they have in common beyond the prompt counts"
    if config.get("swap_space"):
        assert engine.stats().num_swapped_blocks > 0


def test_searches_of_different_priority_and_salt_keep_to_themselves(lab: Lab) -> None:
    engine = lab.engine(num_kv_blocks=30)
    params = [BeamSearchParams(3, 8, priority=i % 3, cache_salt=[None, "a"][i % 2]) for i in range(6)]
    ids = [engine.add_request(PROMPTS[2], each) for each in params]
    outputs = run(engine)
    for i, each in zip(ids, params, strict=True):
        lab.compare(outputs[i], each)


def test_one_beam_is_greedy_decoding(lab: Lab) -> None:
    engine = lab.engine()
    for prompt in PROMPTS:
        (found,) = search(engine, prompt, BeamSearchParams(1, 12)).sequences
        assert found.token_ids == unpaged_greedy(lab.model, prompt, 12).token_ids


@pytest.mark.parametrize("family", hugging_face.FAMILIES)
def test_the_engine_finds_what_transformers_found(family: str) -> None:
    searched, num_near_ties = hugging_face.Searched(family), 0
    for params, eos, results in hugging_face.recorded(family):
        config = {"block_size": 4, "num_kv_blocks": 80, "max_num_seqs": 9, "check_invariants": True}
        engine = LLM.from_model(searched.model, EndTokens(eos), **config).engine
        ids = [engine.add_request(prompt, params) for prompt in searched.prompts]
        outputs = run(engine)
        for request_id, tables, expected in zip(ids, searched.tables, results, strict=True):
            if dense_beam_search(tables, params, eos).margin < NEAR_TIE:
                num_near_ties += 1
                continue
            assert_same(outputs[request_id], expected)
    assert num_near_ties <= 1
