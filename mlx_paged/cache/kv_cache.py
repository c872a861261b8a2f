"""The arrays that hold K and V: one pool of blocks per layer, allocated once and only ever written in place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_paged.cache.codes import KVCodes
from mlx_paged.cache.layer_spec import LayerSpec

BlockContent = dict[str, mx.array]
"""A block in all layers of a cache group: "k0", "v0", "k1", ..., without the first dimension of the pools' arrays."""


@dataclass(eq=False)
class LayerPool:
    """The blocks of one layer.

    A write donates the old array to the new one as long as nothing else holds it, so no view of a pool may outlive
    the step that made it, and a pool never goes into an `mx.eval` list.
    """

    arrays: dict[str, mx.array]
    """Whatever a block consists of, by name, [num_blocks, block_size, ...]: copies, stores and sizes loop over it."""
    latent_dim: int | None = None
    """How many of the first numbers of K are V, where that is not stored."""
    write_done: mx.array | None = None
    """What is there once the last `Backend.write` is over, where MLX does not know of it by itself."""
    reads_done: list[mx.array] = field(default_factory=list)
    """Likewise of all that has read since then, for the next one."""
    codes: KVCodes | None = None
    """How K and V are quantised. None: `keys` and `values` are there."""

    @classmethod
    def zeros(cls, spec: LayerSpec, num_blocks: int, block_size: int) -> "LayerPool":
        arrays = {name: mx.zeros(*each) for name, each in spec.shapes(num_blocks, block_size).items()}
        return cls(arrays, spec.value_dim if spec.value_in_key else None, codes=spec.codes)

    @property
    def keys(self) -> mx.array:
        """[num_blocks, block_size, num_kv_heads, key_dim]."""
        return self.arrays["k"]

    @property
    def values(self) -> mx.array:
        """[num_blocks, block_size, num_kv_heads, at least value_dim]."""
        return self.arrays.get("v", self.keys)

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """How many slots a block has, KV heads, and numbers in a head's K and in its V."""
        if self.codes is not None:
            return self.codes.block_shape(self.arrays)
        block_size, num_kv_heads, key_dim = self.keys.shape[1:]
        return block_size, num_kv_heads, key_dim, self.latent_dim or self.values.shape[3]

    @property
    def value_dim(self) -> int:
        return self.block_shape[3]

    @property
    def dtype(self) -> mx.Dtype:
        """Of K and V before they are stored."""
        return [*self.arrays.values()][-1].dtype  # codes come before their parameters

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def write(self, block_ids: mx.array, offsets: mx.array, keys: mx.array, values: mx.array) -> None:
        """Put K and V, [num_tokens, num_kv_heads, dim], into slots, int32 [num_tokens]."""
        if self.codes is not None:
            self.codes.write(self.arrays, block_ids, offsets, keys.astype(self.dtype), values.astype(self.dtype))
            return
        for array, rows in zip(self.arrays.values(), (keys, values), strict=False):
            array[block_ids, offsets] = rows

    def row_numbers(self, block_ids: mx.array, offsets: mx.array) -> mx.array:
        """Where the arrays as [-1, ...] have the K and V of slots, [n, num_keys]. Returns [n, num_kv_heads, num_keys].

        int32 is wide enough: an array of MLX has fewer than 2**31 such rows.
        """
        block_size, num_kv_heads, *_ = self.block_shape
        heads = mx.arange(num_kv_heads, dtype=mx.int32)[:, None]
        if self.codes is not None:
            return (block_ids[:, None] * num_kv_heads + heads) * block_size + offsets[:, None]
        return (block_ids * block_size + offsets)[:, None] * num_kv_heads + heads

    def gather(self, name: str, rows: mx.array) -> mx.array:
        """K ("k") or V ("v") of these rows, int32 [...]. Returns float32 [..., dim]."""
        if self.codes is not None:
            return self.codes.gather(self.arrays, name, rows)
        return self.arrays.get(name, self.keys).flatten(0, 2)[rows].astype(mx.float32)

    def gather_blocks(self, name: str, block_ids: mx.array) -> mx.array:
        """K ("k") or V ("v") of blocks, int32 [n], in their order. Returns [num_kv_heads, n * block_size, dim]."""
        if self.codes is not None:
            return self.codes.gather_blocks(self.arrays, name, block_ids).astype(self.dtype)
        return self.arrays[name][block_ids].flatten(0, 1).swapaxes(0, 1)

    def views(self) -> dict[str, mx.array]:
        """The first block of each array, in place of all: for kernels, which go by the address, as their inputs.

        MLX ends a command buffer, or a graph, by the size of what is read in it, so each pool would end one. They are
        named "k_cache" and "v_cache", or as codes and parameters are.
        """
        suffix = "_cache" if self.codes is None else ""
        return {name + suffix: array[:1] for name, array in self.arrays.items()}


class PagedKVCache:
    """The pools of all layers. Layers that see the same part of the context form a cache group, and move together."""

    pools: list[LayerPool]
    """One per layer."""

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        num_blocks: Sequence[int],
        block_size: int,
        max_staging: int,
        groups: Sequence[int] | None = None,
    ) -> None:
        """num_blocks, groups: of each layer. max_staging: bytes that copies may hold beside the pools."""
        self.block_size = block_size
        self._layers = list(zip(layers, num_blocks, strict=True))
        self._max_staging = max_staging
        self._groups = [0] * len(self._layers) if groups is None else list(groups)
        self.clear()

    def clear(self) -> None:
        """Make pools of zeros, whatever has become of those before, which are let go first."""
        self.pools = []
        self.pools = [LayerPool.zeros(spec, count, self.block_size) for spec, count in self._layers]
        mx.eval([pool.arrays for pool in self.pools])

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)

    def _arrays_of(self, group: int) -> Iterator[tuple[str, mx.array]]:
        """Yield the arrays of a group's layers, with the names that `read_block` gives them.

        What kernels do with them is over: MLX does not know that they write.
        """
        mx.synchronize()
        pools = [pool for pool, other in zip(self.pools, self._groups, strict=True) if other == group]
        for i, pool in enumerate(pools):
            for name in pool.arrays:
                yield f"{name}{i}", pool.arrays[name]

    def read_block(self, block_id: int, group: int = 0) -> BlockContent:
        """Return a copy of a block in all layers of a group."""
        content = {name: array[block_id] for name, array in self._arrays_of(group)}
        _evaluate_and_wait(content)
        return content

    def write_block(self, block_id: int, content: BlockContent, group: int = 0) -> None:
        """Put back what `read_block` returned. Raises ValueError if it is of another layout."""
        for name, pool in self._arrays_of(group):
            array = content.get(name)
            if array is None or array.shape != pool.shape[1:] or array.dtype != pool.dtype:
                raise ValueError("a block of another layout")
            pool[block_id] = array
            _evaluate_and_wait(pool[block_id, 0, 0, 0])

    def move_blocks(self, moves: Sequence[tuple[int, int]], group: int = 0) -> None:
        """Copy whole blocks, (source, destination) after (source, destination), in all layers of a group.

        At most `max_staging` bytes are held beside the pools (one block of one layer at least). The gather has to be
        evaluated before the scatter: as one expression it would copy the pool.
        """
        for run in independent_runs(moves):
            sources = mx.array([src for src, _ in run], mx.int32)
            destinations = mx.array([dst for _, dst in run], mx.int32)
            for _, pool in self._arrays_of(group):
                step = max(1, self._max_staging // (pool.nbytes // pool.shape[0]))
                for start in range(0, len(run), step):
                    staged = pool[sources[start : start + step]]
                    _evaluate_and_wait(staged)
                    pool[destinations[start : start + step]] = staged
                    # One element of the result forces the scatter without naming the pool in the eval list.
                    _evaluate_and_wait(pool[run[start][1], 0, 0, 0])


def _evaluate_and_wait(arrays: Any) -> None:
    """Compute arrays, and wait until nothing holds what they are read from, which a GPU may do a little longer."""
    mx.eval(arrays)
    mx.synchronize()


def independent_runs(moves: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield runs of moves that touch a written block once: the same in any order, and when one is done again."""
    run: list[tuple[int, int]] = []
    read: set[int] = set()
    written: set[int] = set()
    for src, dst in moves:
        if src in written or dst in written or dst in read:
            yield run
            run, read, written = [], set(), set()
        run.append((src, dst))
        read.add(src)
        written.add(dst)
    if run:
        yield run
