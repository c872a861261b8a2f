"""What a model is told of a step: tokens, positions, slots, and where each sequence's context lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.shared_prefix import SharedPrefix

FindShared = Callable[[np.ndarray], list[SharedPrefix]]


class AttentionMetadata:
    """Which tokens a step computes and where their context lies; all layers of the step share one.

    block_tables: int32 [num_seqs, max_blocks], on the device and perhaps not computed yet: nothing here evaluates it.
    On the host: context_lens, int32 [num_seqs], tokens visible to a sequence's last query; cu_seqlens_q, int32
    [num_seqs + 1], the queries of sequence i are tokens cu_seqlens_q[i] to cu_seqlens_q[i + 1], the last ones of its
    context. find_shared: given numbers of sequences with one query each, the prefixes that they share, whose members
    are indices into these; None: nobody looks for any. What backends derive from all this is made once.
    """

    def __init__(
        self,
        block_tables: mx.array,
        context_lens: np.ndarray,
        cu_seqlens_q: np.ndarray,
        find_shared: FindShared | None = None,
    ) -> None:
        self.block_tables = block_tables
        self.context_lens = context_lens
        self.cu_seqlens_q = cu_seqlens_q
        self.find_shared = find_shared
        self.backends: set[str] = set()  # that computed it
        self._derived: dict[Any, Any] = {}

    @cached_property
    def query_lens(self) -> np.ndarray:
        return self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]

    def pick(self, seqs: np.ndarray, context_lens: np.ndarray, cu_seqlens_q: np.ndarray) -> AttentionMetadata:
        """Of the sequences numbered `seqs`, ascending, other queries, or the same."""
        find_shared = None if self.find_shared is None else partial(_find_among, self.find_shared, seqs)
        return AttentionMetadata(self.block_tables[index_rows(seqs)], context_lens, cu_seqlens_q, find_shared)

    def derive(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call with `key`."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


class GroupInputs(NamedTuple):
    """What differs between cache groups: block_ids, int32 [num_tokens], where each token goes, and the metadata."""

    block_ids: mx.array
    metadata: AttentionMetadata


class StepInputs(NamedTuple):
    """What a model needs to compute one step.

    token_ids, positions, block_offsets: int32 [num_tokens]. logit_rows: int32 [num_rows], the tokens after which a
    next one is chosen; None: all of them. If the step only computes parts of prompts, its last token alone.
    of_logit_rows: those tokens as a step of their own, in which each is the only query of a sequence; None if
    logit_rows is.
    """

    token_ids: mx.array
    positions: mx.array
    block_offsets: mx.array
    logit_rows: mx.array | None
    groups: list[GroupInputs]
    of_logit_rows: StepInputs | None = None


def pick_tokens(inputs: StepInputs, tokens: np.ndarray, seqs: np.ndarray) -> StepInputs:
    """The step with logits for `tokens` alone, which belong to the sequences numbered `seqs`, both ascending."""
    rows, cu_seqlens_q = mx.array(tokens.astype(np.int32)), np.arange(len(tokens) + 1, dtype=np.int32)
    groups = []
    for block_ids, metadata in inputs.groups:
        context_lens = metadata.context_lens[seqs] - (metadata.cu_seqlens_q[1:][seqs] - 1 - tokens)
        groups.append(GroupInputs(block_ids[rows], metadata.pick(seqs, context_lens, cu_seqlens_q)))
    picked = StepInputs(inputs.token_ids[rows], inputs.positions[rows], inputs.block_offsets[rows], None, groups)
    return inputs._replace(logit_rows=rows, of_logit_rows=picked)


def _find_among(find_shared: FindShared, seqs: np.ndarray, some: np.ndarray) -> list[SharedPrefix]:
    return find_shared(seqs[some])


def index_rows(rows: np.ndarray) -> slice | mx.array:
    """Picks `rows`, ascending numbers: without a copy where they are consecutive."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return mx.array(rows.astype(np.int32))
