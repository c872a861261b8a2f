"""Runs a patched model over the paged KV cache."""

import contextlib
from collections.abc import Sequence
from hashlib import sha256

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.cache.block_store import BlockContent
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.config import EngineConfig, parse_memory
from mlx_paged.models.patch import PatchedModel
from mlx_paged.runner.memory_plan import plan_memory
from mlx_paged.runner.warmup import may_submit_early

_CHECKSUM_PIECE = 1 << 24  # words


class ModelRunner:
    """A model and its paged KV cache: runs steps and moves blocks."""

    def __init__(self, model: PatchedModel, config: EngineConfig, max_model_len: int | None) -> None:
        self._model = model
        self.backends = {backend.name for backend in model.backends(config.block_size) if backend is not None}
        self.plan = plan_memory(model, config, max_model_len)
        layers = [layer for layer, _ in model.stored_layers]
        self._group_of_layer = [group for _, group in model.stored_layers]
        num_blocks = [self.plan.num_blocks[group] for group in self._group_of_layer]
        self.may_submit_early = may_submit_early(model, config)
        self._kv_cache = PagedKVCache(layers, num_blocks, config.block_size, parse_memory(config.max_staging))

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def kv_bytes(self) -> int:
        return self._kv_cache.nbytes

    def run(self, inputs: ModelInputs) -> mx.array:
        """The logits of the step's rows, [num_rows, vocab_size], not evaluated yet; K and V are written with them."""
        return self._model(self._kv_cache, inputs)

    def reset(self) -> None:
        """After an error, of which the pools may be part: new ones."""
        with contextlib.suppress(Exception):  # what is still under way may fail like what was
            mx.synchronize()
        self._kv_cache.clear()

    def move_blocks(self, group: int, moves: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (source, destination) after (source, destination), in every layer of a cache group."""
        self._kv_cache.move_blocks(moves, self._layers_of(group))

    def read_block(self, group: int, block_id: int) -> BlockContent:
        """A copy of a block in every layer of its group."""
        return self._kv_cache.read_block(block_id, self._layers_of(group))

    def write_block(self, group: int, block_id: int, content: BlockContent) -> None:
        """Put back what `read_block` returned."""
        self._kv_cache.write_block(block_id, self._layers_of(group), content)

    def fingerprint(self) -> str:
        """Names the weights, their types and the layout of a block: what saved blocks depend on."""
        digest = sha256(repr((self.plan.block_size, self.plan.windows, self._model.stored_layers)).encode())
        for name, array in sorted(dict(tree_flatten(self._model.model.parameters())).items()):
            digest.update(f"{name} {array.shape} {array.dtype} {_checksums(array)}".encode())
        return digest.hexdigest()[:32]

    def _layers_of(self, group: int) -> list[int]:
        return [layer for layer, other in enumerate(self._group_of_layer) if other == group]


def _checksums(array: mx.array) -> list[int]:
    """Two sums of an array's bits, the second one sensitive to their order, at the speed of memory."""
    bits = mx.contiguous(array).flatten()
    bits = bits.view(mx.uint32) if array.nbytes % 4 == 0 else bits.view(mx.uint8)
    total = mx.zeros(2, mx.uint32)
    for start in range(0, bits.size, _CHECKSUM_PIECE):
        piece = bits[start : start + _CHECKSUM_PIECE].astype(mx.uint32)
        weights = (mx.arange(piece.size, dtype=mx.uint32) + start) * 2654435761 + 1
        total = total + mx.stack([piece.sum(), (piece * weights).sum()])
        mx.eval(total)
    return np.array(total).tolist()
