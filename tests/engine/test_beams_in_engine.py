"""Beam search in the batch: the same hypotheses as without any cache, and the blocks that sharing should take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.beam_oracle import OracleResult, dense_beam_search, unpaged_logprobs
from helpers.tiny_models import VOCAB_SIZE, make_model, unpaged_greedy

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import BeamSearchOutput, RequestOutput
from mlx_paged.sampling.beam_search import BeamSearch

EARLY_STOPPING = (False, True, "never")
NEAR_TIE = 1e-4  # where a decision of the oracle is closer than this, either outcome is right
FAMILIES = ("llama", "qwen2", "gemma3_text")
PROMPTS = [np.random.default_rng(length).integers(1, VOCAB_SIZE, length).tolist() for length in (5, 8, 13, 30)]


class EndTokens:
    """All that beam search needs of a tokenizer: which tokens end a text, and no text."""

    bos_token = None
    has_chat_template = False

    class detokenizer:
        text = last_segment = ""

        @staticmethod
        def reset() -> None: ...

        @staticmethod
        def add_token(token: int) -> None: ...

        @staticmethod
        def finalize() -> None: ...

    def __init__(self, eos_token_ids: list[int]) -> None:
        self.eos_token_ids = set(eos_token_ids)


class Lab:
    """A tiny model sure enough of itself for searches to end in all manners, and its results without a cache."""

    def __init__(self, family: str) -> None:
        layers = {"num_hidden_layers": 3 if family == "gemma3_text" else 2}
        windows = {"sliding_window": 7} if family == "gemma3_text" else {}
        self.model = make_model(family, seed=1, **layers, **windows)
        self.model.model.norm.weight *= 2.0
        self._tables = [unpaged_logprobs(self.model, prompt) for prompt in PROMPTS]
        outputs = [dense_beam_search(tables, BeamSearchParams(4, 8), []).sequences for tables in self._tables]
        counts = np.bincount([t for found in outputs for s in found for t in s[0][1:]], minlength=VOCAB_SIZE)
        self.common = np.argsort(-counts, kind="stable").tolist()
        self.num_compared = self.num_near_ties = 0

    def engine(self, eos: list[int] | None = None, **config: Any) -> Engine:
        settings = {"block_size": 4, "num_kv_blocks": 400, "max_num_seqs": 16, "check_invariants": True} | config
        return LLM.from_model(self.model, EndTokens(eos) if eos else None, **settings).engine

    def compare(self, output: BeamSearchOutput, params: BeamSearchParams, eos: list[int] | None = None) -> None:
        tables = self._tables[PROMPTS.index(output.prompt_token_ids)]
        expected = dense_beam_search(tables, params, eos or [])
        self.num_compared += 1
        if expected.margin < NEAR_TIE:
            self.num_near_ties += 1
            return
        assert_same(output, expected)


@cache
def lab_of(family: str) -> Lab:
    return Lab(family)


@pytest.fixture(params=FAMILIES)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = lab_of(request.param)
    lab.num_compared = lab.num_near_ties = 0
    yield lab
    assert lab.num_near_ties <= max(1, lab.num_compared // 10)


@pytest.fixture
def llama() -> Lab:
    return lab_of("llama")


def assert_same(output: BeamSearchOutput, expected: OracleResult) -> None:
    """The same sequences in the same order, but for the order of scores that are nearly equal."""
    found = [(one.token_ids, one.cum_logprob, one.score) for one in output.sequences]
    assert sorted(tokens for tokens, _, _ in found) == sorted(tokens for tokens, _, _ in expected.sequences)
    for (tokens, cum_logprob, score), (other, _, other_score) in zip(found, expected.sequences, strict=True):
        twin = next(each for each in expected.sequences if each[0] == tokens)
        assert (cum_logprob, score) == pytest.approx(twin[1:], abs=1e-3)
        assert tokens == other or abs(score - other_score) < NEAR_TIE


def run(engine: Engine, most_steps: int = 3000) -> dict[int, Any]:
    """Step until nothing is left; the finished outputs by request id."""
    finished = {}
    for _ in range(most_steps):
        if not engine.has_unfinished():
            assert is_idle(engine)
            return finished
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    raise AssertionError("the engine does not come to an end")


def is_idle(engine: Engine) -> bool:
    """Nothing is held, once a step too many has been looked at."""
    nothing, stats = engine.step(), engine.stats()
    return (
        nothing == []
        and stats.num_free_blocks == stats.num_blocks
        and engine.block_manager.seq_ids == []
        and engine._scheduler._num_reserved_rows == 0
        and engine._in_flight is None
    )


def search(engine: Engine, prompt: list[int], params: BeamSearchParams) -> BeamSearchOutput:
    request_id = engine.add_request(prompt, params)
    output = run(engine)[request_id]
    assert isinstance(output, BeamSearchOutput) and output.error is None and not output.aborted
    return output


# -- the same hypotheses ----------------------------------------------------------------------------------------


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
    trunks = []
    unfold = engine._scheduler._split_beams

    def recorded_unfold(sequence: Any) -> None:
        trunks.append((sequence.num_shared_tokens, len(sequence.request.prompt_token_ids)))
        unfold(sequence)

    engine._scheduler._split_beams = recorded_unfold  # type: ignore[method-assign]
    outputs = run(engine)
    for i, each in zip(ids, params, strict=True):
        lab.compare(outputs[i], each)
    assert outputs[samples].outputs[0].token_ids == unpaged_greedy(lab.model, PROMPTS[0], 25).token_ids
    assert engine.stats().num_preemptions > 0
    assert trunks, "the premise: beams were preempted, not only prompts and samples"
    if not config:
        assert any(trunk > prompt for trunk, prompt in trunks), "what they have in common beyond the prompt counts"
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


# -- blocks -----------------------------------------------------------------------------------------------------


def test_the_blocks_of_a_worked_example() -> None:
    # 6 tokens of prompt in blocks of 4: the first is shared by all; the second, partly filled, is copied once less
    # than there are beams as soon as they write their first token. The second token is the last and never fed back.
    engine = lab_of("llama").engine()
    output = search(engine, PROMPTS[0] + [1], BeamSearchParams(3, 2))
    assert (output.num_blocks, output.num_unshared_blocks) == (1 + 3, 3 * 2)
    assert engine.stats().num_cow_copies == 2
    # 8 tokens: nothing is partly filled, so nothing is copied.
    engine = lab_of("llama").engine()
    output = search(engine, PROMPTS[1], BeamSearchParams(3, 2))
    assert (output.num_blocks, output.num_unshared_blocks) == (2 + 3, 3 * 3)
    assert engine.stats().num_cow_copies == 0
    # One token: the beams are never run.
    engine = lab_of("llama").engine()
    output = search(engine, PROMPTS[0], BeamSearchParams(3, 1))
    assert (output.num_blocks, output.num_unshared_blocks, engine.stats().num_cow_copies) == (2, 2, 0)


class Ledger:
    """Counts blocks and copies from the parents of beams alone: a beam is the list of its blocks' names."""

    def __init__(self, num_prompt: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_tokens = num_prompt
        self.next_name = -(-num_prompt // block_size)
        self.beams = [list(range(self.next_name))]
        self.num_blocks, self.num_unshared, self.num_copies = self.next_name, self.next_name, 0

    def grow(self, parents: list[int]) -> None:
        """The beams become these, and each of them writes a token."""
        self.beams = [list(self.beams[parent]) for parent in parents]
        for i, beam in enumerate(self.beams):
            others = {name for other in (*self.beams[:i], *self.beams[i + 1 :]) for name in other}
            if self.num_tokens % self.block_size == 0:
                beam.append(self._new())
            elif beam[-1] in others:
                beam[-1] = self._new()
                self.num_copies += 1
        self.num_tokens += 1
        self.num_blocks = max(self.num_blocks, len({name for beam in self.beams for name in beam}))
        self.num_unshared = max(self.num_unshared, sum(map(len, self.beams)))

    def _new(self) -> int:
        self.next_name += 1
        return self.next_name


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("width", [2, 6])
def test_blocks_and_copies_are_those_that_the_beams_ancestry_asks_for(
    llama: Lab, monkeypatch: pytest.MonkeyPatch, width: int, block_size: int
) -> None:
    advance = BeamSearch.advance
    for prompt in PROMPTS[:3]:
        engine = llama.engine(block_size=block_size)
        ledger = Ledger(len(prompt), block_size)

        def recorded(self: BeamSearch, *candidates: np.ndarray, ledger: Ledger = ledger) -> list[int]:
            parents = advance(self, *candidates)
            if parents:
                ledger.grow(parents)
            return parents

        monkeypatch.setattr(BeamSearch, "advance", recorded)
        output = search(engine, prompt, BeamSearchParams(width, 12))
        assert (output.num_blocks, output.num_unshared_blocks) == (ledger.num_blocks, ledger.num_unshared)
        assert engine.stats().num_cow_copies == ledger.num_copies


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("prompt_len, width, max_tokens", [(5, 4, 12), (8, 3, 9), (1, 8, 6), (13, 2, 20), (6, 5, 1)])
def test_a_search_that_just_fits_the_pool_runs_and_one_block_less_is_refused_with_the_arithmetic(
    llama: Lab, prefix_caching: bool, prompt_len: int, width: int, max_tokens: int
) -> None:
    params, prompt = BeamSearchParams(width, max_tokens), PROMPTS[3][:prompt_len]
    shared = prompt_len // 4
    tails = width if max_tokens > 1 else 1  # the last token of a beam is never written
    needed = shared + tails * (-(-(prompt_len + max_tokens - 1) // 4) - shared)
    engine = llama.engine(num_kv_blocks=needed, prefix_caching=prefix_caching)
    assert_same(search(engine, prompt, params), dense_beam_search(unpaged_logprobs(llama.model, prompt), params, []))
    assert engine.stats().num_preemptions == 0
    engine = llama.engine(num_kv_blocks=needed - 1, prefix_caching=prefix_caching)
    message = rf"{prompt_len} tokens and {width} beams of {max_tokens} more need {needed} blocks .* has {needed - 1}"
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt, params)
    assert is_idle(engine) and not engine.has_unfinished()


def test_searches_that_just_fit_alone_take_turns(llama: Lab) -> None:
    params = BeamSearchParams(3, 9)
    engine = llama.engine(num_kv_blocks=1 + 3 * 3, prefix_caching=False)
    ids = [engine.add_request(PROMPTS[0], params) for _ in range(4)]
    outputs = run(engine)
    for i in ids:
        llama.compare(outputs[i], params)


# -- refusals, aborts, errors -----------------------------------------------------------------------------------


def test_more_beams_than_places_are_refused_and_as_many_run(llama: Lab) -> None:
    engine = llama.engine(max_num_seqs=4)
    with pytest.raises(ValueError, match="beam_width=5 beams can't run at once: max_num_seqs is 4"):
        engine.add_request(PROMPTS[0], BeamSearchParams(5))
    llama.compare(search(engine, PROMPTS[0], BeamSearchParams(4, 8)), BeamSearchParams(4, 8))


def test_a_stream_of_beams_is_refused(llama: Lab) -> None:
    engine = llama.engine()
    with pytest.raises(ValueError, match="a beam search can't be streamed"):
        engine.add_request(PROMPTS[0], BeamSearchParams(2), stream=True)
    assert not engine.has_unfinished()


@pytest.mark.parametrize("width", [2, 4, 8])
def test_beams_that_the_vocabulary_is_too_small_for_come_later_and_still_find_their_places(width: int) -> None:
    model = make_model("llama", num_hidden_layers=2, vocab_size=3)
    engine = LLM.from_model(model, block_size=4, num_kv_blocks=100, max_num_seqs=width, check_invariants=True).engine
    params = BeamSearchParams(width, 5)
    ids = [engine.add_request([1, 2, i], params) for i in range(3)]
    samples = [engine.add_request([i], SamplingParams(temperature=0, max_tokens=9)) for i in range(3)]
    outputs = run(engine)
    for i in ids:
        assert outputs[i].error is None
        assert_same(outputs[i], dense_beam_search(unpaged_logprobs(model, [1, 2, i]), params, []))
    for i, sample in enumerate(samples):
        assert outputs[sample].outputs[0].token_ids == unpaged_greedy(model, [i], 9).token_ids


@pytest.mark.parametrize("num_steps", range(8))
def test_an_aborted_search_gives_what_it_has_so_far_and_frees_everything(llama: Lab, num_steps: int) -> None:
    params = BeamSearchParams(3, 6, 0.5)
    engine = llama.engine(max_num_batched_tokens=10)
    doomed = engine.add_request(PROMPTS[2], dataclasses.replace(params, max_tokens=30))
    survivor = engine.add_request(PROMPTS[0], params)
    outputs = {output.request_id: output for _ in range(num_steps) for output in engine.step()}
    aborted = engine.abort(doomed)
    assert isinstance(aborted, BeamSearchOutput) and aborted.finished and aborted.aborted
    lengths = {len(hypothesis.token_ids) for hypothesis in aborted.sequences}
    assert len(lengths) <= 1
    if lengths:
        llama.compare(aborted, dataclasses.replace(params, max_tokens=lengths.pop()))
    outputs |= run(engine)
    llama.compare(outputs[survivor], params)
    assert doomed not in outputs


def test_preempted_beams_can_be_aborted_while_they_wait(llama: Lab) -> None:
    engine, params = llama.engine(num_kv_blocks=17), BeamSearchParams(4, 13)
    ids = [engine.add_request(prompt, params) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[1])]
    outputs: dict[int, RequestOutput] = {}
    waiting: list[Any] = []
    while not waiting:
        outputs |= {output.request_id: output for output in engine.step()}
        waiting = [sequence.request for sequence in engine._scheduler.waiting if sequence.num_shared_tokens is not None]
    assert len(waiting[0].sequences) == 4, "one waits for all of them"
    aborted = engine.abort(waiting[0].request_id)
    assert aborted is not None and aborted.sequences
    outputs |= run(engine)
    assert sorted(outputs) == [i for i in ids if i != waiting[0].request_id]
    for output in outputs.values():
        llama.compare(output, params)


def test_a_search_in_numbers_that_are_none_ends_alone_with_an_error(
    llama: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine()
    run_model = engine._runner.run

    def poisoned(inputs: Any) -> mx.array:
        logits = run_model(inputs)
        ours = mx.array(np.array(inputs.positions)[np.array(inputs.logits_indices)]
                        if inputs.logits_indices is not None
                        else np.array(inputs.positions))  # fmt: skip
        return mx.where((ours == 10)[:, None], mx.nan, logits)

    monkeypatch.setattr(engine._runner, "run", poisoned)
    bad = engine.add_request(PROMPTS[1], BeamSearchParams(3, 9))
    good = engine.add_request(PROMPTS[0][:2], BeamSearchParams(3, 6))
    outputs = run(engine)
    assert "NaN" in outputs[bad].error and outputs[bad].sequences == []
    assert outputs[good].error is None and len(outputs[good].sequences) == 3


# -- transformers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_engine_finds_what_hugging_face_finds(family: str, early_stopping: bool | str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from test_beam_search import HuggingFace

    twin = HuggingFace(family)
    num_searches = num_near_ties = 0
    for i, width in enumerate((2, 3, 5, 8)):
        eos = twin.end_tokens(1 + i % 2)
        params = BeamSearchParams(width, 10, (1.0, 0.0, 2.0, -0.5)[i], early_stopping)
        config = {"block_size": 4, "num_kv_blocks": 80, "max_num_seqs": 9, "check_invariants": True}
        engine = LLM.from_model(twin.model, EndTokens(eos), **config).engine
        ids = [engine.add_request(prompt, params) for prompt in twin.prompts]
        outputs = run(engine)
        results = twin.generate(twin.prompts, params, eos)
        for request_id, tables, expected in zip(ids, twin.tables, results, strict=True):
            num_searches += 1
            if dense_beam_search(tables, params, eos).margin < NEAR_TIE:
                num_near_ties += 1
                continue
            assert_same(outputs[request_id], expected)
    assert num_near_ties <= num_searches // 4
