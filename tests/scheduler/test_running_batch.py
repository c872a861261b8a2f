"""The running batch: joining and leaving, tokens that come late, and what has changed of the block tables."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_paged import BeamSearchParams, SamplingParams
from mlx_paged.outputs import RequestMetrics
from mlx_paged.request import Request, Sequence
from mlx_paged.sampling.beam_search import BeamSearch
from mlx_paged.scheduler.block_tables import BlockTables
from mlx_paged.scheduler.running_batch import RunningBatch

NO_LOGPROBS = np.zeros(1, np.float32)


def make_sequence(prompt: list[int], seq_id: int = 0, max_tokens: int = 1000, beam_width: int = 0) -> Sequence:
    params = BeamSearchParams(beam_width) if beam_width else SamplingParams()
    search = BeamSearch(params, max_tokens, ()) if isinstance(params, BeamSearchParams) else None
    request = Request(seq_id, None, prompt, params, 0, max_tokens, False, RequestMetrics(0.0), search)
    sequence = Sequence(seq_id, request, 0, list(prompt))
    request.sequences.append(sequence)
    return sequence


def make_batch(num_rows: int = 3) -> RunningBatch:
    return RunningBatch(num_rows, num_groups=1, max_blocks=8, block_size=4)


def draw(batch: RunningBatch, *sequences: Sequence) -> np.ndarray:
    """As the engine does when it has tokens drawn: they are counted before they are known."""
    drawn = np.array([sequence.row for sequence in sequences])
    batch.num_tokens[drawn] += 1
    return drawn


def put_out(batch: RunningBatch, sequence: Sequence, token_id: int, logprob: float = -0.5) -> bool:
    """A token is drawn and known at once; whether it has to be checked."""
    drawn = draw(batch, sequence)
    return bool(batch.append_tokens(drawn, np.array([token_id]), np.array([logprob], np.float32))[0])


def test_a_sequence_that_joins_has_a_row_with_what_is_known_of_it() -> None:
    batch, sequence = make_batch(), make_sequence([5, 6, 7], max_tokens=9)
    batch.add(sequence, 2)
    row = sequence.row
    assert batch.sequences[row] is sequence
    values = [
        getattr(batch, name)[row]
        for name in ("num_prompt", "num_tokens", "num_computed", "num_slots", "max_num_tokens")
    ]
    assert values == [3, 3, 2, 0, 12]
    assert batch.last_token[row] == 7
    assert batch.is_prefilling[row] and batch.will_fork[row]
    assert not batch.tail_is_shared[row] and not batch.is_beam[row] and not batch.has_rules[row]


def test_preempted_beams_join_as_one_row_with_the_tokens_that_they_share() -> None:
    batch, beam = make_batch(), make_sequence([5, 6], beam_width=2)
    beam.token_ids += [7, 8, 9]
    beam.num_shared_tokens = 3
    batch.add(beam, 0)
    assert (batch.num_tokens[beam.row], batch.last_token[beam.row], batch.is_beam[beam.row]) == (3, 7, True)
    beam.num_shared_tokens = None
    batch.recount(beam)
    assert (batch.num_tokens[beam.row], batch.last_token[beam.row]) == (5, 9)


def test_of_a_row_that_has_become_free_nothing_is_left() -> None:
    batch, beam = make_batch(1), make_sequence([5, 6], beam_width=2)
    batch.add(beam, 0)
    batch.tail_is_shared[beam.row] = batch.has_rules[beam.row] = True
    assert batch.has_special_rows
    batch.remove(beam)
    assert not batch.has_special_rows
    names = ("is_beam", "will_fork", "has_rules", "is_prefilling", "tail_is_shared", "num_tokens", "num_computed")
    assert [name for name in names if getattr(batch, name).any()] == []


def test_a_log_probability_that_is_no_number_is_not_added() -> None:
    batch, sequence = make_batch(), make_sequence([5])
    batch.add(sequence, 0)
    for logprob in (-0.5, float("nan"), -0.25):
        put_out(batch, sequence, 8, logprob)
    assert batch.cumulative_logprob[sequence.row] == -0.75


def test_a_row_is_given_to_one_sequence_at_a_time_and_to_the_next_one_after_it_left() -> None:
    batch = make_batch(2)
    first, second, third = (make_sequence([i], i) for i in range(3))
    batch.add(first, 0)
    batch.add(second, 0)
    assert {first.row, second.row} == {0, 1}
    row, row_version = first.row, batch.row_version[first.row]
    batch.remove(first)
    assert first.row == -1
    assert batch.row_version[row] != row_version, "who remembers the row can tell that it changed hands"
    batch.add(third, 0)
    assert third.row == row
    assert batch.row_version[row] != row_version


def test_tokens_and_their_log_probabilities_reach_the_sequence_at_once() -> None:
    batch, sequence = make_batch(), make_sequence([5])
    batch.add(sequence, 0)
    for token_id in (10, 11, 12):
        put_out(batch, sequence, token_id)
    assert sequence.token_ids == [5, 10, 11, 12]
    assert (batch.num_tokens[sequence.row], batch.last_token[sequence.row]) == (4, 12)
    assert batch.cumulative_logprob[sequence.row] == -1.5
    batch.remove(sequence)
    batch.add(sequence, 0)
    put_out(batch, sequence, 13)
    batch.remove(sequence)
    assert sequence.cumulative_logprob == -2


def test_those_that_joined_are_told_once_and_only_if_they_still_run() -> None:
    batch = make_batch()
    first, second = make_sequence([1], 1), make_sequence([2], 2)
    batch.add(first, 0)
    batch.add(second, 0)
    batch.remove(first)
    assert batch.pop_added() == [second]
    assert batch.pop_added() == []


def test_a_sequence_that_leaves_takes_its_known_tokens_along_and_not_the_one_being_drawn() -> None:
    batch, sequence = make_batch(), make_sequence([5])
    batch.add(sequence, 0)
    put_out(batch, sequence, 10)
    draw(batch, sequence)
    row = sequence.row
    batch.remove(sequence)
    assert sequence.token_ids == [5, 10]
    assert batch.num_tokens[row] == 0


def test_a_token_is_checked_if_all_of_its_row_are_or_it_stops_or_it_is_the_last_or_not_a_number() -> None:
    batch = make_batch()
    sequences = [make_sequence([i], i, max_tokens=4) for i in range(3)]
    for sequence, (checked, stop_ids) in zip(sequences, ((True, []), (False, [8, 9]), (False, [])), strict=True):
        batch.add(sequence, 0)
        batch.set_stop_checks(sequence.row, checked, stop_ids)
    checked, stopping, plain = sequences
    assert put_out(batch, checked, 3)
    assert [put_out(batch, stopping, token_id) for token_id in (3, 9, 8)] == [False, True, True]
    assert [put_out(batch, plain, token_id) for token_id in (9, 8, 3, 3)] == [False, False, False, True]
    assert put_out(batch, make_joined(batch, plain), 3, logprob=np.nan)


def make_joined(batch: RunningBatch, leaver: Sequence) -> Sequence:
    """A new sequence in the row of another."""
    row = leaver.row
    batch.remove(leaver)
    sequence = make_sequence([3], 9)
    batch.add(sequence, 0)
    assert sequence.row == row
    batch.set_stop_checks(row, False, [])
    return sequence


def test_stop_ids_of_the_row_before_stop_nobody_else() -> None:
    batch, first = make_batch(), make_sequence([1])
    batch.add(first, 0)
    batch.set_stop_checks(first.row, True, [8, 9, 10])
    second = make_joined(batch, first)
    assert not any(put_out(batch, second, token_id) for token_id in (8, 9, 10))


def test_clearing_keeps_every_known_token_and_gives_every_row_back() -> None:
    batch = make_batch(2)
    sequences = [make_sequence([i], i) for i in range(2)]
    for sequence in sequences:
        batch.add(sequence, 0)
        put_out(batch, sequence, 40)
    versions = batch.row_version.copy()
    batch.clear()
    assert [(s.row, s.output_token_ids) for s in sequences] == [(-1, [40])] * 2
    assert (batch.row_version != versions).all()
    assert batch.pop_added() == []
    for sequence in sequences:
        batch.add(sequence, 0)
    assert {sequence.row for sequence in sequences} == {0, 1}


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 9)), max_size=8), max_size=6))
def test_who_applies_the_changes_of_block_tables_always_has_them_as_they_are(
    rounds: list[list[tuple[int, int, int]]],
) -> None:
    tables, copy = BlockTables(4, 9), np.zeros((4, 9), np.int32)
    for entries in rounds:
        for row, column, block_id in entries:
            tables.rewrite(row, column, [block_id, block_id + 1])
        changes = tables.pop_changes()
        assert (changes is None) is (not entries)
        if changes is not None:
            indices, block_ids = changes
            copy.reshape(-1)[indices] = block_ids
            assert len(set(indices.tolist())) == len(indices), "each of them once"
        assert (copy == tables.matrix).all()
    assert tables.pop_changes() is None
