"""What quantised K and V cost in quality, and what they save: perplexity, KL divergence, greedy tokens, memory, time.

    python benchmarks/quantised_cache.py [--model MODEL] [--text FILE] [--json FILE]   measure, print, write raw numbers
    python benchmarks/quantised_cache.py --markdown FILE                               the tables of such a file

`quality` reads the first tokens of a text with K and V kept as they are and with each kind of quantised ones, of the
same model over the same tokens: the perplexity is that of the next token of the text, the divergence that of a plain
cache's distribution from a quantised one's, in nats, and a greedy token is equal if the likeliest next one is the same.
`speed` continues the text, by this engine and by mlx-lm, whose quantised cache serves one request at a time;
`attention` is that of one layer alone, with heads as SmolLM2-135M has them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import report
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from report import Part, Row

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs
from mlx_paged.attention.paged_attention import choose_backend
from mlx_paged.cache.kv_cache import LayerPool, PagedKVCache
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.config import KV_CACHE_DTYPES
from mlx_paged.models import loading
from mlx_paged.models.patch import PatchedModel, patch_model

PARSER = argparse.ArgumentParser(add_help=False)
PARSER.add_argument("--model", help="a folder or a name of Hugging Face; the bundled one, if not given")
PARSER.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE", help="prose, UTF-8")
PARSER.add_argument("--tokens", type=int, default=900, metavar="N", help="that are read for the quality: 900")
PARSER.add_argument("--context", type=int, default=4096, metavar="N", help="tokens of a prompt for the speed: 4096")
PARSER.add_argument("--repetitions", type=int, default=3, metavar="N", help="of what is timed: 3")
PARSER.add_argument("--dtype", help="of the weights and a plain cache: as the engine's")
PARSER.add_argument("--keep-spaces", action="store_true", help="and line ends of the text, instead of its words alone")
OPTIONS = PARSER.parse_known_args()[0]

BLOCK_SIZE, CHUNK = 16, 96  # tokens
NUM_OUTPUT = 32
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def load(least: int) -> tuple[nn.Module, list[int]]:
    """Load the model, and make at least so many tokens of the text's words, repeated if they are fewer."""
    loaded = loading.load(OPTIONS.model, OPTIONS.dtype)
    text = OPTIONS.text.read_text()
    tokens = loaded.tokenizer.encode(text if OPTIONS.keep_spaces else " ".join(text.split()))
    return loaded.model, tokens * -(-least // len(tokens))


# -- quality -----------------------------------------------------------------------------------------------------


def quality(quick: bool) -> list[Row]:
    """All caches read a chunk of the text after the other."""
    num_tokens = 64 if quick else OPTIONS.tokens
    model, tokens = load(num_tokens + 1)
    patched = patch_model(model)
    readers = {"plain": Reader(patched, num_tokens)}
    readers |= {name: Reader(patched.quantised(name), num_tokens) for name in KV_CACHE_DTYPES}
    losses: dict[str, list[np.ndarray]] = {name: [] for name in readers}
    divergences: dict[str, list[np.ndarray]] = {name: [] for name in readers}
    same: dict[str, list[np.ndarray]] = {name: [] for name in readers}
    for start in range(0, num_tokens, CHUNK):
        end = min(start + CHUNK, num_tokens)
        targets = mx.array(tokens[start + 1 : end + 1])[:, None]
        plain = readers["plain"].logprobs(tokens, start, end)
        for name, reader in readers.items():
            found = plain if name == "plain" else reader.logprobs(tokens, start, end)
            losses[name].append(np.array(-mx.take_along_axis(found, targets, axis=1)))
            divergences[name].append(np.array((mx.exp(plain) * (plain - found)).sum(axis=1)))
            same[name].append(np.array(found.argmax(axis=1) == plain.argmax(axis=1)))
    perplexity = {name: float(np.exp(np.concatenate(each).mean(dtype=np.float64))) for name, each in losses.items()}
    return [
        {
            "kv_cache_dtype": name,
            "tokens": num_tokens,
            "bytes_per_token": reader.bytes_per_token,
            "saved": readers["plain"].bytes_per_token / reader.bytes_per_token,
            "perplexity": perplexity[name],
            "ratio": perplexity[name] / perplexity["plain"],
            "kl": float(np.concatenate(divergences[name]).mean(dtype=np.float64)),
            "equal_greedy": float(np.concatenate(same[name]).mean()),
        }
        for name, reader in readers.items()
    ]


class Reader:
    """A model that reads one text, over a cache of its own."""

    def __init__(self, model: PatchedModel, num_tokens: int) -> None:
        layers = [layer for layer, _ in model.stored_layers]
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        self._model = model
        self._cache = PagedKVCache(layers, [num_blocks] * len(layers), BLOCK_SIZE, 1)
        self._table = mx.arange(max(8, num_blocks), dtype=mx.int32)[None]
        self.bytes_per_token = sum(layer.bytes_per_token for layer in layers)

    def logprobs(self, tokens: list[int], start: int, end: int) -> mx.array:
        """Read the tokens from `start` to `end`. Returns log-probabilities of what follows each, [n, vocab_size]."""
        positions = np.arange(start, end, dtype=np.int32)
        metadata = AttentionMetadata(
            self._table,
            np.array([end], np.int32),
            np.array([0, end - start], np.int32),
            slot_block_ids=mx.array(positions // BLOCK_SIZE),
            slot_offsets=mx.array(positions % BLOCK_SIZE),
        )
        groups = [metadata] * len(self._model.groups)
        inputs = ModelInputs(mx.array(tokens[start:end], mx.int32), mx.array(positions), None, groups)
        logits = self._model(self._cache, inputs).astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=1, keepdims=True)
        mx.eval(logprobs)
        return logprobs


# -- speed -------------------------------------------------------------------------------------------------------


def speed(quick: bool) -> list[Row]:
    """Each system in turn: the pool has room for the requests and no more.

    Seconds are medians, of the CPU, which other processes disturb less; where a GPU computes they say nothing.
    """
    context, num_output, repetitions = (48, 8, 1) if quick else (OPTIONS.context, NUM_OUTPUT, OPTIONS.repetitions)
    model, tokens = load(context)
    prompt = tokens[:context]
    systems: dict[str, Any] = {}
    for count in (1, 4):
        for name in (None, *KV_CACHE_DTYPES):
            systems[f"mlx-paged, {count} at once, {name or 'plain'}"] = partial(paged, model, prompt, count, name)
    systems["mlx_lm, 1 at once, plain"] = partial(unpaged, model, prompt)
    codes = patch_model(model).quantised("int8").stored_layers[0][0].codes
    assert codes is not None
    # Its default is to quantise nothing before 5,000 tokens.
    bits = {"kv_bits": 8, "kv_group_size": codes.keys.group_size, "quantized_kv_start": 0}
    systems["mlx_lm, 1 at once, --kv-bits 8 --quantized-kv-start 0"] = partial(unpaged, model, prompt, **bits)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for _ in range(repetitions):
        for name, run in systems.items():
            try:
                runs[name].append(run(num_output))
            except NotImplementedError as error:  # mlx-lm quantises no cache with a window
                print(f"{name}: {error}")
    expected = runs["mlx_lm, 1 at once, plain"][0]["tokens"]
    return [
        {
            "system": name,
            "context": context,
            "prompt_s": statistics.median(run["prompt_s"] for run in done),
            "decode_s": statistics.median(run["decode_s"] for run in done),
            "kv_bytes": done[0]["kv_bytes"],
            "equal": f"{_num_equal(done[0]['tokens'], expected)} of {num_output}",
        }
        for name, done in runs.items()
        if done
    ]


def paged(model: nn.Module, prompt: list[int], count: int, kv_cache_dtype: str | None, num_output: int) -> Any:
    """Serve the prompt so many times at once, sharing nothing."""
    num_blocks = count * -(-(len(prompt) + num_output) // BLOCK_SIZE)
    llm = LLM.from_model(
        model,
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        kv_cache_dtype=kv_cache_dtype,
        prefix_caching=False,
        max_num_seqs=count,
    )
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
    requests = [llm.engine.make_request(prompt, params) for _ in range(count)]
    steps = [(time.monotonic(), time.process_time())]
    outputs = list(llm.run(requests, lambda: steps.append((time.monotonic(), time.process_time()))))
    last = max(output.metrics.first_token_time or 0.0 for output in outputs if output.metrics)
    first = next(cpu for moment, cpu in steps if moment >= last)
    return {
        "prompt_s": first - steps[0][1],
        "decode_s": steps[-1][1] - first,
        "kv_bytes": llm.stats().kv_bytes,
        "tokens": outputs[0].outputs[0].token_ids,
    }


def unpaged(model: nn.Module, prompt: list[int], num_output: int, **options: Any) -> Any:
    """Complete the prompt as `mlx_lm.generate` does."""
    cache = make_prompt_cache(model)
    started = time.process_time()
    tokens, first = [], started
    steps = generate_step(mx.array(prompt), model, max_tokens=num_output, prompt_cache=cache, **options)
    for token, _ in steps:
        first = first if tokens else time.process_time()
        tokens.append(int(token))
    ended = time.process_time()
    kv_bytes = sum(each.nbytes for each in cache)
    return {"prompt_s": first - started, "decode_s": ended - first, "kv_bytes": kv_bytes, "tokens": tokens}


def _num_equal(tokens: list[int], expected: list[int]) -> int:
    """Count the tokens before the first that differs."""
    pairs = enumerate(zip(tokens, expected, strict=True))
    return next((i for i, (token, other) in pairs if token != other), len(expected))


def attention(quick: bool) -> list[Row]:
    """Best of some repetitions, in milliseconds of the CPU."""
    cases = ((1, 1, 1024), (16, 1, 1024), (1, 1, 8192), (1, 1024, 1024)) if not quick else ((2, 1, 64),)
    return [
        {"sequences": count, "queries": num_queries, "context": context}
        | {name: attention_ms(count, num_queries, context, name) for name in ("plain", *KV_CACHE_DTYPES)}
        for count, num_queries, context in cases
    ]


def attention_ms(count: int, num_queries: int, context: int, kind: str) -> float:
    """Of the last queries of so many sequences, with blocks in random order."""
    layer = LayerSpec(KV_HEADS, HEAD_DIM, HEAD_DIM, mx.float32)
    layer = layer if kind == "plain" else layer.quantised(kind)
    backend, num_blocks = choose_backend(layer, HEADS, BLOCK_SIZE), count * context // BLOCK_SIZE
    pool, slots = LayerPool.zeros(layer, num_blocks, BLOCK_SIZE), mx.arange(num_blocks * BLOCK_SIZE, dtype=mx.int32)
    rows = (mx.random.normal((slots.size, KV_HEADS, HEAD_DIM)) for _ in range(2))
    pool.write(slots // BLOCK_SIZE, slots % BLOCK_SIZE, *rows)
    tables = mx.random.permutation(num_blocks).reshape(count, -1).astype(mx.int32)
    q = mx.random.normal((count * num_queries, HEADS, HEAD_DIM))
    mx.eval(pool.arrays, q, tables)
    times = []
    for _ in range(1 + 3 * OPTIONS.repetitions):
        starts = np.arange(count + 1, dtype=np.int32) * num_queries
        metadata = AttentionMetadata(tables, np.full(count, context, np.int32), starts)
        started = time.process_time()
        mx.eval(backend.attend(q, pool, metadata, AttentionOptions(HEAD_DIM**-0.5)))
        times.append(1e3 * (time.process_time() - started))
    return min(times)


PARTS = [
    Part(
        quality,
        "What a quantised cache does to a model's predictions",
        {
            "kv_cache_dtype": ("K and V", ""),
            "bytes_per_token": ("bytes a token", ",d"),
            "saved": ("tokens in the same memory, times", ".2f"),
            "perplexity": ("perplexity", ".4f"),
            "ratio": ("ratio", ".4f"),
            "kl": ("KL divergence, nats", ".5f"),
            "equal_greedy": ("equal greedy tokens", ".1%"),
        },
    ),
    Part(
        speed,
        "A long prompt and what follows it",
        {
            "system": ("", ""),
            "context": ("tokens in", ",d"),
            "prompt_s": ("CPU s, prompts", ".2f"),
            "decode_s": ("decoding", ".2f"),
            "kv_bytes": ("bytes of K and V", ",d"),
            "equal": ("greedy tokens before one differs from mlx-lm's", ""),
        },
    ),
    Part(
        attention,
        "Attention of one layer, CPU ms",
        {"sequences": ("sequences", "d"), "queries": ("queries of each", ",d"), "context": ("context", ",d")}
        | {name: (name, ".1f") for name in ("plain", *KV_CACHE_DTYPES)},
    ),
]

if __name__ == "__main__":
    named = str(OPTIONS.model or "demo")
    details = {"mlx_lm": mlx_lm.__version__, "model": named, "text": OPTIONS.text.name}
    report.main("quantised_cache.py", __doc__ or "", PARTS, own_options=[PARSER], **details)
