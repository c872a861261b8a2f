"""Which division of decode among simdgroups is the fastest on this Mac: what only hardware decides, swept.

    python benchmarks/decode_layouts.py --json layouts.json    measure, print tables, write the raw numbers

Two constants of mlx_paged/attention/work_items.py are tried against each other, in bfloat16: ELEMENTS_PER_LANE, how
much of queries and output a lane keeps (8, 16 or 32, that is, query heads of 256, 512 or 1,024 elements to a simdgroup:
more reads of a key by neighbours, or more registers), and SIMDGROUPS, of a threadgroup, which also is the fewest tiles
of 32 keys to a part of a context. A column is named for both; those that are chosen today are `chosen`. Times are taken
as in attention.py, and results compared as there.

The second table has the threads that Metal allows in a threadgroup of these kernels and of all others, which says how
many registers each takes: 1,024 if few, 384 to 512 if about 100 to 128. It is learnt by launches of 2,048 threads,
which must fail: the message has the number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import report
from attention_layers import BLOCK_SIZE, Case, Contender, Heads, Layers, compare
from report import Part, Row

from mlx_paged import kernels
from mlx_paged.attention import work_items
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import KernelBackend, shape_of
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.sampling import draw_kernel
from mlx_paged.sampling.draw_kernel import draw_tokens

CHOSEN = work_items.ELEMENTS_PER_LANE, work_items.SIMDGROUPS
LAYOUTS = {f"{elements}x{simdgroups}": (elements, simdgroups) for elements, simdgroups in product((8, 16, 32), (4, 8))}
HEADS = [Heads(*sizes, mx.bfloat16) for sizes in ((32, 8, 128), (24, 4, 256), (16, 2, 256), (14, 2, 64))]
TINY = Heads(4, 1, 128, mx.bfloat16)
TOO_MANY = 2048  # threads of a threadgroup, for any GPU
NOTHING: Row = {"given": 0, "most": 0}


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


def layouts(quick: bool) -> Iterator[Row]:
    """One query for each sequence."""
    on_cpu = mx.default_device() == mx.cpu
    cases = [(heads, 1, 16384) for heads in HEADS] + [(HEADS[0], 8, 4096)]
    for heads, batch, context in [(TINY, 1, 300)] if quick or on_cpu else cases:
        if (row := compare(Case(heads, batch, context), with_layouts, quick)) is not None:
            times = {name: row[f"{name}_us"] for name in LAYOUTS}
            best = min(times, key=lambda name: times[name])
            yield {"batch": batch, "context": context} | row | {"best": best}


def threads(quick: bool) -> Iterator[Row]:
    """Of a threadgroup, at most. 0: there is no kernel here, or the launch did not fail."""
    for heads in [TINY] if quick else [*HEADS, Heads(8, 1, 512, mx.bfloat16)]:
        layers = Layers(Case(heads, 1, 64), 1, quick=True)
        of_heads = {"backend": layers.backend.name} | heads.as_columns()
        for name, constants in list(LAYOUTS.items())[: 1 if quick else None]:
            with planned_by(*constants):
                found = most_threads(layers.backend, partial(decode_once, layers))
            yield of_heads | {"kernel": f"paged_decode, {name}"} | found.get("paged_decode", NOTHING)
        found = most_threads(layers.backend, partial(fill_and_prefill, layers))
        for name in ("paged_write", "paged_prefill", "paged_merge"):
            yield of_heads | {"kernel": name} | found.get(name, NOTHING)
    latents = LayerSpec(1, 576, 512, mx.bfloat16, value_in_key=True)
    backend = choose_backend(latents, 16, BLOCK_SIZE)
    found = most_threads(backend, attend_to_latents)
    row: Row = {"backend": backend.name, "heads": "16/1", "head_dim": 576, "dtype": "bfloat16"}
    yield row | {"kernel": "paged_latent"} | found.get("paged_latent", NOTHING)
    kind = next((kind for kind in kernels.TITLES if kernels.is_available(kind)), None)
    found = most_threads(backend, lambda _: draw_tokens(str(kind), mx.zeros((2, 1000)), np.zeros((2, 8), np.uint32)))
    row = {"backend": kind or "none", "heads": "-", "head_dim": 0, "dtype": "float32"}
    yield row | {"kernel": "draw_tokens"} | found.get("draw_tokens", NOTHING)


def decode_once(layers: Layers, backend: KernelBackend) -> mx.array:
    metadata = layers.metadata["scattered"]
    plan = backend.plan_decode(
        metadata.context_lens, metadata.cu_seqlens_q, None, shape_of(layers.packed_queries, layers.pools[0])
    )
    return backend.run(layers.packed_queries, layers.pools[0], metadata.block_tables, plan, AttentionOptions(1.0))


def fill_and_prefill(layers: Layers, backend: KernelBackend) -> mx.array:
    """Write a block, and attend to it with as many queries, then join the parts of one."""
    heads, slots = layers.case.heads, mx.arange(BLOCK_SIZE, dtype=mx.int32)
    rows = mx.zeros((BLOCK_SIZE, heads.num_kv_heads, heads.head_dim), heads.dtype)
    starts, lengths = np.array([0, BLOCK_SIZE], np.int32), np.array([64], np.int32)
    block_tables = layers.tables["scattered"]
    metadata = AttentionMetadata(block_tables, lengths, starts, None, 0 * slots, slots)
    pool = LayerPool(dict(layers.pools[0].arrays))
    backend.write(pool, metadata, rows, rows)
    q = mx.zeros((BLOCK_SIZE, heads.num_heads, heads.head_dim), heads.dtype)
    plan = backend.plan_prefill(lengths, starts, None, shape_of(q, pool))
    out = backend.run(q, pool, block_tables, plan, AttentionOptions(1.0))
    merge = backend.prepare_merge(q[:2], heads.head_dim, mx.array([0, 2, 4, 4, 4, 4, 4, 4], mx.int32))
    merged = merge([mx.zeros((4, heads.num_heads, heads.head_dim), heads.dtype), mx.zeros((4, heads.num_heads))])
    return out.sum() + merged.sum()


def attend_to_latents(backend: KernelBackend) -> mx.array:
    pool = LayerPool({"k": mx.zeros((4, BLOCK_SIZE, 1, 576), mx.bfloat16)}, latent_dim=512)
    q = mx.zeros((1, 16, 576), mx.bfloat16)
    metadata = AttentionMetadata(mx.arange(8, dtype=mx.int32)[None] % 4, np.array([64], np.int32), np.arange(2))
    return backend.attend(q, pool, metadata, AttentionOptions(1.0))


def most_threads(backend: Any, use: Callable[[Any], mx.array]) -> dict[str, Row]:
    """By the name of each kernel that `use` calls, how many threads a threadgroup is given, and may have."""
    found: dict[str, Row] = {}
    make = kernels.make_kernel

    def make_kernel(*arguments: Any) -> Callable[..., list[mx.array]]:
        """Make what is launched with too many threads, and then as it should be."""
        kernel = make(*arguments)
        name = arguments[1][-1].split(".")[0]

        def call(**settings: Any) -> list[mx.array]:
            width, height, _ = settings["threadgroup"]
            most = 0
            try:
                mx.eval(kernel(**settings | {"grid": (TOO_MANY, 1, 1), "threadgroup": (TOO_MANY, 1, 1)}))
            except (ValueError, RuntimeError, AssertionError) as error:
                numbers = [int(number) for number in re.findall(r"\d+", str(error))]
                most = next((number for number in numbers if number % 32 == 0 and 0 < number < TOO_MANY), 0)
            found[name] = {"given": width * height, "most": most}
            return kernel(**settings)

        return call

    if isinstance(backend, KernelBackend):
        with (
            mock.patch.object(kernels, "make_kernel", make_kernel),
            mock.patch.object(draw_kernel, "make_kernel", make_kernel),
        ):
            mx.eval(use(backend))
    return found


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
        "How many elements should a lane keep, and are teams of 4 or of 8 simdgroups faster?",
        60,
    ),
    Part(
        threads,
        "threads that a threadgroup of a kernel may have: fewer than 1,024 say that it takes many registers",
        _HEADS
        | {"dtype": ("dtype", ""), "kernel": ("kernel", "")}
        | {"given": ("is given", ","), "most": ("may have", ",")},
        "How many registers does each kernel take?",
        30,
    ),
]


if __name__ == "__main__":
    report.main("decode_layouts.py", __doc__ or "", PARTS)
