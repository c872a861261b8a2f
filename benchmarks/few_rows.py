"""How long a model's linear layers take for few rows, whole and in pieces: what models/few_rows.py rests on.

    python benchmarks/few_rows.py [--quick] [--json FILE]    measure, print, write raw numbers
    python benchmarks/few_rows.py --markdown FILE            the table of such a file

All linear layers and the output head of a model with 21 million random weights, so many that no cache holds them. Both
ways alternate; times are medians. The engine takes the faster one where it knows which that is: with OpenBLAS, its
AVX-512 kernels and one thread (`default` in the JSON says whether this is such a process), up to 16 rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn
import report
from report import Part, Row

from mlx_paged.models import few_rows
from mlx_paged.random_models import make_random_model

NUM_ROWS = (1, 2, 4, 8, 16, 24)


def linear_layers(quick: bool) -> list[Row]:
    """Milliseconds for all of them together."""
    model = make_random_model("qwen2-20m", "float32").model
    head = model.model.embed_tokens
    layers = [(layer, layer.weight.shape[1]) for layer in model.modules() if isinstance(layer, nn.Linear)]
    layers.append((head.as_linear, head.weight.shape[1]))
    few_rows.patch_linear()
    few_rows._MOST_ROWS = max(NUM_ROWS)  # to see what is beyond
    table = []
    for rows in NUM_ROWS:
        inputs = {dim: mx.random.normal((rows, 1, dim)) for _, dim in layers}
        mx.eval(inputs)
        calls = [(layer, inputs[dim]) for layer, dim in layers]
        times = [(_timed(calls, nullcontext()), _timed(calls, few_rows.in_pieces())) for _ in range(1 if quick else 60)]
        whole, pieces = (statistics.median(column) for column in zip(*times, strict=True))
        default = few_rows.pieces_are_faster()
        table.append(
            {"rows": rows, "whole_ms": whole, "pieces_ms": pieces, "ratio": pieces / whole, "default": default}
        )
    return table


def _timed(
    calls: Sequence[tuple[Callable[[mx.array], mx.array], mx.array]], way: AbstractContextManager[None]
) -> float:
    """Milliseconds for all calls, their graph included."""
    started = time.perf_counter()
    with way:
        outputs = [layer(x) for layer, x in calls]
    mx.eval(outputs)
    return 1e3 * (time.perf_counter() - started)


COLUMNS = {
    "rows": ("rows", ",d"),
    "whole_ms": ("whole, ms", ",.1f"),
    "pieces_ms": ("in pieces, ms", ",.1f"),
    "ratio": ("ratio", ".2f"),
}

if __name__ == "__main__":
    report.main("few_rows.py", __doc__, [Part(linear_layers, "Linear layers for few rows", COLUMNS)])
