"""How the cost of a step grows: with sequences, context, the pool, cached prefixes, and requests that wait.

    python benchmarks/growth.py [--quick] [--json FILE]     measure, print tables, write the raw numbers
    python benchmarks/growth.py --markdown FILE             the tables of such a file

Times are CPU times of the engine's thread in a decode step: its own work (scheduling, blocks, arrays, tokens), and that
of building graphs and handing them over, which is MLX's. Sizes take turns, so that what else the machine does hits all
of them alike. Sequences, contexts and pools are those of a model of
one tiny layer with random weights, which leaves the host's work to be seen; its K and V are real, and a CPU attends to
them in another thread. Prefixes and queues, which no kernel ever sees, are measured over a stub in its place. `growth`
is the exponent by which a time grows from the row before: 0 is flat, 1 linear, 2 quadratic. `load` is the machine's.
"""

from __future__ import annotations

import math
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import report
from host_overhead import BLOCK_SIZE, StubRunner, StubSampler
from report import Part, Row
from step_clock import OTHER_PARTS, SUM, Clock, no_garbage_collection

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.config import EngineConfig
from mlx_paged.engine.engine import Engine
from mlx_paged.tools.random_models import SHAPES, make_random_model
from mlx_paged.tools.report import Columns

GRAPHS = ("model graph", "sampling graph", "submitting")
NUM_SEQS = 16  # where their number is not what grows
CHAIN = 64  # blocks of a prefix
STEPS, TURNS, WARMUP = 16, 12, 16
SHAPE = "one-tiny-layer"
SHAPES[SHAPE] = SHAPES["qwen2-tiny"] | {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
SHAPES[SHAPE] |= {"hidden_size": 8, "max_position_embeddings": 1 << 18}


def sequences(quick: bool) -> list[Row]:
    """So many sequences decode, each of some tens of tokens."""
    sizes = [1, 8] if quick else [1, 4, 16, 64, 256]
    rows, _ = decode_steps("sequences", sizes, quick, lambda size: tiny_engine(size, 64, 64 + size * 32))
    return with_growth("sequences", rows)


def context(quick: bool) -> list[Row]:
    """Sixteen sequences decode, which share a prompt of so many tokens."""
    sizes = [256, 1024] if quick else [1 << power for power in range(10, 17)]
    num_own = NUM_SEQS * 32
    rows, _ = decode_steps(
        "context", sizes, quick, lambda size: tiny_engine(NUM_SEQS, size, size // BLOCK_SIZE + num_own)
    )
    return with_growth("context", rows)


def pool(quick: bool) -> list[Row]:
    """Sixteen sequences decode, in a pool of so many blocks."""
    sizes = [1000, 4000] if quick else [10**3, 10**4, 10**5, 10**6]
    rows, _ = decode_steps("blocks", sizes, quick, lambda size: tiny_engine(NUM_SEQS, 64, size))
    return with_growth("blocks", rows)


def prefixes(quick: bool) -> list[Row]:
    """Sixteen sequences decode while so many blocks of prompts that have ended are cached, in a pool full of them.

    Beside steps: what a block costs of a prompt that is cached, and of one that is not, for which others are evicted.
    """
    sizes = [1 << 10, 1 << 12] if quick else [1 << 10, 1 << 13, 1 << 17, 1 << 20]
    rows, engines = decode_steps("prefixes", sizes, quick, engine_with_prefixes)
    for row, engine in zip(rows, engines, strict=True):
        manager, num_chains = engine.block_manager, engine.block_manager.num_blocks // CHAIN
        latest = range(num_chains // 2, num_chains)  # the oldest have made way for the running sequences
        known = [prompt(random.Random(number).choice(latest)) for number in range(20 if quick else 400)]
        unknown = [prompt(num_chains + number) for number in range(len(known))]
        row |= {"hit_us": block_us(manager, known), "miss_us": block_us(manager, unknown)}
    return with_growth("prefixes", rows)


def queue(quick: bool) -> list[Row]:
    """Sixteen sequences decode while so many requests wait. Then every second one is aborted, as many arrive, and all
    are served, with a token each. What that costs is per request."""
    sizes = [10, 1000] if quick else [1, 10, 100, 1000, 10_000, 100_000]
    rows, engines = decode_steps("waiting", sizes, quick, engine_with_queue)
    for row, engine in zip(rows, engines, strict=True):
        leaving = [sequence.request.request_id for sequence in engine._scheduler.waiting[::2]]
        row["abort_us"] = cpu_us(lambda: [engine.abort(each) for each in leaving]) / len(leaving)  # noqa: B023
        row["arrival_us"] = cpu_us(lambda: let_wait(engine, len(leaving))) / len(leaving)  # noqa: B023
        for sequence in list(engine._scheduler.running):  # whose rows those that wait will have
            engine.abort(sequence.request.request_id)
        row["served_us"] = cpu_us(lambda: run_out(engine)) / row["waiting"]  # noqa: B023
    return with_growth("waiting", rows)


# -- engines -----------------------------------------------------------------------------------------------------


@cache
def tiny_model() -> Any:
    return make_random_model(SHAPE).model


def tiny_engine(num_seqs: int, context: int, num_blocks: int) -> Engine:
    """An engine of the tiny model whose sequences share all blocks of their prompts but the last."""
    config = {"num_kv_blocks": num_blocks, "max_num_seqs": num_seqs, "block_size": BLOCK_SIZE}
    engine = LLM.from_model(tiny_model(), **config).engine
    return decoding(engine, num_seqs, [3] * context)


def stub_engine(num_seqs: int, num_blocks: int) -> Engine:
    """An engine without a model, whose logits are there at once."""
    runner: Any = StubRunner(num_blocks)
    config = EngineConfig(max_num_seqs=num_seqs, num_kv_blocks=num_blocks, block_size=BLOCK_SIZE)
    engine = Engine(runner, None, config, None)
    engine._sampling._sampler = StubSampler(num_seqs, runner.vocab_size)
    return engine


def decoding(engine: Engine, num_seqs: int, shared: list[int]) -> Engine:
    """Let sequences decode whose blocks fill up at different steps."""
    for number in range(num_seqs):
        drawn = {"temperature": 0.8, "top_p": 0.9, "seed": number} if number % 2 else {"temperature": 0.0}
        params = SamplingParams(max_tokens=WARMUP + STEPS * TURNS + 2 * num_seqs, ignore_eos=True, **drawn)
        engine.add_request([*shared, *[number] * (1 + number % BLOCK_SIZE)], params)
        engine.step()
        while number == 0 and engine._batch.is_prefilling.any():  # the others find its blocks
            engine.step()
    while engine._batch.is_prefilling.any() or engine._scheduler.waiting:
        engine.step()
    assert len(engine._scheduler.running) == num_seqs, "an error has ended some"
    return engine


def engine_with_prefixes(num_prefixes: int) -> Engine:
    """The pool has those blocks, and what the running sequences need: it is full once these have it."""
    engine = stub_engine(NUM_SEQS, num_prefixes + NUM_SEQS * 32)
    manager = engine.block_manager
    for number in range(manager.num_blocks // CHAIN):
        compute(manager, number, prompt(number))
        manager.free(number)
    return decoding(engine, NUM_SEQS, [3] * BLOCK_SIZE)


def engine_with_queue(num_waiting: int) -> Engine:
    engine = decoding(stub_engine(NUM_SEQS, 1024), NUM_SEQS, [3] * BLOCK_SIZE)
    let_wait(engine, num_waiting)
    return engine


def let_wait(engine: Engine, count: int) -> None:
    """Let requests arrive that ask for a token."""
    for _ in range(count):
        engine.add_request([5, 6], SamplingParams(max_tokens=1, temperature=0))
    engine._admit_arrivals()


def run_out(engine: Engine) -> None:
    """Serve all that wait."""
    while engine.has_unfinished():
        engine.step()


def prompt(number: int) -> list[int]:
    """The tokens of `CHAIN` blocks, the same for a number and others for each."""
    return [number, *[7] * (CHAIN * BLOCK_SIZE - 1)]


def compute(manager: BlockManager, name: Any, token_ids: list[int]) -> None:
    """Take blocks for a prompt, and have it computed."""
    manager.allocate(name, token_ids)
    manager.mark_computed(name, len(token_ids))


# -- measuring ---------------------------------------------------------------------------------------------------


def decode_steps(
    name: str, sizes: list[int], quick: bool, make: Callable[[int], Engine]
) -> tuple[list[Row], list[Engine]]:
    """Return a row for each size, of steps in which all of an engine's rows decode, and the engines."""
    engines, rows = [], []
    for size in sizes:
        before = resident_bytes()
        engines.append(make(size))
        rows.append({name: size, "memory_mib": max(0, resident_bytes() - before) / 2**20})
        for _ in range(WARMUP):
            engines[-1].step()
    clocks = [Clock(engine) for engine in engines]
    for _ in range(2 if quick else TURNS):
        for clock in clocks:
            with no_garbage_collection():
                for _ in range(STEPS):
                    clock.step()
    for row, engine, clock in zip(rows, engines, clocks, strict=True):
        row |= {"host_us": median_us(clock, "cpu", (SUM,)), "graph_us": median_us(clock, "cpu", GRAPHS)}
        row["load"] = round(os.getloadavg()[0], 1)
        row["tokens_per_s"] = 1e6 * len(engine._scheduler.running) / median_us(clock, "wall", (SUM, *OTHER_PARTS))
    return rows, engines


def median_us(clock: Clock, by: str, parts: tuple[str, ...]) -> float:
    """Median over the steps that were measured by the CPU's time, or by the wall's, of what these parts took."""
    return 1e6 * statistics.median(sum(times[part] for part in parts) for _, own, times in clock.steps if own == by)


def block_us(manager: BlockManager, prompts: list[list[int]]) -> float:
    """Return the median time to find, or to take and publish, a block of prompts that come one after the other."""
    times = []
    with no_garbage_collection():
        for token_ids in prompts:
            times.append(cpu_us(lambda: compute(manager, "prompt", token_ids)) / CHAIN)  # noqa: B023
            manager.free("prompt")
    return statistics.median(times)


def cpu_us(function: Callable[[], Any]) -> float:
    """Microseconds that this thread computes."""
    started = time.thread_time_ns()
    function()
    return (time.thread_time_ns() - started) / 1e3


def resident_bytes() -> int:
    """Return the memory of this process: what it has now, or where the system does not tell the most it has had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def with_growth(name: str, rows: list[Row]) -> list[Row]:
    """Add to each time of rows by what power of their size it grows from the row before."""
    times = [key for key in rows[0] if key.endswith("_us")]
    for before, row in zip([rows[0], *rows], rows, strict=False):
        for key in times:
            steps = math.log(row[name] / before[name]) if row is not before else math.inf
            row[f"{key}_growth"] = math.log(row[key] / before[key]) / steps
    return rows


def columns(name: str, heading: str, **times: str) -> Columns:
    """Those of a part: its size, times with their growth, throughput and memory."""
    shown: Columns = {name: (heading, ",d")}
    for key, words in ({"host_us": "own work, us per step", "graph_us": "graphs, us per step"} | times).items():
        shown |= {key: (words, ",.1f"), f"{key}_growth": ("growth", ".2f")}
    return shown | {"tokens_per_s": ("tokens/s", ",.0f"), "memory_mib": ("MiB", ",.0f"), "load": ("load", ".1f")}


PARTS = (
    Part(sequences, "Sequences that decode", columns("sequences", "sequences")),
    Part(context, "Tokens of context of 16 sequences", columns("context", "context")),
    Part(pool, "Blocks of the pool", columns("blocks", "blocks")),
    Part(
        prefixes,
        "Cached prefixes, a block each",
        columns("prefixes", "prefixes", hit_us="us per block that is found", miss_us="per block that is not"),
    ),
    Part(
        queue,
        "Requests that wait",
        columns(
            "waiting", "waiting", abort_us="us per abort", arrival_us="per arrival", served_us="per request served"
        ),
    ),
)


if __name__ == "__main__":
    report.main("growth.py", __doc__ or "", PARTS)
