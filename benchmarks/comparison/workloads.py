"""The workloads that engines are compared on: named, seeded, the same requests for everybody.

A workload is one case or several; a case has requests, which all arrive at once, and the systems that serve them. What
a system is, and how it is run, is in systems.py: here there are numbers only.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_paged.tools.cache_cost import TYPICAL_OUTPUT, TYPICAL_PROMPT

CONCURRENCY = 16  # requests served at once, unless memory is what decides
BLOCK_SIZE = 16
_GROWTH = 256  # tokens by which mlx-lm's caches grow
_SPREAD = 1.0  # standard deviation of the logarithm of a mixed length


class Task(NamedTuple):
    """A request."""

    prompt: list[int]
    """Token ids."""
    num_tokens: int
    """How many tokens it gets; it never ends before."""
    num_samples: int = 1
    """Samples of the prompt, drawn at temperature 1 if there are several."""
    beam_width: int = 0
    """Of a beam search; 0: it is none."""

    @property
    def longest(self) -> int:
        """Tokens of prompt and output of one sample."""
        return len(self.prompt) + self.num_tokens


def one_by_one(tasks: Sequence[Task]) -> list[Task]:
    """Repeat each task for each of its samples, for who serves these as requests of their own."""
    return [task for task in tasks for _ in range(task.num_samples)]


class Length(NamedTuple):
    """Tokens of a task."""

    prompt: int
    output: int


@dataclass(frozen=True)
class ReservedRow:
    """Room for the longest request that could come, in each row."""

    num_tokens: int

    def __call__(self, lengths: Sequence[int]) -> int:
        return self.num_tokens


@dataclass(frozen=True)
class Paged:
    """This engine."""

    name: str = "mlx-paged"
    config: dict[str, Any] = field(default_factory=dict)
    """Of its EngineConfig; without `num_kv_blocks` its pool is what the case takes at its peak."""
    as_separate_requests: bool = False
    """Whether samples of a prompt are requests of their own."""
    scattered: bool = False
    """Whether free blocks are in random order."""
    row: Callable[[Sequence[int]], int] | None = None
    """Where it stands for an engine without blocks: the tokens that each row has room for, given the lengths of all."""


@dataclass(frozen=True)
class MlxLm:
    """mlx-lm's BatchGenerator."""

    name: str = "mlx-lm"
    concurrency: int = CONCURRENCY
    """Requests that decode at a time; it may be computing up to 8 further prompts beside them."""
    shared_prefix: int = 0
    """Tokens of each prompt that its prompt cache has."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's server."""

    name: str = "llama.cpp"
    concurrency: int = CONCURRENCY
    """Requests that it has a slot for."""


System = Paged | MlxLm | LlamaCpp


class Case(NamedTuple):
    """Requests and who serves them."""

    workload: str
    label: str
    lengths: list[Length]
    """Of the tasks."""
    systems: list[System]
    """The first is what the others are measured by."""
    shared: int = 0
    """Tokens that all prompts begin with; the rest of a prompt is its own, and other in every repetition."""
    num_samples: int = 1
    beam_width: int = 0

    def tasks(self, repetition: int, text: Sequence[int]) -> list[Task]:
        """Make the tasks of a repetition, the same each time that it is asked for, of passages of a text's tokens."""
        draw = random.Random(f"{self.workload} {self.label} {repetition}")

        def passage(length: int) -> list[int]:
            start = draw.randrange(len(text))
            return [text[i % len(text)] for i in range(start, start + length)]

        shared = passage(self.shared)
        return [
            Task(shared + passage(length.prompt - self.shared), length.output, self.num_samples, self.beam_width)
            for length in self.lengths
        ]

    @property
    def longest(self) -> int:
        """The most tokens of prompt and output together."""
        return max(map(sum, self.lengths))

    def beside_llama_cpp(self) -> Case:
        """Add llama.cpp to the systems, if mlx-lm is one: it serves as many requests at once."""
        peers = [LlamaCpp(concurrency=system.concurrency) for system in self.systems if isinstance(system, MlxLm)]
        return self._replace(systems=[*self.systems, *peers[:1]])


class Workload(NamedTuple):
    """A named set of cases."""

    name: str
    about: str
    cases: Callable[[int], Iterator[Case]]
    """Makes them for a scale, by which numbers of tokens are divided: 1 is what is claimed, more is to try it out."""


# -- W1, W2: equal and mixed lengths -----------------------------------------------------------------------------


def uniform(scale: int) -> Iterator[Case]:
    tokens = 128 // scale
    yield Case("W1", f"{tokens} in, {tokens} out", [Length(tokens, tokens)] * (2 * CONCURRENCY), [MlxLm(), paged()])


def mixed(scale: int) -> Iterator[Case]:
    yield Case("W2", mixed_label(scale), mixed_lengths(4 * CONCURRENCY, scale), [MlxLm(), paged()])


def mixed_label(scale: int) -> str:
    return f"means of {TYPICAL_PROMPT // scale} in, {TYPICAL_OUTPUT // scale} out"


def mixed_lengths(count: int, scale: int, most: int = 2048) -> list[Length]:
    """Log-normal, with the means of ShareGPT's conversations; at most `most` tokens of prompt and output together."""
    draw = random.Random(0)

    def tokens(mean: int) -> int:
        return max(2, round(draw.lognormvariate(math.log(mean / scale) - _SPREAD**2 / 2, _SPREAD)))

    lengths = []
    for _ in range(count):
        prompt = min(tokens(TYPICAL_PROMPT), 3 * most // scale // 4)
        lengths.append(Length(prompt, min(tokens(TYPICAL_OUTPUT), most // scale - prompt)))
    return lengths


def paged(name: str = "mlx-paged", **config: Any) -> Paged:
    """This engine, as many sequences at once as mlx-lm serves."""
    return Paged(name, {"max_num_seqs": CONCURRENCY, "block_size": BLOCK_SIZE} | config)


# -- W3: a fixed budget of memory --------------------------------------------------------------------------------


def fixed_budget(scale: int) -> Iterator[Case]:
    """Memory for the K and V of four requests of the greatest length: how many run in it?"""
    most = 2048 // scale
    budget = 4 * most
    lengths = mixed_lengths(2 * CONCURRENCY, scale)
    padded = max_concurrency(lengths, budget)
    blocks = {"num_kv_blocks": budget // BLOCK_SIZE, "block_size": BLOCK_SIZE}
    systems: list[System] = [
        Paged(f"{most:,} tokens reserved", blocks | {"max_num_seqs": budget // most}, row=ReservedRow(most)),
        Paged("padded to the longest", blocks | {"max_num_seqs": padded}, row=_padded_row),
        MlxLm("mlx-lm", padded),
        Paged("mlx-paged", blocks | {"max_num_seqs": len(lengths)}),
    ]
    yield Case("W3", f"room for {budget:,} tokens", lengths, systems)


def _padded_row(lengths: Sequence[int]) -> int:
    """The tokens that mlx-lm's batch gives each row."""
    return -(-max(lengths) // _GROWTH) * _GROWTH


def max_concurrency(lengths: Sequence[Length], budget: int) -> int:
    """The most requests that mlx-lm's batch may serve at once without ever taking more than `budget` tokens."""
    return max((count for count in range(1, len(lengths) + 1) if padded_peak(lengths, count) <= budget), default=1)


def padded_peak(lengths: Sequence[Length], concurrency: int) -> int:
    """The most tokens that a batch takes in which every row is as long as the longest, a multiple of 256."""
    running: list[tuple[int, Length, int]] = []  # a heap: the step at which it ends, its length, and when it started
    peak = step = 0
    waiting = list(reversed(lengths))
    while waiting or running:
        while waiting and len(running) < concurrency:
            length = waiting.pop()
            heapq.heappush(running, (step + length.output, length, step))
        step = running[0][0]
        row = _padded_row([length.prompt + step - started for _, length, started in running])
        peak = max(peak, len(running) * row)
        heapq.heappop(running)
    return peak


# -- W4: shared prefixes -----------------------------------------------------------------------------------------


def shared_prefix(scale: int) -> Iterator[Case]:
    """Prefixes as in Kwon et al. 2023 (one and five examples of a translation), and a long one; then one not shared."""
    own, output = 64 // scale, 64 // scale
    for prefix in (80 // scale, 341 // scale, 2048 // scale):
        lengths = [Length(prefix + own, output)] * CONCURRENCY
        systems: list[System] = [
            MlxLm(),
            MlxLm("mlx-lm, prompt cache", shared_prefix=prefix),
            paged("mlx-paged, no prefix cache", prefix_caching=False),
            paged(),
        ]
        yield Case("W4", f"{prefix:,} shared", lengths, systems, shared=prefix)
    yield Case("W4", f"{prefix:,}, none shared", lengths, [MlxLm(), *systems[2:]])


# -- W5: several samples, beams ----------------------------------------------------------------------------------


def samples_and_beams(scale: int) -> Iterator[Case]:
    lengths = [Length(512 // scale, 128 // scale)] * 4
    for count in (2, 4, 6):
        seats = {"max_num_seqs": len(lengths) * count}
        systems: list[System] = [
            MlxLm(f"mlx-lm, {count} requests", seats["max_num_seqs"]),
            Paged(
                f"mlx-paged, {count} requests",
                {**seats, "prefix_caching": False},
                as_separate_requests=True,
            ),
            Paged(f"mlx-paged, {count} requests, prefix cache", seats, as_separate_requests=True),
            Paged(f"mlx-paged, n={count}", seats),
        ]
        yield Case("W5", f"{count} samples", lengths, systems, num_samples=count)
    for width in (2, 4, 6):
        searches: list[System] = [Paged("mlx-paged", {"max_num_seqs": len(lengths) * width})]
        yield Case("W5", f"{width} beams", lengths, searches, beam_width=width)


# -- W6: long contexts, over blocks in order and not -------------------------------------------------------------


def long_context(scale: int) -> Iterator[Case]:
    """As many tokens at once in all cases; more of one context would take a CPU an hour."""
    for context, count in ((4096, 4), (16384, 1)) if scale == 1 else ((4096 // scale, 4),):
        config = {"max_num_seqs": count, "block_size": BLOCK_SIZE, "allocator": "fifo"}
        systems: list[System] = [
            MlxLm(concurrency=count),
            Paged("mlx-paged, blocks in order", config),
            Paged("mlx-paged, scattered", config, scattered=True),
        ]
        if scale == 1:  # what is made smaller may have heads too small for codes
            systems.append(Paged("mlx-paged, int8 blocks", config | {"kv_cache_dtype": "int8"}))
        yield Case("W6", f"{count} x {context:,} in", [Length(context, max(2, 64 // scale))] * count, systems)


# -- W7: more than fits ------------------------------------------------------------------------------------------


def overload(scale: int) -> Iterator[Case]:
    """Half of the memory that its requests would take: some are preempted, and go on later."""
    lengths = mixed_lengths(2 * CONCURRENCY, scale)
    by_size = sorted(map(sum, lengths), reverse=True)
    room = sum(by_size[:CONCURRENCY]) // 2 // BLOCK_SIZE
    room = max(room, by_size[0] // BLOCK_SIZE + 2)
    systems: list[System] = [
        paged("mlx-paged, all of it"),
        paged("mlx-paged, computed again", num_kv_blocks=room),
        paged("mlx-paged, swapped", num_kv_blocks=room, swap_space="1GB"),
    ]
    yield Case("W7", "half the memory", lengths, systems)


# -- W8: block sizes ---------------------------------------------------------------------------------------------


def block_sizes(scale: int) -> Iterator[Case]:
    systems: list[System] = [paged(f"blocks of {size}", block_size=size) for size in (16, 8, 32, 64, 128)]
    yield Case("W8", mixed_label(scale), mixed_lengths(CONCURRENCY, scale), systems)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "equal lengths", uniform),
        Workload("W2", "mixed lengths, log-normal with ShareGPT's means", mixed),
        Workload("W3", "a fixed budget of KV memory", fixed_budget),
        Workload("W4", "a shared prefix", shared_prefix),
        Workload("W5", "several samples, and beams", samples_and_beams),
        Workload("W6", "long contexts, over consecutive and scattered blocks", long_context),
        Workload("W7", "more requests than fit: preemption", overload),
        Workload("W8", "block sizes", block_sizes),
    )
}
