"""How long a model's linear layers take for few rows, whole and in pieces: what models/few_rows.py rests on.

    python benchmarks/few_rows.py [--quick] [--json FILE]    measure, print, write raw numbers
    python benchmarks/few_rows.py --markdown FILE            the table of such a file

All linear layers and the output head of a model with 21 million random weights, so many that no cache holds them. Both
ways alternate; times are medians. The engine takes the faster one where it knows which that is: with OpenBLAS, its
AVX-512 kernels and one thread (`default` says whether this is such a process), up to 16 rows.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext

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
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = model.model.embed_tokens
    few_rows.patch_linear()
    few_rows._MOST_ROWS = max(NUM_ROWS)  # to see what is beyond
    table = []
    for rows in NUM_ROWS:
        inputs = {dim: mx.random.normal((rows, 1, dim)) for dim in {layer.weight.shape[1] for layer in [*layers, head]}}
        mx.eval(inputs)

        def compute(pieces: bool, inputs: dict[int, mx.array] = inputs) -> float:
            started = time.perf_counter()
            with few_rows.in_pieces() if pieces else nullcontext():
                outputs = [layer(inputs[layer.weight.shape[1]]) for layer in layers]
                outputs.append(head.as_linear(inputs[head.weight.shape[1]]))
            mx.eval(outputs)
            return 1e3 * (time.perf_counter() - started)

        times = [(compute(False), compute(True)) for _ in range(1 if quick else 60)]
        whole, pieces = (statistics.median(column) for column in zip(*times, strict=True))
        default = few_rows.pieces_are_faster()
        table.append(
            {"rows": rows, "whole_ms": whole, "pieces_ms": pieces, "ratio": pieces / whole, "default": default}
        )
    return table


COLUMNS = {
    "rows": ("rows", ",d"),
    "whole_ms": ("whole, ms", ",.1f"),
    "pieces_ms": ("in pieces, ms", ",.1f"),
    "ratio": ("ratio", ".2f"),
}

if __name__ == "__main__":
    report.main("few_rows.py", __doc__, [Part(linear_layers, "Linear layers for few rows", COLUMNS)])
