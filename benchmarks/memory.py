"""What the memory system costs and saves: block operations, waste, sharing, prefix caching, fragmentation.

    python benchmarks/memory.py [--quick] [--json FILE]     measure, print tables, write the raw numbers
    python benchmarks/memory.py --markdown FILE             the tables of such a file

Everything random is seeded. Times are medians of repetitions that alternate between what is compared.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from mlx_paged import LLM, BlockManager, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import mlx.core as mx
import numpy as np
import report
from report import Part, Row
from sharing import savings, waste

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.blocks.free_lists import POLICIES
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec

BLOCK_SIZE = 16


def cpu_ns(function: Callable[..., Any], *args: Any) -> int:
    """Nanoseconds that this thread computed: for Python that waits for nothing, whatever else the machine does."""
    started = time.thread_time_ns()
    function(*args)
    return time.thread_time_ns() - started


def wall_ns(function: Callable[..., Any], *args: Any) -> int:
    started = time.perf_counter_ns()
    function(*args)
    return time.perf_counter_ns() - started


# -- (a) operations of the block manager -------------------------------------------------------------------------


def operations(quick: bool) -> list[Row]:
    """Medians over the lives of sequences of 64 blocks in a pool that is half full, in random pieces."""
    sizes = [10**3, 10**4] if quick else [10**3, 10**4, 10**5, 10**6]
    managers = {(size, allocator): _fragmented(size, allocator) for size in sizes for allocator in POLICIES}
    times: dict[Any, dict[str, list[float]]] = {pool: defaultdict(list) for pool in managers}
    for number in range(1, 6 if quick else 61):
        for pool, manager in managers.items():
            _time_a_life(manager, number, times[pool])
    return [
        {"num_blocks": size, "allocator": allocator}
        | {name: round(statistics.median(taken)) for name, taken in times[size, allocator].items()}
        for size, allocator in managers
    ]


def _fragmented(num_blocks: int, allocator: str) -> BlockManager:
    rng = random.Random(0)
    manager = BlockManager(num_blocks, BLOCK_SIZE, allocator=allocator)
    lives = 0
    while manager.num_free_blocks:
        manager.allocate(lives, [0] * min(rng.randint(1, 32), manager.num_free_blocks) * BLOCK_SIZE)
        lives += 1
    for seq_id in rng.sample(range(lives), lives // 2):
        manager.free(seq_id)
    return manager


def _time_a_life(manager: BlockManager, number: int, times: dict[str, list[float]]) -> None:
    prompt = [number] + [0] * (64 * BLOCK_SIZE - 1)
    times["allocate"].append(cpu_ns(manager.allocate, "a", prompt) / 64)
    times["register"].append(cpu_ns(manager.mark_computed, "a", len(prompt)) / 64)
    times["fork"].append(cpu_ns(manager.fork, "a", "b") / 64)
    times["hit"].append(cpu_ns(manager.allocate, "c", prompt + [1]) / 64)
    manager.free("b")
    manager.free("c")
    times["append_block"].append(cpu_ns(manager.append, "a", [1]))
    times["append"].append(cpu_ns(_append_each, manager, 15) / 15)
    times["free"].append(cpu_ns(manager.free, "a") / 65)


def _append_each(manager: BlockManager, count: int) -> None:
    for _ in range(count):
        manager.append("a", [1])


# -- (b) what prefix caching costs when nothing is hit -----------------------------------------------------------


def prefix_cost(quick: bool) -> list[Row]:
    """Steps of the demo model, and the manager's own time for the same tokens, with and without prefix caching."""
    num_seqs, length, num_decodes = (2, 64, 8) if quick else (8, 128, 32)
    engines = {
        on: LLM(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_seqs * length,
            num_kv_blocks=1000,
            prefix_caching=on,
            pipelining="off",  # so that a step can be timed by itself
        )
        for on in (False, True)
    }
    rng = random.Random(0)
    steps: dict[tuple[str, bool], list[int]] = defaultdict(list)
    manager_times: dict[tuple[str, bool], list[float]] = defaultdict(list)
    params = SamplingParams(temperature=0, max_tokens=num_decodes + 1, ignore_eos=True)
    for repetition in range(3 if quick else 16):
        prompts = [[rng.randrange(5, 1600) for _ in range(length)] for _ in range(num_seqs)]
        for on, llm in engines.items():
            for prompt in prompts:
                llm.engine.add_request(prompt, params)
            times = [wall_ns(llm.engine.step) for _ in range(num_decodes + 1)]
            assert not llm.engine.has_unfinished()
            assert llm.stats().prefix_hit_tokens == 0
            if repetition > 0:
                steps["prefill", on].append(times[0])
                steps["decode", on] += times[1:]
            for phase, per_token in _manager_times(prompts, num_decodes, on).items():
                manager_times[phase, on].append(per_token)
    rows = []
    for phase, num_tokens in (("prefill", num_seqs * length), ("decode", num_seqs)):
        off_ns, on_ns = (statistics.median(manager_times[phase, on]) for on in (False, True))
        off_step, on_step = (statistics.median(steps[phase, on]) for on in (False, True))
        rows.append(
            {
                "phase": phase,
                "num_tokens": num_tokens,
                "manager_off_ns": off_ns,
                "manager_on_ns": on_ns,
                "step_off_ms": off_step / 1e6,
                "step_on_ms": on_step / 1e6,
                "share": (on_ns - off_ns) * num_tokens / off_step,
            }
        )
    return rows


def _manager_times(prompts: list[list[int]], num_decodes: int, prefix_caching: bool) -> dict[str, float]:
    """Nanoseconds per token of what a step asks of the manager, without a model."""
    manager = BlockManager(1000, BLOCK_SIZE, prefix_caching=prefix_caching)
    num_prompt_tokens = sum(map(len, prompts))

    def prefill() -> None:
        for seq_id, prompt in enumerate(prompts):
            manager.allocate(seq_id, prompt)
            manager.publish(seq_id, len(prompt))
        for seq_id, prompt in enumerate(prompts):
            manager.mark_computed(seq_id, len(prompt))

    def decode() -> None:
        for step in range(num_decodes):
            for seq_id, prompt in enumerate(prompts):
                manager.append(seq_id, [step])
                manager.mark_computed(seq_id, len(prompt) + step + 1)

    return {
        "prefill": cpu_ns(prefill) / num_prompt_tokens,
        "decode": cpu_ns(decode) / (num_decodes * len(prompts)),
    }


# -- (c) fragmented against consecutive tables -------------------------------------------------------------------


def fragmentation(quick: bool) -> list[Row]:
    """Decode attention of 4 sequences and whole-block copies, over consecutive blocks and over scattered ones."""
    contexts = (1024, 2048) if quick else (1024, 4096, 16384)
    return [
        row
        for context in contexts
        for row in _fragmentation(context, repetitions=3 if quick else 21 + (1 << 17) // context)
    ]


def _fragmentation(context: int, repetitions: int) -> Iterator[Row]:
    heads, kv_heads, dim, num_seqs = 8, 2, 64, 4
    num_held = num_seqs * context // BLOCK_SIZE
    num_blocks = 2 * num_held
    layer = LayerSpec(kv_heads, dim, dim, mx.float32)
    cache, backend = PagedKVCache([layer], [num_blocks], BLOCK_SIZE, 64 << 20), choose_backend(layer, heads, BLOCK_SIZE)
    keys, values = (mx.random.normal(cache.pools[0].keys.shape) for _ in range(2))
    cache.pools[0].keys[:], cache.pools[0].values[:] = keys, values
    del keys, values
    q = mx.random.normal((num_seqs, heads, dim))
    permuted = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    blocks = {"consecutive": np.arange(num_blocks, dtype=np.int32), "scattered": permuted}
    held = {kind: ids[:num_held] for kind, ids in blocks.items()}
    free = {kind: ids[num_held:] for kind, ids in blocks.items()}
    lengths, starts = np.full(num_seqs, context, np.int32), np.arange(num_seqs + 1, dtype=np.int32)
    tables = {kind: mx.array(ids.reshape(num_seqs, -1)) for kind, ids in held.items()}
    metadata = {kind: AttentionMetadata(table, lengths, starts) for kind, table in tables.items()}

    def attention(kind: str) -> None:
        mx.eval(backend.attend(q, cache.pools[0], metadata[kind], AttentionOptions(dim**-0.5)))

    def move_blocks(kind: str) -> None:
        cache.move_blocks(list(zip(held[kind].tolist(), free[kind].tolist(), strict=True)))

    def gather(kind: str) -> None:
        mx.eval(cache.pools[0].keys[mx.array(held[kind])], cache.pools[0].values[mx.array(held[kind])])

    for work in (attention, move_blocks, gather):
        times: dict[str, list[int]] = {kind: [] for kind in blocks}
        for repetition in range(repetitions):
            for kind in list(blocks)[:: 1 if repetition % 2 else -1]:
                times[kind].append(wall_ns(work, kind))
        medians = {f"{kind}_ms": statistics.median(values[1:]) / 1e6 for kind, values in times.items()}
        ratio = medians["scattered_ms"] / medians["consecutive_ms"]
        yield {"work": work.__name__, "context": context} | medians | {"ratio": ratio}


# -- tables ------------------------------------------------------------------------------------------------------


PARTS = (
    Part(
        operations,
        "ns per operation (allocate, fork, free, hit, register: per block), pool half full and fragmented",
        {"num_blocks": ("blocks", ",")}
        | {"allocator": ("allocator", "")}
        | {key: (key, ",") for key in ("allocate", "append")}
        | {"append_block": ("append, new block", ",")}
        | {key: (key, ",") for key in ("fork", "free", "hit", "register")},
    ),
    Part(
        waste,
        "slots taken that hold no token: our simulation, and what the paper measured",
        {"held_in": ("held in", ""), "waste": ("ours", ".1%"), "paper": ("paper", "")},
    ),
    Part(
        savings,
        "blocks saved by sharing: our simulation, and what the paper measured",
        {"sharing": ("sharing", ""), "lengths": ("lengths", "")}
        | {f"of_{count}": (f"{count}", ".1%") for count in (2, 4, 6)}
        | {"paper": ("paper, 2 to 6", "")},
    ),
    Part(
        prefix_cost,
        "prefix caching when nothing is hit: the manager's ns per token, and a step of the demo model",
        {
            "phase": ("step", ""),
            "num_tokens": ("tokens", ","),
            "manager_off_ns": ("manager, off", ",.0f"),
            "manager_on_ns": ("manager, on", ",.0f"),
            "step_off_ms": ("step, off (ms)", ".2f"),
            "step_on_ms": ("step, on (ms)", ".2f"),
            "share": ("added / step", ".2%"),
        },
    ),
    Part(
        fragmentation,
        "consecutive against scattered blocks, 4 sequences (ms)",
        {
            "work": ("work", ""),
            "context": ("context", ","),
            "consecutive_ms": ("consecutive", ".2f"),
            "scattered_ms": ("scattered", ".2f"),
            "ratio": ("ratio", ".2f"),
        },
    ),
)


if __name__ == "__main__":
    report.main("memory.py", __doc__, PARTS)
