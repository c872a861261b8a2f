"""The states that are in the block store: of prefixes, and of preempted sequences until they return. Knows no mlx.

A prefix's state has a key like that of its block. A sequence's is that after all that was computed of it, and has the
blocks with it that were not full, which no prefix names: so it goes on where it was.
"""

from collections.abc import Callable, Container, Hashable, Sequence
from typing import Any, Protocol

from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.blocks.transfers import StateLoad, StateSave, Transfer

PREFIX = "state-"  # begins the keys of prefixes' states


class StoredKeys(Container[str], Protocol):
    """What block managers know of the block stores; `mlx_paged.cache.block_store.BlockStores` says what it means."""

    @property
    def swaps(self) -> bool: ...
    def has_prompt(self, key: str) -> bool: ...
    def forget(self, key: str) -> None: ...


class StoredStates:
    """Notes what is to be moved, as `GroupStoreIndex` does."""

    def __init__(self, stored_keys: StoredKeys, transfers: list[Transfer]) -> None:
        self._stored_keys = stored_keys
        self._transfers = transfers
        self._parked: dict[Hashable, int] = {}  # how far each sequence had come
        self._returning: dict[Hashable, int] = {}  # likewise, of those whose state is to be loaded

    def __contains__(self, digest: object) -> bool:
        """Say whether there is the state of a prefix."""
        assert isinstance(digest, bytes)
        return _prefix_key(digest) in self._stored_keys

    def save(self, node: PrefixNode, state: Any) -> None:
        """Have the state of a prefix kept that leaves the device."""
        if self._stored_keys.swaps and node.digest not in self:
            self._transfers.append(self.save_of(node, state))

    def save_of(self, node: PrefixNode, state: Any) -> StateSave:
        """Return what keeps the state of a prefix."""
        return StateSave(_prefix_key(node.digest), state)

    def touch(self, node: PrefixNode) -> None:
        """Note that the state of a prefix is used, if it is kept for another run."""
        self._stored_keys.has_prompt(_prefix_key(node.digest))

    def load(self, digest: bytes, owner: PrefixNode | Hashable) -> None:
        """Have the state that is kept of a prefix taken as that of `owner`."""
        self._transfers.append(StateLoad(_prefix_key(digest), owner))

    def park(self, seq_id: Hashable, position: int, state: Any, tails: Sequence[tuple[int, int]]) -> None:
        """Have the state kept of a sequence that is preempted after `position` tokens."""
        if self._stored_keys.swaps:
            self._parked[seq_id] = position
            self._transfers.append(StateSave(_sequence_key(seq_id), state, tails))

    def parked_position(self, seq_id: Hashable) -> int:
        """After how many tokens the state of a sequence is kept; 0: none is."""
        key = _sequence_key(seq_id)
        is_kept = key in self._stored_keys or any(isinstance(t, StateSave) and t.key == key for t in self._transfers)
        return self._parked.get(seq_id, 0) if is_kept else 0

    def unpark(self, seq_id: Hashable, tails: Sequence[tuple[int, int]]) -> None:
        """Have a sequence that has blocks again go on with its state."""
        self._returning[seq_id] = self._parked.pop(seq_id)
        self._transfers.append(StateLoad(_sequence_key(seq_id), seq_id, tails))

    def put_back(self, seq_id: Hashable) -> None:
        """Note that a sequence has lost its blocks again. If its state was not loaded yet, that stays where it is."""
        if seq_id in self._returning:
            self._parked[seq_id] = self._returning.pop(seq_id)
        self._cancel(lambda each: isinstance(each, StateLoad) and each.owner == seq_id)

    def loaded(self, seq_id: Hashable) -> None:
        """Note that a sequence has its state, or that it can't be had: if it was its own, its place is free."""
        if self._returning.pop(seq_id, None) is not None:
            self._stored_keys.forget(_sequence_key(seq_id))

    def forget(self, seq_id: Hashable) -> None:
        """Give up the state of a sequence that goes on without it, or has ended."""
        if self._parked.pop(seq_id, None) is not None:
            self._cancel(lambda each: isinstance(each, StateSave) and each.key == _sequence_key(seq_id))
            self._stored_keys.forget(_sequence_key(seq_id))

    def clear(self) -> None:
        """Give up those of all sequences."""
        for seq_id in [*self._returning]:
            self.put_back(seq_id)
        for seq_id in [*self._parked]:
            self.forget(seq_id)

    def _cancel(self, is_void: Callable[[Transfer], bool]) -> None:
        self._transfers[:] = [each for each in self._transfers if not is_void(each)]


def _prefix_key(digest: bytes) -> str:
    return f"{PREFIX}{digest.hex()}"


def _sequence_key(seq_id: Hashable) -> str:
    return f"sequence-{seq_id}"
