"""K and V as codes of 8 or 4 bits: what is offered, and how blocks of codes are laid out, written and read.

What is stored for a token depends on its own numbers alone, head by head, so it is the same in any batch and any chunk
of a prompt. Copies, stores and files move codes as they are: nothing is quantised twice.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

Shapes = dict[str, tuple[tuple[int, ...], mx.Dtype]]

_MOST_E4M3 = 448.0


class Codes(NamedTuple):
    """How the K, or the V, of a token in one head is stored: as codes, and parameters of each group of them.

    Two parameters, a scale and a bias: a number is scale * code + bias, as `mx.quantize` makes and packs them. One, a
    scale: it is scale * code, an E4M3 as `mx.to_fp8` makes it.
    """

    bits: int
    group_size: int
    num_params: int = 2

    def quantise(self, numbers: mx.array) -> tuple[mx.array, mx.array]:
        """Codes, uint32 [..., dim * bits / 32], and parameters, [..., dim / group_size, num_params], of [..., dim]."""
        if self.num_params == 2:
            codes, scales, biases = mx.quantize(numbers, self.group_size, self.bits)
            return codes, mx.stack([scales, biases], axis=-1)
        exact = numbers.astype(mx.float32)
        scales = (mx.abs(exact).max(axis=-1, keepdims=True) / _MOST_E4M3).astype(numbers.dtype)
        scales = mx.where(scales == 0, 1, scales)
        return mx.to_fp8(exact / scales.astype(mx.float32)).view(mx.uint32), scales[..., None]

    def dequantise(self, codes: mx.array, params: mx.array) -> mx.array:
        """Float32 [..., dim]. On a CPU this takes half as long as `mx.dequantize`, or less."""
        each, params = codes.view(mx.uint8), params.astype(mx.float32)
        if self.num_params == 1:
            return mx.from_fp8(each, mx.float32) * params[..., 0]
        if self.bits == 4:
            each = mx.stack([each & 15, each >> 4], axis=-1)
        groups = each.reshape(*params.shape[:-1], self.group_size).astype(mx.float32)
        return (groups * params[..., :1] + params[..., 1:]).flatten(-2)


class KVCodes(NamedTuple):
    """How a layer's K and V are stored as codes.

    Its arrays, of K and of V alike, have heads before slots, so that a head's part of a block is one run: "k_codes",
    uint32 [num_blocks, num_kv_heads, block_size, dim * bits / 32], and "k_params", of the layer's dtype, [num_blocks,
    num_kv_heads, block_size, dim / group_size, num_params].
    """

    name: str
    """The `kv_cache_dtype` that asks for it."""
    keys: Codes
    values: Codes

    def shapes(self, num_blocks: int, num_kv_heads: int, block_size: int, dims: tuple[int, int], T: mx.Dtype) -> Shapes:
        """Of the arrays of a layer, with their types. dims: of K and V. T: what they are before and after."""
        rows, shapes = (num_blocks, num_kv_heads, block_size), Shapes()
        for name, dim, (bits, group_size, num_params) in zip("kv", dims, self[1:], strict=True):
            shapes[f"{name}_codes"] = (*rows, dim * bits // 32), mx.uint32
            shapes[f"{name}_params"] = (*rows, dim // group_size, num_params), T
        return shapes

    def block_shape(self, arrays: dict[str, mx.array]) -> tuple[int, int, int, int]:
        """How many slots a block has, KV heads, and numbers in a head's K and in its V."""
        _, num_kv_heads, block_size, *_ = arrays["k_codes"].shape
        key_dim, value_dim = (
            arrays[f"{name}_codes"].shape[3] * 32 // each.bits for name, each in zip("kv", self[1:], strict=True)
        )
        return block_size, num_kv_heads, key_dim, value_dim

    def write(
        self, arrays: dict[str, mx.array], block_ids: mx.array, offsets: mx.array, keys: mx.array, values: mx.array
    ) -> None:
        """Put K and V, [num_tokens, num_kv_heads, dim], as codes into slots, int32 [num_tokens]."""
        slots = block_ids[:, None], mx.arange(keys.shape[1]), offsets[:, None]
        rows = (*self.keys.quantise(keys), *self.values.quantise(values))
        for array, each in zip(arrays.values(), rows, strict=True):
            array[slots] = each

    def gather(self, arrays: dict[str, mx.array], name: str, rows: mx.array) -> mx.array:
        """The numbers of `rows`, int32 [...], of the arrays as [-1, ...]. Returns float32 [..., dim]."""
        return self._numbers(arrays, name, lambda array: array.flatten(0, 2)[rows])

    def gather_blocks(self, arrays: dict[str, mx.array], name: str, block_ids: mx.array) -> mx.array:
        """The numbers of blocks, int32 [n], in their order. Returns float32 [num_kv_heads, n * block_size, dim]."""
        return self._numbers(arrays, name, lambda array: array[block_ids].swapaxes(0, 1).flatten(1, 2))

    def _numbers(self, arrays: dict[str, mx.array], name: str, pick: Callable[[mx.array], mx.array]) -> mx.array:
        """What the codes and parameters are, of K ("k") or V ("v"), that `pick` takes out of their arrays."""
        codes, params = (pick(arrays[f"{name}_{kind}"]) for kind in ("codes", "params"))
        return (self.keys if name == "k" else self.values).dequantise(codes, params)


def choose_codes(kv_cache_dtype: str, key_dim: int, value_dim: int) -> KVCodes:
    """How heads of these sizes are stored. Raises ValueError for sizes that are no whole number of groups."""
    least = 4 if kv_cache_dtype == "fp8" else 32
    for name, dim in (("head_dim", key_dim), ("value_dim", value_dim)):
        if dim % least:
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r}: a {name} must be a multiple of {least}, and this model has one of "
                f"{dim}: leave kv_cache_dtype out"
            )
    if kv_cache_dtype == "fp8":
        return KVCodes(kv_cache_dtype, Codes(8, key_dim, 1), Codes(8, value_dim, 1))
    key, value = (Codes(8, 32 if dim % 64 else 64) for dim in (key_dim, value_dim))
    return KVCodes(kv_cache_dtype, key, Codes(4, 32) if kv_cache_dtype == "k8v4" else value)
