"""Attention of ragged queries over a paged KV cache: the public function, what a step's layers share, and backends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention import cuda, metal, reference
from mlx_paged.attention.kernel_backend import DecodePlan, shape_of
from mlx_paged.attention.metadata import AttentionMetadata, index_rows
from mlx_paged.attention.shared_prefix import SharedPrefix, find_shared_prefixes
from mlx_paged.attention.work_items import Shape
from mlx_paged.errors import EngineWarning

KERNELS = {"metal": metal, "cuda": cuda}  # modules with the same functions
WRITERS = {"cuda": cuda.write}  # those of backends that write into a pool which something still reads
BACKENDS = (*KERNELS, "reference")
BACKEND_VARIABLE = "MLX_PAGED_BACKEND"


def paged_attention(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    block_tables: mx.array | np.ndarray,
    context_lens: mx.array | np.ndarray,
    cu_seqlens_q: mx.array | np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    backend: str | None = None,
) -> mx.array:
    """Causal attention of the last tokens of each sequence over the sequence's blocks (Kwon et al. 2023).

    q: [num_tokens, num_heads, head_dim]; k_cache: [num_blocks, block_size, num_kv_heads, head_dim]; v_cache: the same
    with its own head size; both already hold the K and V of the queries' tokens. block_tables: int32 [num_seqs,
    max_blocks], entries past a sequence's context are ignored; context_lens: int32 [num_seqs]; cu_seqlens_q: int32
    [num_seqs + 1]. num_heads is a multiple of num_kv_heads.

    scale: multiplies the scores. window: a query sees its own key and the window - 1 before it. softcap: scores become
    softcap * tanh(score / softcap). sinks: [num_heads], a logit that takes part in each softmax without a value.
    backend: "metal", "cuda", "reference", or None for what the environment variable MLX_PAGED_BACKEND says, otherwise
    the best one available.

    Returns [num_tokens, num_heads, value_dim] in q's dtype; a sequence with context 0 is padding and gives zeros.
    Values in unused slots, NaN included, have no influence. Raises ValueError or TypeError for arguments that don't
    fit together.
    """
    metadata = _checked_metadata(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query sees itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must have one value per query head, [{q.shape[1]}], got {list(sinks.shape)}")
    q, k_cache, v_cache = map(mx.contiguous, (q, k_cache, v_cache))  # copies nothing that is
    return attend(
        q, k_cache, v_cache, metadata, scale=scale, window=window, softcap=softcap, sinks=sinks, backend=backend
    )


def attend(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    written: mx.array | None = None,
    backend: str | None = None,
) -> mx.array:
    """`paged_attention` without its checks, for callers whose metadata is right by construction.

    The caches must be contiguous, and the rows of q: nothing here makes them so. written: what the writer of the
    backend returned that last wrote into them, if one did.
    """
    arguments: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    name = backend_of(q, k_cache, v_cache, metadata, backend)
    metadata.backends.add(name)
    if module := KERNELS.get(name):
        return _attend_with_kernels(module, q, k_cache, v_cache, metadata, arguments | {"written": written})
    return reference.attend(q, k_cache, v_cache, metadata, **arguments)


def backend_of(
    q: mx.array, k_cache: mx.array, v_cache: mx.array, metadata: AttentionMetadata, backend: str | None = None
) -> str:
    """The one that `attend` takes for such arrays. Raises ValueError if the one asked for is not to be had."""
    asked = (backend, q.dtype, q.shape[1], k_cache.shape[1:], v_cache.shape[3])
    name: str = metadata.plan_once(asked, lambda: _chosen_backend(*asked))
    return name


def _chosen_backend(
    backend: str | None, dtype: mx.Dtype, num_heads: int, block_shape: Sequence[int], value_dim: int
) -> str:
    """What the caller, the environment or the device asks for. Raises ValueError if that is not to be had.

    block_shape: block_size, num_kv_heads, head_dim.
    """
    forced = backend or os.environ.get(BACKEND_VARIABLE)
    available = [name for name, module in KERNELS.items() if module.is_available()] + ["reference"]
    if forced and forced not in available:
        origin = "" if backend else f" ({BACKEND_VARIABLE})"
        raise ValueError(f"backend {forced!r}{origin} is not available here; there is: {', '.join(available)}")
    name = forced or available[0]
    if name == "reference":
        return name
    reason = KERNELS[name].unsupported(dtype, num_heads, block_shape, value_dim)
    if reason and forced:
        raise ValueError(reason)
    if reason:
        _warn_once(f"{reason}; plain MLX operations take its place, more slowly")
    return "reference" if reason else name


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, EngineWarning, stacklevel=4)


class _Group(NamedTuple):
    """The sequences of a step that one kernel computes. tokens: their rows in q."""

    tokens: slice | mx.array
    metadata: AttentionMetadata


class _Groups(NamedTuple):
    """A step's sequences, divided by kernel; order: each token's row in the groups' outputs, None if the same."""

    decodes: _Group | None
    prefills: _Group | None
    order: mx.array | None


def _attend_with_kernels(
    module: ModuleType,
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    metadata: AttentionMetadata,
    arguments: dict[str, Any],
) -> mx.array:
    """A GPU's backend of `attend`: sequences with one query by the decode kernel, the others by the prefill's."""
    groups: _Groups = metadata.plan_once("groups of kernels", lambda: _divide(metadata))
    shape, window = shape_of(q, k_cache, v_cache), arguments["window"]
    outputs = []
    if groups.decodes is not None:
        tokens, part = groups.decodes
        plan = part.plan_once(("decode", shape, window), lambda: _plan_decode(module, part, shape, window))
        options = {name: value for name, value in arguments.items() if name != "window"}  # which is in the plan
        outputs.append(module.decode(q[tokens], k_cache, v_cache, part.block_tables, plan, **options))
    if groups.prefills is not None:
        tokens, prompts = groups.prefills
        lengths = prompts.context_lens, prompts.cu_seqlens_q
        plan = prompts.plan_once(("prefill", shape, window), lambda: module.plan_prefill(*lengths, window, shape))
        outputs.append(module.prefill(q[tokens], k_cache, v_cache, prompts.block_tables, plan, **arguments))
    if not outputs:
        return mx.zeros((0, q.shape[1], v_cache.shape[3]), q.dtype)
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return result if groups.order is None else result[groups.order]


def _plan_decode(module: ModuleType, metadata: AttentionMetadata, shape: Shape, window: int | None) -> DecodePlan:
    contexts, find_shared = metadata.context_lens, metadata.find_shared_prefixes
    shared = find_shared(np.arange(len(contexts))) if find_shared is not None and window is None else []
    plan: DecodePlan = module.plan_decode(contexts, window, shape, shared)
    return plan


def _divide(metadata: AttentionMetadata) -> _Groups:
    """Which sequences go to which kernel."""
    single = metadata.query_lens == 1
    if single.all():
        return _Groups(_Group(slice(None), metadata) if len(single) else None, None, None)
    if not single.any():
        return _Groups(None, _Group(slice(None), metadata), None)
    starts = metadata.cu_seqlens_q
    groups, all_tokens = [], []
    for seqs in (np.flatnonzero(single), np.flatnonzero(~single)):
        lengths = metadata.query_lens[seqs]
        cu_seqlens_q = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = np.repeat(starts[seqs] - cu_seqlens_q[:-1], lengths) + np.arange(cu_seqlens_q[-1])
        groups.append(_Group(index_rows(tokens), metadata.select(seqs, cu_seqlens_q)))
        all_tokens.append(tokens)
    order = np.argsort(np.concatenate(all_tokens)).astype(np.int32)
    in_order = (order == np.arange(len(order))).all()
    return _Groups(groups[0], groups[1], None if in_order else mx.array(order))


def _checked_metadata(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    block_tables: mx.array | np.ndarray,
    context_lens: mx.array | np.ndarray,
    cu_seqlens_q: mx.array | np.ndarray,
) -> AttentionMetadata:
    """The metadata, or the first thing wrong with the arguments as an error; checked on the host."""
    if q.ndim != 3 or k_cache.ndim != 4 or v_cache.ndim != 4:
        raise ValueError(
            "q must be [num_tokens, num_heads, head_dim], the caches [num_blocks, block_size, num_kv_heads, head_dim]; "
            f"got {list(q.shape)}, {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise TypeError(f"q, k_cache and v_cache differ in dtype: {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"k_cache and v_cache differ in blocks: {list(k_cache.shape)} and {list(v_cache.shape)}")
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"head_dim of q is {q.shape[2]}, that of k_cache {k_cache.shape[3]}")
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads can't share {k_cache.shape[2]} KV heads evenly")
    arrays = {"block_tables": block_tables, "context_lens": context_lens, "cu_seqlens_q": cu_seqlens_q}
    host = {name: np.array(array) for name, array in arrays.items()}
    for name, array in host.items():
        if array.dtype != np.int32:
            raise TypeError(f"{name} must be int32, got {array.dtype}")
    tables, contexts, starts = host.values()
    if tables.ndim != 2 or contexts.shape != (len(tables),) or starts.shape != (len(tables) + 1,):
        raise ValueError(
            "block_tables must be [num_seqs, max_blocks], context_lens [num_seqs], cu_seqlens_q [num_seqs + 1]; "
            f"got {list(tables.shape)}, {list(contexts.shape)} and {list(starts.shape)}"
        )
    lengths = np.diff(starts)
    if starts[0] != 0 or (lengths < 0).any() or starts[-1] != q.shape[0]:
        raise ValueError(f"cu_seqlens_q must rise from 0 to the {q.shape[0]} tokens of q, got {starts.tolist()}")
    if (contexts < 0).any():
        raise ValueError(f"context_lens must not be negative, got {contexts.tolist()}")
    for i in np.nonzero((lengths > contexts) & (contexts > 0))[0]:
        raise ValueError(f"sequence {i} has {lengths[i]} queries but a context of {contexts[i]} tokens")
    num_blocks, block_size = k_cache.shape[:2]
    for i in np.nonzero(contexts > tables.shape[1] * block_size)[0]:
        raise ValueError(
            f"sequence {i} has a context of {contexts[i]} tokens, its table room for {tables.shape[1] * block_size}"
        )
    used = np.arange(tables.shape[1])[None, :] < -(-contexts // block_size)[:, None]
    if (bad := tables[used & ((tables < 0) | (tables >= num_blocks))]).size:
        raise ValueError(f"block_tables names block {bad[0]}; the cache has blocks 0 to {num_blocks - 1}")

    def find_shared(seqs: np.ndarray) -> list[SharedPrefix]:
        return find_shared_prefixes(tables[seqs], contexts[seqs], block_size)

    return AttentionMetadata(mx.array(tables), contexts, starts, find_shared)
