"""Whatever arrives, whenever: everything ends, in a bounded number of steps, with every token in its place."""

from __future__ import annotations

from typing import Any

from helpers.pipelined_bench import PipelinedBench
from helpers.scheduler_bench import Bench
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(2, 9),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(3, 6),
    budget=st.integers(1, 9),
    allocator=st.sampled_from(["lru", "fifo"]),
    prefix_caching=st.booleans(),
    arrivals=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(1, 12), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=7,
    ),
)
def test_whatever_arrives_whenever_finishes_in_a_bounded_number_of_steps(
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    allocator: str,
    prefix_caching: bool,
    arrivals: list[tuple[int, int, int, int, bool]],
) -> None:
    bench = Bench(num_blocks, block_size, max_num_seqs, budget, allocator, prefix_caching)
    slots = num_blocks * block_size
    for pause, prompt_len, max_tokens, n, common in arrivals:
        for _ in range(pause):
            bench.step()
        prompt_len = min(prompt_len, slots)
        bench.add(prompt_len, min(max_tokens, slots - prompt_len + 1), n, first_token=1 if common else None)
    # Even one after another, each preempted at every token, this is what they take.
    bound = sum(
        request.params.n * request.max_tokens * (2 + (len(request.prompt_token_ids) + request.max_tokens) // budget)
        for request in bench.requests
    )
    bench.run(most_steps=2 * bound + 50)
    assert bench.manager.num_free_blocks == num_blocks
    assert bench.scheduler.running == bench.scheduler.waiting == []


@st.composite
def arrivals(draw: st.DrawFn) -> list[dict[str, int | bool]]:
    kinds = st.fixed_dictionaries(
        {
            "pause": st.integers(0, 4),
            "prompt_len": st.integers(1, 20),
            "max_tokens": st.integers(1, 12),
            "n": st.integers(1, 4),
            "is_beam": st.booleans(),
            "common": st.booleans(),
            "priority": st.sampled_from([0, 0, 1, -1]),
            "stops": st.integers(1, 12),
            "aborted_after": st.sampled_from([99, 99, 99, 0, 1, 5]),
            "stream": st.booleans(),
        }
    )
    return draw(st.lists(kinds, min_size=1, max_size=7))


@settings(max_examples=400, deadline=None)
@given(
    num_blocks=st.integers(2, 14),
    block_size=st.integers(1, 4),
    max_num_seqs=st.integers(4, 7),
    budget=st.integers(1, 12),
    allocator=st.sampled_from(["lru", "fifo", "buddy"]),
    prefix_caching=st.booleans(),
    overlap=st.booleans(),
    window=st.sampled_from([None, None, 1, 3, 7]),
    fails=st.frozensets(st.integers(1, 40), max_size=2),
    max_step_ms=st.sampled_from([None, 0, 7]),
    takes=st.sampled_from([(0.0,), (0.001,), (1e-5, 0.001, 0.1)]),
    seed=st.integers(0, 10**6),
    arriving=arrivals(),
)
def test_beams_and_late_tokens_and_priorities_and_failures_end_with_every_token_in_its_place(
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    allocator: str,
    prefix_caching: bool,
    overlap: bool,
    window: int | None,
    fails: frozenset[int],
    max_step_ms: float | None,
    takes: tuple[float, ...],
    seed: int,
    arriving: list[dict[str, Any]],
) -> None:
    stops = {i: each["stops"] for i, each in enumerate(arriving) if not each["is_beam"]}
    bench = PipelinedBench(
        num_blocks, block_size, max_num_seqs, budget, allocator, prefix_caching,
        overlap=overlap, window=window, fails=fails, stops=stops, seed=seed, max_step_ms=max_step_ms,
        takes=lambda schedule: bench.random.choice(takes) * schedule.num_tokens,
    )  # fmt: skip
    slots = num_blocks * block_size
    doomed = []
    bound = 100
    for each in arriving:
        for _ in range(each["pause"]):
            bench.step()
        prompt_len, max_tokens = min(each["prompt_len"], slots), each["max_tokens"]
        width = each["n"] if each["is_beam"] else 1
        shared = prompt_len // block_size
        while shared + width * (-(-(prompt_len + max_tokens - 1) // block_size) - shared) > num_blocks:
            prompt_len, max_tokens = max(1, prompt_len - 1), max(1, max_tokens - 1)
            shared = prompt_len // block_size
            width = width - 1 if prompt_len == max_tokens == 1 else width
        request = bench.add(
            prompt_len,
            max_tokens,
            each["n"],
            first_token=1 if each["common"] else None,
            priority=each["priority"],
            beam_width=width if each["is_beam"] else 0,
            stream=each["stream"] and not each["is_beam"],
        )
        # Even one after another, and preempted at every token, this is what they take.
        bound += 3 * each["n"] * max_tokens * (4 + each["n"] * (prompt_len + max_tokens) // min(budget, block_size))
        doomed.append((bench.num_steps + each["aborted_after"], request))
    for when, request in sorted(doomed, key=lambda pair: pair[0]):
        while bench.num_steps < when < 90 and not all(each.finished for each in bench.requests):
            bench.step()
        if when < 90 and not request.finished:
            bench.abort(request)
    bench.run(most_steps=bound)
