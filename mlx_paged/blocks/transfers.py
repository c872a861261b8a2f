"""Transfers of blocks, decided here and carried out elsewhere: copies in the pool, moves to and from block stores."""

from collections.abc import Callable, Container, Hashable, Sequence
from typing import Any, NamedTuple

from mlx_paged.blocks.prefix_tree import PrefixNode


class BlockCopy(NamedTuple):
    """Copy block `src` of a group to `dst`, in all layers of the group."""

    group: int
    src: int
    dst: int


class BlockSave(NamedTuple):
    """Keep a block's content in the block store under `key`."""

    group: int
    block_id: int
    key: str


class BlockLoad(NamedTuple):
    """Put what the block store keeps under `key` into a block; if it can't be had, unpublish `node`."""

    group: int
    block_id: int
    key: str
    node: PrefixNode


class StateSave(NamedTuple):
    """Keep a state of recurrent layers in the block store under `key`."""

    key: str
    state: Any
    """As `StateStore` gives it."""
    tails: Sequence[tuple[int, int]] = ()
    """The blocks that go with it since they are not full: group and block id."""


class StateLoad(NamedTuple):
    """Take what a `StateSave` has kept as the state of a prefix or of a sequence."""

    key: str
    owner: PrefixNode | Hashable
    tails: Sequence[tuple[int, int]] = ()


Save = BlockSave | StateSave
Load = BlockLoad | StateLoad
Transfer = BlockCopy | Save | Load


class GroupStoreIndex:
    """The block store as one group's manager sees it: which prefixes' blocks it has, by digest.

    `save` and `load` are notes for whoever moves K and V: they are carried out in their order, between other copies.
    """

    def __init__(self, group: int, stored_keys: Container[str], transfers: list[Transfer]) -> None:
        self._group = group
        self._stored_keys = stored_keys
        self._transfers = transfers
        self._pending_saves: set[str] = set()
        self.on_save: Callable[[PrefixNode], None] | None = None
        """Told of each prefix whose block is saved."""

    def key(self, digest: bytes) -> str:
        """Return the name of a prefix's block of this group."""
        return f"{self._group}-{digest.hex()}"

    def __contains__(self, digest: object) -> bool:
        """Say whether `load` would find it."""
        assert isinstance(digest, bytes)
        return self.key(digest) in self._stored_keys or self.key(digest) in self._pending_saves

    def save(self, node: PrefixNode, block_id: int) -> None:
        """Have the content of the node's block kept before it is overwritten."""
        if node.digest not in self:
            self._pending_saves.add(self.key(node.digest))
            self._transfers.append(BlockSave(self._group, block_id, self.key(node.digest)))
        if self.on_save is not None:
            self.on_save(node)

    def load(self, node: PrefixNode, block_id: int) -> None:
        """Have the content kept under the node's digest put into the block."""
        self._transfers.append(BlockLoad(self._group, block_id, self.key(node.digest), node))

    def transfers_done(self) -> None:
        """Note that what was to be saved is stored, or could not be."""
        self._pending_saves.clear()
