"""Which division of decode among simdgroups is the fastest on this Mac: what only hardware decides, swept.

    python benchmarks/decode_layouts.py --json layouts.json    measure, print tables, write the raw numbers

Two constants of mlx_paged/attention/work_items.py are tried against each other, in bfloat16: ELEMENTS_PER_LANE, how
much of queries and output a lane keeps (8, 16 or 32, that is, query heads of 256, 512 or 1,024 elements to a simdgroup:
more reads of a key by neighbours, or more registers), and SIMDGROUPS, of a threadgroup, which also is the fewest tiles
of 32 keys to a part of a context. A column is named for both; those that are chosen today are `chosen`. Times are taken
as in attention.py, and results compared as there.

The second table has the threads that Metal allows in a threadgroup of the same kernels, which says how many registers
each takes: 1,024 if few, 384 to 512 if about 100 to 128. It is learnt by launches of 2,048 threads, which must fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
import report
from attention_layers import Case, Contender, Heads, Layers, compare
from report import Part, Row

from mlx_paged.attention import work_items
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import KernelBackend, shape_of
from mlx_paged.attention.metadata import AttentionMetadata

CHOSEN = work_items.ELEMENTS_PER_LANE, work_items.SIMDGROUPS
LAYOUTS = {f"{elements}x{simdgroups}": (elements, simdgroups) for elements, simdgroups in product((8, 16, 32), (4, 8))}
HEADS = [Heads(*sizes, mx.bfloat16) for sizes in ((32, 8, 128), (24, 4, 256), (16, 2, 256), (14, 2, 64))]
TINY = [Heads(4, 1, 128, mx.bfloat16)]


@contextmanager
def planned_by(elements: int, simdgroups: int) -> Iterator[None]:
    """Have what is planned meanwhile divided by these constants."""
    before = work_items.ELEMENTS_PER_LANE, work_items.SIMDGROUPS
    try:
        work_items.ELEMENTS_PER_LANE, work_items.SIMDGROUPS = elements, simdgroups
        work_items.decode_layout.cache_clear()
        yield
    finally:
        work_items.ELEMENTS_PER_LANE, work_items.SIMDGROUPS = before
        work_items.decode_layout.cache_clear()


def with_layouts(layers: Layers) -> dict[str, tuple[Contender, str]]:
    """A contender for each, which has planned already. The others' plans are in metadata of their own."""
    contenders, scattered = {}, layers.metadata["scattered"]
    for name, constants in LAYOUTS.items():
        layers.metadata[name] = AttentionMetadata(
            scattered.block_tables, scattered.context_lens, scattered.cu_seqlens_q
        )
        contender = layers.paged(name)
        with planned_by(*constants):
            contender.call(contender.queries, 0)
        contenders[name] = contender, "scattered"
    return contenders


def layouts(quick: bool) -> list[Row]:
    """One query for each sequence."""
    on_cpu = mx.default_device() == mx.cpu
    rows = []
    for heads, (batch, context) in product(TINY if quick or on_cpu else HEADS, [(1, 16384), (8, 4096)]):
        batch, context = (batch, 300) if quick or on_cpu else (batch, context)
        if (row := compare(Case(heads, batch, context), with_layouts, quick)) is not None:
            times = {name: row[f"{name}_us"] for name in LAYOUTS}
            best = min(times, key=lambda name: times[name])
            rows.append({"batch": batch, "context": context} | row | {"best": best})
    return rows


def threads(quick: bool) -> list[Row]:
    """Of a threadgroup, at most, of the same kernels. 0: there is no kernel here, or the launch did not fail."""
    rows = []
    for heads in TINY if quick else HEADS:
        layers = Layers(Case(heads, 1, 64), 1, quick=True)
        row = {"backend": layers.backend.name} | heads.as_columns()
        rows.append(row | {name: most_threads(layers, *constants) for name, constants in LAYOUTS.items()})
    return rows


def most_threads(layers: Layers, elements: int, simdgroups: int) -> int:
    backend, q, pool = layers.backend, layers.packed_queries, layers.pools[0]
    if not isinstance(backend, KernelBackend):
        return 0
    with planned_by(elements, simdgroups):
        plan = backend.plan_decode(np.array([64]), np.arange(2), None, shape_of(q, pool))
    plan = replace(plan, launch=plan.launch._replace(threads=2048))
    try:
        mx.eval(backend.run(q, pool, layers.tables["scattered"], plan, AttentionOptions(1.0)))
    except (ValueError, RuntimeError, AssertionError) as error:
        numbers = [int(number) for number in re.findall(r"\d+", str(error))]
        return next((number for number in numbers if number % 32 == 0 and 0 < number < 2048), 0)
    return 0


_HEADS = {"heads": ("heads", ""), "head_dim": ("dim", ""), "backend": ("backend", "")}
_CHOSEN = {name: f"{name}, chosen" if constants == CHOSEN else name for name, constants in LAYOUTS.items()}
PARTS = [
    Part(
        layouts,
        "decode by elements in a lane x simdgroups of a threadgroup (us)",
        _HEADS
        | {"batch": ("batch", ""), "context": ("context", ",")}
        | {f"{name}_us": (heading, ",.0f") for name, heading in _CHOSEN.items()}
        | {"best": ("best", ""), "spread": ("spread", ".0%"), "agrees": ("agrees", "")},
    ),
    Part(
        threads,
        "threads that a threadgroup of these kernels may have: fewer than 1,024 say that they take many registers",
        _HEADS | {name: (heading, ",") for name, heading in _CHOSEN.items()},
    ),
]


if __name__ == "__main__":
    report.main("decode_layouts.py", __doc__ or "", PARTS)
