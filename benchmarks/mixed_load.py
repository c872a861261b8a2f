"""What K and V take over a long mixed load: conversations, questions, long documents, as they come.

    python benchmarks/mixed_load.py [--minutes N] [--computed] [--quick] [--json FILE]   serve, print, write raw numbers
    python benchmarks/mixed_load.py --markdown FILE                                      the table of such a file

The same requests come to this engine and to mlx-lm's BatchGenerator with the prompt cache of its server, each in a
process of its own. The clock is that of steps, twenty to a second: what a machine does beside it changes nothing but
how long this takes. What is counted is what MLX's allocator holds after a step beside the weights of the bundled model.
benchmarks/plots.py draws it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import mlx.core as mx
import mlx_lm
import report
from comparison.workloads import mixed_lengths
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache
from report import Part, Row

from mlx_paged.models.loading import load, weight_bytes

MINUTES = 60.0
AT_ONCE = 16  # of both
STEP_S = 0.05  # of the clock
LOOK_S = 10.0
MEMORY = "16MB"  # of this engine's pool
_MEAN_GAP_S = 0.85  # from one request to the next, in the mean of quiet and busy minutes
_WAVE_S = 600.0  # from one busy time to the next
_CLIENTS, _SYSTEM, _MOST_HISTORY = 12, 300, 1200  # of conversations; tokens
_VOCABULARY = range(5, 1600)


class Asked(NamedTuple):
    """A request as it comes."""

    at_s: float
    kind: str
    client: int
    """Of a conversation, whose turns go on from each other; -1: of none."""
    num_prompt: int
    """Tokens of the prompt; of a turn those that are new."""
    num_output: int


def requests(seconds: float, mean_gap_s: float) -> list[Asked]:
    """Draw the requests of a load, always the same: half of them turns of conversations."""
    rng, lengths = random.Random(0), mixed_lengths(1000, 2, most=2048)
    asked: list[Asked] = []
    now = 0.0
    while True:
        busy = 0.5 + math.sin(math.pi * now / _WAVE_S) ** 2
        now += rng.expovariate(busy / mean_gap_s)
        if now >= seconds:
            return asked
        kind = rng.choices(["turn", "question", "document"], [50, 38, 12])[0]
        client, length = -1, rng.choice(lengths)
        if kind == "turn":
            client, length = rng.randrange(_CLIENTS), length._replace(prompt=rng.randint(20, 80))
        elif kind == "document":
            length = length._replace(prompt=rng.randint(1000, 1600), output=min(64, length.output))
        asked.append(Asked(now, kind, client, length.prompt, min(length.output, 400)))


class Paged:
    """This engine."""

    name = "mlx-paged"

    def __init__(self, model: Any) -> None:
        self._engine = LLM.from_model(model, kv_cache_memory=MEMORY, block_size=16, max_num_seqs=AT_ONCE).engine

    def add(self, prompt: list[int], num_tokens: int) -> int:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return self._engine.add_request(prompt, params)

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the numbers and the tokens of requests that have ended."""
        for output in self._engine.step():
            yield output.request_id, [*output.prompt_token_ids, *output.outputs[0].token_ids]  # type: ignore[union-attr]

    def running_bytes(self) -> float:
        """What the requests that run hold of the pool; the rest is free, or caches prefixes until it is needed."""
        stats = self._engine.stats()
        return stats.kv_bytes * (1 - stats.num_free_blocks / stats.num_blocks)


class MlxLm:
    """mlx-lm's batch, and the prompt cache that its server has."""

    name = "mlx-lm"

    def __init__(self, model: Any) -> None:
        self._computed = options().computed
        self._batch = BatchGenerator(model, completion_batch_size=AT_ONCE, prefill_batch_size=8, prefill_step_size=2048)
        self._prompts = LRUPromptCache(10)  # as many as by default

    def add(self, prompt: list[int], num_tokens: int) -> int:
        cache, rest = self._prompts.fetch_nearest_cache("model", prompt)
        known = prompt[: len(prompt) - len(rest)]
        return int(self._batch.insert([rest], [num_tokens], [cache], [known])[0])

    def step(self) -> Iterator[tuple[int, list[int]]]:
        _, responses = self._batch.next()
        for each in responses:
            if each.finish_reason is not None:
                if self._computed:
                    mx.eval([layer.state for layer in each.prompt_cache])
                self._prompts.insert_cache("model", each.all_tokens[:], each.prompt_cache, cache_type="assistant")
                yield each.uid, list(each.all_tokens)

    def running_bytes(self) -> float:
        """What the batch holds; the rest is kept prompts."""
        return float(self._batch.prompt_cache_nbytes)


def serve(name: str, seconds: float, look_s: float, mean_gap_s: float) -> list[Row]:
    """Serve the load for so long by the clock of steps, with a row for each `look_s`. What has not ended is left."""
    model = load(None, None).model
    system = next(kind for kind in (Paged, MlxLm) if kind.name == name)(model)
    mx.synchronize()
    weights = weight_bytes(model)
    beginning = [random.Random(1).choice(_VOCABULARY)] * _SYSTEM
    histories = dict.fromkeys(range(_CLIENTS), beginning)
    client_of: dict[int, int] = {}
    rng, waiting, rows = random.Random(2), requests(seconds, mean_gap_s)[::-1], list[Row]()
    held = running = 0.0
    num_done = 0
    now, next_look = 0.0, look_s
    while now < seconds:
        while waiting and waiting[-1].at_s <= now:
            asked = waiting.pop()
            new = [rng.choice(_VOCABULARY) for _ in range(asked.num_prompt)]
            number = system.add([*histories.get(asked.client, []), *new], asked.num_output)
            client_of[number] = asked.client
        for number, tokens in system.step() if client_of else ():
            client = client_of.pop(number)
            num_done += 1
            if client >= 0:
                histories[client] = tokens if len(tokens) < _MOST_HISTORY else beginning
        mx.synchronize()
        held, running = max(held, mx.get_active_memory() - weights), max(running, system.running_bytes())
        now += STEP_S
        if now >= next_look:
            row = {"system": name, "minute": round(next_look / 60, 4), "running": len(client_of)}
            rows.append(row | {"held_mb": held / 1e6, "running_mb": running / 1e6, "answered": num_done})
            next_look, held, running = next_look + look_s, 0.0, 0.0
    return rows


OPTIONS = argparse.ArgumentParser(add_help=False)
OPTIONS.add_argument("--computed", action="store_true", help="have the prompts that mlx-lm keeps computed at once")
OPTIONS.add_argument("--minutes", type=float, default=MINUTES, help=f"of the load; default: {MINUTES:g}")


def options() -> argparse.Namespace:
    """Return what the command line asks for, which other processes have, too."""
    return OPTIONS.parse_known_args()[0]


def mixed_load(quick: bool) -> list[Row]:
    """Serve by both at once."""
    sizes = (10.0, 1.0, 1.0) if quick else (60 * options().minutes, LOOK_S, _MEAN_GAP_S)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        runs = [processes.submit(serve, kind.name, *sizes) for kind in (Paged, MlxLm)]
        return [row for run in runs for row in run.result()]


COLUMNS = {
    "system": ("system", ""),
    "minute": ("minute", ".1f"),
    "running": ("requests", ",d"),
    "held_mb": ("held, MB", ",.1f"),
    "running_mb": ("of it by those", ",.1f"),
    "answered": ("answered", ",d"),
}
PARTS = [Part(mixed_load, "Memory held beside the weights, the most in each ten seconds", COLUMNS)]

if __name__ == "__main__":
    report.main("mixed_load.py", __doc__, PARTS, own_options=[OPTIONS], mlx_lm=mlx_lm.__version__)
