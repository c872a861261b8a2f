"""What a server costs: `mlx-paged serve` against AsyncLLM in one process, and against mlx-lm's server.

    python benchmarks/server.py [--model FOLDER] [--quick] [--json FILE]   measure, print, write raw numbers
    python benchmarks/server.py --markdown FILE                            the tables of such a file
    python benchmarks/server.py --soak MINUTES [--model FOLDER]            a mix of requests, at how much memory

All answer the same conversations, so many at once, in turns; each has a process of its own, and the clients of the
servers have another. Where mlx_paged loads OpenBLAS by itself, mlx-lm's server gets it preloaded. With --llama-server
llama.cpp's server is one of them, which is given the same weights as a GGUF file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx_lm
import report
from comparison.gguf_file import gguf_in
from report import Part, Row
from served import InProcess, LlamaCppServer, Messages, MlxLm, Ours, Process, closing_all

from mlx_paged.models.hub import resolve

AT_ONCE = (1, 8, 32)
TOPICS = ("the sea", "a lost dog", "bread", "the moon", "an old clock", "winter", "a red boat", "two brothers")

parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--model", default=None, help="a folder or a name of Hugging Face; the bundled one, if not given")
parser.add_argument("--system", default="", help="what the conversations' system message says, if there is to be one")
parser.add_argument("--max-tokens", type=int, default=100, help="of an answer")
parser.add_argument("--repetitions", type=int, default=5, help="of each case; three times as many of one stream")
parser.add_argument("--soak", type=float, metavar="MINUTES", help="ask a server for so long, and look at its memory")
parser.add_argument("--llama-server", metavar="FILE", help="llama.cpp's server, to run beside")
options = parser.parse_known_args()[0] if __name__ == "__main__" else parser.parse_args([])


def throughput(quick: bool) -> list[Row]:
    """Tokens per second of so many streams at once, all there from the start."""
    model = str(resolve(options.model))
    repetitions, max_tokens = (1, 8) if quick else (options.repetitions, options.max_tokens)
    rows = []
    with TemporaryDirectory() as folder, closing_all([InProcess(model), Ours(model), MlxLm(model)]) as systems:
        if options.llama_server:
            weights = gguf_in(folder, Path(model), "server.py", options.llama_server)
            systems.append(LlamaCppServer(options.llama_server, weights))
        for system in systems:
            system.ask(conversations(-1, 2), 4)
        for at_once in AT_ONCE[::2] if quick else AT_ONCE:
            runs: dict[str, list[Row]] = {system.name: [] for system in systems}
            for number in range(repetitions if at_once > 1 else 3 * repetitions):
                first = number % len(systems)
                for system in systems[first:] + systems[:first]:
                    runs[system.name].append(measure(system, conversations(number, at_once), max_tokens))
            rows += [summary(at_once, name, runs) for name in runs]
    return rows


def conversations(number: int, count: int) -> list[Messages]:
    """Conversations that no prefix cache has seen in this run."""
    system = [{"role": "system", "content": options.system}] if options.system else []
    about = [
        f"Number {number}, {i} of {count}. Write a long story about {TOPICS[i % len(TOPICS)]}, with many details."
        for i in range(count)
    ]
    return [[*system, {"role": "user", "content": text}] for text in about]


def measure(system: Process, asked: list[Messages], max_tokens: int) -> Row:
    """Ask for all at once."""
    before = system.cpu_s()
    answers = system.ask(asked, max_tokens)
    after = system.cpu_s()
    num_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / max(answer.total_s for answer in answers),
        "first_ms": [1e3 * answer.first_s for answer in answers],
        "cpu_ms": 0.0 if before is None or after is None else 1e3 * (after - before) / num_tokens,
    }


def summary(at_once: int, name: str, runs: dict[str, list[Row]]) -> Row:
    """Medians of a system's runs, and of its ratios to AsyncLLM run by run."""
    first = sorted(ms for run in runs[name] for ms in run["first_ms"])

    def median(key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    ratios = [
        run["tokens_per_s"] / other["tokens_per_s"] for run, other in zip(runs[name], runs["AsyncLLM"], strict=True)
    ]
    return {
        "streams": at_once,
        "system": name,
        "tokens": median("tokens"),
        "tokens_per_s": median("tokens_per_s"),
        "of_async_llm": statistics.median(ratios),
        "first_ms_p50": statistics.median(first),
        "first_ms_p95": first[min(len(first) - 1, int(0.95 * len(first)))],
        "cpu_ms_per_token": median("cpu_ms"),
    }


PARTS = [
    Part(
        throughput,
        "So many streams at once",
        {
            "streams": ("streams", ",d"),
            "system": ("system", ""),
            "tokens": ("tokens", ",.0f"),
            "tokens_per_s": ("tokens/s", ",.1f"),
            "of_async_llm": ("of AsyncLLM", ".2f"),
            "first_ms_p50": ("first text p50, ms", ",.0f"),
            "first_ms_p95": ("p95", ",.0f"),
            "cpu_ms_per_token": ("CPU ms per token", ",.2f"),
        },
    )
]

if __name__ == "__main__":
    if options.soak is not None:
        import soak

        sys.exit(soak.run(str(resolve(options.model)), options.soak, options.system))
    load = f"{os.getloadavg()[0]:.1f}"
    name = "demo" if options.model is None else Path(options.model).name
    report.main(
        "server.py", __doc__, PARTS, own_options=[parser], mlx_lm=mlx_lm.__version__, model=name, load_at_start=load
    )
