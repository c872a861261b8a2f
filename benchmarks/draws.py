"""How long it takes to draw a step's tokens on this device, by the kernel for it and by plain operations.

    python benchmarks/draws.py --json draws.json    measure, print a table, write the raw numbers

Rows of a vocabulary of 151,936 tokens, whose scores are normal with a deviation of 3, as bfloat16 has them, all asking
for the same. Measured as attention.py does. `passes` is the time in units of half of what a copy of the scores takes.
On a CPU, where there is no kernel, rows are few. **It has not been run on a GPU.**
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import product

import mlx.core as mx
import numpy as np
import report
from attention_layers import ON_CPU, Contender, measure
from report import Part, Row

from mlx_paged.sampling.draw_kernel import KernelRows, choose_kind
from mlx_paged.sampling.draws import RandomRows
from mlx_paged.sampling.sampler import PARAMETERS

ASKED: dict[str, dict[str, float]] = {
    "temperature 1": {},
    "min_p 0.05": {"log_min_p": math.log(0.05)},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "temperature 0.6, top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
}


def compare(asked: str, num_rows: int, vocab_size: int, quick: bool) -> list[Row]:
    """One step in which all rows ask for the same."""
    params = np.zeros(num_rows, PARAMETERS)
    values = {"temperature": 1, "log_min_p": -np.inf, "top_p": 1, "top_k": vocab_size} | ASKED[asked]
    for name, value in values.items():
        params[name] = value
    scores = (mx.random.normal((num_rows, vocab_size)) * 3).astype(mx.bfloat16).astype(mx.float32)
    mx.eval(scores)
    kind, positions = choose_kind(), np.arange(num_rows)
    ways = {"plain": partial(RandomRows.gather(params, vocab_size).draw, positions=positions)}
    if kind is not None:
        ways[kind] = partial(KernelRows.gather(kind, params, vocab_size).draw, positions=positions)
    drawn = {name: np.array(way(scores)) for name, way in ways.items()}
    # Each takes the scores once the tokens before are drawn.
    calls = {
        name: Contender(scores, lambda x, _, way=way: mx.depends([x], [way(x)])[0], 1) for name, way in ways.items()
    }
    seconds = measure(calls | {"copy": Contender(scores, lambda x, _: x + 1, 1)}, quick)
    return [
        {
            "rows": num_rows,
            "asked": asked,
            "way": name,
            "microseconds": 1e6 * seconds[name],
            "passes": 2 * seconds[name] / seconds["copy"],
            "same": f"{(drawn[name] == drawn['plain']).sum()} of {num_rows}",
            "spread": seconds["spread"],
        }
        for name in ways
    ]


def draws(quick: bool) -> Iterator[Row]:
    """One sequence, and batches."""
    sizes = [(2, 1000)] if quick else [(rows, 151_936) for rows in ((1, 4) if ON_CPU else (1, 8, 64))]
    for size, asked in product(sizes, ASKED):
        yield from compare(asked, *size, quick)


COLUMNS = {
    "rows": ("rows", ""),
    "asked": ("asked for", ""),
    "way": ("by", ""),
    "microseconds": ("us", ",.0f"),
    "passes": ("passes", ",.1f"),
    "same": ("same tokens", ""),
    "spread": ("spread", ".0%"),
}
DRAWS = Part(
    draws, "Draws of a step's tokens (us)", COLUMNS, "Does the kernel that draws tokens beat plain operations?", 25
)
PARTS = [DRAWS]

if __name__ == "__main__":
    report.main("draws.py", __doc__ or "", PARTS)
