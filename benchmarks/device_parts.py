"""What on_a_mac.py and on_a_gpu.py ask a device at first: its tests, whether kernels can write, what a prefix costs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import mlx.core as mx
from limited import run_limited
from report import Part, Row

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.found_at_load import ASSUMED, least_members
from mlx_paged.attention.kernel_backend import KernelBackend
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.runner.layer_kinds import LayerKind
from mlx_paged.runner.prepare_kernels import is_gpu
from mlx_paged.runner.sharing_costs import measure_costs
from mlx_paged.runner.trial_writes import failure_of_write

ROOT = Path(__file__).parents[1]
BLOCK_SIZE = 16
HEADS = ((32, 8, 128), (24, 4, 256), (14, 2, 64), (8, 1, 512))
LAYERS = [(LayerSpec(kv_heads, dim, dim, mx.bfloat16), num_heads) for num_heads, kv_heads, dim in HEADS]


def run_tests(files: Sequence[str], but_not: str, limit_s: float, **variables: str) -> Row:
    """What the tests in these files came to in that time, without those whose names have the word `but_not`."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-ra", "-k", f"not {but_not}"]
    command += [str(ROOT / "tests" / file) for file in files]
    ended = run_limited(command, limit_s, {"PYTHONPATH": path} | variables)
    counts = re.findall(
        r"^=* ?(.*\d+ (?:passed|failed|skipped|errors?|deselected)\b.*? in [\d.]+s.*?) ?=*$", ended.output, re.M
    )
    return {"result": f"{ended.word}: {counts[-1] if counts else 'no test has ended'}", "log": ended.output[-20_000:]}


def writer(quick: bool) -> Iterator[Row]:
    """Tried as an engine does at load, for layers of several sizes and dtypes."""
    for (layer, num_heads), dtype in product(LAYERS[:1] if quick else LAYERS, (mx.bfloat16, mx.float32)):
        if dtype == mx.float32 and layer.key_dim > 256:
            continue
        layer = layer._replace(dtype=dtype)
        backend, result = choose_backend(layer, num_heads, BLOCK_SIZE), "no kernel here"
        if isinstance(backend, KernelBackend):
            failure = failure_of_write(backend, layer, BLOCK_SIZE)
            result = "yes" if failure is None else f"no: {failure}"
        kind = str(dtype).removeprefix("mlx.core.")
        heads = f"{layer.num_kv_heads} x {layer.key_dim}"
        yield {"heads": heads, "dtype": kind, "backend": backend.name, "in_place": result}


def sharing_costs(quick: bool) -> Iterator[Row]:
    """As an engine measures them at load; where there is no GPU, those that it assumes."""
    for layer, num_heads in LAYERS[:1] if quick else LAYERS:
        backend = choose_backend(layer, num_heads, BLOCK_SIZE)
        if not isinstance(backend, KernelBackend):
            continue
        kind = LayerKind(backend, layer, num_heads, AttentionOptions(layer.key_dim**-0.5))
        costs = measure_costs(kind, BLOCK_SIZE) if is_gpu() else ASSUMED
        row: Row = {"heads": f"{num_heads}/{layer.num_kv_heads} x {layer.key_dim}", "unit": costs.unit}
        row |= {"decode_key": costs.decode_key, "tile_key": costs.tile_key, "start": costs.start}
        tile = backend.tiles(kind.shape).tile
        for length in (1024, 8192):
            row[f"least_{length}"] = least_members(costs, length, kind.shape, tile) or "-"
        yield row


WRITER = Part(
    writer,
    "Kernels that write into pools",
    {"heads": ("KV heads", ""), "dtype": ("dtype", ""), "backend": ("backend", ""), "in_place": ("in place", "")},
    "Can a kernel write into what it is given?",
    20,
)
SHARING = Part(
    sharing_costs,
    "Shared prefixes: what a key takes, read by each sequence and for a tile of them, and for how many it is read once",
    {
        "heads": ("heads", ""),
        "unit": ("in", ""),
        "decode_key": ("each", ".5f"),
        "tile_key": ("a tile", ".5f"),
        "start": ("start", ",.0f"),
        "least_1024": ("of 1,024 tokens", ""),
        "least_8192": ("of 8,192", ""),
    },
    "Which constants of shared prefixes are measured at load?",
    20,
)
