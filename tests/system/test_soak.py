"""Many random requests at once in engines of every kind: each gives what it gives alone, and nothing is left behind.

MLX_PAGED_LONG_TESTS=1 runs many rounds instead of the few; each is named by its seed, MLX_PAGED_SOAK_SEED the first.
"""

from __future__ import annotations

import os
import random
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.budget import budget
from helpers.workload import FAMILIES, Alone, Asked, Results, assert_idle, make_engine, random_requests

NUM_ROUNDS = budget(8, 1800)
FIRST_SEED = int(os.environ.get("MLX_PAGED_SOAK_SEED") or 0)
ROUNDS_PER_SET = 18  # that draw from the same requests, whose results are known then
MOST_STEPS = 5000


@cache
def alone(family: str) -> Alone:
    return Alone(family)


@cache
def requests_of(number: int) -> list[Asked]:
    return random_requests(random.Random(number), 60)


def random_config(chance: random.Random, requests: list[Asked], folder: Path) -> dict[str, Any]:
    """An engine that can serve each of the requests, some of them barely."""
    block_size = chance.choice((1, 2, 3, 4, 8, 16))
    needed = max(asked.num_blocks(block_size) for asked in requests)
    prefix_caching = chance.random() < 0.75
    swap = chance.choice((None, None, "30KB", folder / "swap")) if prefix_caching else None
    return {
        "block_size": block_size,
        "num_kv_blocks": needed + chance.choice((0, 0, 1, needed // 2, 2 * needed, 20 * needed)),
        "max_num_seqs": max(chance.choice((4, 5, 8, 16, 32)), *(asked.width for asked in requests)),
        "max_num_batched_tokens": chance.choice((5, 8, 17, 64, 512)),
        "allocator": chance.choice(("lru", "fifo", "buddy")),
        "prefix_caching": prefix_caching,
        "swap_space": swap,
        "prefix_cache_dir": folder / "prompts" if prefix_caching and chance.random() < 0.15 else None,
        "pipelining": chance.choice(("off", "build", "submit")),
        "check_invariants": chance.random() < 0.3,
        "max_step_ms": chance.choice((None, 0, 0.001)),
    }


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + NUM_ROUNDS))
def test_whatever_runs_beside_it_a_request_gives_what_it_gives_alone(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    family = chance.choice(list(FAMILIES))
    expect = alone(family)
    requests = chance.sample(requests_of(seed // ROUNDS_PER_SET), chance.randrange(6, 20))
    config = random_config(chance, requests, tmp_path)
    print(f"seed {seed}: {family} {config}")  # shown if it fails
    num_threads = threading.active_count()
    engine = make_engine(family, **config)
    spread = chance.choice((1, 20, 60))
    arrivals = sorted(((chance.randrange(spread), asked) for asked in requests), key=lambda pair: pair[0])
    ids: dict[int, Asked] = {}
    ends: dict[int, int] = {}  # the steps at which requests are aborted
    results = Results()
    for step in range(MOST_STEPS):
        while arrivals and arrivals[0][0] <= step:
            asked = arrivals.pop(0)[1]
            request_id = engine.add_request(asked.prompt, asked.params, stream=asked.stream)
            ids[request_id] = asked
            if chance.random() < 0.15:
                ends[request_id] = step + chance.randrange(0, 30)
        for request_id in [request_id for request_id, end in ends.items() if end <= step]:
            del ends[request_id]
            output = engine.abort(request_id)
            if output is not None:
                results.take([output])
                expect.compare_part(ids.pop(request_id), results.finished[request_id])
        results.take(engine.step())
        if chance.random() < 0.02:
            engine.compact()
        if chance.random() < 0.05:
            engine.stats()
        if not arrivals and not engine.has_unfinished():
            break
    else:
        raise AssertionError(f"it does not come to an end: {sorted(set(ids) - set(results.finished))} go on")
    assert results.errors == {}
    for request_id, asked in ids.items():
        expect.compare(asked, results.finished[request_id])
    assert_idle(engine)
    assert threading.active_count() == num_threads


def test_few_of_the_results_were_near_ties() -> None:
    """They are counted, not skipped: the comparisons above ended at them."""
    for family in FAMILIES:
        assert alone(family).num_ties <= 2 + len(alone(family)._known) // 50
