"""How many command buffers MLX makes of a step on a Mac, by its own rule: no Mac needed, and no time measured.

    python benchmarks/command_buffers.py [--quick] [--json FILE]     count, print a table, write the raw numbers

MLX ends a command buffer once it has more operations than a number, or more elements in the distinct arrays that they
take and make than another (`needs_commit` in mlx/backend/metal/device.cpp of MLX 0.32; 40 and 40 << 20 on Apple's base
and Pro chips, 50 and 50 << 20 on Max and Ultra). Each end costs the GPU some idle time. Here the graph of a step is
built as on a Mac, by mlx-lm's models over this package, with kernels that are only named and arrays that are never
computed, and the rule is applied to its operations one after another.

A step is one token of one sequence after 4,096 others, over pools of 16 GB in float16. What it computes in between is
small and not counted, nor is it known whether MLX takes the operations in exactly this order.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import report
from mlx.utils import tree_flatten, tree_map
from report import Part, Row

from mlx_paged.attention.metadata import AttentionMetadata, ModelInputs
from mlx_paged.attention.paged_attention import BACKEND_VARIABLE, BACKENDS
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.models.patch import patch_model

POOL_BYTES = 16 << 30
CONTEXT = 4096
CHIPS = {"base, Pro": 40, "Max, Ultra": 50}  # most operations of a buffer, and millions (2^20) of elements
_LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN = _LLAMA | {
    "model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "head_dim": 128, "intermediate_size": 9728,
    "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
}  # fmt: skip
_QWEN_MOE = _QWEN | {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
MODELS = {"Llama-3.1-8B": _LLAMA, "Qwen3-4B": _QWEN, "Qwen3-30B-A3B": _QWEN_MOE}
WAYS = {"scatter": (False, False), "kernel, whole pools": (True, False), "kernel, one block": (True, True)}
"""Who writes K and V, and what kernels are given of a pool: whether a kernel, and whether one block."""
_MAX_NAMES = 1000  # of arrays that MLX takes at once
_NO_WORK = {  # kinds of operation that only look at an array in another way, or belong to one that is not there
    "AsStrided", "Broadcast", "Contiguous", "ExpandDims", "Flatten", "Full", "Reshape", "Slice", "Split", "Squeeze",
    "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip


class Operation(NamedTuple):
    """A node of a graph: its kind, and the names of the arrays that it takes and makes."""

    kind: str
    inputs: list[str]
    outputs: list[str]


# -- the graph of a step -----------------------------------------------------------------------------------------


def make_model(config: dict[str, Any], bits: int) -> nn.Module:
    """A model of mlx-lm whose weights are not there, of 4 bits in groups of 64, or of 16 bits."""
    source = import_module(f"mlx_lm.models.{config['model_type']}")
    model = source.Model(source.ModelArgs.from_dict(config))
    model.set_dtype(mx.float16)
    if bits == 4:
        nn.quantize(model, group_size=64, bits=4)
    model.update(tree_map(lambda array: mx.zeros(array.shape, array.dtype), model.parameters()))
    return model


class Pools:
    """A cache whose pools are not there, in the midst of a text."""

    def __init__(self, layers: list[LayerSpec], block_size: int, is_written_by_kernels: bool) -> None:
        self.block_size = block_size
        self.pools = [LayerPool.zeros(layer, 1, block_size) for layer in layers]
        num_blocks = POOL_BYTES // sum(pool.nbytes for pool in self.pools)
        self.pools = [LayerPool.zeros(layer, num_blocks, block_size) for layer in layers]
        self.arrays = {
            f"pool{i}{name}": each for i, pool in enumerate(self.pools) for name, each in pool.arrays.items()
        }
        for pool in self.pools:  # in other objects, which a scatter changes
            pool.arrays = {name: mx.stop_gradient(array) for name, array in pool.arrays.items()}
            if is_written_by_kernels:
                pool.write_done, pool.reads_done = mx.zeros(8, mx.int32), [mx.zeros(8, mx.int32)]
                mx.eval(pool.write_done, pool.reads_done)


def _whole_pools(pool: LayerPool) -> dict[str, mx.array]:
    """What `LayerPool.views` would return without its trick."""
    return {f"{name}_cache": array for name, array in pool.arrays.items()}


def graph_of(model: nn.Module, by_kernel: bool, one_block: bool) -> tuple[list[Operation], dict[str, int]]:
    """The operations of a step in order, and the elements of all weights and pools by name."""
    block_size, views = 16, LayerPool.views if one_block else _whole_pools
    with (
        mock.patch.object(mx.fast, "metal_kernel", _stand_in),
        mock.patch.object(mx.fast, "rms_norm", lambda x, weight, eps: x if weight is None else x * weight),
        mock.patch.object(mx.fast, "rope", lambda x, *_, **__: -x),  # on a CPU they are many operations
        mock.patch.object(mx.metal, "is_available", lambda: True),
        mock.patch.dict("os.environ", {BACKEND_VARIABLE: "metal"}),
        mock.patch.object(BACKENDS["metal"], "writes_in_place", by_kernel),
        mock.patch.object(LayerPool, "views", views),
    ):
        patched = patch_model(model)
        cache: Any = Pools([layer for layer, _ in patched.stored_layers], block_size, by_kernel)
        position = np.array([CONTEXT], np.int32)
        metadata = AttentionMetadata(
            mx.zeros((1, CONTEXT // block_size + 1), mx.int32), position + 1, np.array([0, 1], np.int32),
            slot_block_ids=mx.array(position // block_size), slot_offsets=mx.array(position % block_size),
        )  # fmt: skip
        inputs = ModelInputs(mx.zeros(1, mx.int32), mx.array(position), None, [metadata])
        mx.eval(metadata.block_tables, inputs.token_ids)
        logits = patched(cache, inputs)
    leaves = {f"weight{i}": array for i, (_, array) in enumerate(tree_flatten(model.parameters()))} | cache.arrays
    leaves = dict(sorted(leaves.items(), key=lambda leaf: -leaf[1].size)[:_MAX_NAMES])  # the others are next to nothing
    return list(_parse(logits, leaves)), {name: array.size for name, array in leaves.items()}


def _stand_in(**_: Any) -> Callable[..., list[mx.array]]:
    """Takes the place of `mx.fast.metal_kernel`: one operation with the same inputs and outputs."""

    def call(*, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        made = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(made)
        return mx.depends(made, inputs)

    return call


def _parse(result: mx.array, leaves: dict[str, mx.array]) -> Iterator[Operation]:
    """The operations that compute `result` from leaves, each after those that it needs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), result, **leaves)
        nodes = re.split(r'\{ \d+ \[label ="', file.read_text())[1:]
    for node in nodes:
        yield Operation(node.split('"')[0], re.findall(r'"(\w+)" ->', node), re.findall(r'-> "(\w+)"', node))


# -- MLX's rule --------------------------------------------------------------------------------------------------


def count_buffers(operations: list[Operation], sizes: dict[str, int], limit: int, block: int) -> dict[str, int]:
    """Operations of a step, and the command buffers that they take. block: elements of one block of a pool."""
    buffer_of, size_of = {name: name for name in sizes}, dict(sizes)
    num_operations, in_buffer, elements, seen = 0, 0, 0, set[str]()
    num_buffers = 1  # the last one
    for kind, inputs, outputs in operations:
        if kind in _NO_WORK or kind == "Scatter":  # whose result is where its first input was
            for name in outputs:
                if inputs and name not in sizes:
                    buffer_of[name] = buffer_of.get(inputs[0], inputs[0])
                    size_of[name] = block if kind == "Slice" and inputs[0] in size_of else size_of.get(inputs[0], 0)
        if kind in _NO_WORK:
            continue
        num_operations, in_buffer = num_operations + 1, in_buffer + 1
        for name in (*inputs, *outputs):
            if buffer_of.get(name, name) not in seen:
                seen.add(buffer_of.get(name, name))
                elements += size_of.get(name, 0)
        if in_buffer > limit or elements >> 20 > limit:
            num_buffers, in_buffer, elements, seen = num_buffers + 1, 0, 0, set()
    return {"operations": num_operations, "buffers": num_buffers}


def steps(quick: bool) -> list[Row]:
    """Each model, weight and chip, with each way to write and to read."""
    rows = []
    for name, config in list(MODELS.items())[: 1 if quick else None]:
        for bits in (4, 16):
            model = make_model(config | ({"num_hidden_layers": 2} if quick else {}), bits)
            graphs = {way: graph_of(model, *choice) for way, choice in WAYS.items()}
            for chip, limit in CHIPS.items():
                block = 16 * config["num_key_value_heads"] * 128
                counted = {way: count_buffers(*graph, limit, block) for way, graph in graphs.items()}
                row = {"model": name, "bits": bits, "layers": len(model.layers), "chip": chip}
                row["operations of a scatter"], row["operations"] = (
                    counted[way]["operations"] for way in list(WAYS)[::2]
                )
                rows.append(row | {way: each["buffers"] for way, each in counted.items()})
    return rows


COLUMNS = {
    "model": ("model", ""),
    "bits": ("bits of weights", ""),
    "chip": ("chip", ""),
    "operations": ("operations", ",d"),
} | {way: (way, "") for way in WAYS}
PARTS = (
    Part(steps, "command buffers of a step of one token, by who writes K and V and what kernels are given", COLUMNS),
)


if __name__ == "__main__":
    report.main("command_buffers.py", __doc__, PARTS)
