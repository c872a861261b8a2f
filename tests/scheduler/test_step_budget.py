"""How long a step with prompts takes while somebody reads a stream, with costs that are told."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from helpers.scheduler_bench import Bench, planned

from mlx_paged.request import Sequence
from mlx_paged.scheduler.schedule import Chunk, Schedule
from mlx_paged.scheduler.step_budget import StepBudget

BASE_S = 0.01  # what a step takes beside prompts
SEQUENCE: Sequence = None  # type: ignore[assignment]  # a budget looks at positions alone


def step(budget: StepBudget, start: int, cost: Callable[[int], float], is_read: bool = True) -> tuple[int, float]:
    """Compute what there is time for of a prompt of any length; the number of tokens, and the seconds."""
    budget.begin(is_read)
    num_tokens = min(budget.room(start), 2048)
    chunk = Chunk(SEQUENCE, start, num_tokens)
    budget.take(chunk)
    seconds = BASE_S + sum(cost(position) for position in range(start, start + num_tokens))
    budget.add(Schedule(chunks=[chunk]), None, True, seconds)
    return num_tokens, seconds


def prompt(
    budget: StepBudget, cost: Callable[[int], float], start: int = 0, end: int = 32768
) -> list[tuple[int, float]]:
    steps = []
    while start < end:
        steps.append(step(budget, start, cost))
        start += steps[-1][0]
    return steps


def decodes(budget: StepBudget, *seconds: float) -> None:
    for each in seconds:
        budget.add(Schedule(), Schedule(), False, each)


@pytest.mark.parametrize("s_per_token", [2e-5, 1e-3, 4e-3])
def test_chunks_come_to_fill_the_time_that_a_step_may_take(s_per_token: float) -> None:
    budget = StepBudget(16, max_step_ms=200)
    steps = prompt(budget, lambda _: s_per_token)
    assert max(seconds for _, seconds in steps) <= 0.27, "the first one is a guess"
    short = [seconds for num_tokens, seconds in steps[5:-1] if num_tokens < 2048 and not 0.19 <= seconds <= 0.201]
    assert len(short) <= 5 and all(0.1 <= seconds <= 0.2 for seconds in short), "one each time the position doubles"


def test_chunks_shrink_as_a_prompt_grows_and_no_step_is_much_longer_than_it_may_be() -> None:
    """At the end of the prompt a token costs 33 times what it costs at its beginning."""

    def cost(position: int) -> float:
        return 1e-4 * (1 + position / 1024)

    budget = StepBudget(16, max_step_ms=100)
    _, *others = prompt(budget, cost)
    assert max(seconds for _, seconds in others) <= 0.13
    assert others[2][0] > 8 * others[-2][0]
    again = prompt(budget, cost)  # what each position costs is known by now
    assert max(seconds for _, seconds in again) <= 0.13 and again[0][0] > 512
    far = StepBudget(16, max_step_ms=100)
    prompt(far, cost, end=2048)
    assert step(far, 30_000, cost)[1] <= 0.13, "costs that far are not known: too few tokens rather than too many"


def test_a_step_that_was_held_up_makes_one_small_chunk_and_a_fast_one_makes_none_large() -> None:
    budget = StepBudget(16, max_step_ms=100)
    for _ in range(8):
        usual, _ = step(budget, 0, lambda _: 1e-3)
    step(budget, 0, lambda _: 0.1)
    assert step(budget, 0, lambda _: 1e-3)[0] == 16, "what has risen may stay so"
    assert step(budget, 0, lambda _: 1e-3)[0] >= usual / 2
    for _ in range(8):
        usual, _ = step(budget, 0, lambda _: 1e-3)
    step(budget, 0, lambda _: 1e-6)
    assert step(budget, 0, lambda _: 1e-3)[0] <= 1.2 * usual


def test_costs_that_have_risen_are_believed_at_once() -> None:
    budget = StepBudget(16, max_step_ms=100)
    for _ in range(8):
        step(budget, 0, lambda _: 1e-3)
    assert step(budget, 0, lambda _: 4e-3)[1] > 0.3
    assert all(step(budget, 0, lambda _: 4e-3)[1] <= 0.11 for _ in range(5))


def test_a_step_computes_a_block_even_if_there_is_time_for_less() -> None:
    budget = StepBudget(16, max_step_ms=1)
    assert [num_tokens for num_tokens, _ in prompt(budget, lambda _: 1.0, end=160)] == [16] * 10
    budget.begin(is_read=True)
    budget.take(Chunk(SEQUENCE, 0, 16))
    assert not budget.has_time and budget.room(0) == 0


def test_time_that_is_left_by_one_prompt_is_anothers() -> None:
    budget = StepBudget(16, max_step_ms=100)
    for _ in range(8):
        whole, _ = step(budget, 0, lambda _: 1e-3)
    budget.begin(is_read=True)
    budget.take(Chunk(SEQUENCE, 0, 10))
    assert budget.has_time and whole - 32 <= budget.room(0) < whole


def test_without_readers_and_without_a_limit_there_is_room_for_any_prompt() -> None:
    budget = StepBudget(16, max_step_ms=1)
    assert step(budget, 0, lambda _: 1.0, is_read=False)[0] == 2048
    assert not budget.must_time(Schedule(chunks=[Chunk(SEQUENCE, 0, 2048)]))
    unlimited = StepBudget(16, max_step_ms=0)
    assert [step(unlimited, 0, lambda _: 1.0)[0] for _ in range(3)] == [2048] * 3
    assert unlimited.max_step_s == math.inf


@pytest.mark.parametrize(
    ("decode_s", "limit_s"), [(0.002, 0.05), (0.03, 0.15), (0.08, 0.4), (0.2, 1.0), (0.4, 2.0)], ids=str
)
def test_by_default_a_step_may_take_as_long_as_five_of_decodes_and_50_ms_at_least(
    decode_s: float, limit_s: float
) -> None:
    budget = StepBudget(16)
    assert budget.max_step_s == 0.5, "while nothing is known"
    decodes(budget, decode_s, 30 * decode_s, decode_s)
    budget.add(Schedule(chunks=[Chunk(SEQUENCE, 0, 100)]), None, True, 0.03)
    assert budget.max_step_s == pytest.approx(limit_s), "of which the median counts"


def test_by_default_a_step_may_take_as_long_as_a_chunk_that_pays_but_not_longer_than_the_most() -> None:
    def cost(position: int) -> float:
        return 1e-3 * (1 + position / 1024)

    budget = StepBudget(16)
    decodes(budget, 0.01)
    steps = prompt(budget, cost)
    small = [num_tokens for num_tokens, seconds in steps[:-1] if num_tokens < 60 and seconds < 0.4]
    assert len(small) <= 5, "one each time the position doubles"
    assert max(seconds for _, seconds in steps) <= 0.55
    assert 0.05 <= step(budget, 0, cost)[1] <= 0.12, "at its beginning a prompt takes less time again"


def test_times_that_are_of_two_kinds_of_steps_are_not_learnt_from() -> None:
    prompts, nothing = Schedule(chunks=[Chunk(SEQUENCE, 0, 2048)]), Schedule()
    budget = StepBudget(16)
    for schedule, before, is_over in [
        (nothing, None, False),  # only launched
        (nothing, prompts, False),
        (nothing, prompts, True),
        (prompts, None, False),
        (prompts, nothing, False),
        (prompts, prompts, True),
    ]:
        budget.add(schedule, before, is_over, 1.0)
    assert (budget.max_step_s, budget.s_per_token) == (0.5, None)
    budget.add(prompts, prompts, False, 2.048)
    assert budget.s_per_token == pytest.approx(1e-3)


def test_short_prompts_neither_wait_for_their_time_nor_tell_what_a_token_costs() -> None:
    budget = StepBudget(16, max_step_ms=100)
    for _ in range(8):
        step(budget, 0, lambda _: 1e-3)
    short, long = Schedule(chunks=[Chunk(SEQUENCE, 0, 3)]), Schedule(chunks=[Chunk(SEQUENCE, 0, 80)])
    budget.begin(is_read=True)
    assert (budget.must_time(Schedule()), budget.must_time(short), budget.must_time(long)) == (False, False, True)
    before = budget.s_per_token
    budget.add(short, None, True, 0.05)
    assert budget.s_per_token == before


# -- in the scheduler ---------------------------------------------------------------------------------------------


def fair_bench(**settings: object) -> Bench:
    """A millisecond a token, 40 of which a step may take; a stream decodes."""
    bench = Bench(400, 4, 8, 64, max_step_ms=40, takes=lambda schedule: 1e-3 * schedule.num_tokens, **settings)  # type: ignore[arg-type]
    bench.add(2, max_tokens=300, stream=True)
    bench.step()
    return bench


def test_prompts_are_cut_while_a_stream_decodes_and_whole_once_it_has_ended() -> None:
    bench = fair_bench()
    stream = bench.requests[0]
    bench.add(600)
    chunks = [planned(bench.step())[1][2] for _ in range(6)]
    assert set(chunks[2:]) == {39}, "what fits"
    stream.sequences[0].finish_reason = "abort"
    bench.scheduler.remove(stream.sequences[0])
    assert planned(bench.step()) == [(1, sum(chunks), 64)]


def test_prompts_are_whole_while_nobody_reads_what_is_decoded() -> None:
    bench = fair_bench()
    bench.batch.is_streamed[:] = False
    bench.add(600)
    assert planned(bench.step())[1] == (1, 0, 63)


def test_the_time_is_that_of_all_prompts_of_a_step() -> None:
    bench = fair_bench()
    for _ in range(5):
        bench.add(20, stream=True)
    while len(plan := planned(bench.step())) > 1:
        assert sum(num_tokens for _, _, num_tokens in plan) <= 1 + 40 + 1
    assert all(request.finished for request in bench.requests[1:])
