"""The blocks and rows that beams hold, share, wait for and give back."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.beam_lab import PROMPTS, Lab, assert_same, is_idle, lab_of, run, search
from helpers.beam_oracle import dense_beam_search, unpaged_logprobs
from helpers.tiny_models import make_model, unpaged_greedy

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.outputs import BeamSearchOutput, RequestOutput
from mlx_paged.sampling.beam_search import BeamSearch


@pytest.fixture
def llama() -> Lab:
    return lab_of("llama")


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


def test_more_beams_than_rows_are_refused_and_as_many_run(llama: Lab) -> None:
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
def test_beams_that_the_vocabulary_is_too_small_for_come_later_and_still_find_their_rows(width: int) -> None:
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
        ours = mx.array(np.array(inputs.positions)[np.array(inputs.logits_indices)] if inputs.logits_indices is not None
                        else np.array(inputs.positions))  # fmt: skip
        return mx.where((ours == 10)[:, None], mx.nan, logits)

    monkeypatch.setattr(engine._runner, "run", poisoned)
    bad = engine.add_request(PROMPTS[1], BeamSearchParams(3, 9))
    good = engine.add_request(PROMPTS[0][:2], BeamSearchParams(3, 6))
    outputs = run(engine)
    assert "NaN" in outputs[bad].error and outputs[bad].sequences == []
    assert outputs[good].error is None and len(outputs[good].sequences) == 3
