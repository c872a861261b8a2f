"""Attention of ragged queries over a paged KV cache: the public function, and the choice of its backend."""

import os
import warnings
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_paged.attention.backend import AttentionOptions, Backend
from mlx_paged.attention.cpu import CpuBackend
from mlx_paged.attention.cuda import CudaBackend
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.metal import MetalBackend
from mlx_paged.attention.reference import ReferenceBackend
from mlx_paged.attention.shared_prefix import find_shared_prefixes
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.errors import EngineWarning
from mlx_paged.kernels import BACKEND_VARIABLE

BACKENDS: dict[str, Backend] = {kind.name: kind() for kind in (MetalBackend, CudaBackend, CpuBackend, ReferenceBackend)}
"""By name, the best first."""


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
    backend: a name of BACKENDS, or None for what the environment variable MLX_PAGED_BACKEND says, otherwise the best
    one available.

    Returns [num_tokens, num_heads, value_dim] in q's dtype; a sequence with context 0 is padding and gives zeros.
    Values in unused slots, NaN included, have no influence. Raises ValueError or TypeError for arguments that don't
    fit together.
    """
    if q.ndim != 3 or k_cache.ndim != 4 or v_cache.ndim != 4:
        raise ValueError(
            "q must be [num_tokens, num_heads, head_dim], the caches [num_blocks, block_size, num_kv_heads, head_dim]; "
            f"got {list(q.shape)}, {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    _check_arrays(q, k_cache, v_cache, sinks)
    arrays = {"block_tables": block_tables, "context_lens": context_lens, "cu_seqlens_q": cu_seqlens_q}
    metadata = _checked_metadata(q.shape[0], k_cache.shape[0], k_cache.shape[1], arrays)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query sees itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    q, k_cache, v_cache = map(mx.contiguous, (q, k_cache, v_cache))  # copies nothing that is
    sinks = None if sinks is None else mx.contiguous(sinks)
    layer = LayerSpec(k_cache.shape[2], k_cache.shape[3], v_cache.shape[3], q.dtype)
    chosen = choose_backend(layer, q.shape[1], k_cache.shape[1], backend)
    options = AttentionOptions(scale, window, softcap, sinks)
    return chosen.attend(q, LayerPool({"k": k_cache, "v": v_cache}), metadata, options)


def choose_backend(layer: LayerSpec, num_heads: int, block_size: int, asked: str | None = None) -> Backend:
    """What the caller, the environment or the device asks for. Raises ValueError if that can't be had."""
    forced = asked or os.environ.get(BACKEND_VARIABLE)
    available = [backend for backend in BACKENDS.values() if backend.is_available()]
    names = [backend.name for backend in available]
    if forced and forced not in names:
        origin = "" if asked else f" ({BACKEND_VARIABLE})"
        raise ValueError(f"backend {forced!r}{origin} is not available here; there is: {', '.join(names)}")
    for backend in [BACKENDS[forced]] if forced else available:
        reason = backend.unsupported(layer, num_heads, block_size)
        if reason is None:
            return backend
        if forced:
            raise ValueError(reason)
        _warn_once(f"{reason}; plain MLX operations take its place, more slowly")
    raise AssertionError("the reference backend computes everything")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, EngineWarning, stacklevel=4)


def _check_arrays(q: mx.array, k_cache: mx.array, v_cache: mx.array, sinks: mx.array | None) -> None:
    """Raise ValueError for arrays that do not fit together, TypeError if it is for their dtypes."""
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise TypeError(f"q, k_cache and v_cache differ in dtype: {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"k_cache and v_cache differ in blocks: {list(k_cache.shape)} and {list(v_cache.shape)}")
    if q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"head_dim of q is {q.shape[2]}, that of k_cache {k_cache.shape[3]}")
    if q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads can't share {k_cache.shape[2]} KV heads evenly")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must have one value per query head, [{q.shape[1]}], got {list(sinks.shape)}")


def _checked_metadata(
    num_tokens: int, num_blocks: int, block_size: int, arrays: dict[str, mx.array | np.ndarray]
) -> AttentionMetadata:
    """Check, on the host, the arrays of `paged_attention` that say where tokens lie. Raises ValueError or TypeError."""
    host = {name: np.array(array, order="C") for name, array in arrays.items()}
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
    if starts[0] != 0 or (lengths < 0).any() or starts[-1] != num_tokens:
        raise ValueError(f"cu_seqlens_q must rise from 0 to the {num_tokens} tokens of q, got {starts.tolist()}")
    if (contexts < 0).any():
        raise ValueError(f"context_lens must not be negative, got {contexts.tolist()}")
    for i in np.nonzero((lengths > contexts) & (contexts > 0))[0]:
        raise ValueError(f"sequence {i} has {lengths[i]} queries but a context of {contexts[i]} tokens")
    for i in np.nonzero(contexts > tables.shape[1] * block_size)[0]:
        raise ValueError(
            f"sequence {i} has a context of {contexts[i]} tokens, its table room for {tables.shape[1] * block_size}"
        )
    used = np.arange(tables.shape[1])[None, :] < -(-contexts // block_size)[:, None]
    if (bad := tables[used & ((tables < 0) | (tables >= num_blocks))]).size:
        raise ValueError(f"block_tables names block {bad[0]}; the cache has blocks 0 to {num_blocks - 1}")
    seen = contexts - lengths + 1  # by first queries
    return AttentionMetadata(
        mx.array(tables), contexts, starts, lambda seqs: find_shared_prefixes(tables[seqs], seen[seqs], block_size)
    )
