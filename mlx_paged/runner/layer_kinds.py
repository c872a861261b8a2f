"""The kinds of layers of a model that kernels compute, and steps that they are tried with before the first request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import KernelBackend, shape_of_layer
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.attention.work_items import Shape
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.models.patch import PatchedModel
from mlx_paged.scheduler.block_tables import MIN_COLUMNS

_NUM_NAMED = 8


class TrialStep(NamedTuple):
    """Some sequences that are alike, and whose contexts lie in the same blocks."""

    num_seqs: int = 1
    num_queries: int = 1
    """Of each."""
    context_len: int = 1
    num_shared: int = 0
    """Tokens of which they are known to share them."""

    def num_blocks(self, block_size: int) -> int:
        return -(-self.context_len // block_size)

    def metadata(self, block_size: int, first_block: int | None = None) -> AttentionMetadata:
        """first_block: of those that have the context, one after the other. None: all are block 0."""
        prefix, num_columns = SharedPrefix(np.arange(self.num_seqs), self.num_shared), self.num_blocks(block_size)
        table = mx.zeros(max(MIN_COLUMNS, num_columns), mx.int32)
        if first_block is not None:
            table[:num_columns] = mx.arange(first_block, first_block + num_columns, dtype=mx.int32)
        return AttentionMetadata(
            mx.contiguous(mx.broadcast_to(table, (self.num_seqs, table.size))),
            np.full(self.num_seqs, self.context_len, np.int32),
            np.arange(self.num_seqs + 1, dtype=np.int32) * self.num_queries,
            lambda _: [prefix] if self.num_shared else [],
        )


@dataclass(eq=False)
class LayerKind:
    """Layers that take the same kernels."""

    backend: KernelBackend
    layer: LayerSpec
    num_heads: int
    options: AttentionOptions
    """Of one of the layers; the others' have other numbers in the same places."""
    numbers: list[int] = field(default_factory=list)
    """Of what they attend to, among all that a model stores: those of its attention layers, unless some share it."""

    @property
    def shape(self) -> Shape:
        return shape_of_layer(self.layer, self.num_heads)

    @property
    def shares_prefixes(self) -> bool:
        """Whether kernels read what several sequences share once for all of them: paged_decode's sequences do."""
        return self.options.window is None and self.backend.decode_queries(self.shape) > 0

    def queries(self, num_tokens: int) -> mx.array:
        return mx.zeros((num_tokens, self.num_heads, self.layer.key_dim), self.layer.dtype)


def kinds_of(model: PatchedModel, block_size: int) -> list[LayerKind]:
    """List the kinds of a model's layers."""
    kinds: dict[Any, LayerKind] = {}
    for number, layer in enumerate(model.layers):
        backend = model.backends(block_size)[number]
        if isinstance(backend, KernelBackend) and layer is not None:
            for num_heads, options in model.uses[number]:
                _, window, softcap, sinks = options
                key = layer, num_heads, window is None, softcap is None, None if sinks is None else sinks.dtype
                numbers = kinds.setdefault(key, LayerKind(backend, layer, num_heads, options)).numbers
                numbers += [] if number in numbers else [number]
    return list(kinds.values())


def named(numbers: list[int]) -> str:
    """Write the numbers of attention layers: the first of many."""
    first, more = ", ".join(map(str, numbers[:_NUM_NAMED])), len(numbers) - _NUM_NAMED
    return f"attention layer{'s' * (len(numbers) > 1)} {first}" + f" and {more} more" * (more > 0)
