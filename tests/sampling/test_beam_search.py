"""Beam search against a plain implementation of it, and both against Hugging Face's `generate`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.beam_oracle import LogprobsOf, OracleResult, dense_beam_search, unpaged_beam_search, unpaged_logprobs
from helpers.tiny_models import COMMON, TINY_CONFIGS, VOCAB_SIZE, make_model, unpaged_greedy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_paged.sampling.beam_search import BeamSearch, Hypothesis
from mlx_paged.sampling.sampler import best_tokens
from mlx_paged.sampling_params import BeamSearchParams

EARLY_STOPPING = (False, True, "never")
LENGTH_PENALTIES = (-0.5, 0.0, 0.8, 1.0, 2.0)
NEAR_TIE = 1e-4  # float32 in two frameworks: where a decision is closer than this, either outcome is right


def best_of(table: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row in no particular order, of equal ones the lower token ids."""
    token_ids = np.argsort(-table, axis=-1, kind="stable")[:, :k][:, ::-1]
    return token_ids, np.take_along_axis(table, token_ids, axis=-1)


def advance(search: BeamSearch, logprobs_of: LogprobsOf) -> None:
    """One step of a search; the new beams must grow out of the parents that it returns."""
    old = [beam.token_ids for beam in search.beams]
    parents = search.advance(*best_of(logprobs_of([tuple(tokens) for tokens in old]), search.num_candidates))
    assert len(parents) == len(search.beams)
    assert [beam.token_ids[:-1] for beam in search.beams] == [old[parent] for parent in parents]


def run(logprobs_of: LogprobsOf, params: BeamSearchParams, eos_token_ids: Collection[int]) -> list[Hypothesis]:
    search = BeamSearch(params, params.max_tokens, eos_token_ids)
    while not search.finished:
        advance(search, logprobs_of)
    assert search.beams == []
    return search.hypotheses()


def random_tables(seed: int, vocab_size: int, levels: int = 1 << 20) -> LogprobsOf:
    """Log-probabilities that depend on the output so far; few `levels` make many ties. Their sums are exact."""

    def logprobs_of(outputs: list[tuple[int, ...]]) -> np.ndarray:
        rows = [np.random.default_rng([seed, *tokens]).integers(1, levels + 1, vocab_size) for tokens in outputs]
        return np.stack(rows) * (-4.0 / levels)

    return logprobs_of


@st.composite
def problems(
    draw: st.DrawFn, levels: tuple[int, ...] = (1, 4, 16, 1 << 20)
) -> tuple[LogprobsOf, BeamSearchParams, list[int]]:
    width = draw(st.integers(1, 5))
    eos_token_ids = draw(st.lists(st.integers(0, 3), max_size=2, unique=True))
    params = BeamSearchParams(
        beam_width=width,
        max_tokens=draw(st.integers(1, 7)),
        length_penalty=draw(st.sampled_from((*LENGTH_PENALTIES, -1.0, 3.0))),
        early_stopping=draw(st.sampled_from(EARLY_STOPPING)),
        num_return_sequences=draw(st.none() | st.integers(1, width)),
    )
    tables = random_tables(draw(st.integers(0, 1 << 30)), draw(st.integers(4, 20)), draw(st.sampled_from(levels)))
    return tables, params, eos_token_ids


@settings(max_examples=300)
@given(problems())
def test_every_search_gives_what_the_plain_implementation_gives(problem: Any) -> None:
    found = run(*problem)
    assert [tuple(hypothesis) for hypothesis in found] == dense_beam_search(*problem).sequences
    scores = [hypothesis.score for hypothesis in found]
    assert scores == sorted(scores, reverse=True)


@settings(max_examples=100)
@given(problems(levels=(1 << 20,)), st.integers(1, 6))
def test_a_search_given_up_returns_what_it_would_with_so_many_tokens_allowed(problem: Any, num_steps: int) -> None:
    tables, params, eos_token_ids = problem
    params = dataclasses.replace(params, early_stopping=params.early_stopping is True)
    search = BeamSearch(params, 100, eos_token_ids)
    for _ in range(num_steps):
        advance(search, tables)
        assume(not search.finished)
    expected = dense_beam_search(tables, dataclasses.replace(params, max_tokens=num_steps), eos_token_ids)
    assert [tuple(hypothesis) for hypothesis in search.hypotheses()] == expected.sequences


@settings(max_examples=50)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from([(2, 1), (2, 4), (3, 3), (4, 2)]),
    st.sampled_from(LENGTH_PENALTIES),
    st.sampled_from(EARLY_STOPPING),
)
def test_a_beam_as_wide_as_all_outputs_finds_the_best_of_all(
    seed: int, size: tuple[int, int], length_penalty: float, early_stopping: bool | str
) -> None:
    vocab_size, max_tokens = size
    tables = random_tables(seed, vocab_size)
    params = BeamSearchParams(vocab_size**max_tokens, max_tokens, length_penalty, early_stopping)
    every_output = [
        (sum(tables([tokens[:i]])[0, token] for i, token in enumerate(tokens)) / length**length_penalty)
        for length in range(1, max_tokens + 1)
        for tokens in itertools.product(range(vocab_size), repeat=length)
        if 0 not in tokens[:-1] and (tokens[-1] == 0 or length == max_tokens)
    ]
    assert [hypothesis.score for hypothesis in run(tables, params, [0])] == sorted(every_output, reverse=True)


def test_of_equal_candidates_the_lower_token_comes_first_and_then_the_better_parent() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3), 10, [])
    assert search.advance(np.array([[5, 9, 2, 7]]), np.full((1, 4), -1.0)) == [0, 0, 0]
    assert [beam.token_ids for beam in search.beams] == [[2], [5], [7]]
    assert search.advance(np.array([[6, 4], [4, 6], [6, 4]]), np.full((3, 2), -1.0)) == [0, 1, 2]
    assert [beam.token_ids for beam in search.beams] == [[2, 4], [5, 4], [7, 4]]


def test_of_equal_scores_the_hypothesis_that_finished_first_is_kept() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=1, length_penalty=0.0, early_stopping="never"), 10, [0])
    search.advance(np.array([[1, 0]]), np.array([[0.0, -1.0]]))
    search.advance(np.array([[0, 1]]), np.array([[-1.0, -1.0]]))
    assert search.finished
    assert search.hypotheses() == [([1, 0], -1.0, -1.0)]
    search = BeamSearch(BeamSearchParams(beam_width=2, length_penalty=0.0, early_stopping="never"), 3, [0])
    search.advance(np.array([[0, 1, 2, 3]]), np.array([[-1.0, 0.0, -2.0, -3.0]]))
    search.advance(np.array([[0, 2, 3, 4], [0, 2, 3, 4]]), np.array([[-1.0, -0.5, -9, -9], [-9, -9, -9, -9.0]]))
    assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [[1, 2], [0]]
    search.advance(np.array([[0, 2, 3, 4], [0, 2, 3, 4]]), np.array([[-0.5, -0.5, -9, -9], [-9, -9, -9, -9.0]]))
    assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [[0], [1, 0]]


def test_an_end_token_counts_only_among_the_first_beam_width_candidates() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2), 10, [0])
    search.advance(np.array([[1, 2, 0, 3]]), np.array([[-1.0, -2.0, -3.0, -4.0]]))
    assert [beam.token_ids for beam in search.beams] == [[1], [2]]
    assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [[1], [2]]
    search.advance(np.array([[0, 1, 2, 3]] * 2), np.array([[-1.0, -1.5, -8.0, -9.0]] * 2))
    assert [beam.token_ids for beam in search.beams] == [[1, 1], [2, 1]]
    assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [[1, 0], [1, 1]]


@pytest.mark.parametrize(("length_penalty", "goes_on"), [(1.0, True), (0.0, False), (-0.5, False)])
def test_never_grants_running_beams_the_length_that_suits_them_most(length_penalty: float, goes_on: bool) -> None:
    search = BeamSearch(BeamSearchParams(2, 64, length_penalty, "never"), 64, [0, 1])
    search.advance(np.array([[0, 1, 2, 3]]), np.array([[-1.0, -2.0, -3.0, -4.0]]))
    assert search.finished is not goes_on


def test_a_negative_length_penalty_does_not_stop_a_search_that_can_still_improve() -> None:
    search = BeamSearch(BeamSearchParams(2, 64, -1.0, "never"), 64, [0])
    search.advance(np.array([[0, 1, 2, 3]]), np.array([[-1.5, -0.25, -9.0, -9.0]]))
    search.advance(np.array([[0, 1, 2, 3]] * 2), np.array([[-4.0, -0.25, -5.0, -5.5], [-9.0, -9.0, -9.0, -9.0]]))
    assert [hypothesis.score for hypothesis in search.hypotheses()] == [-1.0, -1.5]  # [1, 1], which runs, before [0]
    assert not search.finished
    search.advance(np.array([[0, 1, 2, 3]] * 2), np.array([[-0.5, -0.25, -5.0, -5.5], [-9.0, -9.0, -9.0, -9.0]]))
    assert not search.finished  # 3 tokens at -0.75 in sum: -2.25 beats the -3 of [1, 1, 0], -48 would not


def test_the_candidates_suffice_when_every_end_token_is_likely() -> None:
    assert BeamSearch(BeamSearchParams(beam_width=4), 10, []).num_candidates == 8
    assert BeamSearch(BeamSearchParams(beam_width=4), 10, [3]).num_candidates == 8
    assert BeamSearch(BeamSearchParams(beam_width=4), 10, [3, 5, 5]).num_candidates == 12


def test_a_vocabulary_with_fewer_tokens_than_wanted_gives_fewer_beams() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=4), 10, [0])
    assert search.advance(np.array([[0, 1, 2]]), np.array([[-1.0, -2.0, -3.0]])) == [0, 0]
    assert search.advance(np.array([[0, 1, 2]] * 2), np.array([[-1.0, -2.0, -3.0]] * 2)) == [0, 1, 0, 1]


def test_a_search_in_which_only_the_end_is_left_is_over() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3), 10, [0])
    assert search.advance(np.array([[0]]), np.array([[-1.0]])) == []
    assert search.finished
    assert search.hypotheses() == [([0], -1.0, -1.0)]


def test_an_impossible_token_is_no_candidate() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3), 2, [0])
    assert search.advance(np.array([[0, 1, 2]]), np.array([[-np.inf, -0.5, -np.inf]])) == [0]
    assert search.advance(np.array([[0, 1, 2]]), np.array([[-0.5, -np.inf, -np.inf]])) == []
    assert search.hypotheses() == [([1, 0], -1.0, -0.5)]


def test_a_search_given_up_before_its_first_token_returns_nothing() -> None:
    search = BeamSearch(BeamSearchParams(), 10, [0])
    assert search.hypotheses() == []
    assert not search.finished


def test_nan_is_refused_and_changes_nothing() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2), 3, [0])
    search.advance(np.array([[1, 2]]), np.array([[-1.0, -2.0]]))
    with pytest.raises(ValueError, match=r"not numbers \(NaN\)"):
        search.advance(np.array([[1, 2], [1, 2]]), np.array([[-1.0, -2.0], [-1.0, np.nan]]))
    assert [beam.token_ids for beam in search.beams] == [[1], [2]]
    assert [hypothesis.score for hypothesis in search.hypotheses()] == [-1.0, -2.0]
    search.advance(np.array([[1, 2], [1, 2]]), np.array([[-1.0, -2.0], [-1.0, -9.0]]))
    assert not search.finished  # the refused step was none


def test_candidates_of_another_number_of_beams_are_refused() -> None:
    with pytest.raises(ValueError, match="1 beams need as many rows"):
        BeamSearch(BeamSearchParams(), 10, [0]).advance(np.zeros((2, 8), int), np.zeros((2, 8)))


@pytest.mark.parametrize("length_penalty", [-5e3, 5e3])
def test_an_absurd_length_penalty_is_no_error(length_penalty: float) -> None:
    found = run(random_tables(0, 12), BeamSearchParams(3, 5, length_penalty, "never"), [0, 1])
    assert len(found) == 3
    assert not any(math.isnan(hypothesis.score) for hypothesis in found)


@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_beam_is_greedy_decoding(
    tiny_model: Callable[..., nn.Module], family: str, early_stopping: bool | str
) -> None:
    model = tiny_model(family)
    prompt = [3, 14, 15, 92, 65]
    greedy = unpaged_greedy(model, prompt, 16)
    end = next(i for i in range(4, 16) if greedy.token_ids[i] not in greedy.token_ids[:i])
    params = BeamSearchParams(1, 16, 2.0, early_stopping)
    for eos_token_ids, length in (([], 16), ([greedy.token_ids[end]], end + 1)):
        (found,) = run(unpaged_logprobs(model, prompt), params, eos_token_ids)
        assert found.token_ids == greedy.token_ids[:length]
        assert found.cum_logprob == pytest.approx(sum(greedy.logprobs[:length]), abs=1e-4)
        assert found.score == found.cum_logprob / length**2


def test_the_best_tokens_of_a_model_are_enough_for_the_search(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    prompt = [5, 8, 13]
    for width in (2, 5):
        params = BeamSearchParams(width, 10, early_stopping="never")
        eos_token_ids = [unpaged_beam_search(model, prompt, params, []).sequences[0][0][4]]
        search = BeamSearch(params, 10, eos_token_ids)
        while not search.finished:
            inputs = mx.array([[*prompt, *beam.token_ids] for beam in search.beams])
            token_ids, logprobs = best_tokens(model(inputs)[:, -1], search.num_candidates)
            search.advance(np.array(token_ids), np.array(logprobs))
        expected = unpaged_beam_search(model, prompt, params, eos_token_ids)
        assert expected.margin > NEAR_TIE
        assert [hypothesis.token_ids for hypothesis in search.hypotheses()] == [s[0] for s in expected.sequences]


class HuggingFace:
    """A tiny random model twice: of mlx-lm, and with the same weights of transformers."""

    def __init__(self, family: str) -> None:
        self.torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        self.torch.set_num_threads(1)
        size = {"num_hidden_layers": 2, "rope_theta": 10000.0}
        self.model = make_model(family, seed=1, **size)
        self.model.model.norm.weight *= 2.0  # sure of itself, so that later hypotheses can overtake finished ones
        name = {"llama": "Llama", "qwen2": "Qwen2"}[family]
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = getattr(transformers, f"{name}Config")(**COMMON | TINY_CONFIGS[family] | size, rope_parameters=rope)
        self.twin = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        weights = {path: self.torch.tensor(np.array(weight)) for path, weight in tree_flatten(self.model.parameters())}
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.twin.load_state_dict(weights)
        rng = np.random.default_rng(7)
        self.prompts = [rng.integers(1, VOCAB_SIZE, length).tolist() for length in (4, 11, 7)]
        self.tables = [unpaged_logprobs(self.model, prompt) for prompt in self.prompts]

    def end_tokens(self, num_tokens: int) -> list[int]:
        """Tokens that beams of every prompt come across, so that searches end in all manners."""
        outputs = [dense_beam_search(tables, BeamSearchParams(4, 8), []).sequences for tables in self.tables]
        counts = np.bincount([t for sequences in outputs for s in sequences for t in s[0][1:]], minlength=VOCAB_SIZE)
        return np.argsort(-counts, kind="stable")[:num_tokens].tolist()

    def generate(self, prompts: list[list[int]], params: BeamSearchParams, eos: list[int]) -> list[OracleResult]:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        count = params.num_return_sequences or params.beam_width
        with self.torch.inference_mode():
            result = self.twin.generate(
                self.torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]),
                attention_mask=self.torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
                do_sample=False,
                num_beams=params.beam_width,
                num_return_sequences=count,
                max_new_tokens=params.max_tokens,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                eos_token_id=eos or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
        lengths = (result.beam_indices >= 0).sum(dim=-1).tolist()
        rows = [
            (row[longest : longest + length], score * length**params.length_penalty, score)
            for row, length, score in zip(
                result.sequences.tolist(), lengths, result.sequences_scores.tolist(), strict=True
            )
        ]
        return [OracleResult(rows[i : i + count]) for i in range(0, len(rows), count)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def hugging_face(request: pytest.FixtureRequest) -> Iterator[HuggingFace]:
    yield HuggingFace(request.param)


def assert_same(found: list[tuple[list[int], float, float]], expected: list[tuple[list[int], float, float]]) -> None:
    """The same sequences in the same order, but for the order of scores that are nearly equal."""
    assert len(found) == len(expected)
    for tokens, cum_logprob, score in found:
        twins = [other for other in expected if other[0] == tokens]
        assert len(twins) == 1, (tokens, expected)
        assert score == pytest.approx(twins[0][2], abs=1e-3)
        assert cum_logprob == pytest.approx(twins[0][1], abs=1e-3)
    for (tokens, _, score), (other, _, other_score) in zip(found, expected, strict=True):
        assert tokens == other or abs(score - other_score) < NEAR_TIE


@pytest.mark.parametrize("early_stopping", EARLY_STOPPING)
@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_searches_end_as_those_of_hugging_face(
    hugging_face: HuggingFace, width: int, early_stopping: bool | str
) -> None:
    num_searches = num_near_ties = 0
    for i, length_penalty in enumerate(LENGTH_PENALTIES):
        eos_token_ids = hugging_face.end_tokens((1, 2, 8)[(i + width) % 3])
        params = BeamSearchParams(width, 10, length_penalty, early_stopping, 1 + i % width if i % 3 else None)
        results = hugging_face.generate(hugging_face.prompts, params, eos_token_ids)
        for prompt, tables, result in zip(hugging_face.prompts, hugging_face.tables, results, strict=True):
            expected = dense_beam_search(tables, params, eos_token_ids)
            found = [tuple(hypothesis) for hypothesis in run(tables, params, eos_token_ids)]
            num_searches += 1
            if expected.margin < NEAR_TIE:
                num_near_ties += 1
                continue
            assert_same(found, expected.sequences)
            assert_same(expected.sequences, result.sequences)
            if i == 3:
                (alone,) = hugging_face.generate([prompt], params, eos_token_ids)
                assert_same(expected.sequences, alone.sequences)
    assert num_near_ties <= num_searches // 10


def test_the_searches_compared_end_in_all_manners(hugging_face: HuggingFace) -> None:
    ended, num_outcomes = [], []
    for num_end_tokens, length_penalty, tables in itertools.product((1, 2, 8), LENGTH_PENALTIES, hugging_face.tables):
        eos_token_ids = hugging_face.end_tokens(num_end_tokens)
        params = [BeamSearchParams(5, 10, length_penalty, early_stopping) for early_stopping in EARLY_STOPPING]
        found = [run(tables, p, eos_token_ids) for p in params]
        ended += [hypothesis.token_ids[-1] in eos_token_ids for hypotheses in found for hypothesis in hypotheses]
        num_outcomes.append(len({str(hypotheses) for hypotheses in found}))
    assert 0.3 < np.mean(ended) < 0.9
    assert np.mean(num_outcomes) > 1.1


def test_a_search_without_end_tokens_runs_as_long_as_that_of_hugging_face(hugging_face: HuggingFace) -> None:
    params = BeamSearchParams(4, 9)
    results = hugging_face.generate(hugging_face.prompts, params, [])
    for tables, result in zip(hugging_face.tables, results, strict=True):
        found = run(tables, params, [])
        assert {len(hypothesis.token_ids) for hypothesis in found} == {9}
        assert_same([tuple(hypothesis) for hypothesis in found], result.sequences)


def test_one_beam_is_the_greedy_decoding_of_hugging_face(hugging_face: HuggingFace) -> None:
    eos_token_ids = hugging_face.end_tokens(2)
    for prompt, tables in zip(hugging_face.prompts, hugging_face.tables, strict=True):
        output = hugging_face.twin.generate(
            hugging_face.torch.tensor([prompt]),
            attention_mask=hugging_face.torch.ones(1, len(prompt), dtype=int),
            do_sample=False, num_beams=1, max_new_tokens=12, eos_token_id=eos_token_ids, pad_token_id=0,
        )  # fmt: skip
        (found,) = run(tables, BeamSearchParams(1, 12, early_stopping="never"), eos_token_ids)
        assert found.token_ids == output[0, len(prompt) :].tolist()


@settings(max_examples=150)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.data(),
)
def test_candidates_are_the_best_tokens_and_of_equal_ones_the_lowest(
    num_rows: int, vocab_size: int, k: int, dtype: mx.Dtype, data: st.DataObject
) -> None:
    values = st.sampled_from([-np.inf, -1e30, -30.0, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0078125, 9.0])
    logits = np.array(
        data.draw(st.lists(values, min_size=num_rows * vocab_size, max_size=num_rows * vocab_size))
    ).reshape(num_rows, vocab_size)
    logits[:, 0] = np.maximum(logits[:, 0], -3.0)  # a row without any possible token has no distribution
    given_logits = mx.array(logits.astype(np.float32)).astype(dtype)
    exact = np.array(given_logits.astype(mx.float32), dtype=np.float64)
    token_ids, logprobs = (np.array(x) for x in best_tokens(given_logits, k))
    order = np.argsort(-exact, axis=-1, kind="stable")[:, :k]
    assert token_ids.tolist() == order.tolist()
    shifted = exact - exact.max(axis=-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, order, axis=-1), rtol=1e-6, atol=2e-5)
    assert logprobs.dtype == np.float32


@pytest.mark.parametrize("vocab_size", [1000, 32003])
def test_candidates_of_a_large_vocabulary_full_of_equal_logits(vocab_size: int) -> None:
    logits = np.random.default_rng(vocab_size).integers(-20, 20, (5, vocab_size)).astype(np.float32)
    token_ids, _ = best_tokens(mx.array(logits), 12)
    assert np.array(token_ids).tolist() == np.argsort(-logits, axis=-1, kind="stable")[:, :12].tolist()


@pytest.mark.parametrize("vocab_size", [7, 4099])
@pytest.mark.parametrize("not_a_number", [np.nan, -np.nan])
def test_a_row_with_nan_has_nan_candidates_and_the_others_do_not(vocab_size: int, not_a_number: float) -> None:
    logits = np.random.default_rng(0).normal(size=(4, vocab_size)).astype(np.float32)
    for row, position in ((0, 0), (1, vocab_size // 2), (2, vocab_size - 1)):
        logits[row, position] = not_a_number
    _, logprobs = best_tokens(mx.array(logits), 5)
    assert np.isnan(np.array(logprobs)).all(axis=-1).tolist() == [True, True, True, False]
    assert not np.isnan(np.array(logprobs)[3]).any()
