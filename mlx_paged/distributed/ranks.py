"""The processes that a model is divided among: who they are, what they agree on, what rank 0 tells the others.

Everything goes through `mx.distributed`, and most of it through sums, to which all ranks but one add zeros: that is a
broadcast with every backend that MLX has. All ranks have to make the same calls in the same order.
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_paged.errors import LostRanks

_HEAD = 512  # int32 numbers that are told at once: a step of 64 sequences fits, mostly
_TEXT = 4096  # bytes that a rank says of itself
_MOST_FILES = 4096  # that are looked at for connections


class Message(IntEnum):
    """What rank 0 tells the others."""

    STEP = 1
    MOVE = 2
    RESET = 3
    MEASURE = 4
    REST = 5
    END = 6


class Ranks:
    """This process among those that a model is divided among."""

    def __init__(self, group: Any) -> None:
        self.group = group
        """MLX's own."""
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.num_messages = self.num_bytes = 0
        """That were told: bytes as they are summed up."""
        self.last_told = mx.array([])
        """What is there once all have heard the last message."""
        self._connections = _connections()
        self._hosts = [socket.gethostname()] * self.size

    @classmethod
    def join(cls, size: int, setting: str) -> Ranks:
        """Meet the other processes. Raises ValueError if they are not as many as the setting asks for."""
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            raise ValueError(f"{setting}={size}: the processes did not find each other: {error}") from None
        if group.size() != size:
            raise ValueError(
                f"{setting}={size} takes {size} processes, and here {_count(group.size())}: "
                f"start the program with mlx.launch -n {size} python PROGRAM, or use mlx-paged's own commands, which do"
            )
        return cls(group)

    def named(self, rank: int) -> str:
        """Name a rank for messages."""
        return f"rank {rank} on {self._hosts[rank]}"

    # -- what all ranks call ------------------------------------------------------------------------------------

    def gather(self, text: str) -> list[str]:
        """Return what each rank says; it is cut after 4096 bytes."""
        said = np.zeros(_TEXT, np.uint8)
        encoded = np.frombuffer(text.encode()[:_TEXT], np.uint8)
        said[: len(encoded)] = encoded
        everything = np.array(mx.distributed.all_gather(mx.array(said), group=self.group))
        return [bytes(each).rstrip(b"\0").decode(errors="replace") for each in everything.reshape(self.size, _TEXT)]

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError, with the first difference, if the ranks are not all told the same."""
        own = {name: str(value)[:200] for name, value in facts.items()}
        try:
            told = [json.loads(each) for each in self.gather(json.dumps({"host": socket.gethostname(), **own}))]
        except (RuntimeError, json.JSONDecodeError):
            raise ValueError(
                "the other ranks do not answer: a program's ranks end with the first LLM that has them"
            ) from None
        self._hosts = [each.pop("host") for each in told]
        for rank, theirs in enumerate(told):
            for name, value in told[0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"all ranks have to be alike: {name} is {value} on {self.named(0)}, and {theirs.get(name)} on "
                        f"{self.named(rank)}"
                    )

    def smallest(self, numbers: Sequence[int]) -> list[int]:
        """Return the smallest that any rank has of each number."""
        found = np.array(mx.distributed.all_min(mx.array(list(numbers), mx.int32), group=self.group))
        return [int(number) for number in found]

    def all_agree(self, answer: bool) -> bool:
        """Say whether an answer is true for all ranks."""
        return self.smallest([int(answer)]) == [1]

    def share(self, array: mx.array) -> mx.array:
        """Return rank 0's array, int32; others give one of the same shape. Nothing is evaluated."""
        mine = array if self.rank == 0 else mx.zeros_like(array)
        return mx.distributed.all_sum(mine, group=self.group)

    # -- what rank 0 tells --------------------------------------------------------------------------------------

    def tell(self, kind: Message, *arrays: np.ndarray) -> None:
        """Tell the other ranks something, arrays of whole numbers with it. Nobody waits for it."""
        lengths = [each.size for each in arrays]
        numbers = np.concatenate([[kind, sum(lengths), len(arrays), *lengths], *(each.reshape(-1) for each in arrays)])
        head = np.zeros(max(_HEAD, len(numbers)), np.int32)
        head[: len(numbers)] = numbers
        parts = [head[:_HEAD], head[_HEAD:]] if len(head) > _HEAD else [head]
        for part in parts:
            self.last_told = self.share(mx.array(part))
            mx.async_eval(self.last_told)
        self.num_messages += len(parts)
        self.num_bytes += head.nbytes

    def listen(self, *, is_resting: bool) -> tuple[Message, list[np.ndarray]]:
        """Wait for what rank 0 tells. Returns its arrays flat. Raises LostRanks if a rank has gone.

        is_resting: nothing runs here, and it may take long. MLX's own wait takes a core's whole time.
        """
        if is_resting and self._connections:
            select.select(self._connections, [], [])
        try:
            numbers = np.array(self.share(mx.zeros(_HEAD, mx.int32)))
            num_arrays = int(numbers[2])
            length = 3 + num_arrays + int(numbers[1])
            if length > _HEAD:
                numbers = np.concatenate([numbers, np.array(self.share(mx.zeros(length - _HEAD, mx.int32)))])
            kind = Message(int(numbers[0]))
        except (RuntimeError, ValueError) as error:  # of a connection that is gone MLX's ring may give zeros
            raise LostRanks(f"another rank has gone: {error}") from None
        return kind, _cut(numbers, num_arrays)


def _cut(numbers: np.ndarray, num_arrays: int) -> list[np.ndarray]:
    """Cut a message's numbers into its arrays."""
    start, arrays = 3 + num_arrays, []
    for length in numbers[3 : 3 + num_arrays].tolist():
        arrays.append(numbers[start : start + length])
        start += length
    return arrays


def _count(size: int) -> str:
    return "there is one" if size == 1 else f"there are {size}"


def _connections() -> list[int]:
    """Return the connections of MLX's ring, if that is what it uses: when they can be read, there is something to do.

    Their ports are in the file of hosts that MLX has read itself.
    """
    try:
        with open(os.environ.get("MLX_HOSTFILE", "")) as file:
            ports = {int(address.rpartition(":")[2]) for host in json.load(file) for address in host}
    except (OSError, ValueError):
        return []
    return [number for number in range(3, _MOST_FILES) if not ports.isdisjoint(_ports_of(number))]


def _ports_of(number: int) -> set[int]:
    """Return both ends' ports of a connection; nothing of another kind of file."""
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return set()
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as connection:
            return {connection.getsockname()[1], connection.getpeername()[1]}
    except (OSError, IndexError):
        return set()
