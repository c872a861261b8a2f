"""What one layer of a model caches."""

import math
from typing import NamedTuple, Self

import mlx.core as mx

from mlx_paged.cache.codes import KVCodes, Shapes, choose_codes


class LayerSpec(NamedTuple):
    """What one layer caches per token: K [num_kv_heads, key_dim] and V [num_kv_heads, value_dim] of `dtype`."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    value_in_key: bool = False
    """V is not stored: it is the first `value_dim` numbers of K."""
    codes: KVCodes | None = None
    """How K and V are quantised, if they are."""

    def shapes(self, num_blocks: int, block_size: int) -> Shapes:
        """The arrays that blocks of it consist of: their shapes and types by name."""
        if self.codes is not None:
            return self.codes.shapes(num_blocks, self.num_kv_heads, block_size, self[1:3], self.dtype)
        rows, names = (num_blocks, block_size, self.num_kv_heads), "k" if self.value_in_key else "kv"
        return {name: ((*rows, dim), self.dtype) for name, dim in zip(names, self[1:3], strict=False)}

    def quantised(self, kv_cache_dtype: str) -> Self:
        """The same with its K and V quantised. Raises ValueError if they can't be."""
        if self.value_in_key:
            raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r}: latents are small as they are and are not quantised")
        return self._replace(codes=choose_codes(kv_cache_dtype, self.key_dim, self.value_dim))

    @property
    def bytes_per_token(self) -> int:
        return sum(math.prod(shape) * dtype.size for shape, dtype in self.shapes(1, 1).values())
