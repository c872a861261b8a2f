"""What one layer of a model caches."""

from typing import NamedTuple

import mlx.core as mx


class LayerSpec(NamedTuple):
    """What one layer caches per token: K [num_kv_heads, key_dim] and V [num_kv_heads, value_dim] of `dtype`."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    value_in_key: bool = False
    """V is not stored: it is the first `value_dim` numbers of K."""

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + (0 if self.value_in_key else self.value_dim)) * self.dtype.size
