"""Runs a patched model over the paged KV cache."""

import contextlib
import re
from hashlib import sha256

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.cache.states import States
from mlx_paged.config import EngineConfig, parse_memory
from mlx_paged.models.patch import PatchedModel
from mlx_paged.runner.memory_plan import fit_to_states, plan_memory
from mlx_paged.runner.trial_writes import choose_writers
from mlx_paged.runner.warmup import overlap_is_safe

_CHECKSUM_PIECE = 1 << 24  # words


class ModelRunner:
    """A model and its paged KV cache."""

    def __init__(
        self, model: PatchedModel, config: EngineConfig, max_model_len: int | None, num_needed: int | None = None
    ) -> None:
        """num_needed: blocks of a pool for which no size is given, if fewer than a share of the memory has room for."""
        self._model = model
        self.backends = {backend.name for backend in choose_writers(model, config.block_size)}
        self.plan = plan_memory(model, config, max_model_len, num_needed)
        self.config = config if self.plan.state_bytes == 0 else fit_to_states(config, self.plan.num_state_slots)
        """With no more sequences at once than there is room for."""
        layers = [layer for layer, _ in model.stored_layers]
        groups = [group for _, group in model.stored_layers]
        num_blocks = [self.plan.num_blocks[group] for group in groups]
        self.overlap_is_safe = overlap_is_safe(model, config, self.plan.num_blocks[0])
        self.states = States(model.num_entries) if model.num_entries else None
        """Those of recurrent layers, if there are any."""
        self.kv_cache = PagedKVCache(layers, num_blocks, config.block_size, parse_memory(config.max_staging), groups)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def run(self, inputs: ModelInputs) -> mx.array:
        """Build the graph of a step, K and V written with it. Returns its logits, [num_rows, vocab_size]."""
        return self._model(self.kv_cache, inputs, self.states)

    def reset(self) -> None:
        """Make new pools after an error, of which the old ones may be part."""
        with contextlib.suppress(Exception):  # what is still in flight may fail like what was
            mx.synchronize()
        self.kv_cache.clear()

    def fingerprint(self) -> str:
        """Name the family, the weights, their types and the layout of a block: what saved blocks depend on."""
        digest = sha256(repr((self.plan.block_size, self.plan.windows, self._model.stored_layers)).encode())
        for name, array in sorted(dict(tree_flatten(self._model.model.parameters())).items()):
            digest.update(f"{name} {array.shape} {array.dtype} {_checksums(array)}".encode())
        family = re.sub(r"\W", "_", str(getattr(self._model.model, "model_type", "model")))
        return f"{family}-{digest.hexdigest()[:32]}"


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
