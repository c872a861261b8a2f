"""Drafts of a second model: right where both think alike, in blocks of its own, and never in the way of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from helpers.families import family_model
from helpers.tiny_models import make_model, unpaged_greedy

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.errors import EngineWarning, ModelError
from mlx_paged.request import Sequence
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.speculation.draft_model import DraftModel
from mlx_paged.speculation.load_draft import first_difference

PROMPT = [5, 9, 2, 7, 11, 3]


def drafting(model: Any, draft: Any, **config: Any) -> LLM:
    """An engine that always proposes three tokens."""
    speculative = {"model": draft, "num_speculative_tokens": 3, "adaptive": False}
    return LLM.from_model(model, speculative_config=speculative, **({"num_kv_blocks": 64, "block_size": 8} | config))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step of a draft model has."""
    sizes: list[int] = []
    run = ModelRunner.run

    def counted(runner: ModelRunner, inputs: ModelInputs) -> Any:
        if runner.config.speculative_config is not None and runner.draft is None:
            sizes.append(inputs.token_ids.size)
        return run(runner, inputs)

    monkeypatch.setattr(ModelRunner, "run", counted)
    return sizes


@pytest.mark.parametrize(
    ("kv_cache_dtype", "shape"),
    [
        (None, {"temperature": 0, "logit_bias": dict.fromkeys(range(0, 90, 3), 4.0)}),
        ("int8", {"top_k": 5, "top_p": 0.9, "logit_bias": dict.fromkeys(range(0, 90, 3), 4.0)}),
        (None, {"min_p": 0.3}),
    ],
)
def test_a_draft_model_that_is_the_model_is_always_right(kv_cache_dtype: str | None, shape: dict[str, Any]) -> None:
    model, draft = (make_model("llama", head_dim=32) for _ in range(2))
    params = SamplingParams(max_tokens=33, ignore_eos=True, seed=4, **shape)
    llm = drafting(model, draft, kv_cache_dtype=kv_cache_dtype)
    plain = LLM.from_model(model, num_kv_blocks=64, block_size=8, kv_cache_dtype=kv_cache_dtype)
    found, expected = (each.generate([PROMPT, PROMPT[:2]], params) for each in (llm, plain))
    assert [r.outputs[0].token_ids for r in found] == [r.outputs[0].token_ids for r in expected]
    stats = llm.stats()
    assert stats.num_accepted_tokens == stats.num_draft_tokens == 2 * 24
    assert stats.num_drafts == 2 * 8, "of each sequence: 1 token of the prompt, and 8 times 3 drafts and one more"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_guess_is_what_the_draft_model_itself_would_say_next(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    llm = drafting(model, model)
    proposer: Any = llm.engine._speculator.proposer
    propose, proposed = proposer.propose, list[tuple[list[int], list[int]]]()

    def recorded(rooms: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        drafts = propose(rooms)
        proposed.extend((list(sequence.token_ids), tokens) for sequence, tokens in drafts.items())
        return drafts

    monkeypatch.setattr(proposer, "propose", recorded)
    # What the model puts out is not what it would say: of several guesses in a row some are right.
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=1.3)
    llm.generate([PROMPT, PROMPT[::-1]], params)
    stats = llm.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    for tokens, drafts in proposed:
        assert drafts == unpaged_greedy(model, tokens, len(drafts)).token_ids


def test_equal_prefixes_are_computed_once_by_the_draft_model_too(computed: list[int]) -> None:
    llm = drafting(make_model("llama"), make_model("llama"))
    prompt, params = [i % 90 for i in range(41)], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    other = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, cache_salt="of another")
    for asked, most in ((params, 50), (params, 5), (other, 50)):
        computed.clear()
        llm.generate([prompt], asked)
        assert most - 10 < sum(computed) <= most, "five blocks of eight tokens are found, or none"


def test_a_long_prompt_is_caught_up_with_in_chunks_while_the_answer_goes_on(computed: list[int]) -> None:
    llm = drafting(make_model("llama"), make_model("llama"), num_kv_blocks=200, max_num_batched_tokens=100)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    llm.generate([[i % 90 for i in range(330)]], params)
    assert computed[:4] == [100, 100, 100, 32], "while two tokens of the answer came"
    stats = llm.stats()
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0


def test_its_blocks_are_freed_with_the_sequence_and_are_as_many_as_the_models() -> None:
    llm = drafting(make_model("llama"), make_model("gemma3_text"), num_kv_blocks=24, check_invariants=True)
    proposer: Any = llm.engine._speculator.proposer
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    llm.generate([PROMPT, PROMPT[1:], PROMPT[2:], PROMPT[3:]], params)
    assert llm.stats().num_preemptions > 0 and llm.stats().num_draft_tokens > 0
    proposer.keep(set())
    for manager, num_blocks in zip(proposer._groups.managers, proposer._runner.plan.num_blocks, strict=True):
        manager.check()
        assert manager.num_free_blocks == num_blocks
    assert proposer._groups.num_free_blocks == llm.engine.block_manager.num_blocks


def test_a_draft_model_without_room_for_a_sequence_leaves_it_without_drafts() -> None:
    llm = drafting(make_model("llama"), make_model("llama"))
    groups = llm.engine._speculator.proposer._groups  # type: ignore[union-attr]
    groups.attach("somebody", [1] * 8 * 64, 8 * 64)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    assert len(llm.generate([PROMPT], params)[0].outputs[0].token_ids) == 9
    assert llm.stats().num_draft_tokens == 0
    groups.free("somebody")
    llm.generate([PROMPT], params)
    assert llm.stats().num_draft_tokens > 0


@pytest.mark.parametrize("prompt_len", [6, 40])
def test_what_is_longer_than_the_draft_models_context_has_no_drafts(prompt_len: int, computed: list[int]) -> None:
    draft = family_model("gpt2", n_positions=30)  # past its table of positions it would read what is not its own
    llm = drafting(make_model("llama"), draft)
    longest: list[int] = []
    proposer: Any = llm.engine._speculator.proposer
    reserve = proposer._groups.reserve
    proposer._groups.reserve = lambda seq_id, num_tokens: (longest.append(num_tokens), reserve(seq_id, num_tokens))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    (output,) = llm.generate([[i % 90 for i in range(prompt_len)]], params)
    assert len(output.outputs[0].token_ids) == 40
    assert max(longest, default=30) == 30 and bool(computed) == (prompt_len < 30)
    assert proposer._groups.num_free_blocks == 64


def test_both_models_share_the_memory_that_was_asked_for() -> None:
    model = make_model("llama")
    sizes = {"kv_cache_memory": 400_000, "num_kv_blocks": None}
    alone = LLM.from_model(model, block_size=8, kv_cache_memory=400_000)
    llm = drafting(model, make_model("llama", num_hidden_layers=6), **sizes)
    assert llm.stats().num_blocks == alone.stats().num_blocks // 3
    pools: list[Any] = [llm._runner.kv_cache, llm._runner.draft.kv_cache]  # type: ignore[union-attr]
    assert 380_000 < sum(pool.nbytes for pool in pools) <= 400_000
    assert "draft model" in llm.describe_memory() and "draft model" not in alone.describe_memory()


def test_its_steps_are_taken_for_cheaper_while_it_is_skipped() -> None:
    proposer = drafting(make_model("llama"), make_model("llama")).engine._speculator.proposer
    assert isinstance(proposer, DraftModel)
    before = proposer.seconds(1, 3)
    proposer.skip()
    assert 0.99 * before < proposer.seconds(1, 3) < before


def test_a_draft_model_that_fails_ends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = drafting(make_model("llama"), make_model("llama"))
    draft = llm._runner.draft

    def fail(_: ModelInputs) -> None:
        raise MemoryError("no room\nfor this")

    monkeypatch.setattr(draft, "run", fail)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    with pytest.warns(EngineWarning, match="guessing next tokens failed, and goes on no more: MemoryError: no room f"):
        (output,) = llm.generate([PROMPT], params)
    assert output.outputs[0].finish_reason == "length" and llm.stats().num_draft_tokens == 0


def test_tokens_that_only_the_model_knows_are_never_guessed_and_harm_nothing() -> None:
    model, draft = make_model("llama"), make_model("llama", vocab_size=60)
    params = SamplingParams(temperature=1, seed=1, max_tokens=20, ignore_eos=True, logit_bias={80: 3.0, 90: 3.0})
    plain = LLM.from_model(model, num_kv_blocks=64, block_size=8).generate([[96, 80]], params)
    (output,) = drafting(model, draft).generate([[96, 80]], params)
    assert output.outputs[0].token_ids == plain[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("make_draft", "config", "message"),
    [
        (lambda: family_model("mamba2"), {}, "draft model has recurrent layers"),
        (lambda: 5, {}, "speculative_config: model must be a name, a folder, or an mlx-lm model that is already"),
        (lambda: nn.Linear(3, 3), {}, "mlx-lm model that is already loaded, got Linear(input_dims=3, output_dims=3"),
        (lambda: make_model("llama", head_dim=24), {"kv_cache_dtype": "int8"}, "draft model: "),
        (
            lambda: make_model("llama", max_position_embeddings=3),
            {},
            "draft model was made for 3 tokens of context: num_speculative_tokens must be less than that, not 3",
        ),
        (lambda: family_model("llama4"), {"block_size": 16}, "draft model: this model attends in chunks of 24 tokens"),
    ],
)
def test_a_draft_model_that_cannot_be_used_is_refused_in_one_line(
    make_draft: Callable[[], Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        drafting(make_model("llama", head_dim=32), make_draft(), **config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_vocabularies_that_differ_are_told_by_their_first_difference() -> None:
    assert first_difference({"a": 0, "b": 1}, {"b": 1, "a": 0}) is None
    assert first_difference({"a": 0, "b": 1}, {"a": 0, "c": 1}) == "token 1 is 'b' here and 'c' there"
    assert first_difference({"a": 0}, {"a": 0, "added later": 7}) is None
