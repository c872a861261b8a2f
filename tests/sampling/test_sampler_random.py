"""The random numbers of a draw depend on seed, sample and position, and on nothing else."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from helpers.budget import budget
from helpers.sampling_oracle import VOCAB_SIZE, Row, make_logits, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged import SamplingParams
from mlx_paged.sampling.sampler import sample_seed


def test_a_draw_depends_on_nothing_else_in_the_batch() -> None:
    logits = make_logits(12, seed=5)
    choices = itertools.cycle(
        [
            SamplingParams(),
            SamplingParams(temperature=0.7, top_p=0.8),
            SamplingParams(temperature=0),
            SamplingParams(top_k=4, repetition_penalty=1.5),
            SamplingParams(min_p=0.1, logit_bias={1: 2.0}, logprobs=3),
        ]
    )
    rows = [Row(next(choices), sample_seed(9, i), i, [1, 2], [3]) for i in range(12)]
    together = run(logits, rows).token_ids.tolist()
    alone = [int(run(logits[i : i + 1], rows[i : i + 1]).token_ids[0]) for i in range(12)]
    assert together == alone
    order = np.random.default_rng(0).permutation(12)
    shuffled = run(logits[order], [rows[i] for i in order]).token_ids.tolist()
    assert shuffled == [together[i] for i in order]


def test_the_same_draw_gives_the_same_token_and_another_draw_another_one() -> None:
    logits = make_logits(1, seed=6, vocab_size=1000, spread=0.1)
    first = [int(run(logits, [Row(SamplingParams(), draw)]).token_ids[0]) for draw in range(20)]
    again = [int(run(logits, [Row(SamplingParams(), draw)]).token_ids[0]) for draw in range(20)]
    assert first == again
    assert len(set(first)) > 15


@pytest.mark.parametrize("shift", [1, 1 << 31, 1 << 32, 1 << 63])
def test_every_bit_of_a_draws_name_counts(shift: int) -> None:
    logits = np.zeros((2, 100_000), np.float32)
    a, b = run(logits, [Row(SamplingParams(), 5), Row(SamplingParams(), 5 ^ shift)]).token_ids
    assert a != b


def scalar_mix(x: int) -> int:
    """splitmix64's step, in whole numbers of any size."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@settings(max_examples=budget(40, 4_000), deadline=None)
@given(seed=st.integers(), index=st.integers(0, 2**41), position=st.integers(0, 2**31 - 1))
def test_a_seeds_random_numbers_stay_the_same_from_release_to_release(seed: int, index: int, position: int) -> None:
    stream = scalar_mix(scalar_mix(seed % 2**64) + index)
    assert sample_seed(seed, index) == stream
    draw = scalar_mix(stream + position)
    noise = mx.random.gumbel((VOCAB_SIZE,), key=mx.array([draw >> 32, draw % 2**32], mx.uint32))
    logits = make_logits(1, seed=20)
    row = Row(SamplingParams(), stream, position)
    assert run(logits, [row]).token_ids.tolist() == [int(mx.argmax(mx.array(logits[0]) + noise))]


def test_the_generator_is_splitmix64() -> None:
    # The first outputs of the generator seeded with 1234567, as published with it.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    gamma = 0x9E3779B97F4A7C15
    assert [scalar_mix(1234567 + i * gamma) for i in range(3)] == published


def test_seeds_and_indices_name_streams_of_their_own() -> None:
    seeds = [0, 1, 2, -1, -2, 2**31, 2**32, 2**63, 2**64 - 3, 123456789]
    names = {sample_seed(seed, index) for seed in seeds for index in range(100)}
    assert len(names) == len(seeds) * 100
    assert all(0 <= name < 1 << 64 for name in names)


@pytest.mark.parametrize("seed", [-1, -(10**30), 2**64, 10**40])
def test_seeds_of_any_size_name_streams_of_64_bits(seed: int) -> None:
    names = {sample_seed(seed, index) for index in range(150)}
    assert len(names) == 150
    assert all(0 <= name < 1 << 64 for name in names)


def test_positions_of_a_stream_draw_tokens_of_their_own() -> None:
    logits = np.zeros((200, 100_000), np.float32)
    tokens = run(logits, [Row(SamplingParams(), 2**64 - 1, position) for position in range(200)]).token_ids
    assert len(set(tokens.tolist())) > 190
