"""What the reference backend computes together in a step, and where the keys of it are.

Sequences with equally many queries and contexts of similar length are computed together, so a batch of decodes costs
a few operations however many sequences it has. What one operation gathers or scores stays under `_MAX_BYTES`.

Decodes are split over their contexts (as in Flash-Decoding): all chunks of all sequences have one size and are
computed as one batch, then the chunks of each sequence are merged. Short and long contexts so share a few operations
without being padded to the longest. As MLX computes a stream of operations on one core, on a CPU half of many chunks go
into a second stream, which the first then waits for: what follows there, such as the next write, cannot overtake it.

Where the keys are is computed on the device, once per step: the host handles a few numbers per sequence, whatever the
contexts. Positions past a sequence's context stand for its last token again, so that what unused slots hold, NaN
included, is never read.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.shared_prefix import SharedPrefix

if TYPE_CHECKING:
    from mlx_paged.attention.metadata import AttentionMetadata

_MAX_BYTES = 128 << 20
_PARTS = np.array([1, 2, 4, 8, 16])  # of the longest context: the choice of chunk sizes
_CHUNK_COST = 32  # what a further chunk costs, in keys
_MOST_HEADS_AT_ONCE = 8  # KV heads, for products with whole blocks to be faster than copies
_LEAST_FOR_TWO_STREAMS = 16384  # keys of chunks: with fewer a second stream costs more than it brings
_CACHED_BYTES = 2 << 20  # of scores: on a CPU a prompt is computed in tiles that stay in its cache
_LEAST_TILE = 16  # queries
_LEAST_SAVED = 4096  # keys that are not read again, for a prefix to be computed once for all that share it
_MOST_SHARED = 4  # prefixes of a step that are


class Merge(NamedTuple):
    """Which chunks make up each sequence."""

    chunks: mx.array  # int32 [num_seqs, max_chunks]
    bias: mx.array  # [num_seqs, max_chunks, 1, 1, 1]: -inf for chunks that the sequence does not have, otherwise 0


class Decodes(NamedTuple):
    """Sequences with one query each, their keys cut into chunks of one size."""

    tokens: mx.array | None  # int32 [num_chunks]: the row in q of each chunk's query, None if its own number
    num_kv_heads: int
    parts: list[Chunks]  # computed at the same time, if there are several
    merge: Merge | None  # None: one chunk each
    shared: list[SharedKeys]  # whose results, member by member, are chunks that follow those


class Chunks(NamedTuple):
    """Some of the chunks."""

    span: slice  # which
    stream: mx.ThreadLocalStream | None  # None: the current one
    rows: mx.array  # int32 [num_chunks, num_kv_heads, chunk_size]: the keys' rows in the cache as [-1, dim]
    bias: mx.array  # [num_chunks or 1, 1, 1, chunk_size or 1]: -inf for keys that the chunk does not have, otherwise 0
    blocks: Blocks | None  # None: keys are gathered


class Blocks(NamedTuple):
    """Pairs of chunks and blocks of keys."""

    chunks: mx.array  # uint32 [num_chunks, blocks_per_chunk]: the number of the chunk
    block_ids: mx.array  # likewise; another block of the sequence in the place of one that the chunk does not have
    visible: mx.array  # bool [num_chunks, 1, 1, chunk_size]: which keys are the chunk's
    own_head: mx.array  # [num_kv_heads, 1, num_kv_heads, 1]: the queries' scale for a head with itself, otherwise 0


class SharedKeys(NamedTuple):
    """Keys that several decodes share."""

    tokens: mx.array  # int32 [num_members]: the rows of their queries in q
    rows: mx.array  # int32 [num_kv_heads, num_keys]: the keys' rows in the cache as [-1, dim]


class Prompts(NamedTuple):
    """Sequences with several queries each, and the keys that they see."""

    tokens: mx.array  # int32 [num_seqs, num_queries]: the queries' rows in q
    rows: mx.array  # int32 [num_seqs, num_kv_heads, num_keys]: the keys' rows in the cache as [-1, dim]
    visible: mx.array  # bool [num_seqs, 1, num_queries, num_keys]


class Plan(NamedTuple):
    groups: list[Decodes | Prompts]
    order: mx.array | None  # int32 [num_tokens]: the row of each token in the groups' outputs, None if the same
    num_padding: int  # tokens of sequences without context, whose outputs come last


class Shape(NamedTuple):
    """What a plan depends on beside the step's metadata."""

    block_size: int
    num_kv_heads: int
    num_heads: int
    dims: int  # of a key and a value together
    window: int | None
    scale: float  # of the queries
    dtype: mx.Dtype  # of the caches

    @property
    def reads_blocks(self) -> bool:
        """Whether decodes read keys where they lie."""
        whole = self.window is None and self.num_kv_heads <= _MOST_HEADS_AT_ONCE
        return whole and self.dtype == mx.float32 and mx.default_device() == mx.cpu


def make_plan(metadata: AttentionMetadata, shape: Shape) -> Plan:
    """How to compute a step, for layers of this shape."""
    contexts, lengths, starts = metadata.context_lens, metadata.query_lens, metadata.cu_seqlens_q
    max_keys = _MAX_BYTES // (4 * shape.num_kv_heads * shape.dims)
    groups: list[Decodes | Prompts] = []
    runs: list[np.ndarray] = []  # first and last token of those computed together, in the order of the outputs
    all_decode = np.count_nonzero(lengths == 1) == np.count_nonzero(contexts) == len(lengths)
    for num_queries in [1] if all_decode else sorted(set(lengths.tolist()) - {0}):
        seqs = np.arange(len(lengths))
        if not all_decode:
            seqs = np.flatnonzero((lengths == num_queries) & (contexts > 0))
        num_keys = contexts if shape.window is None else np.minimum(contexts, num_queries + shape.window - 1)
        prefixes = []
        if num_queries == 1 and shape.window is None and metadata.find_shared_prefixes is not None:
            prefixes = _worth_sharing(metadata.find_shared_prefixes(seqs))
            num_keys = _without(prefixes, seqs, num_keys)
        most, spread = max_keys, int(_PARTS[-1]) if num_queries == 1 else 2
        if num_queries > 1 and mx.default_device() == mx.cpu:
            most = min(most, _CACHED_BYTES // (4 * shape.num_heads * min(num_queries, _LEAST_TILE)))
        for members in _similar_lengths(seqs, num_keys, most, spread):
            if num_queries == 1:
                groups.append(_decodes(metadata, shape, members, num_keys[members], _among(prefixes, seqs, members)))
                if len(members) == len(lengths):  # the common case
                    return Plan(groups, None, 0)
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
        return Plan(groups, None, num_padding)
    tokens = [np.arange(begin, end + 1) for begin, end in zip(first.tolist(), last.tolist(), strict=True)]
    return Plan(groups, mx.array(np.argsort(np.concatenate(tokens)).astype(np.int32)), num_padding)


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
    metadata: AttentionMetadata, shape: Shape, seqs: np.ndarray, num_keys: np.ndarray, prefixes: list[SharedPrefix]
) -> Decodes:
    """The queries of decodes, each of which sees the last `num_keys` tokens of its sequence, and the prefixes."""
    chunk_size, num_chunks = _chunks(num_keys, shape.block_size if shape.reads_blocks else 1)
    end, owners = metadata.context_lens[seqs], seqs
    begin, merge = end - num_keys, None
    shared: list[SharedKeys] = []
    if np.count_nonzero(num_chunks > 1) or prefixes:
        ends = num_chunks.cumsum()
        starts = ends - num_chunks
        chunks, absent = _spans(starts, ends, int(num_chunks[num_chunks.argmax()]))
        merge = Merge(chunks, absent[:, :, None, None, None])
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
    all_chunks = Chunks(slice(None), None, rows, bias, None)
    if shape.reads_blocks:
        first_keys = positions[:, :: shape.block_size]  # of each block; or the sequence's last one
        block_ids = metadata.block_tables[_column(owners), first_keys // shape.block_size].astype(mx.uint32)
        numbers = mx.broadcast_to(mx.arange(len(owners), dtype=mx.uint32)[:, None], block_ids.shape)
        visible = mx.broadcast_to(bias == 0, (len(owners), 1, 1, chunk_size))
        own_head = shape.scale * mx.eye(shape.num_kv_heads)[:, None, :, None]
        all_chunks = all_chunks._replace(blocks=Blocks(mx.contiguous(numbers), block_ids, visible, own_head))
    parts = [all_chunks]
    if mx.default_device() == mx.cpu and len(owners) > 1 and len(owners) * chunk_size >= _LEAST_FOR_TWO_STREAMS:
        parts = _halves(all_chunks, len(owners) // 2)
    return Decodes(None if in_order else mx.array(tokens), shape.num_kv_heads, parts, merge, shared)


def _halves(chunks: Chunks, middle: int) -> list[Chunks]:
    """The first `middle` chunks, and the others in a second stream."""
    halves = []
    for span, stream in ((slice(middle), None), (slice(middle, None), _second_stream())):
        bias = chunks.bias if len(chunks.bias) == 1 else chunks.bias[span]
        blocks = chunks.blocks
        if blocks is not None:
            numbers = blocks.chunks[: len(chunks.rows[span])]
            blocks = Blocks(numbers, blocks.block_ids[span], blocks.visible[span], blocks.own_head)
        halves.append(Chunks(span, stream, chunks.rows[span], bias, blocks))
    return halves


@cache
def _second_stream() -> mx.ThreadLocalStream:
    """Of each thread its own, as MLX's default streams are."""
    return mx.new_thread_local_stream(mx.cpu)


def _shared_keys(
    metadata: AttentionMetadata,
    shape: Shape,
    seqs: np.ndarray,
    prefixes: list[SharedPrefix],
    merge: Merge,
    num_chunks: int,
) -> tuple[list[SharedKeys], Merge]:
    """The keys of prefixes, in pieces of bounded size, and `merge` with their results, which follow `num_chunks`."""
    shared, columns = [], []
    for prefix in prefixes:
        per_key = 4 * (len(prefix.members) * shape.num_heads + shape.num_kv_heads * shape.dims)
        size = max(1, _MAX_BYTES // per_key)
        for begin in range(0, prefix.num_tokens, size):
            positions = mx.arange(begin, min(begin + size, prefix.num_tokens), dtype=mx.int32)[None]
            rows = _rows(metadata, shape, _column(seqs[prefix.members[:1]]), positions)[0]
            shared.append(SharedKeys(mx.array(metadata.cu_seqlens_q[seqs[prefix.members]]), rows))
            column = np.full(len(seqs), -1)
            column[prefix.members] = num_chunks + np.arange(len(prefix.members))
            columns.append(column)
            num_chunks += len(prefix.members)
    more = np.stack(columns, axis=1)
    absent = np.where(more < 0, -np.float32(np.inf), np.float32(0))[:, :, None, None, None]
    chunks = mx.concatenate([merge.chunks, mx.array(np.maximum(more, 0).astype(np.int32))], axis=1)
    bias = mx.broadcast_to(merge.bias, (*merge.chunks.shape, 1, 1, 1))
    return shared, Merge(chunks, mx.concatenate([bias, mx.array(absent)], axis=1))


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


def _prompts(metadata: AttentionMetadata, shape: Shape, seqs: np.ndarray, begin: int, num_queries: int) -> Prompts:
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
    return Prompts(_column(metadata.cu_seqlens_q[seqs] + begin) + queries, rows, visible[:, None])


def _rows(metadata: AttentionMetadata, shape: Shape, seqs: mx.array, positions: mx.array) -> mx.array:
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
        if longest is None or longest > spread * max(64, sorted_keys[begin]) or longest * (end + 1 - begin) > max_keys:
            groups.append(np.sort(by_length[begin:end]))
            begin = end
    return groups
