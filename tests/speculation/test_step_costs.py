"""What a step takes by its tokens: between what was measured, beyond it, and as it changes."""

from __future__ import annotations

import pytest

from mlx_paged.speculation.step_costs import StepCosts


def test_between_two_sizes_a_step_takes_what_lies_between_and_past_those_that_are_kept_in_proportion() -> None:
    costs = StepCosts({1: 1.0, 2: 1.2, 4: 2.0})
    assert [costs.of(n) for n in (1, 2, 3, 4, 7)] == pytest.approx([1.0, 1.2, 1.6, 2.0, 3.0])
    assert costs.of(256) == pytest.approx(2 * costs.of(128))


def test_what_was_not_measured_is_rather_taken_for_cheap_so_that_it_is_tried() -> None:
    costs = StepCosts({1: 1.0, 4: 1.0})
    assert costs.of(8) == pytest.approx(1.25)


def test_more_tokens_never_take_less_time() -> None:
    costs = StepCosts({1: 1.0, 2: 0.5, 4: 0.7})
    assert [costs.of(n) for n in (1, 2, 4)] == [1.0, 1.0, 1.0]


def test_it_comes_to_what_steps_take_and_one_that_was_held_up_hardly_counts() -> None:
    costs = StepCosts({1: 1.0, 4: 2.0})
    for _ in range(60):
        costs.add(4, 6.0)
    assert costs.of(4) == pytest.approx(6.0, rel=0.05)
    assert 1.2 < costs.of(1) < 6.0, "other sizes follow, more slowly"
    for _ in range(60):
        costs.add(4, 1.0)
    assert costs.of(1) <= costs.of(4) < 1.1, "fewer tokens never take more time"
    before = costs.of(4)
    costs.add(4, 1000.0)
    assert costs.of(4) < 1.5 * before


def test_large_steps_that_were_dear_in_long_contexts_are_taken_for_cheaper_while_only_small_ones_run() -> None:
    costs = StepCosts({1: 1.0, 16: 2.0, 64: 4.0})
    for _ in range(60):
        costs.add(64, 40.0)
    dear = costs.of(64)
    for _ in range(60):
        costs.add(16, 2.0)
    assert costs.of(64) < 0.8 * dear
    for _ in range(2000):
        costs.add(16, 2.0)
    assert costs.of(64) == pytest.approx(2 * 1.75, rel=0.02), "a quarter of what as many steps of 16 would take"
    costs = StepCosts({1: 1.0, 16: 2.0, 64: 2.5})
    for _ in range(2000):
        costs.add(16, 2.0)
    assert costs.of(64) == pytest.approx(2.5, rel=0.01), "what is known to be cheap does not change"


def test_what_others_step_in_place_of_is_taken_for_cheaper_with_each_and_in_proportion() -> None:
    costs = StepCosts({1: 1.0, 16: 2.0})
    for _ in range(800):
        costs.fade()
    assert costs.of(1) == pytest.approx(0.37, abs=0.01) and costs.of(16) == pytest.approx(2 * costs.of(1))
