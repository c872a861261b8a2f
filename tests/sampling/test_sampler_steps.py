"""The sampler over many steps: rows that come and go, penalties that follow their tokens, nothing done twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from helpers.budget import budget
from helpers.sampling_oracle import VOCAB_SIZE, Row, bitmask, evaluated, make_logits, oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged import SamplingParams
from mlx_paged.sampling.sampler import Sampler, sample_seed

MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.8},
    {"top_k": 4, "repetition_penalty": 1.5},
    {"min_p": 0.1, "logit_bias": {1: 2.0, 40: 3.0}, "logprobs": 3},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"frequency_penalty": 1.2, "top_k": 9, "top_p": 0.9, "logprobs": 1},
    {},
]


def test_a_row_alone_draws_what_it_draws_among_64_mixed_ones_step_after_step() -> None:
    num_rows, num_steps = 64, 5
    rng = np.random.default_rng(1)
    rows = [
        Row(SamplingParams(**MIXED[i % len(MIXED)]), sample_seed(4, i), 3 * i, [i % 41, 5], [7, i % 3])
        for i in range(num_rows)
    ]
    logits = [make_logits(num_rows, seed, spread=1.0) for seed in range(num_steps)]
    allowed = [(rng.random((num_rows, VOCAB_SIZE)) < 0.6) | (np.arange(num_rows)[:, None] % 2 == 0) for _ in logits]

    def tokens(members: Sequence[int], numbers: Sequence[int]) -> np.ndarray:
        sampler = Sampler(100, VOCAB_SIZE)
        for member, number in zip(members, numbers, strict=True):
            row = rows[member]
            sampler.set_row(number, row.params, row.stream, row.prompt, row.output)
        drawn = []
        for step in range(num_steps):
            positions = np.array([rows[member].position + step for member in members])
            masks = bitmask(allowed[step][members])
            sampled = sampler.sample(mx.array(logits[step][members]), np.array(numbers), positions, masks)
            drawn.append(np.array(sampled.token_ids))
        return np.array(drawn)

    together = tokens(range(num_rows), range(num_rows))
    members, numbers = rng.permutation(num_rows).tolist(), rng.permutation(100)[:num_rows].tolist()
    assert tokens(members, numbers).tolist() == together[:, members].tolist()
    for member in range(0, num_rows, 3):
        assert tokens([member], [99 - member])[:, 0].tolist() == together[:, member].tolist()


@settings(max_examples=budget(40, 4_000), deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_penalties_follow_the_tokens_through_steps_and_changes_of_rows(data: st.DataObject, seed: int) -> None:
    num_rows = 5
    rng = np.random.default_rng(seed)
    sampler = Sampler(num_rows, VOCAB_SIZE)
    tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4)
    sequences: dict[int, tuple[SamplingParams, list[int], list[int]]] = {}
    for _ in range(data.draw(st.integers(3, 8))):
        for number in data.draw(st.sets(st.integers(0, num_rows - 1), max_size=3)) or {0}:
            values: dict[str, Any] = data.draw(
                st.sampled_from([{}, {"repetition_penalty": 1.7}, {"presence_penalty": 0.9}])
            )
            values = values | {"frequency_penalty": data.draw(st.sampled_from([0.0, 0.0, 0.6, -0.4]))}
            params, prompt, output = SamplingParams(temperature=0, **values), data.draw(tokens), data.draw(tokens)
            sequences[number] = params, prompt, output
            sampler.set_row(number, params, 0, prompt, output)
        for _ in range(data.draw(st.integers(0, 4))):
            numbers = data.draw(st.permutations(sorted(sequences)))
            numbers = numbers[: data.draw(st.integers(1, len(numbers)))]
            logits = rng.uniform(-1, 1, (len(numbers), VOCAB_SIZE)).astype(np.float32)
            drawn = evaluated(sampler.sample(mx.array(logits), np.array(numbers), np.zeros(len(numbers), int)))
            for i, number in enumerate(numbers):
                params, prompt, output = sequences[number]
                # At temperature 1 the oracle tells how good the token is: of two as good as equal, either will do.
                chances = oracle(logits[i], dataclasses.replace(params, temperature=1.0), prompt, output)
                assert chances[drawn.token_ids[i]] > chances.max() - 1e-6
                output.append(int(drawn.token_ids[i]))


def test_many_steps_that_are_only_evaluated_at_the_end_count_every_token() -> None:
    sampler = Sampler(3, VOCAB_SIZE)
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    for row in range(3):
        sampler.set_row(row, params, 0, [], [])
    logits = make_logits(3, seed=17)
    lazy = [sampler.sample(mx.array(logits), np.arange(3), np.full(3, step)) for step in range(30)]
    outputs: list[list[int]] = [[], [], []]
    for sampled in lazy:
        for row in range(3):
            chances = oracle(logits[row], SamplingParams(frequency_penalty=2.0), [], outputs[row])
            token = int(np.array(sampled.token_ids)[row])
            assert chances[token] > chances.max() - 1e-6
            outputs[row].append(token)


def test_a_steady_batch_is_put_together_once() -> None:
    sampler = Sampler(16, VOCAB_SIZE)
    for row in range(16):
        sampler.set_row(row, SamplingParams(**MIXED[row % len(MIXED)]), row, [1], [2])
    logits = mx.array(make_logits(12))
    assert sampler.num_rebuilds == 0
    for step in range(20):
        sampler.sample(logits, np.arange(12), np.full(12, step))
    assert sampler.num_rebuilds == 1
    sampler.set_row(15, SamplingParams(temperature=0), 0, [], [])  # not one of the batch
    sampler.sample(logits, np.arange(12), np.zeros(12, int))
    assert sampler.num_rebuilds == 1


def test_a_batch_is_put_together_anew_for_other_rows_another_order_and_a_row_that_was_set() -> None:
    sampler = Sampler(4, VOCAB_SIZE)
    logits = make_logits(4, seed=18)
    worst, best = int(logits[1].argmin()), int(logits[1].argmax())
    for row in range(4):
        sampler.set_row(row, SamplingParams(temperature=0), 0, [], [])

    def step(numbers: list[int]) -> list[int]:
        sampled = sampler.sample(mx.array(logits[: len(numbers)]), np.array(numbers), np.zeros(len(numbers), int))
        return np.array(sampled.token_ids).tolist()

    assert step([0, 1, 2])[1] == best and sampler.num_rebuilds == 1
    sampler.set_row(1, SamplingParams(temperature=0, logit_bias={worst: 100.0}), 0, [], [])
    assert step([0, 1, 2])[1] == worst and sampler.num_rebuilds == 2
    assert step([0, 2, 1])[1] == best and sampler.num_rebuilds == 3
    assert step([2, 1])[1] == worst and sampler.num_rebuilds == 4
    sampler.set_row(1, SamplingParams(temperature=0), 0, [], [])
    assert step([2, 1])[1] == best and sampler.num_rebuilds == 5


def test_an_array_of_rows_that_the_caller_changes_is_noticed() -> None:
    sampler = Sampler(2, VOCAB_SIZE)
    logits = make_logits(1, seed=19)
    worst = int(logits[0].argmin())
    sampler.set_row(0, SamplingParams(temperature=0), 0, [], [])
    sampler.set_row(1, SamplingParams(temperature=0, logit_bias={worst: 100.0}), 0, [], [])
    rows = np.array([0])
    sampler.sample(mx.array(logits), rows, np.zeros(1, int))
    rows[0] = 1
    assert sampler.sample(mx.array(logits), rows, np.zeros(1, int)).token_ids.tolist() == [worst]


def test_sampling_evaluates_nothing() -> None:
    vocab_size = 100_000
    sampler = Sampler(16, vocab_size)
    for row in range(16):
        sampler.set_row(row, SamplingParams(**MIXED[row % len(MIXED)]), row, [1], [2])
    logits = mx.random.normal((16, vocab_size), key=mx.random.key(0))
    masks = np.full((16, vocab_size // 32), -1, np.int32)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sampled = sampler.sample(logits, np.arange(16), np.zeros(16, int), masks)
    put_up = masks.nbytes + 4 * vocab_size * len(MIXED)  # the masks and the first counts, which the host made
    assert mx.get_peak_memory() - before < put_up + 10_000
    mx.eval(sampled.token_ids, sampled.logprobs)
    assert mx.get_peak_memory() - before > 4 * 16 * vocab_size


def test_only_rows_that_have_penalties_hold_memory_for_them() -> None:
    vocab_size = 100_000
    logits = mx.zeros((1, vocab_size))
    sampler = Sampler(8, vocab_size)
    mx.eval(logits)
    mx.clear_cache()
    before = mx.get_active_memory()
    for row in range(8):
        for params in (SamplingParams(presence_penalty=1.0), SamplingParams(temperature=0)):
            sampler.set_row(row, params, 0, [], [])
            mx.eval(sampler.sample(logits, np.array([row]), np.zeros(1, int)).token_ids)
    mx.synchronize()
    assert mx.get_active_memory() - before < 4 * vocab_size + 10_000
