"""Token counts on the device: what they count, how they grow, and that counting copies nothing."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from helpers.budget import budget
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_paged.sampling.token_counts import TokenCounts

VOCAB_SIZE = 11


def read(counts: TokenCounts, rows: list[int]) -> tuple[list[list[bool]], list[list[int]]]:
    occurs, num_out = counts.read(mx.array(counts.count_rows[rows]))
    return np.array(occurs).tolist(), np.array(num_out).tolist()


def draw(counts: TokenCounts, rows: list[int], tokens: list[int]) -> None:
    """A step that puts out a token of each row."""
    mx.eval(*counts.read(mx.array(counts.count_rows[rows])))
    counts.add(counts.count_rows[rows], mx.array(tokens))


def test_prompt_tokens_occur_but_are_not_counted() -> None:
    counts = TokenCounts(1, VOCAB_SIZE)
    counts.set(0, [7, 7, 3], [3, 9, 3])
    draw(counts, [0], [7])
    draw(counts, [0], [10])
    occurs, num_out = read(counts, [0])
    assert [token for token in range(VOCAB_SIZE) if occurs[0][token]] == [3, 7, 9, 10]
    assert {token: n for token, n in enumerate(num_out[0]) if n} == {3: 2, 7: 1, 9: 1, 10: 1}


@settings(max_examples=budget(60, 6_000), deadline=None)
@given(data=st.data())
def test_counts_are_those_of_the_sequence_that_has_the_row(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 6))
    counts = TokenCounts(num_rows, VOCAB_SIZE)
    token = st.integers(0, VOCAB_SIZE - 1)
    sequences: dict[int, tuple[list[int], list[int]]] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        row = data.draw(st.integers(0, num_rows - 1))
        action = data.draw(st.sampled_from(["set", "release", "draw", "draw"]))
        if action == "set":
            sequences[row] = data.draw(st.lists(token, max_size=5)), data.draw(st.lists(token, max_size=5))
            counts.set(row, *sequences[row])
        elif action == "release":
            counts.release(row)
            sequences.pop(row, None)
        elif sequences:
            rows = data.draw(st.lists(st.sampled_from(sorted(sequences)), min_size=1, unique=True))
            tokens = [data.draw(token) for _ in rows]
            draw(counts, rows, tokens)
            for row, token_id in zip(rows, tokens, strict=True):
                sequences[row][1].append(token_id)
    for row, (prompt, output) in sequences.items():
        occurs, num_out = read(counts, [row])
        assert occurs[0] == [t in prompt + output for t in range(VOCAB_SIZE)]
        assert num_out[0] == [output.count(t) for t in range(VOCAB_SIZE)]
    assert all((count_row >= 0) == (row in sequences) for row, count_row in enumerate(counts.count_rows))


def test_a_count_row_is_given_back_and_taken_again() -> None:
    counts = TokenCounts(4, VOCAB_SIZE)
    for row in (2, 0):
        counts.set(row, [], [])
    assert counts.count_rows.tolist() == [1, -1, 0, -1]
    counts.release(2)
    counts.set(3, [1], [])
    counts.set(0, [2], [])
    assert counts.count_rows.tolist() == [1, -1, -1, 0]
    assert read(counts, [3])[0][0].index(True) == 1


def test_a_token_drawn_by_a_step_that_failed_does_not_outlive_its_sequence() -> None:
    counts = TokenCounts(2, VOCAB_SIZE)
    counts.set(0, [], [])
    counts.read(mx.array([0]))
    counts.add(counts.count_rows[[0]], mx.array([5]))
    counts.set(0, [], [1])
    assert read(counts, [0])[1] == [[0, 1] + [0] * (VOCAB_SIZE - 2)]


# -- memory -----------------------------------------------------------------------------------------------------

WIDE = 100_000


def active_bytes() -> int:
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize(("num_rows", "num_count_rows"), [(0, 0), (1, 1), (2, 2), (3, 4), (5, 6), (6, 6)])
def test_memory_is_what_the_rows_need_doubled_at_most_and_below_the_limit(num_rows: int, num_count_rows: int) -> None:
    before = active_bytes()
    counts = TokenCounts(6, WIDE)
    for row in range(num_rows):
        counts.set(row, [row], [])
        draw(counts, [row], [1])
    for turn in range(20 if num_rows else 0):  # sequences that come and go
        counts.set(turn % num_rows, [1], [])
        draw(counts, [turn % num_rows], [1])
    assert 0 <= active_bytes() - before - 4 * WIDE * num_count_rows < 10_000


def test_a_row_that_was_released_before_its_first_step_leaves_nothing() -> None:
    counts = TokenCounts(6, WIDE)
    for row in range(6):
        counts.set(row, [], [])
    for row in range(1, 6):
        counts.release(row)
    before = active_bytes()
    draw(counts, [0], [1])
    assert active_bytes() - before < 4 * WIDE + 10_000


def one_by_one(counts: TokenCounts, rows: list[int]) -> Callable[[], None]:
    def step() -> None:
        _, num_out = counts.read(mx.array(counts.count_rows[rows]))
        tokens = mx.argmin(num_out, axis=-1)
        counts.add(counts.count_rows[rows], tokens)
        mx.eval(tokens)

    return step


def pipelined(counts: TokenCounts, rows: list[int]) -> Callable[[], None]:
    def step() -> None:
        _, num_out = counts.read(mx.array(counts.count_rows[rows]))
        tokens = mx.argmin(num_out, axis=-1)
        counts.add(counts.count_rows[rows], tokens)
        mx.synchronize()
        mx.async_eval(tokens)

    return step


def joining(counts: TokenCounts, rows: list[int]) -> Callable[[], None]:
    step = one_by_one(counts, rows)

    def joined() -> None:
        counts.set(rows[0], [1, 2], [3])
        step()

    return joined


@pytest.mark.parametrize("make_step", [one_by_one, pipelined, joining])
def test_counting_does_not_copy_the_counts(make_step: Callable[..., Callable[[], None]]) -> None:
    counts = TokenCounts(32, WIDE)
    for row in range(32):
        counts.set(row, [], [])
    step = make_step(counts, [3, 30])
    step()
    step()
    before = active_bytes()
    mx.reset_peak_memory()
    for _ in range(5):
        step()
    mx.synchronize()
    assert mx.get_peak_memory() - before < 4 * 32 * WIDE / 2
