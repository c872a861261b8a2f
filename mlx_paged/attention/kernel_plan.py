"""A step's plan for the kernels: which sequences each of them computes, and its work items on the device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.metadata import AttentionMetadata, index_rows
from mlx_paged.attention.work_items import WorkItems

MIN_INPUT_SIZE = 8  # MLX binds smaller inputs as `constant`, which changes a Metal kernel's text: plans are padded


class Launch(NamedTuple):
    """How a kernel is launched for a shape."""

    kernel_name: str
    threads: int
    """Of an item and KV head."""
    template: dict[str, Any]
    """Template arguments that only this kind of GPU has."""
    shared_bytes: int = 0
    """Dynamic shared memory of a threadgroup."""


@dataclass(eq=False)
class Plan:
    """A step's work items on the device, the same for all layers of one shape and window: `WorkItems` tells."""

    launch: Launch
    work: mx.array
    """At least MIN_INPUT_SIZE elements, as `cu_parts`."""
    num_items: int
    num_parts: int
    cu_parts: mx.array
    is_split: bool
    """Whether what `cu_parts` tells has to be merged."""
    constants: dict[str, mx.array] = field(default_factory=dict)
    """Inputs that only this kernel has."""
    shared: "Plan | None" = None
    """Of a decode: the keys that several sequences share, which the items above leave out."""
    ranges: mx.array | None = None
    """With `shared`: the parts of each query's prefix, as in `SharedWorkItems`."""
    calls: dict[Any, Callable[..., mx.array]] = field(default_factory=dict)
    """What has been prepared for the layers that are alike."""


class Part(NamedTuple):
    """The sequences of a step that one kernel computes."""

    tokens: slice | mx.array
    """Their rows in q."""
    metadata: AttentionMetadata


class Parts(NamedTuple):
    token_order: mx.array | None
    """The row of each token in the parts' outputs. None: the same as in q."""
    decodes: Part | None
    """Of one query each."""
    short: Part | None
    """Of a few queries each, which paged_decode takes, too."""
    prefills: Part | None
    gathered: Part | None
    """Long stretches of prompts, for MLX's own attention."""


def split_by_kernel(metadata: AttentionMetadata, max_decode_queries: int, is_gathered: np.ndarray | bool) -> Parts:
    """Which sequences go to which kernel. is_gathered: bool [num_seqs], or of all."""
    query_lens = metadata.query_lens
    is_decode = (query_lens > 0) & (query_lens <= max_decode_queries)
    is_one, is_longer = query_lens == 1, ~is_decode
    members = is_decode & is_one, is_decode & ~is_one, is_longer & np.logical_not(is_gathered), is_longer & is_gathered
    if any(each.all() for each in members):
        whole = Part(slice(None), metadata) if len(is_decode) else None
        return Parts(None, *(whole if each.all() else None for each in members))
    parts, all_tokens = [], []
    for each in members:
        seqs = np.flatnonzero(each)
        lengths = query_lens[seqs]
        cu_seqlens_q = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = np.repeat(metadata.cu_seqlens_q[seqs] - cu_seqlens_q[:-1], lengths) + np.arange(cu_seqlens_q[-1])
        parts.append(Part(index_rows(tokens), metadata.select(seqs, cu_seqlens_q)) if len(seqs) else None)
        all_tokens.append(tokens)
    order = np.argsort(np.concatenate(all_tokens)).astype(np.int32)
    return Parts(None if (order == np.arange(len(order))).all() else mx.array(order), *parts)


def to_device(items: WorkItems, launch: Launch) -> Plan:
    """The items as the kernels take them."""
    return Plan(launch, padded(items.work), len(items.work), items.num_parts, padded(items.cu_parts), items.is_split)


def padded(values: np.ndarray) -> mx.array:
    """int32 on the device, with zeros for rows until there are MIN_INPUT_SIZE elements."""
    missing = max(0, -(-MIN_INPUT_SIZE // max(1, values[:1].size)) - len(values))
    return mx.array(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))
