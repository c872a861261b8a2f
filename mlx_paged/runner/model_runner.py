"""Runs a patched model over the paged KV cache."""

import contextlib
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.cache.states import States
from mlx_paged.config import EngineConfig, parse_memory
from mlx_paged.models.loading import context_of_model
from mlx_paged.models.patch import PatchedModel
from mlx_paged.runner.fingerprint import fingerprint
from mlx_paged.runner.memory_plan import MemoryPlan, fit_to_states, plan_memory
from mlx_paged.runner.prepare_kernels import prepare_kernels
from mlx_paged.runner.warmup import overlap_is_safe, step_seconds


class ModelRunner:
    """A model and its paged KV cache: all of it, or what this process has of it (`runner/rank_runner.py`)."""

    _cache_type: Callable[..., PagedKVCache] = PagedKVCache

    def __init__(
        self,
        model: PatchedModel,
        config: EngineConfig,
        max_model_len: int | None,
        num_needed: int | None = None,
        draft: PatchedModel | None = None,
    ) -> None:
        """num_needed: blocks of a pool for which no size is given, if fewer than a share of the memory has room for.

        draft: a second model that shares the memory, with as many blocks.
        """
        self._model = model = model if config.kv_cache_dtype is None else model.quantised(config.kv_cache_dtype)
        self.backends = prepare_kernels(model, config.block_size)
        self.plan = self._agree(plan_memory(model, config, max_model_len, num_needed, draft))
        self.draft = None if draft is None else ModelRunner(draft, self.plan.of_draft(config), max_model_len)
        """What runs the second model, if there is one."""
        self.config = config if self.plan.state_bytes == 0 else fit_to_states(config, self.plan)
        """With no more sequences at once than there is room for."""
        layers = [layer for layer, _ in model.stored_layers]
        groups = [group for _, group in model.stored_layers]
        num_blocks = [self.plan.num_blocks[group] for group in groups]
        self.overlap_is_safe = overlap_is_safe(model, config, self._all_agree, self.plan.num_blocks[0])
        self.states = States(model.num_entries, model.state_shapes) if model.num_entries else None
        """Those of recurrent layers, if there are any."""
        self.kv_cache = self._cache_type(
            layers, num_blocks, config.block_size, parse_memory(config.max_staging), groups
        )

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def context(self) -> int | None:
        """The longest context, in tokens, that the model was made for; None if it does not say."""
        return context_of_model(self._model.model)

    @property
    def max_decode_queries(self) -> int:
        """Query tokens of one sequence that every layer computes while it reads the sequence's blocks once."""
        return self._model.max_decode_queries(self.config.block_size)

    def run(self, inputs: ModelInputs) -> mx.array:
        """Build the graph of a step, K and V written with it. Returns its logits, [num_rows, vocab_size]."""
        return self._model(self.kv_cache, inputs, self.states)

    def rest(self) -> None:
        """Know that nothing runs now, perhaps for long."""

    def measure_steps(self, sizes: Sequence[int]) -> dict[int, float]:
        """Measure the seconds of steps of so many tokens, logits for all of them. The last sizes may be left out."""
        return step_seconds(self._model, self.config, sizes, self._begin_measuring)

    def _begin_measuring(self, size: int) -> None:
        """Know that steps of so many tokens are measured next."""

    def _agree(self, plan: MemoryPlan) -> MemoryPlan:
        """Return the plan that all processes keep to: here there is one."""
        return plan

    def _all_agree(self, answer: bool) -> bool:
        """Whether it is true for all processes."""
        return answer

    def reset(self, unfinished: Sequence[mx.array] = ()) -> None:
        """Make new pools after an error, of which the old ones may be part. unfinished: logits of steps in flight."""
        with contextlib.suppress(Exception):  # what is still in flight may fail like what was
            mx.synchronize()
        self.kv_cache.clear()

    def describe_sharing(self) -> list[str]:
        """Say which prefixes that sequences share are computed once for all of them, and why."""
        from mlx_paged.runner.sharing_costs import describe_sharing

        return describe_sharing(self._model, self.config.block_size)

    def fingerprint(self) -> str:
        """Name what saved blocks and states depend on beside their tokens."""
        return fingerprint(self._model, self.plan.block_size)
