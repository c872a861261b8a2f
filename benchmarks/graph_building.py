"""The graph of a decode step, built and not run: by mlx-lm with its batch cache, and by us over a paged one."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models import qwen2
from mlx_lm.models.cache import BatchKVCache
from report import Row
from step_clock import no_garbage_collection

from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.models.patch import PatchedModel, patch_model

BLOCK_SIZE = 16


class Decode(NamedTuple):
    """reset: caches as before the step, and the last graph gone; build: the step's logits, not evaluated."""

    reset: Callable[[], None]
    build: Callable[[], mx.array]


def graph_building(quick: bool) -> list[Row]:
    """CPU time to build, without running it, the graph of a step: mlx-lm with its batch cache, and ours.

    A Qwen2 with the heads of the 0.5B model, 24 layers and tiny sizes. Contexts are equal, or from a tenth of the
    longest up to it. Medians of interleaved repeats, each from the same caches.
    """
    num_layers, repeats = (2, 3) if quick else (24, 40)
    model = tiny_qwen2(num_layers)
    rows = []
    for batch in (4, 8) if quick else (32, 256):
        for contexts in ("equal", "mixed"):
            first = 100 if contexts == "mixed" else 1000
            lengths = np.linspace(first, 1000, batch).astype(np.int32)
            decodes = {"mlx_lm": mlx_lm_decode(model, lengths), "mlx_paged": mlx_paged_decode(model, lengths)}
            times: dict[str, list[float]] = defaultdict(list)
            with no_garbage_collection():
                for _ in range(repeats):
                    for name, decode in decodes.items():
                        decode.reset()
                        started = time.thread_time()
                        logits = decode.build()
                        times[name].append(1e3 * (time.thread_time() - started))
                        del logits
            medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
            ratio = medians["mlx_paged_ms"] / medians["mlx_lm_ms"]
            rows.append({"sequences": batch, "contexts": contexts, "layers": num_layers} | medians | {"ratio": ratio})
    return rows


def tiny_qwen2(num_layers: int) -> qwen2.Model:
    """14 query and 2 KV heads, as in Qwen2 0.5B, of 8 instead of 64."""
    arguments = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=112,
        num_hidden_layers=num_layers,
        intermediate_size=64,
        num_attention_heads=14,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=64,
    )
    model = qwen2.Model(arguments)
    mx.eval(model.parameters())
    return model


def mlx_lm_decode(model: qwen2.Model, lengths: np.ndarray) -> Decode:
    """Builds the graph of one token for each sequence, the last of its `lengths`, in mlx-lm's batch cache."""
    args = model.args
    caches = [BatchKVCache((lengths.max() - lengths).tolist()) for _ in range(args.num_hidden_layers)]
    head_dim = args.hidden_size // args.num_attention_heads
    kv = mx.zeros((len(lengths), args.num_key_value_heads, int(lengths.max()) - 1, head_dim))
    for layer in caches:
        layer.update_and_fetch(kv, kv)
        mx.eval(layer.keys, layer.values, layer.offset, layer.left_padding)
    states = [layer.state for layer in caches]
    token_ids = mx.zeros((len(lengths), 1), mx.int32)

    def reset() -> None:
        for layer, state in zip(caches, states, strict=True):
            layer.state = state

    return Decode(reset, lambda: model(token_ids, cache=caches))


def mlx_paged_decode(model: qwen2.Model, lengths: np.ndarray) -> Decode:
    """The same over a paged cache, from host arrays of the step and the block tables on the device."""
    patched: PatchedModel = patch_model(model)
    num_blocks = -(-lengths // BLOCK_SIZE)
    tables = np.zeros((len(lengths), int(num_blocks.max())), np.int32)
    tables[np.arange(tables.shape[1]) < num_blocks[:, None]] = np.arange(num_blocks.sum())
    matrix = mx.array(tables)
    layers = [layer for layer, _ in patched.stored_layers]
    kv_cache = PagedKVCache(layers, [int(num_blocks.sum())] * len(layers), BLOCK_SIZE, 1)
    arrays = [dict(pool.arrays) for pool in kv_cache.pools]
    token_ids = mx.zeros(len(lengths), mx.int32)
    rows = mx.arange(len(lengths), dtype=mx.int32)
    mx.eval(matrix, token_ids, rows)

    def reset() -> None:
        for pool, before in zip(kv_cache.pools, arrays, strict=True):
            pool.arrays = dict(before)

    def build() -> mx.array:
        positions = mx.array(lengths - 1)
        table = matrix[rows]
        slots = {"slot_block_ids": table[rows, positions // BLOCK_SIZE], "slot_offsets": positions % BLOCK_SIZE}
        metadata = AttentionMetadata(table, lengths, np.arange(len(lengths) + 1, dtype=np.int32), **slots)
        return patched(kv_cache, ModelInputs(token_ids, positions, None, [metadata]))

    return Decode(reset, build)
