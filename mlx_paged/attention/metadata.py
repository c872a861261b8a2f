"""What a model is told of a step: tokens, positions, slots, and where each sequence's context lies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.cache.states import Stretch

FindSharedPrefixes = Callable[[np.ndarray], list[SharedPrefix]]


@dataclass(eq=False)
class AttentionMetadata:
    """Which tokens a step computes and where their context lies. All layers of a cache group share one in a step."""

    block_tables: mx.array
    """int32 [num_seqs, max_blocks], on the device and perhaps not computed yet: nothing here evaluates it."""
    context_lens: np.ndarray
    """int32 [num_seqs]: the tokens visible to each sequence's last query, its own included."""
    cu_seqlens_q: np.ndarray
    """int32 [num_seqs + 1]: the queries of sequence i, the last tokens of its context, are tokens cu_seqlens_q[i] to
    cu_seqlens_q[i + 1] of the step."""
    find_shared_prefixes: FindSharedPrefixes | None = None
    """Given the numbers of sequences, returns the prefixes that they share and that all their queries see, whose
    members are indices into these. None: nobody looks for any."""
    slot_block_ids: mx.array | None = None
    """int32 [num_tokens]: the block that each token's K and V go into. None: they are in place already."""
    slot_offsets: mx.array | None = None
    """int32 [num_tokens]: the place in that block."""
    _plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def query_lens(self) -> np.ndarray:
        """int32 [num_seqs]."""
        return self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]

    def select(self, seqs: np.ndarray, cu_seqlens_q: np.ndarray) -> "AttentionMetadata":
        """The metadata of the sequences numbered `seqs`, ascending, for a q of their tokens alone."""
        find = self.find_shared_prefixes
        find_here = None if find is None else lambda some: find(seqs[some])
        return AttentionMetadata(self.block_tables[index_rows(seqs)], self.context_lens[seqs], cu_seqlens_q, find_here)

    def plan_once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, called once for all layers that ask with the same `key`."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]


class TableUpdate(NamedTuple):
    """What has become of the block tables since the step before: for other ranks, which keep copies of them."""

    rows: np.ndarray
    """The row of each sequence of the step."""
    shape: tuple[int, ...]
    """Rows and columns of the tables."""
    version: tuple[int, int]
    """As in RunningBatch, and `num_rewrites` as in the first group's BlockTables."""
    changes: list[tuple[np.ndarray, np.ndarray] | None]
    """Of each group, as `BlockTables.pop_changes` returns them."""


class ModelInputs(NamedTuple):
    """All that a model is told of a step."""

    token_ids: mx.array
    """int32 [num_tokens]."""
    positions: mx.array
    """int32 [num_tokens]: of each token in its sequence."""
    logits_indices: mx.array | None
    """int32 [num_rows]: the tokens after which a next one is chosen. None: all of them."""
    groups: list[AttentionMetadata]
    """One per cache group."""
    stretches: Sequence[Stretch] = ()
    """How recurrent layers take the tokens; in a model that has some, all of them."""
    tables: TableUpdate | None = None


def index_rows(rows: np.ndarray) -> slice | mx.array:
    """An index of `rows`, ascending numbers, that copies nothing where they are consecutive."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return mx.array(rows.astype(np.int32))
