"""What checkpoints speak to, without the arrays: states and block stores that note what they are told."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class StubStates:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.latest: dict[Hashable, int] = {}
        self.kept: list[int] = []
        self.dropped: list[Any] = []
        self.freed: list[Hashable] = []
        self.forks: list[tuple[Hashable, Hashable]] = []
        self.num_clears = 0

    def fork(self, seq_id: Hashable, new_seq_id: Hashable) -> None:
        self.forks.append((seq_id, new_seq_id))

    def free(self, seq_id: Hashable) -> None:
        self.freed.append(seq_id)
        self.latest.pop(seq_id, None)

    def clear(self) -> None:
        self.num_clears += 1

    def latest_position(self, seq_id: Hashable) -> int:
        return self.latest.get(seq_id, 0)

    def keep_latest(self, seq_id: Hashable, name: Any) -> None:
        self.kept.append(self.latest[seq_id])

    def drop(self, name: Any) -> None:
        self.dropped.append(name)

    def of_checkpoint(self, name: Any) -> str:
        return "state"

    def of_sequence(self, seq_id: Hashable) -> str:
        return "state"


class StoredKeys(set[str]):
    """The keys of what is in a store, as block managers see `BlockStores`."""

    swaps = True

    def has_prompt(self, key: str) -> bool:
        return key in self

    def forget(self, key: str) -> None:
        self.discard(key)
