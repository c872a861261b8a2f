"""The arrays that hold K and V: one pool of blocks per layer, allocated once and only ever written in place."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx


class LayerShape(NamedTuple):
    """What one layer caches per token: K [num_kv_heads, key_dim] and V [num_kv_heads, value_dim] of `dtype`."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.size


class PagedKVCache:
    """K and V of every layer: `keys[l]`, `values[l]` are [num_blocks, block_size, num_kv_heads, dim].

    A write donates the old array to the new one as long as nothing else holds it, so no view of a pool may outlive
    the step that made it, and a pool never goes into an `mx.eval` list.
    """

    def __init__(
        self, layers: Sequence[LayerShape], num_blocks: Sequence[int], block_size: int, max_staging: int
    ) -> None:
        """num_blocks: of each layer's pool. max_staging: bytes that copies may hold beside the pools."""
        self._max_staging = max_staging
        self._shapes = list(zip(layers, num_blocks, strict=True))
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        """Pools of zeros, whatever has become of those before, which are let go first."""
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []
        for layer, count in self._shapes:
            rows = (count, self.block_size, layer.num_kv_heads)
            self.keys.append(mx.zeros((*rows, layer.key_dim), layer.dtype))
            self.values.append(mx.zeros((*rows, layer.value_dim), layer.dtype))
        mx.eval(self.keys, self.values)
        self.write_done: list[mx.array | None] = [None] * len(self.keys)  # what `Backend.write` returned last

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    def read_block(self, block_id: int, layers: Sequence[int]) -> dict[str, mx.array]:
        """A copy of a block in the given layers: "k0", "v0", "k1", ... [block_size, num_kv_heads, dim]."""
        content = {}
        for i, layer in enumerate(layers):
            content[f"k{i}"], content[f"v{i}"] = self.keys[layer][block_id], self.values[layer][block_id]
        _settle(content)
        return content

    def write_block(self, block_id: int, layers: Sequence[int], content: dict[str, mx.array]) -> None:
        """Put back what `read_block` returned. Raises ValueError if it is of another layout."""
        for i, layer in enumerate(layers):
            for pool, array in ((self.keys[layer], content.get(f"k{i}")), (self.values[layer], content.get(f"v{i}"))):
                if array is None or array.shape != pool.shape[1:] or array.dtype != pool.dtype:
                    raise ValueError("a block of another layout")
                pool[block_id] = array
                _settle(pool[block_id, 0, 0, 0])

    def copy_range(self, src: int, dst: int, start: int, end: int) -> None:
        """Copy the slots start .. end - 1 of block `src` to the same places of `dst`, in every layer."""
        slots = mx.arange(start, end)
        for pools in (self.keys, self.values):
            for pool in pools:
                staged = pool[src][slots]  # a slice would be a view of the pool, and the write below copy it
                _settle(staged)
                pool[dst, start:end] = staged
                _settle(pool[dst, 0, 0, 0])

    def move_blocks(self, moves: Sequence[tuple[int, int]], layers: Sequence[int] | None = None) -> None:
        """Copy whole blocks, (source, destination) after (source, destination), in all layers or those given.

        At most `max_staging` bytes are held beside the pools (one block of one layer at least). The gather has to be
        evaluated before the scatter: as one expression it would copy the pool.
        """
        for piece in independent_pieces(moves):
            sources = mx.array([src for src, _ in piece], mx.int32)
            destinations = mx.array([dst for _, dst in piece], mx.int32)
            for pools in (self.keys, self.values):
                for layer in range(len(pools)) if layers is None else layers:
                    step = max(1, self._max_staging // (pools[layer].nbytes // pools[layer].shape[0]))
                    for start in range(0, len(piece), step):
                        staged = pools[layer][sources[start : start + step]]
                        _settle(staged)
                        pools[layer][destinations[start : start + step]] = staged
                        # One element of the result forces the scatter without naming the pool in the eval list.
                        _settle(pools[layer][piece[start][1], 0, 0, 0])


def _settle(arrays: Any) -> None:
    """Compute them, and wait until nothing holds what they are read from, which a GPU may do a little longer."""
    mx.eval(arrays)
    mx.synchronize()


def independent_pieces(moves: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Runs of moves that touch a written block once: the same in any order, and when one is done again."""
    piece: list[tuple[int, int]] = []
    read: set[int] = set()
    written: set[int] = set()
    for src, dst in moves:
        if src in written or dst in written or dst in read:
            yield piece
            piece, read, written = [], set(), set()
        piece.append((src, dst))
        read.add(src)
        written.add(dst)
    if piece:
        yield piece
