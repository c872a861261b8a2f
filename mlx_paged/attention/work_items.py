"""How a step's attention is divided among the threadgroups of a GPU: arithmetic on host arrays, for any device.

Both kernels work on items: a threadgroup per item and KV head. An item is a part of the keys of a few queries (decode)
or of a tile of queries (prefill), so that a few long contexts fill the device, too. What parts compute is then merged.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.cache.codes import KVCodes

MAX_THREADGROUP_BYTES = 32 << 10
SIMDGROUPS = 8  # of a threadgroup of paged_decode, or more where a KV head has more groups of query heads
ELEMENTS_PER_LANE = 16  # of queries and of output, that a lane of paged_decode keeps: 512 of a simdgroup
_TILE_KEYS = 32  # that a simdgroup of paged_decode computes at once
_FIRST_PARTS = 8  # into so many a context is split however much merging costs
_MIN_KEYS_PER_ROW = 16  # of a part of paged_prefill


class Shape(NamedTuple):
    """What the work items depend on, beside lengths."""

    num_kv_heads: int
    heads_per_kv_head: int
    head_dim: int
    value_dim: int
    element_size: int
    """Bytes of an element of q, K and V."""
    value_in_key: bool = False
    """Latent attention: V is the first part of K."""
    codes: KVCodes | None = None
    """How K and V are quantised, if they are."""


class WorkItems(NamedTuple):
    """The work of a kernel, and where the parts of each of its results lie."""

    work: np.ndarray
    """int32 [num_items, ...], a row per item, with the columns of `decode_items` or `prefill_items`."""
    cu_parts: np.ndarray
    """int32 [num_results + 1]: result i is merged from parts cu_parts[i] to cu_parts[i + 1] of the kernel's output."""

    @property
    def num_parts(self) -> int:
        return int(self.cu_parts[-1])

    @property
    def is_split(self) -> bool:
        """Whether any result has several parts. Otherwise the kernel's output is the result."""
        return self.num_parts >= len(self.cu_parts)


# ---- decode: one query per sequence, or a few ----


class DecodeLayout(NamedTuple):
    """How the threads of Metal's paged_decode divide a tile of keys; see there."""

    rows_per_simdgroup: int
    lanes: int
    width: int
    batch: int
    simdgroups: int


@cache
def decode_layout(shape: Shape) -> DecodeLayout:
    """Choose as many rows to a simdgroup as leave a lane few elements of each of queries and output to keep.

    shape: with the rows of a KV head, pairs of a query and a query head, as its heads. The others of a KV head are its
    neighbours'. Then come the longest loads, then the fewest lanes to a row, so the
    fewest sums over lanes, and as many rows at once as are 64 bytes of a lane.
    """
    rows, size, longer = shape.heads_per_kv_head, shape.element_size, max(shape.head_dim, shape.value_dim)
    widths = [load_bytes // size for load_bytes in (16, 8, 4) if load_bytes > size]
    if shape.codes is not None:
        widths, size = widths_of_codes(shape), 2  # bytes of a code that is unpacked
    for groups, width, lanes in product(range(1, rows + 1), widths, (8, 16, 32)):
        of_simdgroup, of_row = -(-rows // groups), -(-longer // (width * lanes)) * width
        if of_simdgroup * of_row <= ELEMENTS_PER_LANE and (of_row * size <= 32 or lanes == 32):
            batch = next(n for n in (16, 8, 4, 2) if n <= lanes and (n * of_row * size <= 64 or n == 2))
            simdgroups = groups * max(1, SIMDGROUPS // groups)
            return DecodeLayout(of_simdgroup, lanes, width, batch, simdgroups)
    raise AssertionError(f"no layout for {shape}")


def widths_of_codes(shape: Shape) -> list[int]:
    """How many codes a lane can load of K at once: 4 bytes to 16, of which there are some for 8 lanes at least."""
    fitting = [width for width in (16, 8, 4) if not shape.head_dim % width + shape.value_dim % width]
    return [width for width in fitting if 8 * width <= max(shape.head_dim, shape.value_dim) or width == 4]


def keys_per_item(num_keys: np.ndarray, shape: Shape, num_cores: int) -> int:
    """Choose how many keys of a sequence one threadgroup of paged_decode computes: contexts are split into such parts.

    num_keys: [num_seqs], those each sequence attends to. Small enough to give every core 8 threadgroups, and 256 in
    all; large enough that 8 simdgroups have a tile, and that writing and reading the parts is at most 2% of reading K
    and V, of which codes are half. But a context of 2048 keys or more has 8 parts whatever they cost, or most of a
    device would be idle that has one sequence to compute. No context is split where the sequences' KV heads come within
    half of that many threadgroups and the longest is at most twice an equal share.
    """
    longest = int(num_keys.max(initial=1))
    step = SIMDGROUPS * _TILE_KEYS
    wanted = max(256, 8 * num_cores)
    equal_share = max(1, int(num_keys.sum()) * shape.num_kv_heads // wanted)
    if longest <= 2 * equal_share:
        return longest
    part_bytes = 2 * shape.heads_per_kv_head * (shape.value_dim * shape.element_size + 4)  # written and read
    worth_merging = -(-50 * part_bytes // ((shape.head_dim + shape.value_dim) * shape.element_size))
    most_parts = max(1, longest // worth_merging)
    least = min(-(-longest // (most_parts * step)) * step, longest // _FIRST_PARTS // step * step)
    return max(step, equal_share // step * step, least)


def decode_items(context_lens: np.ndarray, cu_seqlens_q: np.ndarray, num_keys: np.ndarray, size: int) -> WorkItems:
    """Cut the last `num_keys` keys of each sequence's context into parts of `size`. No keys are one empty part.

    Columns: sequence, its first token in q, its number of queries, the position of the first one in the context, the
    first key, past the last key, the part, the number of parts, where the sequence's parts begin. The parts of a query
    lie side by side.
    """
    contexts, num_keys = context_lens.astype(np.int64), num_keys.astype(np.int64)
    first_tokens, query_lens = cu_seqlens_q[:-1], np.diff(cu_seqlens_q)
    num_parts = np.maximum(1, -(-num_keys // size))
    cu_parts = _cumulative(np.repeat(num_parts, query_lens))
    sequence = np.repeat(np.arange(len(contexts)), num_parts)
    part = _ranges(num_parts)
    of_sequence = (first_tokens, query_lens, contexts - query_lens, contexts - num_keys, contexts, num_parts)
    first, queries, position, begin, end, parts = (values[sequence] for values in of_sequence)
    begin = begin + part * size
    end = np.minimum(begin + size, end)
    return WorkItems(_columns(sequence, first, queries, position, begin, end, part, parts, cu_parts[first]), cu_parts)


# ---- prefill: several queries per sequence ----


class Tile(NamedTuple):
    """What a threadgroup of paged_prefill computes at once."""

    rows: int
    """Pairs of a query and one of the query heads of a KV head."""
    keys: int


def tile_for(shape: Shape) -> Tile:
    """Choose Metal's tile: up to 32 keys, as many as 32 KB of threadgroup memory have room for.

    Rows before keys: a simdgroup has 8 of them, and fewer than four leave a core's schedulers idle. Past 256
    two simdgroups share 8 rows, each with half of the values' columns.
    """
    pad = 16 // shape.element_size
    longer = max(shape.head_dim, shape.value_dim)
    rows = 16 if longer > 256 or (longer >= 192 and shape.element_size == 4) else 32
    room = MAX_THREADGROUP_BYTES // shape.element_size - rows * (shape.head_dim + pad)
    return Tile(rows, next(keys for keys in (32, 16, 8) if keys * (longer + pad) <= room))


def num_key_splits(num_tiles: np.ndarray, num_keys: np.ndarray, shape: Shape, num_cores: int, tile: Tile) -> np.ndarray:
    """Choose into how many parts the keys of each sequence's tiles are split. Returns [num_seqs].

    One, unless there are fewer than 8 threadgroups to a core or a tile has more than twice an equal share of the keys.
    num_tiles, num_keys: [num_seqs], of a sequence. A part has enough keys for the merging of parts to move at most a
    sixteenth of the bytes of K and V; of latents a fourth, since one sequence is not many parts of their only KV head.
    """
    equal_share = int((num_tiles * num_keys).sum()) * shape.num_kv_heads // (8 * num_cores)
    size = max(_MIN_KEYS_PER_ROW * tile.rows // (2 if shape.value_in_key else 1), equal_share)
    return np.where((num_tiles > 0) & (num_keys > 2 * size), -(-num_keys // size), 1)


def prefill_items(
    context_lens: np.ndarray, cu_seqlens_q: np.ndarray, window: int | None, shape: Shape, num_cores: int, tile: Tile
) -> WorkItems:
    """List the tiles of each sequence's rows, one row per query and head of a KV head, and the parts of their keys.

    Columns: sequence, its first token in q, its number of queries, the position of the first one in the context
    (negative: the sequence is padding), the tile's first row, the part, the number of parts, where the sequence's
    parts begin. The parts of a query lie side by side.
    """
    query_lens, num_keys = np.diff(cu_seqlens_q), context_lens.astype(np.int64)
    if window is not None:
        num_keys = np.minimum(num_keys, window + tile.rows // shape.heads_per_kv_head)
    sequences = np.arange(len(query_lens))
    return _tiles(sequences, query_lens, context_lens - query_lens, num_keys, shape, num_cores, tile)


def _tiles(
    sequences: np.ndarray,
    query_lens: np.ndarray,
    first_positions: np.ndarray,
    num_keys: np.ndarray,
    shape: Shape,
    num_cores: int,
    tile: Tile,
) -> WorkItems:
    """List the items of paged_prefill, with the columns of `prefill_items`. Arrays have a value per run of queries."""
    num_tiles = -(-query_lens * shape.heads_per_kv_head // tile.rows)
    num_parts = num_key_splits(num_tiles, num_keys, shape, num_cores, tile)
    cu_parts = _cumulative(np.repeat(num_parts, query_lens))
    first_tokens = np.cumsum(query_lens) - query_lens
    num_items = num_tiles * num_parts
    run = np.repeat(np.arange(len(num_items)), num_items)
    in_tile, part = np.divmod(_ranges(num_items), num_parts[run])
    of_run = (sequences, first_tokens, query_lens, first_positions, num_parts, cu_parts[first_tokens])
    sequence, first, queries, position, parts, first_part = (values[run] for values in of_run)
    return WorkItems(
        _columns(sequence, first, queries, position, in_tile * tile.rows, part, parts, first_part), cu_parts
    )


# ---- decode of sequences that share their first blocks ----


class SharedWorkItems(NamedTuple):
    """Prefixes that several sequences share, each computed once for the queries of all its members."""

    items: WorkItems
    """Of paged_prefill, which takes the members of a prefix for its queries."""
    members: np.ndarray
    """int32: the queries of all prefixes' members."""
    ranges: np.ndarray
    """int32 [num_tokens, 2]: the first and past the last of the parts of each query's prefix."""


def shared_items(
    prefixes: Sequence[SharedPrefix], cu_seqlens_q: np.ndarray, shape: Shape, num_cores: int, tile: Tile
) -> SharedWorkItems:
    """List the tiles of each prefix: its members' queries are a run of queries, which all see all of its keys."""
    query_lens = np.diff(cu_seqlens_q)
    counts = np.array([query_lens[prefix.members].sum() for prefix in prefixes])
    lengths = np.array([prefix.num_tokens for prefix in prefixes])
    sequences = np.concatenate([prefix.members for prefix in prefixes])
    members = np.repeat(cu_seqlens_q[sequences], query_lens[sequences]) + _ranges(query_lens[sequences])
    first_members = np.array([prefix.members[0] for prefix in prefixes])
    items = _tiles(first_members, counts, lengths - 1, lengths, shape, num_cores, tile)
    ranges = np.zeros((cu_seqlens_q[-1], 2), np.int32)
    ranges[members] = np.stack([items.cu_parts[:-1], items.cu_parts[1:]], axis=1)
    return SharedWorkItems(items, members.astype(np.int32), ranges)


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, ..."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _cumulative(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _columns(*columns: np.ndarray) -> np.ndarray:
    return np.stack(columns, axis=1).astype(np.int32)
