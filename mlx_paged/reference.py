"""Paged attention in plain MLX operations: runs on any device, and is what the kernels are measured against.

Sequences with equally many queries and contexts of similar length are computed together, so a batch of decodes costs
a few operations however many sequences it has. What one operation gathers or scores stays under `_MAX_BYTES`.

Decodes are split over their contexts (as in Flash-Decoding): all chunks of all sequences have one size and are
computed as one batch, then the chunks of each sequence are merged. Short and long contexts so share a few operations
without being padded to the longest.

K and V are gathered a row of one head at a time, straight into the order that the matrix products want: on a CPU
gathering whole blocks and then transposing takes five times as long. Positions past a sequence's context read its
last token again, so that what unused slots hold, NaN included, is never read. Where the rows are is computed on the
device, once per step: the host handles a few numbers per sequence, whatever the contexts.

On a CPU decodes over float32 keys gather values alone: MLX's `gather_mm` multiplies queries with keys where they lie. A
block is a matrix [block_size, num_kv_heads * dim], so a query goes in with zeros in the place of the other heads. That
multiplies num_kv_heads times as often and still is faster, up to 8 of them: memory is what this waits for. And as MLX
computes a stream of operations on one core, half of many chunks go into a second stream, which the first then waits
for: what follows there, such as the next write, cannot overtake it.
"""

from __future__ import annotations

import math
import platform
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from mlx_paged.shared_prefix import SharedPrefix

if TYPE_CHECKING:
    from mlx_paged.attention import AttentionMetadata

_MAX_BYTES = 128 << 20
_PARTS = np.array([1, 2, 4, 8, 16])  # of the longest context: the choice of chunk sizes
_CHUNK_COST = 32  # what a further chunk costs, in keys
_MOST_HEADS_AT_ONCE = 8  # KV heads, for products with whole blocks to be faster than copies
_LEAST_FOR_TWO_STREAMS = 16384  # keys of chunks: with fewer a second stream costs more than it brings
_CACHED_BYTES = 2 << 20  # of scores: on a CPU a prompt is computed in tiles that stay in its cache
_LEAST_TILE = 16  # queries
_LEAST_SAVED = 4096  # keys that are not read again, for a prefix to be computed once for all that share it
_MOST_SHARED = 4  # prefixes of a step that are
_LOG2_E = 1 / math.log(2)
_EXP2 = Chebyshev.interpolate(np.exp2, 5, domain=[-1, 0]).convert(kind=Polynomial).coef.tolist()  # error below 1e-7


class _Merge(NamedTuple):
    """Which chunks make up each sequence."""

    chunks: mx.array  # int32 [num_seqs, max_chunks]
    bias: mx.array  # [num_seqs, max_chunks, 1, 1, 1]: -inf for chunks that the sequence does not have, otherwise 0


class _Decodes(NamedTuple):
    """Sequences with one query each, their keys cut into chunks of one size."""

    tokens: mx.array | None  # int32 [num_chunks]: the row in q of each chunk's query, None if its own number
    num_kv_heads: int
    parts: list[_Chunks]  # computed at the same time, if there are several
    merge: _Merge | None  # None: one chunk each
    shared: list[_SharedKeys]  # whose results, member by member, are chunks that follow those


class _Chunks(NamedTuple):
    """Some of the chunks."""

    span: slice  # which
    stream: mx.ThreadLocalStream | None  # None: the current one
    rows: mx.array  # int32 [num_chunks, num_kv_heads, chunk_size]: the keys' rows in the cache as [-1, dim]
    bias: mx.array  # [num_chunks or 1, 1, 1, chunk_size or 1]: -inf for keys that the chunk does not have, otherwise 0
    blocks: _Blocks | None  # None: keys are gathered


class _Blocks(NamedTuple):
    """Pairs of chunks and blocks of keys."""

    chunks: mx.array  # uint32 [num_chunks, blocks_per_chunk]: the number of the chunk
    block_ids: mx.array  # likewise; another block of the sequence in the place of one that the chunk does not have
    visible: mx.array  # bool [num_chunks, 1, 1, chunk_size]: which keys are the chunk's
    own_head: mx.array  # [num_kv_heads, 1, num_kv_heads, 1]: 1 for a head with itself, otherwise 0


class _SharedKeys(NamedTuple):
    """Keys that several decodes share."""

    tokens: mx.array  # int32 [num_members]: the rows of their queries in q
    rows: mx.array  # int32 [num_kv_heads, num_keys]: the keys' rows in the cache as [-1, dim]


class _Prompts(NamedTuple):
    """Sequences with several queries each, and the keys that they see."""

    tokens: mx.array  # int32 [num_seqs, num_queries]: the queries' rows in q
    rows: mx.array  # int32 [num_seqs, num_kv_heads, num_keys]: the keys' rows in the cache as [-1, dim]
    visible: mx.array  # bool [num_seqs, 1, num_queries, num_keys]


class _Plan(NamedTuple):
    groups: list[_Decodes | _Prompts]
    order: mx.array | None  # int32 [num_tokens]: the row of each token in the groups' outputs, None if the same
    num_padding: int  # tokens of sequences without context, whose outputs come last


class _Shape(NamedTuple):
    """What a plan depends on beside the step's metadata."""

    block_size: int
    num_kv_heads: int
    num_heads: int
    dims: int  # of a key and a value together
    window: int | None
    dtype: mx.Dtype  # of the caches

    @property
    def reads_blocks(self) -> bool:
        """Whether decodes read keys where they lie."""
        whole = self.window is None and self.num_kv_heads <= _MOST_HEADS_AT_ONCE
        return whole and self.dtype == mx.float32 and mx.default_device() == mx.cpu


class _Rows(NamedTuple):
    """The caches as [-1, dim]."""

    k: mx.array
    v: mx.array


def attend(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """The reference backend of `paged_attention`; shapes as there."""
    _, block_size, num_kv_heads, key_dim = k_cache.shape
    num_heads, value_dim = q.shape[1], v_cache.shape[3]
    shape = _Shape(block_size, num_kv_heads, num_heads, key_dim + value_dim, window, k_cache.dtype)
    plan = metadata.derive(shape, lambda: _plan(metadata, shape))
    caches = _Rows(k_cache.flatten(0, 2), v_cache.flatten(0, 2))
    outputs = []
    for group in plan.groups:
        compute = _decode if isinstance(group, _Decodes) else _prefill
        outputs.append(compute(q, caches, group, scale, softcap, sinks))
    if plan.num_padding or not outputs:
        outputs.append(mx.zeros((plan.num_padding, num_heads, value_dim), q.dtype))
    result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
    return result if plan.order is None else result[plan.order]


def _decode(
    q: mx.array, caches: _Rows, group: _Decodes, scale: float, softcap: float | None, sinks: mx.array | None
) -> mx.array:
    """q [num_tokens, num_heads, dim] -> [num_seqs, num_heads, value_dim]."""
    num_heads, dim = q.shape[1:]
    queries = q if group.tokens is None else q[group.tokens]
    queries = queries.astype(mx.float32).reshape(-1, group.num_kv_heads, num_heads // group.num_kv_heads, dim)
    results = [_attend_chunks(queries, caches, chunks, scale, softcap) for chunks in group.parts]
    out, log_total = results[0]
    if len(results) > 1:
        out, log_total = (mx.concatenate(list(halves)) for halves in zip(*results, strict=True))
    if group.merge is not None or sinks is not None:
        if group.shared:
            parts = [_attend_shared(q, caches, shared, scale, softcap) for shared in group.shared]
            out = mx.concatenate([out, *(out for out, _ in parts)])
            log_total = mx.concatenate([log_total, *(total for _, total in parts)])
        out = _merged(out, log_total, group.merge, sinks)
    return out.reshape(-1, num_heads, caches.v.shape[1]).astype(q.dtype)


def _attend_chunks(
    queries: mx.array, caches: _Rows, chunks: _Chunks, scale: float, softcap: float | None
) -> tuple[mx.array, mx.array]:
    """The results over chunks and the logs of their totals, both [num_chunks, kv_heads, heads / kv_heads, -1]."""
    with nullcontext() if chunks.stream is None else mx.stream(chunks.stream):
        queries = queries[chunks.span]
        if chunks.blocks is None:
            scores = _scores(queries, caches.k[chunks.rows], chunks.bias, scale, softcap)
        else:
            scores = _scores_in_blocks(queries, caches.k, chunks.blocks, scale, softcap)
        weights, log_total = _softmax(scores)
        return weights @ caches.v[chunks.rows].astype(mx.float32), log_total


def _attend_shared(
    q: mx.array, caches: _Rows, shared: _SharedKeys, scale: float, softcap: float | None
) -> tuple[mx.array, mx.array]:
    """The results over shared keys and the logs of their totals, both [num_members, kv_heads, heads / kv_heads, -1].

    All members' queries of a KV head are rows of one product.
    """
    num_kv_heads, num_members = shared.rows.shape[0], shared.tokens.shape[0]
    queries = q[shared.tokens].astype(mx.float32).reshape(num_members, num_kv_heads, -1, q.shape[2])
    queries = queries.swapaxes(0, 1).flatten(1, 2)
    scores = _scores(queries, caches.k[shared.rows], mx.zeros((1, 1, 1)), scale, softcap)
    weights, log_total = _softmax(scores)
    results = weights @ caches.v[shared.rows].astype(mx.float32), log_total
    out, log_total = (array.reshape(num_kv_heads, num_members, -1, array.shape[2]) for array in results)
    return out.swapaxes(0, 1), log_total.swapaxes(0, 1)


def _scores(queries: mx.array, keys: mx.array, bias: mx.array, scale: float, softcap: float | None) -> mx.array:
    """[..., rows, keys]; queries: float32 [..., rows, dim], keys: [..., keys, dim]."""
    keys = keys.astype(mx.float32).swapaxes(-1, -2)
    if softcap is None:
        return mx.addmm(bias, queries, keys, alpha=scale)
    return mx.tanh((queries * (scale / softcap)) @ keys) * softcap + bias


def _scores_in_blocks(
    queries: mx.array, keys: mx.array, blocks: _Blocks, scale: float, softcap: float | None
) -> mx.array:
    """queries [num_chunks, kv_heads, heads / kv_heads, dim] -> [num_chunks, kv_heads, heads / kv_heads, chunk_size].

    Where a chunk has no key anything may have been read, NaN included, and the score is -inf.
    """
    num_chunks, num_kv_heads, num_grouped, dim = queries.shape
    chunk_size, num_blocks = blocks.visible.shape[3], blocks.chunks.shape[1]
    own_head = blocks.own_head * (scale if softcap is None else scale / softcap)
    spread = (mx.expand_dims(queries, 3) * own_head).reshape(num_chunks, -1, num_kv_heads * dim)
    keys = keys.reshape(-1, chunk_size // num_blocks, num_kv_heads * dim).swapaxes(1, 2)
    scores = mx.gather_mm(spread, keys, blocks.chunks, blocks.block_ids)
    scores = scores.swapaxes(1, 2).reshape(num_chunks, num_kv_heads, num_grouped, chunk_size)
    if softcap is not None:
        scores = mx.tanh(scores) * softcap
    return mx.where(blocks.visible, scores, -mx.inf)


def _softmax(scores: mx.array) -> tuple[mx.array, mx.array]:
    """Over the last axis, and the logs of the sums of exp(scores), [..., 1]; float32."""
    top = scores.max(axis=-1, keepdims=True)
    if _exp_is_slow():
        weights = _exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        return weights / total, top + mx.log(total)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return weights, top - mx.log(weights.max(axis=-1, keepdims=True))  # no second pass of exp


def _exp_is_slow() -> bool:
    """Where MLX computes exponentials one by one: on x86 20 to 30 ns each, where those of `_exp` take 7."""
    return mx.default_device() == mx.cpu and platform.machine() in ("x86_64", "AMD64")


def _exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, as 2**(n + f) with f in (-1, 0]: by its exponent and a polynomial.

    It is never less than 2**-100, 8e-31, so that no product of it is denormal: those take several times as long.
    """
    x = mx.maximum(x * _LOG2_E, -100)
    n = x.astype(mx.int32)
    f = x - n
    power = _EXP2[-1]
    for coefficient in _EXP2[-2::-1]:
        power = power * f + coefficient
    return power * ((n + 127) << 23).view(mx.float32)


def _merged(out: mx.array, log_total: mx.array, merge: _Merge | None, sinks: mx.array | None) -> mx.array:
    """The mean over each sequence's chunks, weighed by exp(log_total); a sink is one more chunk, of zeros.

    out: [num_chunks, kv_heads, heads / kv_heads, value_dim] -> [num_seqs, kv_heads, heads / kv_heads, 1, value_dim].
    """
    if merge is None:
        out, log_total = out[:, None], log_total[:, None]
    else:
        out, log_total = out[merge.chunks], log_total[merge.chunks] + merge.bias
    out, log_total = out.transpose(0, 2, 3, 1, 4), log_total.transpose(0, 2, 3, 4, 1)
    if sinks is None:
        return mx.softmax(log_total, axis=-1) @ out
    sink = sinks.astype(mx.float32).reshape(1, *log_total.shape[1:3], 1, 1)
    log_total = mx.concatenate([log_total, mx.broadcast_to(sink, (*log_total.shape[:4], 1))], axis=-1)
    return mx.softmax(log_total, axis=-1)[..., :-1] @ out


def _prefill(
    q: mx.array, caches: _Rows, group: _Prompts, scale: float, softcap: float | None, sinks: mx.array | None
) -> mx.array:
    """q [num_tokens, num_heads, dim] -> [num_seqs * num_queries, num_heads, value_dim]."""
    # On a CPU float32 is both the precise and the fast arithmetic.
    dtype = mx.float32 if mx.default_device() == mx.cpu else q.dtype
    queries = q[group.tokens].astype(dtype).transpose(0, 2, 1, 3)
    sinks = None if sinks is None else sinks.astype(dtype)
    k, v = (cache[group.rows].astype(dtype) for cache in caches)
    if softcap is None and not _exp_is_slow():
        out = mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=group.visible, sinks=sinks)
    else:
        out = _softmax_attention(queries, k, v, group.visible, scale, softcap, sinks)
    return out.transpose(0, 2, 1, 3).flatten(0, 1).astype(q.dtype)


def _softmax_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    visible: mx.array,
    scale: float,
    softcap: float | None,
    sinks: mx.array | None,
) -> mx.array:
    """q [batch, heads, queries, dim], k and v [batch, kv_heads, keys, dim], visible [batch, 1, queries, keys]."""
    batch, heads, queries, dim = q.shape
    num_kv_heads, keys = k.shape[1:3]
    q = (q * (scale if softcap is None else scale / softcap)).reshape(batch, num_kv_heads, -1, dim)
    scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32).reshape(batch, heads, queries, keys)
    if softcap is not None:
        scores = mx.tanh(scores) * softcap
    scores = mx.where(visible, scores, -mx.inf)
    if sinks is not None:
        sink_column = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, -1, 1, 1), (batch, heads, queries, 1))
        scores = mx.concatenate([scores, sink_column], axis=-1)
    weights = _softmax(scores)[0][..., :keys].astype(v.dtype)
    return (weights.reshape(batch, num_kv_heads, -1, keys) @ v).reshape(batch, heads, queries, -1)


def _plan(metadata: AttentionMetadata, shape: _Shape) -> _Plan:
    """How to compute a step, for layers of this shape."""
    contexts, lengths, starts = metadata.context_lens, metadata.query_lens, metadata.cu_seqlens_q
    max_keys = _MAX_BYTES // (4 * shape.num_kv_heads * shape.dims)
    groups: list[_Decodes | _Prompts] = []
    runs: list[np.ndarray] = []  # first and last token of those computed together, in the order of the outputs
    all_decode = np.count_nonzero(lengths == 1) == np.count_nonzero(contexts) == len(lengths)
    for num_queries in [1] if all_decode else sorted(set(lengths.tolist()) - {0}):
        seqs = np.arange(len(lengths))
        if not all_decode:
            seqs = np.flatnonzero((lengths == num_queries) & (contexts > 0))
        num_keys = contexts if shape.window is None else np.minimum(contexts, num_queries + shape.window - 1)
        prefixes = []
        if num_queries == 1 and shape.window is None and metadata.find_shared is not None:
            prefixes = _worth_sharing(metadata.find_shared(seqs))
            num_keys = _without(prefixes, seqs, num_keys)
        most, spread = max_keys, int(_PARTS[-1]) if num_queries == 1 else 2
        if num_queries > 1 and mx.default_device() == mx.cpu:
            most = min(most, _CACHED_BYTES // (4 * shape.num_heads * min(num_queries, _LEAST_TILE)))
        for members in _similar_lengths(seqs, num_keys, most, spread):
            if num_queries == 1:
                groups.append(_decodes(metadata, shape, members, num_keys[members], _among(prefixes, seqs, members)))
                if len(members) == len(lengths):  # the common case
                    return _Plan(groups, None, 0)
                runs.append(starts[members, None] + [0, 0])
                continue
            tile = _tile(4 * shape.num_heads * len(members) * int(num_keys[members].max()))
            for begin in range(0, num_queries, tile):
                size = min(tile, num_queries - begin)
                groups.append(_prompts(metadata, shape, members, begin, size))
                runs.append(starts[members, None] + [begin, begin + size - 1])
    runs += [starts[i : i + 2][None] - [0, 1] for i in np.flatnonzero((contexts == 0) & (lengths > 0))]
    num_padding = int(lengths[contexts == 0].sum())
    first, last = np.concatenate([*runs, np.zeros((0, 2), np.int64)]).T
    if len(first) == 0 or (first[0] == 0 and (first[1:] == last[:-1] + 1).all()):
        return _Plan(groups, None, num_padding)
    tokens = [np.arange(begin, end + 1) for begin, end in zip(first.tolist(), last.tolist(), strict=True)]
    return _Plan(groups, mx.array(np.argsort(np.concatenate(tokens)).astype(np.int32)), num_padding)


def _tile(bytes_per_query: int) -> int:
    """How many queries of prompts are computed at once."""
    most = _MAX_BYTES // bytes_per_query
    if mx.default_device() == mx.cpu:
        most = min(most, max(_LEAST_TILE, _CACHED_BYTES // bytes_per_query))
    return max(1, most)


def _worth_sharing(prefixes: list[SharedPrefix]) -> list[SharedPrefix]:
    """Those that are computed apart: each costs some twenty operations in each layer."""
    by_size = sorted(prefixes, key=lambda prefix: prefix.num_saved, reverse=True)
    return [prefix for prefix in by_size[:_MOST_SHARED] if prefix.num_saved >= _LEAST_SAVED]


def _without(prefixes: list[SharedPrefix], seqs: np.ndarray, num_keys: np.ndarray) -> np.ndarray:
    """num_keys, less those that are computed apart. Members of prefixes are indices into `seqs`."""
    own = num_keys.copy() if prefixes else num_keys
    for prefix in prefixes:
        own[seqs[prefix.members]] -= prefix.num_tokens
    return own


def _among(prefixes: list[SharedPrefix], seqs: np.ndarray, some: np.ndarray) -> list[SharedPrefix]:
    """The prefixes with their members among `some` of the `seqs`, as indices into `some`."""
    found = [SharedPrefix(np.flatnonzero(np.isin(some, seqs[each.members])), each.num_tokens) for each in prefixes]
    return [prefix for prefix in found if len(prefix.members)]


def _decodes(
    metadata: AttentionMetadata, shape: _Shape, seqs: np.ndarray, num_keys: np.ndarray, prefixes: list[SharedPrefix]
) -> _Decodes:
    """The queries of decodes, each of which sees the last `num_keys` tokens of its sequence, and the prefixes."""
    chunk_size, num_chunks = _chunks(num_keys, shape.block_size if shape.reads_blocks else 1)
    end, owners = metadata.context_lens[seqs], seqs
    begin, merge = end - num_keys, None
    shared: list[_SharedKeys] = []
    if np.count_nonzero(num_chunks > 1) or prefixes:
        ends = num_chunks.cumsum()
        starts = ends - num_chunks
        chunks, absent = _spans(starts, ends, int(num_chunks[num_chunks.argmax()]))
        merge = _Merge(chunks, absent[:, :, None, None, None])
        owner = np.arange(len(seqs)).repeat(num_chunks)  # of each chunk, its sequence
        begin = begin[owner] + (np.arange(len(owner)) - starts[owner]) * chunk_size
        end, owners = end[owner], seqs[owner]
        if prefixes:
            shared, merge = _shared_keys(metadata, shape, seqs, prefixes, merge, len(owner))
    positions, bias = _spans(begin, end, chunk_size)
    rows = _rows(metadata, shape, _column(owners), positions)
    tokens = metadata.cu_seqlens_q[owners]
    in_order = len(tokens) == metadata.cu_seqlens_q[-1] and (tokens == np.arange(len(tokens))).all()
    bias = bias[:, None, None]
    all_chunks = _Chunks(slice(None), None, rows, bias, None)
    if shape.reads_blocks:
        first_keys = positions[:, :: shape.block_size]  # of each block; or the sequence's last one
        block_ids = metadata.block_tables[_column(owners), first_keys // shape.block_size].astype(mx.uint32)
        numbers = mx.broadcast_to(mx.arange(len(owners), dtype=mx.uint32)[:, None], block_ids.shape)
        visible = mx.broadcast_to(bias == 0, (len(owners), 1, 1, chunk_size))
        own_head = mx.eye(shape.num_kv_heads)[:, None, :, None]
        all_chunks = all_chunks._replace(blocks=_Blocks(mx.contiguous(numbers), block_ids, visible, own_head))
    parts = [all_chunks]
    if mx.default_device() == mx.cpu and len(owners) > 1 and len(owners) * chunk_size >= _LEAST_FOR_TWO_STREAMS:
        parts = _halves(all_chunks, len(owners) // 2)
    return _Decodes(None if in_order else mx.array(tokens), shape.num_kv_heads, parts, merge, shared)


def _halves(chunks: _Chunks, middle: int) -> list[_Chunks]:
    """The first `middle` chunks, and the others in a second stream."""
    halves = []
    for span, stream in ((slice(middle), None), (slice(middle, None), _second_stream())):
        bias = chunks.bias if len(chunks.bias) == 1 else chunks.bias[span]
        blocks = chunks.blocks
        if blocks is not None:
            numbers = blocks.chunks[: len(chunks.rows[span])]
            blocks = _Blocks(numbers, blocks.block_ids[span], blocks.visible[span], blocks.own_head)
        halves.append(_Chunks(span, stream, chunks.rows[span], bias, blocks))
    return halves


@cache
def _second_stream() -> mx.ThreadLocalStream:
    """Of each thread its own, as MLX's default streams are."""
    return mx.new_thread_local_stream(mx.cpu)


def _shared_keys(
    metadata: AttentionMetadata,
    shape: _Shape,
    seqs: np.ndarray,
    prefixes: list[SharedPrefix],
    merge: _Merge,
    num_chunks: int,
) -> tuple[list[_SharedKeys], _Merge]:
    """The keys of prefixes, in pieces of bounded size, and `merge` with their results, which follow `num_chunks`."""
    shared, columns = [], []
    for prefix in prefixes:
        per_key = 4 * (len(prefix.members) * shape.num_heads + shape.num_kv_heads * shape.dims)
        size = max(1, _MAX_BYTES // per_key)
        for begin in range(0, prefix.num_tokens, size):
            positions = mx.arange(begin, min(begin + size, prefix.num_tokens), dtype=mx.int32)[None]
            rows = _rows(metadata, shape, _column(seqs[prefix.members[:1]]), positions)[0]
            shared.append(_SharedKeys(mx.array(metadata.cu_seqlens_q[seqs[prefix.members]]), rows))
            column = np.full(len(seqs), -1)
            column[prefix.members] = num_chunks + np.arange(len(prefix.members))
            columns.append(column)
            num_chunks += len(prefix.members)
    more = np.stack(columns, axis=1)
    absent = np.where(more < 0, -np.float32(np.inf), np.float32(0))[:, :, None, None, None]
    chunks = mx.concatenate([merge.chunks, mx.array(np.maximum(more, 0).astype(np.int32))], axis=1)
    bias = mx.broadcast_to(merge.bias, (*merge.chunks.shape, 1, 1, 1))
    return shared, _Merge(chunks, mx.concatenate([bias, mx.array(absent)], axis=1))


def _chunks(num_keys: np.ndarray, unit: int) -> tuple[int, np.ndarray]:
    """The size of chunks, a multiple of `unit`, and the number of chunks of each sequence.

    It is the one with the least work: small ones leave few places empty, but each costs something.
    """
    sizes = np.ceil(num_keys[num_keys.argmax()] / (_PARTS * unit)) * unit
    num_chunks = np.ceil(num_keys[:, None] / sizes)  # exact: the numbers are far below 2**52
    best = (np.add.reduce(num_chunks) * (sizes + _CHUNK_COST)).argmin()
    return int(sizes[best]), num_chunks[:, best].astype(np.int64)


def _spans(begin: np.ndarray, end: np.ndarray, size: int) -> tuple[mx.array, mx.array]:
    """int32 [n, size]: begin[i], begin[i] + 1, ..., but never past end[i] - 1.

    And float [n or 1, size or 1], a bias: -inf where they would be past it, otherwise 0.
    """
    numbers = _column(begin) + mx.arange(size, dtype=mx.int32)
    if not np.count_nonzero(begin + size > end):
        return numbers, mx.zeros((1, 1))
    last = _column(end - 1)
    return mx.minimum(numbers, last), mx.where(numbers <= last, 0.0, -mx.inf)


def _prompts(metadata: AttentionMetadata, shape: _Shape, seqs: np.ndarray, begin: int, num_queries: int) -> _Prompts:
    """The queries `begin` and following of each sequence, and the keys that they see."""
    first_query = metadata.context_lens[seqs] - metadata.query_lens[seqs] + begin
    last_query = first_query + num_queries - 1
    first_key = np.zeros_like(first_query)
    if shape.window is not None:
        first_key = np.maximum(first_query + 1 - shape.window, 0)
    queries = mx.arange(num_queries, dtype=mx.int32)
    positions = _column(first_key) + mx.arange(int((last_query - first_key).max()) + 1, dtype=mx.int32)
    distance = (_column(first_query) + queries)[:, :, None] - positions[:, None]
    visible = distance >= 0
    if shape.window is not None:
        visible = visible & (distance < shape.window)
    rows = _rows(metadata, shape, _column(seqs), mx.minimum(positions, _column(last_query)))
    return _Prompts(_column(metadata.cu_seqlens_q[seqs] + begin) + queries, rows, visible[:, None])


def _rows(metadata: AttentionMetadata, shape: _Shape, seqs: mx.array, positions: mx.array) -> mx.array:
    """[n, num_kv_heads, keys]: where the cache has the keys at `positions`, [n, keys], of `seqs`, [n, 1].

    int32 is wide enough: as [rows, dim] an array of MLX has fewer than 2**31 rows.
    """
    block, offset = mx.divmod(positions, shape.block_size)
    rows = (metadata.block_tables[seqs, block] * shape.block_size + offset) * shape.num_kv_heads
    return mx.expand_dims(rows, 1) + mx.arange(shape.num_kv_heads, dtype=mx.int32).reshape(-1, 1)


def _column(values: np.ndarray) -> mx.array:
    """int32 [n, 1] on the device."""
    return mx.array(values[:, None].astype(np.int32))


def _similar_lengths(seqs: np.ndarray, num_keys: np.ndarray, max_keys: int, spread: int) -> list[np.ndarray]:
    """Split sequences into groups whose longest is at most `spread` times the shortest (or 64 keys, if that is more).

    Were all as long as its longest, a group would have at most `max_keys` keys.
    """
    if len(seqs) == 0:
        return []
    own = num_keys[seqs]
    longest = own[own.argmax()]  # not max(), here and below: that goes through Python, at a multiple of the cost
    if longest <= spread * max(64, own[own.argmin()]) and longest * len(seqs) <= max_keys:
        return [seqs]
    groups: list[np.ndarray] = []
    by_length = seqs[np.argsort(num_keys[seqs], kind="stable")]
    sorted_keys = num_keys[by_length].tolist()
    begin = 0
    for end in range(1, len(by_length) + 1):
        longest = sorted_keys[end] if end < len(by_length) else None
        if (
            longest is None
            or longest > spread * max(64, sorted_keys[begin])
            or longest * (end + 1 - begin) > max_keys
        ):
            groups.append(np.sort(by_length[begin:end]))
            begin = end
    return groups
