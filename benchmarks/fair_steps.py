"""How long a stream waits for its next token while a long prompt is computed: this server, and mlx-lm's.

    python benchmarks/fair_steps.py [--quick] [--json FILE]      random weights, a prompt of 32,000 tokens
    python benchmarks/fair_steps.py --model FOLDER --prompt 7500   a model, too
    python benchmarks/fair_steps.py --markdown FILE              the tables of such a file

Each server is a process of its own, with its own defaults, and is asked over the loopback in turns: a stream of
completions runs, a long prompt comes, which no server has seen, and when its first token is there the stream's times
are looked at. Its gaps are those between the texts that a client gets, from the last one before the prompt was sent to
the first one after that prompt's first token. Numbers are medians of the repetitions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import mlx_lm
import report
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2
from report import Part, Row

from mlx_paged.distributed.launch import free_ports
from mlx_paged.models.hub import DEMO_FOLDER
from mlx_paged.tools.report import Columns

REPETITIONS, LONG_PROMPT, QUICK_PROMPT = 3, 32_000, 600
NUM_BEFORE = 30  # tokens of the stream before the prompt comes
# A small model, since attention to 32,000 tokens takes a CPU long; otherwise as the demo model. Not of one layer, which
# mlx-lm would not run: keys and values are all that it needs of a prompt.
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}
SHAPE |= {"max_position_embeddings": 65536}
WORDS = ("the", "a", "red", "box", "key", "man", "dog", "house", "saw", "went", "home", "and", "then", "in", "on")
PAGED = [sys.executable, "-m", "mlx_paged", "serve", "--log-level", "error"]
SYSTEMS = {
    "mlx-paged": PAGED,
    "mlx-paged --max-step-ms 0": [*PAGED, "--max-step-ms", "0"],
    "mlx_lm.server": [sys.executable, "-m", "mlx_lm", "server", "--log-level", "ERROR"],
}
COLUMNS: Columns = {
    "system": ("server", ""),
    "prompt_tokens": ("prompt", ",d"),
    "longest_gap_ms": ("longest gap, ms", ",.0f"),
    "gap_p95_ms": ("95th percentile", ",.0f"),
    "gap_alone_ms": ("median without the prompt", ",.1f"),
    "tokens_per_s": ("stream's tokens/s meanwhile", ",.1f"),
    "first_token_s": ("prompt's first token, s", ",.1f"),
}


def write_random_model(folder: Path) -> None:
    """Write a model of the demo model's form and tokenizer, with random weights and a long context."""
    for file in DEMO_FOLDER.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text()) | SHAPE | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))


@contextmanager
def serving(command: Sequence[str], model: Path) -> Iterator[str]:
    """Run a server. Yields its address once it answers."""
    port = free_ports(1)
    nowhere = subprocess.DEVNULL  # mlx-lm's writes tracebacks of clients that go
    command = [*command, "--model", str(model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{url}/v1/models")
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{' '.join(command)} does not answer") from None
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


class Case:
    """What is asked of each server."""

    def __init__(self, num_prompt: int, paged_url: str) -> None:
        """paged_url: of a server that tells tokens."""
        self.random = random.Random(0)
        self.num_words = math.ceil(num_prompt * 400 / len(tokens_of(self.words(400), paged_url)))
        self.only = {str(tokens_of("the red", paged_url)[-1]): 100}  # each token has text, and none is the last

    def words(self, count: int) -> str:
        """Write random words, which differ from all before."""
        return " ".join(self.random.choices(WORDS, k=count))

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Write a request for a stream that does not end by itself."""
        asked = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        return asked | {"logit_bias": self.only}

    async def run(self, url: str, served_as: str) -> dict[str, float]:
        """Ask one server. Returns what was measured, in seconds."""
        times: list[float] = []
        started, ended = asyncio.Event(), asyncio.Event()

        async def read(client: httpx.AsyncClient) -> None:
            body = self.body(self.words(20), 20_000 if self.num_words > 10_000 else 4000) | {"model": served_as}
            async for moment in texts(client, url, body):
                times.append(moment)
                if len(times) >= NUM_BEFORE:
                    started.set()
                if ended.is_set():
                    return

        async with httpx.AsyncClient(timeout=1200) as client:
            stream = asyncio.create_task(read(client))
            waiting = asyncio.create_task(started.wait())
            await asyncio.wait({stream, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not started.is_set():
                await stream
                raise RuntimeError(f"the stream of {url} ended after {len(times)} tokens")
            sent = time.monotonic()
            body = self.body(self.words(self.num_words), 2) | {"model": served_as}
            async for moment in texts(client, url, body):
                first = moment
                break
            else:
                raise RuntimeError(f"the long prompt has no answer from {url}")
            ended.set()
            await stream
        within = [moment for moment in times if moment >= sent]
        before = [moment for moment in times if moment < sent]
        until = next((moment for moment in within if moment > first), within[-1])
        gaps = sorted(after - earlier for earlier, after in pairwise([before[-1], *(m for m in within if m <= until)]))
        return {
            "longest_gap": gaps[-1],
            "gap_p95": gaps[math.ceil(0.95 * len(gaps)) - 1],
            "gap_alone": statistics.median(after - earlier for earlier, after in pairwise(before[5:])),
            "tokens_per_s": sum(moment <= first for moment in within) / (first - sent),
            "first_token": first - sent,
        }


def tokens_of(text: str, url: str) -> list[int]:
    """Ask a server of this project for the tokens of a text."""
    tokens: list[int] = httpx.post(f"{url}/tokenize", json={"prompt": text}, timeout=60).json()["tokens"]
    return tokens


async def texts(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[float]:
    """Stream a completion. Yields the moments at which text comes."""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{url}: {response.status_code} {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {") and any(each.get("text") for each in json.loads(line[6:])["choices"]):
                yield time.monotonic()


def measure(model: Path, num_prompt: int, repetitions: int) -> list[Row]:
    """Ask all servers of a model in turns."""
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serving(command, model)) for name, command in SYSTEMS.items()}
        case, short = Case(num_prompt, urls["mlx-paged"]), Case(64, urls["mlx-paged"])
        names = {name: "default_model" if name == "mlx_lm.server" else model.name for name in SYSTEMS}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
        for name, url in urls.items():
            asyncio.run(short.run(url, names[name]))  # what is done once is done
        for _ in range(repetitions):
            for name, url in urls.items():
                runs[name].append(asyncio.run(case.run(url, names[name])))
                print(f"{name}: {runs[name][-1]}", file=sys.stderr)
        num_prompt = len(tokens_of(case.words(case.num_words), urls["mlx-paged"]))
    return [row(name, num_prompt, each) for name, each in runs.items()]


def row(system: str, num_prompt: int, runs: list[dict[str, float]]) -> Row:
    """Write the runs of a system as a row."""
    middle = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
    return {
        "system": system,
        "prompt_tokens": num_prompt,
        "repetitions": len(runs),
        "longest_gap_ms": 1e3 * middle["longest_gap"],
        "gap_p95_ms": 1e3 * middle["gap_p95"],
        "gap_alone_ms": 1e3 * middle["gap_alone"],
        "tokens_per_s": middle["tokens_per_s"],
        "first_token_s": middle["first_token"],
    }


def random_weights(quick: bool) -> list[Row]:
    """A small model with random weights and a long context."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder))
        return measure(Path(folder), *((QUICK_PROMPT, 1) if quick else (LONG_PROMPT, OPTIONS.repetitions)))


def given_model(quick: bool) -> list[Row]:
    """The model of --model."""
    model = Path(OPTIONS.model).resolve()
    return measure(model, *((QUICK_PROMPT, 1) if quick else (OPTIONS.prompt, OPTIONS.repetitions)))


PARSER = argparse.ArgumentParser(add_help=False)
PARSER.add_argument("--model", metavar="FOLDER", help="measure this model, too")
PARSER.add_argument("--prompt", type=int, default=7500, metavar="N", help="tokens of its long prompt; default: 7500")
PARSER.add_argument("--repetitions", type=int, default=REPETITIONS, metavar="N", help=f"default: {REPETITIONS}")
OPTIONS = PARSER.parse_known_args([])[0]
PARTS = [
    Part(random_weights, "A stream beside a long prompt, two small layers of random weights", COLUMNS),
    Part(given_model, "A stream beside a long prompt, the model of `--model`", COLUMNS),
]

if __name__ == "__main__":
    OPTIONS = PARSER.parse_known_args()[0]
    measured = PARTS if OPTIONS.model or "--markdown" in sys.argv else PARTS[:1]
    report.main("fair_steps.py", __doc__, measured, own_options=[PARSER], mlx_lm=mlx_lm.__version__)
