"""Runs a patched model over the paged KV cache."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_paged.batch import StepInputs
from mlx_paged.config import EngineConfig, parse_memory
from mlx_paged.kv_cache import PagedKVCache
from mlx_paged.memory_plan import plan_memory
from mlx_paged.models.patch import PatchedModel


class ModelRunner:
    """A model and its paged KV cache: runs steps and moves blocks."""

    def __init__(self, model: PatchedModel, config: EngineConfig, max_model_len: int | None) -> None:
        self._model = model
        self.plan = plan_memory(model, config, max_model_len)
        layers = [layer for layer, _ in model.stored_layers]
        self._group_of_layer = [group for _, group in model.stored_layers]
        num_blocks = [self.plan.num_blocks[group] for group in self._group_of_layer]
        self._kv_cache = PagedKVCache(layers, num_blocks, config.block_size, parse_memory(config.max_staging))

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def kv_bytes(self) -> int:
        return self._kv_cache.nbytes

    def run(self, inputs: StepInputs) -> mx.array:
        """The logits of the step's rows, [num_rows, vocab_size], not evaluated yet; K and V are written with them."""
        return self._model(self._kv_cache, inputs)

    def wait(self, logits: mx.array) -> None:
        """Have a step computed whose logits nobody needs."""
        mx.eval(logits)

    def move_blocks(self, group: int, moves: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (source, destination) after (source, destination), in every layer of a cache group."""
        self._kv_cache.move_blocks(moves, [layer for layer, g in enumerate(self._group_of_layer) if g == group])
