"""What several ranks tell each other in a step, and how long that takes.

    python benchmarks/parallel.py [--model FOLDER --ranks N] [--quick] [--json FILE]   measure, print, write numbers
    python benchmarks/parallel.py --markdown FILE                                      the tables of such a file

The ranks are processes of this machine, on MLX's ring over the loopback; each is kept on a core of its own, since the
ring's wait takes one. Messages and bytes are those of one rank and a step that decodes, as arrays go into MLX: what
rank 0 tells, the tokens, and what the model's layers sum up, send or gather; a ring of n sends 2 (n - 1) / n times
as much of a sum. Their time is that of the same calls in the same order with nothing computed between them: a lower
bound of what they take of a step. No number of a machine with a network or several devices can be read off this one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import mlx.core as mx
import report
from report import Part, Row

from mlx_paged.distributed.launch import free_ports
from mlx_paged.tools.random_models import make_random_model

Call = tuple[str, tuple[int, ...], mx.Dtype, tuple[Any, ...]]
CASES: list[dict[str, int]] = [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
SHAPE, QUICK_SHAPE = "qwen2-20m", "qwen2-tiny"
NAMES = ["all_sum", "all_gather", "send", "recv_like"]
BATCHES, HEAD = (1, 16), 512
PARSER = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
PARSER.add_argument("--model", help="of which is told what a rank holds; the bundled one, if not given")
PARSER.add_argument("--ranks", type=int, default=2, metavar="N", help="that share it, one of its numbers of heads: 2")
OPTIONS = PARSER.parse_known_args()[0]
LAUNCH = "from mlx._distributed_utils.launch import main; main()"


class Counter:
    """Stands before a function of mx.distributed, and notes what it is given."""

    def __init__(self, calls: list[Call], name: str) -> None:
        self._calls, self._name, self._original = calls, name, getattr(mx.distributed, name)
        setattr(mx.distributed, name, self)

    def __call__(self, array: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self._calls.append((self._name, tuple(array.shape), array.dtype, args))
        called: mx.array = self._original(array, *args, **kwargs)
        return called


def steps(quick: bool) -> Iterator[Row]:
    """Decoding with so many sequences."""
    for case in CASES:
        yield from in_ranks("measure", case, quick)


def held(quick: bool) -> Iterator[Row]:
    """What rank 0 holds of a model that is read from its files: the bundled one, or what --model says."""
    for size in (1, OPTIONS.ranks):
        yield from in_ranks("load", {"tensor_parallel_size": size} if size > 1 else {}, quick)


def in_ranks(task: str, case: dict[str, int], quick: bool) -> list[Row]:
    """Run a task in each rank of a case, each a process. Returns the rows that rank 0 writes."""
    size = max(case.values(), default=1)
    with tempfile.TemporaryDirectory() as folder:
        program = [
            sys.executable,
            __file__,
            "--as-rank",
            json.dumps([task, OPTIONS.model, case, quick, f"{folder}/rows"]),
        ]
        if size > 1:
            start = ["-n", str(size), "--backend", "ring", "--starting-port", str(free_ports(size)), "--"]
            program = [sys.executable, "-c", LAUNCH, *start, *program]
        env = os.environ | {"OPENBLAS_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size))}
        env |= {"MLX_RANK": "0"} if size == 1 else {}
        stdin, writer = os.pipe()  # that stays open: mlx.launch would look at one that has ended all the time
        subprocess.run(program, check=True, stdin=stdin, env=env)
        os.close(stdin)
        os.close(writer)
        rows: list[Row] = json.loads(Path(f"{folder}/rows").read_text())
        return rows


def load(model: str | None, case: dict[str, int], _: bool, file: str) -> None:
    """Load a model as a rank, and write down what rank 0 holds."""
    mx.reset_peak_memory()
    llm = LLM(model, num_kv_blocks=16, **case)  # in rank 0; the others follow it to its end
    plan = llm._runner.plan
    row = {"ranks": max(case.values(), default=1), "weights_mb": plan.weight_bytes / 1e6}
    row |= {"peak_mb": mx.get_peak_memory() / 1e6, "kv_bytes": sum(plan.block_bytes) // plan.block_size}
    Path(file).write_text(json.dumps([row]))


def measure(_: str | None, case: dict[str, int], quick: bool, file: str) -> None:
    """Measure as a rank, and write down rank 0's rows."""
    if case and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(os.environ["MLX_RANK"]) % (os.cpu_count() or 1)})
    calls: list[Call] = []
    for name in NAMES if case else ():
        Counter(calls, name)
    rows = []
    try:
        model = make_random_model(QUICK_SHAPE if quick else SHAPE).model
        llm = LLM.from_model(model, num_kv_blocks=256, max_num_seqs=max(BATCHES), **case)
        rows = [decode(llm, batch, quick) for batch in BATCHES]
        if case:
            llm._runner._end()  # type: ignore[attr-defined]
    except SystemExit:  # in another rank than 0
        pass
    for i, batch in enumerate(BATCHES if case else ()):
        step = calls_of(calls, batch)
        seconds = time_of(step, 5 if quick else 30)
        if rows:
            size = sum(math.prod(shape) * dtype.size for _, shape, dtype, _ in step)
            rows[i] |= {"messages": len(step), "bytes": size, "alone_ms": 1e3 * seconds}
            rows[i] |= {"share": 1e3 * seconds / rows[i]["step_ms"]}
    for row in rows:
        row["ranks"] = " ".join(f"{size} ({name.split('_')[0]})" for name, size in case.items()) or "1"
        Path(file).write_text(json.dumps(rows))


def decode(llm: LLM, batch: int, quick: bool) -> Row:
    """Decode with so many sequences. Returns what a step in the middle takes."""
    params = SamplingParams(temperature=0, max_tokens=9 if quick else 33, ignore_eos=True)
    requests = [llm.engine.make_request([1 + i, 2, 3], params) for i in range(batch)]
    ends: list[float] = []
    for _ in llm.run(requests, lambda: ends.append(time.perf_counter())):
        pass
    first, last = len(ends) // 4, len(ends) * 3 // 4
    step_s = (ends[last] - ends[first]) / (last - first)
    no_messages = {"messages": 0, "bytes": 0, "alone_ms": 0.0, "share": 0.0}
    return no_messages | {"batch": batch, "step_ms": 1e3 * step_s, "tokens_per_s": batch / step_s}


def calls_of(calls: list[Call], batch: int) -> list[Call]:
    """Return the calls of the last step that decoded so many sequences: what is told, then tokens, then the model's."""
    starts = [i for i, (_, shape, dtype, _) in enumerate(calls) if (shape, dtype) == ((HEAD,), mx.int32)]
    pairs = zip(starts, [*starts[1:], len(calls)], strict=True)
    found = [calls[start:end] for start, end in pairs if end - start > 1 and calls[start + 1][1] == (batch,)]
    return found[-1]


def time_of(step: list[Call], repetitions: int) -> float:
    """Time the calls of a step alone, one after the other, in all ranks."""
    arrays = [mx.zeros(shape, dtype) for _, shape, dtype, _ in step]
    mx.eval(arrays)
    mx.eval(mx.distributed.all_sum(mx.zeros(1)))
    started = time.perf_counter()
    for _ in range(repetitions):
        for (name, _, _, args), array in zip(step, arrays, strict=True):
            mx.eval(getattr(mx.distributed, name)(array, *args))
    return (time.perf_counter() - started) / repetitions


PARTS = [
    Part(
        steps,
        "A step that decodes, of random weights in a shape with 6 layers, 8 query heads and 2 KV heads",
        {
            "ranks": ("ranks", ""),
            "batch": ("sequences", "d"),
            "messages": ("messages", "d"),
            "bytes": ("bytes", ",d"),
            "step_ms": ("step, ms", ".2f"),
            "tokens_per_s": ("tokens/s", ",.0f"),
            "alone_ms": ("messages alone, ms", ".2f"),
            "share": ("share of the step", ".0%"),
        },
    ),
    Part(
        held,
        "What rank 0 holds of a model, and the most while it loads",
        {
            "ranks": ("ranks, by heads", "d"),
            "weights_mb": ("weights, MB", ",.1f"),
            "peak_mb": ("at most, MB", ",.1f"),
            "kv_bytes": ("bytes of K and V a token", ",d"),
        },
    ),
]

if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-rank"]:
        task, *arguments = json.loads(sys.argv[2])
        {"measure": measure, "load": load}[task](*arguments)
    else:
        report.main("parallel.py", __doc__ or "", PARTS, own_options=[PARSER], model=OPTIONS.model or "demo")
