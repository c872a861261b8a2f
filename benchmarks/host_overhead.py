"""What the host does in a decode step, and what that costs: the engine's own work, graphs, text, and a real model.

    python benchmarks/host_overhead.py [--quick] [--json FILE]     measure, print tables, write the raw numbers
    python benchmarks/host_overhead.py --markdown FILE             the tables of such a file

The engine's work is measured over a stub model and sampler whose results are there at once: on a CPU a device at work
would take the core, or its caches, from what is measured. Graphs of the sampler are built, and dropped. There are 256
sequences, a sixteenth of which needs a block in any step, half of them greedy and half drawn with a temperature and a
top_p. They share a prompt by prefix caching, which bounds the memory of 256 long ones; their block tables are as long
as if they did not. Times are CPU times of the thread, with wall times beside them: each part's own, without what it
calls of other parts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import mlx.core as mx
import numpy as np
import report
from graph_building import graph_building
from report import Part, Row
from step_clock import OTHER_PARTS, SUM, Clock, no_garbage_collection

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.config import EngineConfig
from mlx_paged.engine.engine import Engine
from mlx_paged.runner.memory_plan import MemoryPlan
from mlx_paged.sampling.sampler import SampledTokens, Sampler

BLOCK_SIZE = 16
VOCAB_SIZE = 64
STOP = VOCAB_SIZE - 1  # a token that ends sequences and never comes: stop checks are made and fail
# -- how fast this machine is ------------------------------------------------------------------------------------


def calibration(quick: bool) -> list[Row]:
    """What single operations cost here: the parts of a step are some tens of such each."""
    values, index = np.arange(256, dtype=np.int32), np.random.default_rng(0).permutation(256)
    large = np.zeros(1 << 23, np.uint8)  # more than the caches next to a core hold

    def add() -> None:
        for i in range(1000):
            i + i

    works: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
        "numpy: 256 of 256 values by index": (lambda: values[index], None),
        "the same, caches cold": (lambda: values[index], lambda: large.sum()),
        "mx.array of 256 int32": (lambda: mx.array(values), None),
        "Python: 1000 additions in a loop": (add, None),
        "reading the thread's clock": (time.thread_time_ns, None),
    }
    rows = []
    for name, (work, before) in works.items():
        times = []
        for _ in range(20 if quick else 2000):
            if before is not None:
                before()
            started = time.thread_time_ns()
            work()
            times.append(time.thread_time_ns() - started)
        rows.append({"work": name, "cpu_median_us": statistics.median(times) / 1e3})
    return rows


# -- (a) the engine's work over a stub model ---------------------------------------------------------------------


class StubRunner:
    """In place of a ModelRunner: logits of zeros, which are there already."""

    overlap_is_safe = True
    states = None
    kv_cache = SimpleNamespace(move_blocks=lambda moves, group: None, nbytes=0)

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE, vocab_size: int = VOCAB_SIZE) -> None:
        self.plan = MemoryPlan([num_blocks], [1], [None], block_size, 0, 0, 0, "")
        self.vocab_size = vocab_size

    def run(self, inputs: ModelInputs) -> mx.array:
        rows = inputs.token_ids if inputs.logits_indices is None else inputs.logits_indices
        return zeros(rows.shape[0], self.vocab_size)

    def rest(self) -> None:
        pass

    def reset(self, unfinished: Sequence[mx.array] = ()) -> None:
        pass

    def fingerprint(self) -> str:
        return ""


@cache
def zeros(*shape: int) -> mx.array:
    array = mx.zeros(shape)
    mx.eval(array)
    return array


class StubSampler(Sampler):
    """Builds the graph of a draw, and gives tokens that are there already."""

    def sample(self, logits: mx.array, rows: np.ndarray, *others: Any) -> SampledTokens:
        super().sample(logits, rows, *others)
        return given_tokens(len(rows))


@cache
def given_tokens(count: int) -> SampledTokens:
    """None of them is STOP."""
    token_ids = mx.arange(count, dtype=mx.uint32) % STOP
    mx.eval(token_ids)
    return SampledTokens(token_ids, zeros(count), None, None)


def stub_engine(
    num_seqs: int, context: int, num_tokens: int, *, tokenizer: Any = None, stream: bool = False, extra_seqs: int = 0
) -> Engine:
    """An engine whose `num_seqs` sequences of about `context` tokens all decode, for `num_tokens` more.

    They start one after another, so that their blocks fill up at different steps, and share the blocks of their
    prompts but the last. `extra_seqs` more may run.
    """
    shared = [3] * (context // BLOCK_SIZE * BLOCK_SIZE)
    num_blocks = len(shared) // BLOCK_SIZE + (num_seqs + extra_seqs) * ((num_tokens + num_seqs) // BLOCK_SIZE + 4)
    config = EngineConfig(
        max_num_seqs=num_seqs + extra_seqs,
        max_num_batched_tokens=len(shared) + num_seqs * BLOCK_SIZE,
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
    )
    runner: Any = StubRunner(num_blocks, vocab_size=len(tokenizer) if tokenizer is not None else VOCAB_SIZE)
    engine = Engine(runner, tokenizer, config, None)
    engine._sampling._sampler = StubSampler(config.max_num_seqs, runner.vocab_size)
    for number in range(num_seqs):
        engine.add_request([*shared, number % STOP], sampling(number, num_tokens + num_seqs), stream=stream)
        engine.step()
    while engine._batch.is_prefilling.any():
        engine.step()
    assert len(engine._scheduler.running) == num_seqs, "an error has ended some"
    return engine


def sampling(number: int, num_tokens: int) -> SamplingParams:
    """Every second request is greedy."""
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": number} if number % 2 else {"temperature": 0.0}
    return SamplingParams(max_tokens=num_tokens, stop_token_ids=[STOP], ignore_eos=True, **drawn)


def measure(engine: Engine, clock: Clock, num_steps: int) -> None:
    """Steps, between which the block tables on the device are computed now and then, as a model would."""
    with no_garbage_collection():
        for step in range(num_steps):
            clock.step()
            if step % 16 == 0:
                mx.eval([tables.update() for tables in engine._input_builder._tables])


def host_work(quick: bool) -> list[Row]:
    """A step of 256 decodes, by part and context; then steps in which a sequence joins, or leaves.

    Contexts take turns, so that what else the machine does hits all of them alike.
    """
    num_seqs, num_turns = (32, 2) if quick else (256, 40)
    num_changes = 8 if quick else 40
    rows = []
    contexts = (500, 1000) if quick else (1000, 10_000, 100_000)
    num_tokens = 50 + 16 * num_turns + 8 * num_changes
    engines = {context: stub_engine(num_seqs, context, num_tokens, extra_seqs=1) for context in contexts}
    clocks = {context: Clock(engine) for context, engine in engines.items()}
    for _ in range(num_turns):
        for context, engine in engines.items():
            measure(engine, clocks[context], 16)
    for context, engine in engines.items():
        clock = clocks[context]
        rows += [{"context": context, "step": "decode"} | row for row in clock.rows()]
        shared = [3] * (context // BLOCK_SIZE * BLOCK_SIZE)
        for number in range(num_changes):
            engine.add_request(shared + [5], sampling(number, 3))
            kind = "join"
            while not clock.step(kind):
                kind = "between"
        for kind in ("join", "leave"):
            rows += [{"context": context, "step": kind} | row for row in clock.rows(kind) if row["part"] == SUM]
    return rows


def detokenising(quick: bool) -> list[Row]:
    """The same with the demo model's tokenizer and 1000 tokens of context: requests that are streamed and not."""
    num_seqs, num_steps = (8, 8) if quick else (256, 200)
    tokenizer = LLM(num_kv_blocks=16, pipelining="off").tokenizer
    rows = []
    for stream in (False, True):
        engine = stub_engine(num_seqs, 1000, 20 + num_steps, tokenizer=tokenizer, stream=stream)
        clock = Clock(engine)
        measure(engine, clock, num_steps)
        times = {row["part"]: row for row in clock.rows()}
        for part in ("tokens and stops", SUM, "detokenising"):
            rows.append({"requests": "streamed" if stream else "not streamed"} | times[part])
    return rows


# -- (b) the demo model end to end -------------------------------------------------------------------------------


def end_to_end(quick: bool) -> list[Row]:
    """Decode steps of the demo model by way of pipelining: what the thread does in a step, as shares of wall time.

    Steps of the three engines alternate in turns, so that what else the machine does hits all of them alike.
    """
    num_seqs, num_turns, steps_per_turn = (4, 2, 6) if quick else (32, 12, 16)
    ways = ("off", "build", "submit")
    num_tokens = num_turns * steps_per_turn + 8
    clocks = {}
    for way in ways:
        llm = LLM(max_num_seqs=num_seqs, num_kv_blocks=num_seqs * (2 + (64 + num_tokens) // BLOCK_SIZE), pipelining=way)
        for number in range(num_seqs):
            params = SamplingParams(
                temperature=0.8 if number % 2 else 0.0, top_p=0.9, max_tokens=num_tokens, ignore_eos=True, seed=number
            )
            llm.engine.add_request([5 + number] * 32, params)
        for _ in range(4):
            llm.engine.step()
        clocks[way] = Clock(llm.engine)
    for _ in range(num_turns):
        for clock in clocks.values():
            for _ in range(steps_per_turn):
                clock.step()
    rows = []
    for way, clock in clocks.items():
        wall = [sum(times[part] for part in (SUM, *OTHER_PARTS)) for _, by, times in clock.steps if by == "wall"]
        shares = {part: sum(clock.times("decode", "wall", part)) / sum(wall) for part in (SUM, *OTHER_PARTS)}
        rows.append(
            {
                "pipelining": way,
                "tokens_per_second": num_seqs * len(wall) / sum(wall),
                "step_ms": 1e3 * statistics.median(wall),
                "own_work": shares.pop(SUM),
            }
            | {part.replace(" ", "_"): share for part, share in shares.items()}
        )
    for row in rows:
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


# -- tables ------------------------------------------------------------------------------------------------------


_TIMES = {
    "cpu_median_us": ("CPU, median", ",.0f"),
    "cpu_p95_us": ("CPU, p95", ",.0f"),
    "wall_median_us": ("wall, median", ",.0f"),
    "wall_p95_us": ("wall, p95", ",.0f"),
}
PARTS = (
    Part(
        calibration,
        "what single operations take on this machine (us)",
        {"work": ("work", ""), "cpu_median_us": ("CPU, median", ",.2f")},
    ),
    Part(
        host_work,
        "a step of 256 sequences over a stub model, by part (us)",
        {"context": ("context", ","), "step": ("step", ""), "part": ("part", "")} | _TIMES,
    ),
    Part(
        detokenising,
        "the same with text, 1000 tokens of context (us)",
        {"requests": ("requests", ""), "part": ("part", "")} | _TIMES,
    ),
    Part(
        graph_building,
        "building the graph of a decode step (ms of CPU time)",
        {
            "sequences": ("sequences", ","),
            "contexts": ("contexts", ""),
            "layers": ("layers", ""),
            "mlx_lm_ms": ("mlx-lm", ".2f"),
            "mlx_paged_ms": ("mlx-paged", ".2f"),
            "ratio": ("ratio", ".2f"),
        },
    ),
    Part(
        end_to_end,
        "the demo model, 32 sequences: what the thread does, as shares of wall time",
        {
            "pipelining": ("pipelining", ""),
            "step_ms": ("step (ms)", ".2f"),
            "ratio": ("tokens/s, ratio", ".2f"),
            "own_work": ("own work", ".1%"),
        }
        | {part.replace(" ", "_"): (part, ".1%") for part in OTHER_PARTS},
    ),
)


if __name__ == "__main__":
    report.main("host_overhead.py", __doc__, PARTS, numpy=np.__version__)
