"""What blocks waste and what sharing them saves: simulations of requests over block managers, without a model.

Kwon et al. 2023 measured the same, with lengths of the same means.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import numpy as np
from report import Row

from mlx_paged import BlockManager

BLOCK_SIZE = 16
DATASETS = {"Alpaca": (19, 58), "ShareGPT": (161, 338)}  # mean tokens in and out, Kwon et al. 2023, figure 11
PAPER = {  # share of blocks saved, Kwon et al. 2023, section 6.3
    ("parallel sampling", "Alpaca"): "6-10%",
    ("parallel sampling", "ShareGPT"): "16-30%",
    ("beam search", "Alpaca"): "37.6-55.2%",
    ("beam search", "ShareGPT"): "44-66%",
}


def log_normal(rng: random.Random, mean: float, spread: float = 1.0) -> int:
    """A length of at least 1 token; spread: standard deviation of its logarithm."""
    return max(1, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)))


def waste(quick: bool) -> list[Row]:
    """Slots that are taken and hold no token, over all steps of all requests."""
    rng = random.Random(0)
    lengths = [tuple(log_normal(rng, mean) for mean in DATASETS["ShareGPT"]) for _ in range(200 if quick else 5000)]
    stored = np.concatenate([np.arange(prompt, prompt + output) for prompt, output in lengths])
    rows = [
        {"held_in": f"blocks of {size}", "waste": float(1 - stored.sum() / (-(-stored // size) * size).sum())}
        for size in (8, 16, 32, 64, 128)
    ]
    for row in rows:
        row["paper"] = "under 4%" if row["held_in"] == "blocks of 16" else ""
    reserved = stored[stored <= 2048]
    return [*rows, {"held_in": "2048 tokens reserved", "waste": float(1 - reserved.mean() / 2048), "paper": "62-80%"}]


# -- savings by sharing --------------------------------------------------------------------------------------


def savings(quick: bool) -> list[Row]:
    """Blocks that sharing saves, as a share of those that would be held without it, summed over all steps."""
    rows = []
    ways: dict[str, Callable[..., Iterator[tuple[int, int]]]] = {
        "parallel sampling": _parallel_sampling,
        "beam search": _beam_search,
    }
    for way, simulate in ways.items():
        for dataset, (prompt, output) in DATASETS.items():
            row: Row = {"sharing": way, "lengths": dataset}
            for count in (2, 4, 6):
                rng = random.Random(0)  # the same requests for every count
                requests = [(log_normal(rng, prompt), log_normal(rng, output)) for _ in range(4 if quick else 100)]
                held = np.sum([pair for sizes in requests for pair in simulate(rng, count, *sizes, output)], axis=0)
                row[f"of_{count}"] = float(1 - held[0] / held[1])
            rows.append(row | {"paper": PAPER[way, dataset]})
    for prefix in (64, 256, 1024):
        rows.append(_shared_prefix(prefix))
    return rows


def _used(manager: BlockManager) -> int:
    return manager.num_blocks - manager.num_free_blocks


def _unshared(manager: BlockManager) -> int:
    return sum(len(manager.block_table(seq_id)) for seq_id in manager.seq_ids)


def _parallel_sampling(
    rng: random.Random, count: int, prompt: int, output: int, mean_output: int
) -> Iterator[tuple[int, int]]:
    """After each step: blocks held with sharing, and without. Every sample has a length of its own."""
    outputs = [output, *(log_normal(rng, mean_output) for _ in range(count - 1))]
    manager = BlockManager(1 << 16, BLOCK_SIZE)
    manager.allocate(0, range(prompt))
    for sample in range(1, count):
        manager.fork(0, sample)
    for step in range(max(outputs)):
        for sample in manager.seq_ids:
            if outputs[int(str(sample))] == step:
                manager.free(sample)
            else:
                manager.append(sample, [step])
        yield _used(manager), _unshared(manager)


def _beam_search(rng: random.Random, width: int, prompt: int, output: int, _: int) -> Iterator[tuple[int, int]]:
    """Beam search over a model that says nothing: fresh random log-probabilities of 1000 tokens at every step."""
    draw = np.random.default_rng(rng.randrange(1 << 30))
    manager = BlockManager(1 << 16, BLOCK_SIZE)
    manager.allocate((0, 0), range(prompt))
    scores = np.zeros(1)
    for step in range(1, output + 1):
        logits = 2.0 * draw.standard_normal((len(scores), 1000))
        candidates = scores[:, None] + logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        best = np.argsort(candidates, axis=None)[::-1][:width]
        for beam, candidate in enumerate(best):
            manager.fork((step - 1, candidate // 1000), (step, beam))
        for beam in range(len(scores)):
            manager.free((step - 1, beam))
        for beam in range(width):
            manager.append((step, beam), [step])
        scores = candidates.ravel()[best]
        yield _used(manager), _unshared(manager)


def _shared_prefix(prefix: int) -> Row:
    """Requests behind one prompt of `prefix` tokens, when all of them run and have half of their output."""
    rng = random.Random(prefix)
    row: Row = {"sharing": f"prefix of {prefix} tokens", "lengths": "ShareGPT"}
    for count in (2, 4, 6):
        manager = BlockManager(1 << 16, BLOCK_SIZE)
        for request in range(count * 50):
            group, number = divmod(request, count)
            own = log_normal(rng, DATASETS["ShareGPT"][0]) + log_normal(rng, DATASETS["ShareGPT"][1]) // 2
            tokens = [group] * prefix + [1000 + number] * own
            manager.allocate(request, tokens)
            manager.mark_computed(request, len(tokens))
        row[f"of_{count}"] = 1 - _used(manager) / _unshared(manager)
    return row | {"paper": ""}
