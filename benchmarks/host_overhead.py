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

import gc
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import report
from mlx_lm.models import qwen2
from mlx_lm.models.cache import BatchKVCache
from report import Part, Row

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.config import EngineConfig
from mlx_paged.engine.engine import Engine
from mlx_paged.models.patch import PatchedModel, patch_model
from mlx_paged.runner.memory_plan import MemoryPlan
from mlx_paged.sampling.sampler import SampledTokens, Sampler

BLOCK_SIZE = 16
VOCAB_SIZE = 64
STOP = VOCAB_SIZE - 1  # a token that ends sequences and never comes: stop checks are made and fail
OWN_PARTS = ("scheduling", "block management", "batch arrays", "tokens and stops", "rest of the step")
SUM = "sum of these"
OTHER_PARTS = ("model graph", "sampling graph", "submitting", "waiting", "detokenising")
CLOCKS: dict[str, Callable[[], int]] = {"cpu": time.thread_time_ns, "wall": time.perf_counter_ns}
PARTS_OF_A_STEP = (*OWN_PARTS, SUM, *OTHER_PARTS)


# -- measuring ---------------------------------------------------------------------------------------------------


class Clock:
    """The time of each part of an engine's steps, its own: what it calls of other parts is theirs.

    Each step reads one clock, that of the CPU or of the wall, drawn at random. What this takes is left out: a call of
    an empty function is measured first, and what it seems to cost the function and its caller is subtracted from each.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps: list[tuple[str, str, dict[str, float]]] = []  # (kind, clock, {part: seconds})
        self._engine = engine
        self._rng = random.Random(0)
        self._times: dict[str, int] = dict.fromkeys(PARTS_OF_A_STEP, 0)
        self._now = time.perf_counter_ns
        self._part = OWN_PARTS[-1]
        self._last = 0
        self._outer_cost = self._inner_cost = 0
        self._to_subtract = {name: self._cost_of_a_call(clock) for name, clock in CLOCKS.items()}
        self._wrap(engine._scheduler, "scheduling", "schedule", "complete", "remove")
        self._wrap(engine.cache_groups, "block management", "attach", "reserve", "append_blocks", "publish")
        self._wrap(engine.cache_groups, "block management", "mark_computed", "free")
        self._wrap(engine._input_builder, "batch arrays", "build")
        self._wrap(engine._outputs, "tokens and stops", "process_tokens")
        self._wrap(engine._steps, "waiting", "wait")
        self._wrap(engine._sampling._sampler, "sampling graph", "sample")
        self._wrap(engine._runner, "model graph", "run")
        self._wrap(engine._outputs, "detokenising", "_detokenize", "_complete_text")

    def _cost_of_a_call(self, clock: Callable[[], int]) -> tuple[int, int]:
        """Nanoseconds that a call seems to cost the caller, and the function."""
        self._now, costs = clock, []
        call = self._timed("waiting", lambda: None)
        for _ in range(1000):
            self._times = dict.fromkeys(PARTS_OF_A_STEP, 0)
            self._last = clock()
            call()
            self._times[self._part] += clock() - self._last
            costs.append((self._times[self._part], self._times["waiting"]))
        outer, inner = zip(*costs, strict=True)
        return int(statistics.median(outer)), int(statistics.median(inner))

    def step(self, kind: str = "decode") -> int:
        """One step of the engine; how many requests have ended with it."""
        clock = self._rng.choice(list(CLOCKS))
        self._now = CLOCKS[clock]
        self._outer_cost, self._inner_cost = self._to_subtract[clock]
        self._times = dict.fromkeys(PARTS_OF_A_STEP, 0)
        submit = mx.async_eval
        self._wrap(mx, "submitting", "async_eval")
        try:
            self._last = self._now()
            outputs = self._timed("rest of the step", self._engine.step)()
        finally:
            mx.async_eval = submit
        num_ended = sum(output.finished for output in outputs)
        times = {part: taken / 1e9 for part, taken in self._times.items()}
        times[SUM] = sum(times[part] for part in OWN_PARTS)
        self.steps.append(("leave" if num_ended else kind, clock, times))
        return num_ended

    def times(self, kind: str, clock: str, part: str) -> list[float]:
        """Seconds that a part took in each step of a kind that was measured with this clock."""
        return [times[part] for step, by, times in self.steps if (step, by) == (kind, clock)]

    def rows(self, kind: str = "decode") -> Iterator[Row]:
        """Of the steps of a kind: the parts, and the sum of those that are the engine's own work."""
        for part in PARTS_OF_A_STEP:
            row: Row = {"part": part}
            for clock in CLOCKS:
                seconds = self.times(kind, clock, part)
                row[f"{clock}_median_us"] = 1e6 * statistics.median(seconds)
                row[f"{clock}_p95_us"] = 1e6 * float(np.quantile(seconds, 0.95))
            yield row

    def _wrap(self, owner: Any, part: str, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, now = self._part, self._now
            self._times[outer] += now() - self._last - self._outer_cost
            self._part = part
            self._last = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._times[part] += now() - self._last - self._inner_cost
                self._part = outer
                self._last = now()

        return timed


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Its pauses depend on what else the process holds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
    kv_bytes = 0
    kv_cache = SimpleNamespace(move_blocks=lambda moves, group: None)

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE, vocab_size: int = VOCAB_SIZE) -> None:
        self.plan = MemoryPlan([num_blocks], [1], [None], block_size, 0, 0, 0, "")
        self.vocab_size = vocab_size

    def run(self, inputs: ModelInputs) -> mx.array:
        rows = inputs.token_ids if inputs.logits_indices is None else inputs.logits_indices
        return zeros(rows.shape[0], self.vocab_size)

    def reset(self) -> None:
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

    def sample(self, logits: mx.array, rows: np.ndarray, positions: np.ndarray, masks: Any = None) -> SampledTokens:
        super().sample(logits, rows, positions, masks)
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


# -- (b) building a model's graph --------------------------------------------------------------------------------


class Decode(NamedTuple):
    """reset: caches as before the step, and the last graph gone; build: the step's logits, not evaluated."""

    reset: Callable[[], None]
    build: Callable[[], mx.array]


def graph_building(quick: bool) -> list[Row]:
    """CPU time to build, without running it, the graph of a step: mlx-lm with its batch cache, and ours.

    A Qwen2 with the heads of the 0.5B model, 24 layers and tiny sizes. Contexts are equal, or from a tenth of the
    longest up to it. Medians of interleaved repeats, each from the same caches.
    """
    num_layers, repeats = (2, 3) if quick else (24, 40)
    model = tiny_qwen2(num_layers)
    rows = []
    for batch in (4, 8) if quick else (32, 256):
        for contexts in ("equal", "mixed"):
            first = 100 if contexts == "mixed" else 1000
            lengths = np.linspace(first, 1000, batch).astype(np.int32)
            decodes = {"mlx_lm": mlx_lm_decode(model, lengths), "mlx_paged": mlx_paged_decode(model, lengths)}
            times: dict[str, list[float]] = defaultdict(list)
            with no_garbage_collection():
                for _ in range(repeats):
                    for name, decode in decodes.items():
                        decode.reset()
                        started = time.thread_time()
                        logits = decode.build()
                        times[name].append(1e3 * (time.thread_time() - started))
                        del logits
            medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
            ratio = medians["mlx_paged_ms"] / medians["mlx_lm_ms"]
            rows.append({"sequences": batch, "contexts": contexts, "layers": num_layers} | medians | {"ratio": ratio})
    return rows


def tiny_qwen2(num_layers: int) -> qwen2.Model:
    """14 query and 2 KV heads, as in Qwen2 0.5B, of 8 instead of 64."""
    arguments = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=112,
        num_hidden_layers=num_layers,
        intermediate_size=64,
        num_attention_heads=14,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=64,
    )
    model = qwen2.Model(arguments)
    mx.eval(model.parameters())
    return model


def mlx_lm_decode(model: qwen2.Model, lengths: np.ndarray) -> Decode:
    """Builds the graph of one token for each sequence, the last of its `lengths`, in mlx-lm's batch cache."""
    args = model.args
    caches = [BatchKVCache((lengths.max() - lengths).tolist()) for _ in range(args.num_hidden_layers)]
    head_dim = args.hidden_size // args.num_attention_heads
    kv = mx.zeros((len(lengths), args.num_key_value_heads, int(lengths.max()) - 1, head_dim))
    for layer in caches:
        layer.update_and_fetch(kv, kv)
        mx.eval(layer.keys, layer.values, layer.offset, layer.left_padding)
    states = [layer.state for layer in caches]
    token_ids = mx.zeros((len(lengths), 1), mx.int32)

    def reset() -> None:
        for layer, state in zip(caches, states, strict=True):
            layer.state = state

    return Decode(reset, lambda: model(token_ids, cache=caches))


def mlx_paged_decode(model: qwen2.Model, lengths: np.ndarray) -> Decode:
    """The same over a paged cache, from host arrays of the step and the block tables on the device."""
    patched: PatchedModel = patch_model(model)
    num_blocks = -(-lengths // BLOCK_SIZE)
    tables = np.zeros((len(lengths), int(num_blocks.max())), np.int32)
    tables[np.arange(tables.shape[1]) < num_blocks[:, None]] = np.arange(num_blocks.sum())
    matrix = mx.array(tables)
    layers = [layer for layer, _ in patched.stored_layers]
    kv_cache = PagedKVCache(layers, [int(num_blocks.sum())] * len(layers), BLOCK_SIZE, 1)
    arrays = [dict(pool.arrays) for pool in kv_cache.pools]
    token_ids = mx.zeros(len(lengths), mx.int32)
    rows = mx.arange(len(lengths), dtype=mx.int32)
    mx.eval(matrix, token_ids, rows)

    def reset() -> None:
        for pool, before in zip(kv_cache.pools, arrays, strict=True):
            pool.arrays = dict(before)

    def build() -> mx.array:
        positions = mx.array(lengths - 1)
        table = matrix[rows]
        slots = {"slot_block_ids": table[rows, positions // BLOCK_SIZE], "slot_offsets": positions % BLOCK_SIZE}
        metadata = AttentionMetadata(table, lengths, np.arange(len(lengths) + 1, dtype=np.int32), **slots)
        return patched(kv_cache, ModelInputs(token_ids, positions, None, [metadata]))

    return Decode(reset, build)


# -- (c) the demo model end to end -------------------------------------------------------------------------------


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
