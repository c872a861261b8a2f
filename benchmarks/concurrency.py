"""What serving more requests at once brings, and what it takes: speed by concurrency, memory step by step.

    python benchmarks/concurrency.py [--quick] [--only throughput] [--json FILE]   measure, print, write raw numbers
    python benchmarks/concurrency.py --markdown FILE                               the tables of such a file

`throughput` serves requests by this engine and by mlx-lm's BatchGenerator, 1, 2, 4 ... at a time and twice as many in
all, with 21 million random weights in float32; how it is measured is in comparison/compare.py. `memory_over_time` is
counted, not timed: the tokens that an engine has in its blocks while it serves the requests of workload W3, and what
other ways to hold the same sequences would take. benchmarks/plots.py draws both.
"""

from __future__ import annotations

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import mlx_lm
import report
from comparison.compare import COLUMNS, compare
from comparison.workloads import WORKLOADS, Case, MlxLm, Paged, System, mixed_lengths, paged
from report import Part, Row
from workloads import QUICK_SCALE, REPETITIONS, random_model

from mlx_paged.tools.random_models import make_random_model

AT_ONCE = (1, 2, 4, 8, 16, 32)
LOOK_EVERY = 16  # steps, so that a full run has a hundred rows or so


def throughput(quick: bool) -> list[Row]:
    """Requests of mixed lengths, with means of 80 tokens in and 169 out, all there from the start."""
    scale, repetitions = (QUICK_SCALE, 1) if quick else (2, REPETITIONS)
    rows = []
    for most in AT_ONCE[::3] if quick else AT_ONCE:
        lengths = mixed_lengths(2 * most, scale)
        systems: list[System] = [MlxLm(concurrency=most), paged(max_num_seqs=most)]
        case = Case("concurrency", f"{most} at once", lengths, systems)
        rows += [{"most": most} | row for row in compare(case, random_model(quick), repetitions)]
    return rows


def memory_over_time(quick: bool) -> list[Row]:
    """Tokens, after every sixteenth step (in a quick run after each). The model is a tiny one: it decides nothing.

    used: those that have a slot; blocks: the slots of all blocks that are taken; pool: of all there are. padded,
    reserved: what mlx-lm's batch and a fixed reservation would take for the sequences that run in this step.
    """
    (case,) = WORKLOADS["W3"].cases(QUICK_SCALE if quick else 1)
    reserved, padded, _, ours = case.systems
    assert isinstance(reserved, Paged) and isinstance(padded, Paged) and isinstance(ours, Paged)
    assert reserved.row is not None and padded.row is not None
    engine = LLM.from_model(make_random_model("qwen2-tiny", "float32").model, **ours.config).engine
    for task in case.tasks(0, range(1000)):
        engine.add_request(task.prompt, SamplingParams(temperature=0, max_tokens=task.num_tokens, ignore_eos=True))
    rows, manager = [], engine.block_manager
    while engine.has_unfinished():
        engine.step()
        stats = engine.stats()
        if stats.num_steps % (1 if quick else LOOK_EVERY):
            continue
        lengths = [manager.num_tokens(seq_id) for seq_id in manager.seq_ids]
        if lengths:
            rows.append(
                {
                    "step": stats.num_steps,
                    "requests": len(lengths),
                    "used": stats.kv_tokens,
                    "blocks": (stats.num_blocks - stats.num_free_blocks) * stats.block_size,
                    "pool": stats.num_blocks * stats.block_size,
                    "padded": len(lengths) * padded.row(lengths),
                    "reserved": len(lengths) * reserved.row(lengths),
                    "preemptions": stats.num_preemptions,
                }
            )
    return rows


THROUGHPUT_COLUMNS = {
    "most": ("at once", ",d"),
    **{key: COLUMNS[key] for key in ("system", "tokens_per_s", "speedup", "cpu_speedup", "kv_peak_mb", "kv_waste")},
}
MEMORY_COLUMNS = {
    "step": ("step", ",d"),
    "requests": ("requests", ",d"),
    "used": ("tokens", ",d"),
    "blocks": ("in blocks", ",d"),
    "pool": ("of", ",d"),
    "padded": ("padded", ",d"),
    "reserved": ("reserved", ",d"),
    "preemptions": ("preemptions", ",d"),
}

PARTS = [
    Part(throughput, "Throughput, so many requests at a time of twice as many", THROUGHPUT_COLUMNS),
    Part(memory_over_time, "Memory while the requests of W3 are served, in tokens", MEMORY_COLUMNS),
]

if __name__ == "__main__":
    report.main("concurrency.py", __doc__, PARTS, mlx_lm=mlx_lm.__version__)
