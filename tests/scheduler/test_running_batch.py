"""Rows: joining and leaving, tokens that come late, and what has changed of the block tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_paged import BeamSearchParams, SamplingParams
from mlx_paged.outputs import RequestMetrics
from mlx_paged.request import Request, Sequence
from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.scheduler.running_batch import BlockTables, Rows

NO_LOGPROBS = np.zeros(1, np.float32)


def make_sequence(prompt: list[int], seq_id: int = 0, max_tokens: int = 1000, beam_width: int = 0) -> Sequence:
    params = BeamSearchParams(beam_width) if beam_width else SamplingParams()
    search = BeamSearch(params, max_tokens, ()) if isinstance(params, BeamSearchParams) else None
    request = Request(seq_id, None, prompt, params, 0, max_tokens, False, RequestMetrics(0.0), search)
    sequence = Sequence(seq_id, request, 0, list(prompt))
    request.sequences.append(sequence)
    return sequence


def make_rows(num_rows: int = 3) -> Rows:
    return Rows(num_rows, num_groups=1, max_blocks=8, block_size=4)


def draw(rows: Rows, *sequences: Sequence) -> np.ndarray:
    """As the engine does when it has tokens drawn: they are counted before they are known."""
    drawn = np.array([sequence.row for sequence in sequences])
    rows.num_tokens[drawn] += 1
    return drawn


def put_out(rows: Rows, sequence: Sequence, token_id: int, logprob: float = -0.5) -> bool:
    """A token is drawn and known at once; whether it has to be looked at."""
    drawn = draw(rows, sequence)
    return bool(rows.add_tokens(drawn, np.array([token_id]), np.array([logprob], np.float32))[0])


def test_a_sequence_that_joins_has_a_row_with_what_is_known_of_it() -> None:
    rows, sequence = make_rows(), make_sequence([5, 6, 7], max_tokens=9)
    rows.join(sequence, 2)
    row = sequence.row
    assert rows.sequences[row] is sequence
    values = [getattr(rows, name)[row] for name in ("num_prompt", "num_tokens", "num_computed", "num_slots", "end")]
    assert values == [3, 3, 2, 0, 12]
    assert rows.last_token[row] == 7
    assert rows.is_filling[row] and rows.is_unforked[row]
    assert not rows.shares_tail[row] and not rows.is_beam[row] and not rows.is_constrained[row]


def test_a_trunk_joins_with_the_tokens_that_are_shared_and_is_widened_to_all_of_its_own() -> None:
    rows, beam = make_rows(), make_sequence([5, 6], beam_width=2)
    beam.token_ids += [7, 8, 9]
    beam.trunk = 3
    rows.join(beam, 0)
    assert (rows.num_tokens[beam.row], rows.last_token[beam.row], rows.is_beam[beam.row]) == (3, 7, True)
    beam.trunk = None
    rows.widen(beam)
    assert (rows.num_tokens[beam.row], rows.last_token[beam.row]) == (5, 9)


def test_a_row_is_given_to_one_sequence_at_a_time_and_to_the_next_one_after_it_left() -> None:
    rows = make_rows(2)
    first, second, third = (make_sequence([i], i) for i in range(3))
    rows.join(first, 0)
    rows.join(second, 0)
    assert {first.row, second.row} == {0, 1}
    row, stamp = first.row, rows.stamp[first.row]
    rows.leave(first)
    assert first.row == -1
    assert rows.stamp[row] != stamp, "who remembers the row can tell that it changed hands"
    rows.join(third, 0)
    assert third.row == row
    assert rows.stamp[row] != stamp


def test_those_that_joined_are_told_once_and_only_if_they_still_run() -> None:
    rows = make_rows()
    first, second = make_sequence([1], 1), make_sequence([2], 2)
    rows.join(first, 0)
    rows.join(second, 0)
    rows.leave(first)
    assert rows.take_joined() == [second]
    assert rows.take_joined() == []


def test_tokens_reach_their_sequence_when_they_are_flushed() -> None:
    rows, sequence = make_rows(), make_sequence([5])
    rows.join(sequence, 0)
    for token_id in (10, 11, 12):
        put_out(rows, sequence, token_id)
    assert (sequence.token_ids, rows.num_tokens[sequence.row], rows.last_token[sequence.row]) == ([5], 4, 12)
    rows.flush(sequence)
    rows.flush(sequence)
    assert sequence.token_ids == [5, 10, 11, 12]
    assert sequence.cumulative_logprob == pytest.approx(-1.5)


def test_a_sequence_that_leaves_takes_its_known_tokens_along_and_not_the_one_being_drawn() -> None:
    rows, sequence = make_rows(), make_sequence([5])
    rows.join(sequence, 0)
    put_out(rows, sequence, 10)
    draw(rows, sequence)
    row = sequence.row
    rows.leave(sequence)
    assert sequence.token_ids == [5, 10]
    assert rows.num_tokens[row] == 0


@given(st.lists(st.integers(0, 1), min_size=100, max_size=700), st.integers(0, 400))
def test_however_many_tokens_come_between_flushes_none_is_lost(turns: list[int], flushed_at: int) -> None:
    rows = make_rows()
    sequences = [make_sequence([1], 1), make_sequence([2], 2)]
    for sequence in sequences:
        rows.join(sequence, 0)
    for i, turn in enumerate(turns):
        put_out(rows, sequences[turn], 100 + i, logprob=-1.0)
        if i == flushed_at:
            rows.flush(sequences[0])
    for turn, sequence in enumerate(sequences):
        rows.flush(sequence)
        assert sequence.output_token_ids == [100 + i for i, other in enumerate(turns) if other == turn]
        assert sequence.cumulative_logprob == -turns.count(turn)


def test_a_token_is_looked_at_if_its_row_is_watched_or_it_stops_or_it_is_the_last_or_not_a_number() -> None:
    rows = make_rows()
    sequences = [make_sequence([i], i, max_tokens=4) for i in range(3)]
    for sequence, (watched, stop_ids) in zip(sequences, ((True, []), (False, [8, 9]), (False, [])), strict=True):
        rows.join(sequence, 0)
        rows.watch(sequence.row, watched, stop_ids)
    watched, stopping, plain = sequences
    assert put_out(rows, watched, 3)
    assert [put_out(rows, stopping, token_id) for token_id in (3, 9, 8)] == [False, True, True]
    assert [put_out(rows, plain, token_id) for token_id in (9, 8, 3, 3)] == [False, False, False, True]
    assert put_out(rows, make_joined(rows, plain), 3, logprob=np.nan)


def make_joined(rows: Rows, leaver: Sequence) -> Sequence:
    """A new sequence in the row of another."""
    row = leaver.row
    rows.leave(leaver)
    sequence = make_sequence([3], 9)
    rows.join(sequence, 0)
    assert sequence.row == row
    rows.watch(row, False, [])
    return sequence


def test_stop_ids_of_the_row_before_stop_nobody_else() -> None:
    rows, first = make_rows(), make_sequence([1])
    rows.join(first, 0)
    rows.watch(first.row, True, [8, 9, 10])
    second = make_joined(rows, first)
    assert not any(put_out(rows, second, token_id) for token_id in (8, 9, 10))


def test_clearing_keeps_every_known_token_and_gives_every_row_back() -> None:
    rows = make_rows(2)
    sequences = [make_sequence([i], i) for i in range(2)]
    for sequence in sequences:
        rows.join(sequence, 0)
        put_out(rows, sequence, 40)
    stamps = rows.stamp.copy()
    rows.clear()
    assert [(s.row, s.output_token_ids) for s in sequences] == [(-1, [40])] * 2
    assert (rows.stamp != stamps).all()
    assert rows.take_joined() == []
    for sequence in sequences:
        rows.join(sequence, 0)
    assert {sequence.row for sequence in sequences} == {0, 1}


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 9)), max_size=8), max_size=6))
def test_who_applies_the_changes_of_block_tables_always_has_them_as_they_are(
    rounds: list[list[tuple[int, int, int]]],
) -> None:
    tables, copy = BlockTables(4, 6), np.zeros((4, 6), np.int32)
    for entries in rounds:
        for row, column, block_id in entries:
            tables.set_tail(row, column, [block_id, block_id + 1][: 6 - column])
        changes = tables.take_changes()
        assert (changes is None) is (not entries)
        if changes is not None:
            indices, block_ids = changes
            copy.reshape(-1)[indices] = block_ids
            assert len(set(indices.tolist())) == len(indices), "each of them once"
        assert (copy == tables.matrix).all()
    assert tables.take_changes() is None
