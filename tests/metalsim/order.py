"""In which order kernels touch what some of them change although it is an input, of which MLX knows nothing.

MLX puts two kernels in order only where one takes what the other has made. So a kernel that writes into a pool has to
take something from every kernel that has read there since it was written last, or else from that write; and one that
reads, from the last write. A simulator runs them as they come, so that a wrong order would show on a device alone. What
they hand each other are outputs whose names end in "_done": they get numbers, and sums of these tell what was waited
for.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np


class UnorderedAccess(AssertionError):
    """A kernel touches a pool before another one need be over."""


@dataclass
class _Pool:
    last_write: int
    content: int = 0  # a checksum, after that
    reads: list[int] = field(default_factory=list)


class AccessOrder:
    """What the kernels of a test have done with its pools."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}  # by address
        self._last_number = 1000

    def check(
        self, kernel: str, inputs: Mapping[str, mx.array], memory: Mapping[str, np.ndarray], written: Set[str]
    ) -> int:
        """Raise UnorderedAccess for a launch that does not wait for another. Returns the number of what it makes.

        memory: that of the inputs which are pools, by name. written: those that the kernel changes.
        """
        self._last_number += 7919
        for name, content in memory.items():
            address, given = content.ctypes.data, _number(inputs, "reads_done" if written else "write_done")
            pool = self._pools.get(address)
            if pool is not None and not (content.any() and pool.content == zlib.crc32(content.view(np.uint8))):
                pool = None  # another one in memory that has become free, or moved by operations of MLX
            if pool is not None and given != (sum(pool.reads) if written and pool.reads else pool.last_write):
                what = "writes into" if written else "reads"
                raise UnorderedAccess(f"{kernel} {what} {name} and does not wait for those before it")
            if name in written:
                self._pools[address] = _Pool(self._last_number)
            elif pool is not None:
                pool.reads.append(self._last_number)
        return self._last_number

    def is_over(self, memory: Mapping[str, np.ndarray], written: Set[str]) -> None:
        """Take note of what a launch has left in the pools that it changes."""
        for name in written & memory.keys():
            self._pools[memory[name].ctypes.data].content = zlib.crc32(memory[name].view(np.uint8))


def _number(inputs: Mapping[str, mx.array], name: str) -> int:
    return int(inputs[name].reshape(-1)[0].item()) if name in inputs else 0
