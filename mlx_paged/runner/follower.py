"""The ranks other than 0: each makes the steps that rank 0 tells of with its part of the model, and keeps no result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np

import mlx_paged
from mlx_paged.config import EngineConfig
from mlx_paged.distributed.ranks import Message, Ranks
from mlx_paged.distributed.shard import shard_layers, shard_tensors
from mlx_paged.models.patch import PatchedModel, patch_model
from mlx_paged.runner.input_builder import InputBuilder
from mlx_paged.runner.rank_runner import LEADERS, LeadingRunner, RankRunner
from mlx_paged.scheduler.running_batch import RunningBatch


def make_runner(
    model: nn.Module,
    config: EngineConfig,
    max_model_len: int | None,
    num_needed: int | None,
    draft: Callable[[PatchedModel], PatchedModel | None],
) -> LeadingRunner:
    """Divide a model among the ranks, and return rank 0's runner. In other ranks follow it, and end the program.

    draft: loads the draft model, if there is one, which rank 0 has for itself.
    Raises ValueError for what can't be divided, and if the ranks are not alike.
    """
    by_heads = config.tensor_parallel_size > 1
    name = "tensor_parallel_size" if by_heads else "pipeline_parallel_size"
    if any(leader.is_heard for leader in LEADERS):
        raise ValueError(f"{name}={getattr(config, name)}: the ranks of this program follow another LLM, which lives")
    ranks = Ranks.join(getattr(config, name), name)
    ranks.compare(
        {
            "mlx": mx.__version__,  # type: ignore[attr-defined]
            "mlx-lm": mlx_lm.__version__,
            "mlx-paged": mlx_paged.__version__,
            "the model's config.json": hashlib.sha256(str(getattr(model, "args", "")).encode()).hexdigest()[:8],
        }
    )
    own = vars(config) | {"speculative_config": None}  # guesses are rank 0's
    settings, max_model_len = json.loads(ranks.gather(json.dumps([own, max_model_len]))[0])
    config = config if ranks.rank == 0 else EngineConfig(**settings)
    (shard_tensors if by_heads else shard_layers)(model, ranks)
    patched = patch_model(model, max_model_len)
    if patched.num_entries:
        raise ValueError(f"{name}={ranks.size}: recurrent layers, which this model has, run on one device")
    ranks.compare({"what layers see": patched.groups})
    if ranks.rank == 0:
        return LeadingRunner(ranks, patched, config, max_model_len, num_needed, draft(patched))
    Follower(ranks, patched, config, max_model_len, num_needed).follow()
    raise SystemExit(0)


class Follower(RankRunner):
    """The runner of another rank than 0."""

    _builder: InputBuilder
    _batch: RunningBatch

    def follow(self) -> None:
        """Do what rank 0 tells, until it tells of the end. Raises LostRanks if it has gone."""
        kind = Message.REST
        while True:
            kind, arrays = self.ranks.listen(is_resting=kind is Message.REST)
            if kind is Message.STEP:
                self._step(*arrays)
            elif kind is Message.MOVE:
                (group,), moves = arrays
                self.kv_cache.move_blocks([(src, dst) for src, dst in moves.reshape(-1, 2).tolist()], int(group))
            elif kind is Message.MEASURE:
                self.measure_steps(arrays[0].tolist())
            elif kind is Message.RESET:
                self.reset()
            elif kind is Message.REST:
                mx.synchronize()
            else:
                return

    def _step(
        self, head: np.ndarray, rows: np.ndarray, starts: np.ndarray, query_lens: np.ndarray, *changes: np.ndarray
    ) -> None:
        """Submit a step. Of its logits one row is computed: they are nobody's."""
        version, num_rewrites, *shape = head.tolist()
        if not hasattr(self, "_batch"):
            self._batch = RunningBatch(shape[0], len(changes) // 2, shape[1], self.config.block_size)
            self._builder = InputBuilder(self._batch)
        self._batch.version, self._batch.tables[0].num_rewrites = version, num_rewrites
        for tables, indices, block_ids in zip(self._batch.tables, changes[::2], changes[1::2], strict=True):
            if len(indices):
                tables.write(indices, block_ids)
        num_tokens = int(query_lens.sum())
        mx.async_eval(token_ids := self.ranks.share(mx.zeros(num_tokens, mx.int32)))
        inputs, _ = self._builder.arrange(token_ids, rows, starts, query_lens, num_tokens)
        logits = self.run(inputs._replace(logits_indices=mx.array([num_tokens - 1], mx.int32)))
        if not self.overlap_is_safe:
            mx.synchronize()
        mx.async_eval(logits)
