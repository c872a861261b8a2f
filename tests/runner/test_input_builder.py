"""From schedules to arrays: each row's queries, as many as its query length, at their positions and in their slots."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import mlx.core as mx
import numpy as np
import pytest

from mlx_paged import SamplingParams
from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.outputs import RequestMetrics
from mlx_paged.request import Request, Sequence
from mlx_paged.runner.in_flight import StepInFlight
from mlx_paged.runner.input_builder import InputBuilder
from mlx_paged.sampling.sampler import SampledTokens
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Chunk, Schedule

BLOCK_SIZE = 4
TABLES = {0: [7, 3, 9, 0], 1: [5, 2, 11], 2: [8, 1, 6, 4, 10]}  # by sequence, of the first group
SECOND_GROUP = 20  # what is added to them in the second
NUM_COMPUTED = {0: 9, 1: 3, 2: 11}


def make_batch() -> RunningBatch:
    """Three sequences in rows 2, 0, 1 of 4, with blocks for what is computed of them."""
    batch = RunningBatch(4, num_groups=2, max_blocks=5, block_size=BLOCK_SIZE)
    batch._free_rows = [3, 1, 0, 2]
    for seq_id, num_computed in NUM_COMPUTED.items():
        prompt = [10 * seq_id + i for i in range(num_computed + 1)]
        request = Request(seq_id, None, prompt, SamplingParams(), 0, 50, False, RequestMetrics(0.0), None)
        request.is_forked = True
        sequence = Sequence(seq_id, request, 0, list(prompt))
        batch.add(sequence, num_computed)
        give_slots(batch, seq_id, num_computed)
    return batch


def give_slots(batch: RunningBatch, seq_id: int, num_tokens: int) -> None:
    (row,) = rows_of(batch, seq_id)
    for tables, more in zip(batch.tables, (0, SECOND_GROUP), strict=True):
        tables.rewrite(row, 0, [block_id + more for block_id in TABLES[seq_id][: -(-num_tokens // BLOCK_SIZE)]])


def rows_of(batch: RunningBatch, *seq_ids: int) -> np.ndarray:
    rows = {sequence.seq_id: sequence.row for sequence in batch.sequences if sequence is not None}
    return np.array([rows[seq_id] for seq_id in seq_ids], np.int64)


def decodes(batch: RunningBatch, seq_ids: SequenceOf[int], query_lens: SequenceOf[int]) -> Schedule:
    """A schedule of the next tokens of some rows, which get slots for them."""
    rows, lens = rows_of(batch, *seq_ids), np.array(query_lens, np.int32)
    for seq_id, end in zip(seq_ids, (batch.num_computed[rows] + lens).tolist(), strict=True):
        give_slots(batch, seq_id, end)
    return Schedule(rows, lens, num_tokens=int(lens.sum()))


def add_chunk(schedule: Schedule, batch: RunningBatch, seq_id: int, num_tokens: int) -> None:
    """Let the schedule compute some of a sequence's prompt, from its second token on."""
    sequence = batch.sequences[rows_of(batch, seq_id)[0]]
    assert sequence is not None
    schedule.chunks.append(Chunk(sequence, 1, num_tokens))
    schedule.num_tokens += num_tokens


def assert_layout(inputs: ModelInputs, queries: list[tuple[int, int, int]]) -> None:
    """The step's tokens are those of `queries`, in order: (sequence, position of the first one, how many)."""
    expected = [(seq_id, start + i) for seq_id, start, count in queries for i in range(count)]
    positions = [position for _, position in expected]
    assert np.array(inputs.positions).tolist() == positions
    for group, more in zip(inputs.groups, (0, SECOND_GROUP), strict=True):
        assert group.slot_block_ids is not None and group.slot_offsets is not None
        assert np.array(group.slot_block_ids).tolist() == [
            TABLES[seq_id][position // BLOCK_SIZE] + more for seq_id, position in expected
        ]
        assert np.array(group.slot_offsets).tolist() == [position % BLOCK_SIZE for position in positions]
        assert group.cu_seqlens_q.tolist() == [sum(q[2] for q in queries[:i]) for i in range(len(queries) + 1)]
        assert group.query_lens.tolist() == [count for _, _, count in queries]
        assert group.context_lens.tolist() == [start + count for _, start, count in queries]
        assert group.cu_seqlens_q.dtype == group.context_lens.dtype == np.int32
        for table, (seq_id, start, count) in zip(np.array(group.block_tables), queries, strict=True):
            num_used = -(-(start + count) // BLOCK_SIZE)
            assert table[:num_used].tolist() == [block_id + more for block_id in TABLES[seq_id][:num_used]]


@pytest.mark.parametrize("query_lens", [[1, 3, 2], [2, 1, 1], [3, 5, 4], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_each_rows_queries_follow_what_is_computed_of_it(order: tuple[int, ...], query_lens: list[int]) -> None:
    batch = make_batch()
    schedule = decodes(batch, order, query_lens)
    inputs, rows = InputBuilder(batch).build(schedule, None)
    assert_layout(inputs, [(seq_id, NUM_COMPUTED[seq_id], n) for seq_id, n in zip(order, query_lens, strict=True)])
    assert rows.tolist() == np.repeat(rows_of(batch, *order), query_lens).tolist()
    assert inputs.logits_indices is None, "the logits of all tokens are needed"


def test_a_query_that_goes_over_a_block_boundary_has_slots_in_both_blocks() -> None:
    batch = make_batch()
    inputs, _ = InputBuilder(batch).build(decodes(batch, [1, 2], [3, 2]), None)
    assert np.array(inputs.positions).tolist() == [3, 4, 5, 11, 12]
    assert np.array(inputs.groups[0].slot_block_ids).tolist() == [5, 2, 2, 6, 4]
    assert np.array(inputs.groups[0].slot_offsets).tolist() == [3, 0, 1, 3, 0]


@pytest.mark.parametrize("query_lens", [[1, 1], [3, 2]], ids=str)
def test_chunks_follow_the_rows_that_decode(query_lens: list[int]) -> None:
    batch = make_batch()
    schedule = decodes(batch, [0, 1], query_lens)
    add_chunk(schedule, batch, 2, 7)
    inputs, rows = InputBuilder(batch).build(schedule, None)
    assert_layout(inputs, [(0, 9, query_lens[0]), (1, 3, query_lens[1]), (2, 1, 7)])
    expected = np.repeat(rows_of(batch, 0, 1), query_lens)
    assert rows.tolist() == expected.tolist(), "the chunk does not end its prompt"
    assert inputs.logits_indices is not None
    assert np.array(inputs.logits_indices).tolist() == [*range(sum(query_lens))]


@pytest.mark.parametrize("with_chunk", [False, True])
def test_drafts_follow_the_last_token_of_their_row(with_chunk: bool) -> None:
    batch = make_batch()
    schedule = decodes(batch, [0, 1, 2], [1, 3, 2])
    first, second, third = rows_of(batch, 0, 1, 2).tolist()
    schedule.drafts = {second: [71, 72], third: [73]}
    last = {row: int(batch.last_token[row]) for row in (first, second, third)}
    expected = [last[first], last[second], 71, 72, last[third], 73]
    if with_chunk:
        schedule = decodes(batch, [0, 1], [1, 3])
        schedule.drafts = {second: [71, 72]}
        add_chunk(schedule, batch, 2, 2)
        expected = [*expected[:4], 21, 22]
    inputs, _ = InputBuilder(batch).build(schedule, None)
    assert np.array(inputs.token_ids).tolist() == expected


def test_a_chunk_that_ends_its_prompt_has_logits_of_its_last_token() -> None:
    batch = make_batch()
    schedule = decodes(batch, [0], [1])
    add_chunk(schedule, batch, 2, 11)
    inputs, rows = InputBuilder(batch).build(schedule, None)
    assert_layout(inputs, [(0, 9, 1), (2, 1, 11)])
    assert rows.tolist() == rows_of(batch, 0, 2).tolist()
    assert inputs.logits_indices is not None
    assert np.array(inputs.logits_indices).tolist() == [0, 11]
    assert np.array(inputs.token_ids).tolist() == [9, *range(21, 32)]


def test_steps_of_one_token_each_and_of_more_may_follow_each_other() -> None:
    batch = make_batch()
    builder, starts = InputBuilder(batch), list(NUM_COMPUTED.values())
    for query_lens in ([1, 1, 1], [2, 1, 3], [1, 1, 1], [1, 3, 2]):
        schedule = decodes(batch, [0, 1, 2], query_lens)
        inputs, _ = builder.build(schedule, None)
        assert_layout(inputs, [(i, start, n) for i, (start, n) in enumerate(zip(starts, query_lens, strict=True))])
        batch.num_computed[schedule.rows] += schedule.query_lens
        starts = [start + n for start, n in zip(starts, query_lens, strict=True)]


def test_a_step_of_one_token_each_computes_the_last_known_tokens() -> None:
    batch = make_batch()
    inputs, _ = InputBuilder(batch).build(decodes(batch, [2, 0, 1], [1, 1, 1]), None)
    assert np.array(inputs.token_ids).tolist() == [31, 9, 13]


def drawing(batch: RunningBatch, rows: np.ndarray, token_ids: list[int]) -> StepInFlight:
    """A step in which these tokens are being drawn for rows as they are now."""
    step = StepInFlight(Schedule(), rows, batch.version, sampled_rows=rows, sampled_version=batch.version)
    step.sampled_tokens = SampledTokens(mx.array(token_ids, mx.uint32), mx.zeros(len(rows)), None, None)
    return step


def test_tokens_that_are_being_drawn_are_taken_from_where_they_are_drawn() -> None:
    batch = make_batch()
    schedule = decodes(batch, [0, 1, 2], [1, 1, 1])
    for drawn, expected in (
        (drawing(batch, schedule.rows, [50, 51, 52]), [50, 51, 52]),
        (drawing(batch, rows_of(batch, 2, 0, 1), [52, 50, 51]), [50, 51, 52]),
        (drawing(batch, rows_of(batch, 2, 0), [52, 50]), [50, 13, 52]),
    ):
        inputs, _ = InputBuilder(batch).build(schedule, drawn)
        assert np.array(inputs.token_ids).tolist() == expected


@pytest.mark.parametrize("is_same_array", [True, False])
def test_what_is_drawn_for_a_row_that_has_changed_hands_since_is_nobodys(is_same_array: bool) -> None:
    batch = make_batch()
    schedule = decodes(batch, [0, 1, 2], [1, 1, 1])
    step = drawing(batch, schedule.rows if is_same_array else rows_of(batch, 0, 1, 2), [50, 51, 52])
    sequence = batch.sequences[schedule.rows[1]]
    assert sequence is not None
    batch.remove(sequence)
    batch.add(sequence, NUM_COMPUTED[1])
    assert sequence.row == schedule.rows[1], "the premise: it is the same row"
    inputs, _ = InputBuilder(batch).build(schedule, step)
    assert np.array(inputs.token_ids).tolist() == [50, 13, 52]


def test_prefixes_are_looked_for_again_once_a_table_is_another() -> None:
    batch = make_batch()
    builder, schedule = InputBuilder(batch), decodes(batch, [0, 2], [1, 1])

    def found() -> list[list[int]]:
        find = builder.build(schedule, None)[0].groups[0].find_shared_prefixes
        assert find is not None
        return [prefix.members.tolist() for prefix in find(np.arange(2))]

    assert found() == []
    batch.tables[0].rewrite(int(rows_of(batch, 2)[0]), 0, TABLES[0][:3])
    assert found() == [[0, 1]]
