"""The definitions of the workloads: the same requests each time, in the sizes that they claim."""

import random
import statistics

import pytest
from comparison.workloads import (
    CONCURRENCY,
    WORKLOADS,
    Case,
    Length,
    MlxLm,
    Paged,
    max_concurrency,
    mixed_lengths,
    padded_peak,
)

VOCAB_SIZE = 101
TEXT = random.Random(0).choices(range(VOCAB_SIZE), k=2**16)


def cases(name: str, scale: int = 1) -> list[Case]:
    return list(WORKLOADS[name].cases(scale))


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_each_time_it_is_made(name: str) -> None:
    for first, second in zip(cases(name), cases(name), strict=True):
        assert first == second
        assert first.tasks(0, TEXT) == second.tasks(0, TEXT)


@pytest.mark.parametrize("scale", [1, 7, 32])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_task_has_tokens_of_the_vocabulary_and_the_length_of_its_case(name: str, scale: int) -> None:
    for case in cases(name, scale):
        tasks = case.tasks(3, TEXT)
        assert [(len(task.prompt), task.num_tokens) for task in tasks] == case.lengths
        assert all(length.prompt >= 1 and length.output >= 1 for length in case.lengths)
        assert all(0 <= token < VOCAB_SIZE for task in tasks for token in task.prompt)
        assert max(len(task.prompt) + task.num_tokens for task in tasks) == case.longest


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_share_what_the_case_says_and_differ_between_repetitions(name: str) -> None:
    for case in cases(name):
        prompts = [task.prompt for task in case.tasks(0, TEXT)]
        assert len({tuple(prompt[: case.shared]) for prompt in prompts}) == 1
        long = [tuple(prompt[case.shared : case.shared + 16]) for prompt in prompts if len(prompt) >= case.shared + 16]
        assert len(set(long)) == len(long)
        assert case.tasks(1, TEXT)[0].prompt != prompts[0]


def test_mixed_lengths_have_the_means_and_the_spread_that_they_claim() -> None:
    lengths = mixed_lengths(20_000, 1, most=10**9)
    assert statistics.mean(length.prompt for length in lengths) == pytest.approx(161, rel=0.03)
    assert statistics.mean(length.output for length in lengths) == pytest.approx(338, rel=0.03)
    outputs = sorted(length.output for length in lengths)
    assert outputs[len(outputs) // 2] == pytest.approx(338 * 2.718281828**-0.5, rel=0.03)


def test_mixed_lengths_are_cut_at_the_context() -> None:
    assert max(map(sum, mixed_lengths(5000, 1))) == 2048


def test_a_padded_batch_grows_with_its_longest_row_and_in_steps_of_256() -> None:
    assert padded_peak([Length(100, 50)], 1) == 256
    assert padded_peak([Length(200, 57)], 1) == 512
    assert padded_peak([Length(200, 57), Length(3, 3)], 2) == 512  # the short one has gone by then
    assert padded_peak([Length(200, 57), Length(3, 57)], 2) == 1024
    assert padded_peak([Length(200, 57), Length(3, 57)], 1) == 512
    # the third joins when the second leaves, and is there when the first has passed 256 tokens
    assert padded_peak([Length(200, 60), Length(3, 20), Length(5, 90)], 2) == 1024


def test_as_many_run_at_once_as_the_budget_allows_in_a_padded_batch() -> None:
    lengths = [Length(100, 50)] * 9
    assert max_concurrency(lengths, 5 * 256) == 5
    assert max_concurrency(lengths, 5 * 256 - 1) == 4
    assert max_concurrency(lengths, 10**6) == 9


@pytest.mark.parametrize("name", ["W1", "W2", "W4"])
def test_both_engines_serve_equally_many_at_once(name: str) -> None:
    for case in cases(name):
        for system in case.systems:
            count = system.concurrency if isinstance(system, MlxLm) else system.config["max_num_seqs"]
            assert count == CONCURRENCY


def test_a_fixed_budget_is_the_same_for_all_who_have_one() -> None:
    (case,) = cases("W3")
    pools = {s.config["num_kv_blocks"] * s.config["block_size"] for s in case.systems if isinstance(s, Paged)}
    assert pools == {4 * 2048}
    reserved, padded, *_ = case.systems
    assert isinstance(reserved, Paged) and reserved.config["max_num_seqs"] == 4
    assert isinstance(padded, Paged) and padded.config["max_num_seqs"] == max_concurrency(case.lengths, 4 * 2048)


def test_the_overloaded_pool_holds_any_request_but_not_all_of_those_that_run() -> None:
    (case,) = cases("W7")
    room = next(s.config["num_kv_blocks"] for s in case.systems if isinstance(s, Paged) and "num_kv_blocks" in s.config)
    assert case.longest <= 16 * room < sum(sorted(map(sum, case.lengths))[-CONCURRENCY:])


def test_engines_without_blocks_are_charged_for_the_rows_that_they_would_reserve() -> None:
    (case,) = cases("W3")
    rows = {system.name: system.row for system in case.systems if isinstance(system, Paged)}
    reserved, padded, blocks = rows.values()
    assert reserved is not None and reserved([1, 700]) == 2048
    assert padded is not None and padded([1, 700]) == 768
    assert blocks is None
