"""The runner of one rank among those that a model is divided among, and that of rank 0, which tells of each step."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.cache.kv_cache import PagedKVCache
from mlx_paged.distributed.ranks import Message, Ranks
from mlx_paged.errors import LostRanks
from mlx_paged.runner.memory_plan import MemoryPlan
from mlx_paged.runner.model_runner import ModelRunner

_END_S = 5.0  # that the others have to hear of the end


class RankRunner(ModelRunner):
    """A rank's part of a model and of its KV cache. What depends on measurements is agreed on."""

    def __init__(self, ranks: Ranks, *of_runner: Any) -> None:
        """of_runner: what a ModelRunner takes."""
        self.ranks = ranks
        super().__init__(*of_runner)

    def _agree(self, plan: MemoryPlan) -> MemoryPlan:
        plan = plan._replace(num_blocks=self.ranks.smallest(plan.num_blocks))
        layers = [layer for layer, _ in self._model.stored_layers]
        heads = " or ".join(map(str, sorted({layer.num_kv_heads for layer in layers})))
        own = f"{self.ranks.named(self.ranks.rank)}: layers {len(layers)}, KV heads {heads}; {plan}"
        return plan._replace(by_rank=tuple(self.ranks.gather(own)))

    def _all_agree(self, answer: bool) -> bool:
        return self.ranks.all_agree(answer)


class LeadingRunner(RankRunner):
    """Rank 0's: the other ranks do what this one does, and the results are its own."""

    def __init__(self, ranks: Ranks, *of_runner: Any) -> None:
        self._cache_type = functools.partial(_ToldKVCache, ranks)
        super().__init__(ranks, *of_runner)
        self._end = weakref.finalize(self, _end, ranks)
        LEADERS.add(self)

    @property
    def is_heard(self) -> bool:
        """Whether other ranks follow this one: they have not been told of the end."""
        return self._end.alive

    def run(self, inputs: ModelInputs) -> mx.array:
        """Build the graph of a step, and tell of it once that has worked: from here on it has to be computed."""
        token_ids = self.ranks.share(inputs.token_ids)
        logits = super().run(inputs._replace(token_ids=token_ids))
        tables, metadata = inputs.tables, inputs.groups[0]
        assert tables is not None
        starts = metadata.context_lens - metadata.query_lens
        nothing = np.zeros(0, np.int32)
        changes = [part for changed in tables.changes for part in changed or (nothing, nothing)]
        head = np.array([*tables.version, *tables.shape], np.int32)
        self.ranks.tell(Message.STEP, head, tables.rows, starts, metadata.query_lens, *changes)
        mx.async_eval(token_ids)  # now: where others have the first layers, nothing here waits for the tokens
        return logits

    def rest(self) -> None:
        self.ranks.tell(Message.REST)

    def _begin_measuring(self, size: int) -> None:
        self.ranks.tell(Message.MEASURE, np.array([size], np.int32))

    def reset(self, unfinished: Sequence[mx.array] = ()) -> None:
        """Have all ranks make new pools. Raises LostRanks if a step that others were told of can't be computed."""
        try:
            mx.eval(list(unfinished))
        except Exception as error:
            self._end.detach()  # nobody is there to hear of it
            raise LostRanks(f"the ranks can't go on together: {error}") from None
        self.ranks.tell(Message.RESET)
        super().reset()


LEADERS: weakref.WeakSet[LeadingRunner] = weakref.WeakSet()
"""Those of this process, of which the other ranks can follow one."""


class _ToldKVCache(PagedKVCache):
    """Rank 0's KV cache, whose moves all ranks make."""

    def __init__(self, ranks: Ranks, *args: Any) -> None:
        self._ranks = ranks
        super().__init__(*args)

    def move_blocks(self, moves: Sequence[tuple[int, int]], group: int = 0) -> None:
        self._ranks.tell(Message.MOVE, np.array([group], np.int32), np.array(moves, np.int32))
        super().move_blocks(moves, group)


def _end(ranks: Ranks) -> None:
    """Let the other ranks end, when all has arrived that they were told. Nobody waits long: one may be gone."""
    if _has_arrived(ranks):
        ranks.tell(Message.END)  # here, since each thread of MLX's has a stream of its own
        _has_arrived(ranks)


def _has_arrived(ranks: Ranks) -> bool:
    """Wait for the last message to be heard. Returns False if that takes too long, or can't be."""
    heard = threading.Event()

    def wait() -> None:
        with contextlib.suppress(RuntimeError):
            mx.eval(ranks.last_told)
            heard.set()

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    waiter.join(_END_S)
    return heard.is_set()
