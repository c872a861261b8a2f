"""What one cache group wants moved to and from a block store."""

from __future__ import annotations

from mlx_paged.blocks.prefix_tree import PrefixNode
from mlx_paged.blocks.transfers import BlockLoad, BlockSave, GroupStoreIndex, Transfer


def test_a_block_is_saved_once_and_counts_as_stored_from_then_on() -> None:
    stored, transfers = {f"1-{b'old'.hex()}"}, list[Transfer]()
    index = GroupStoreIndex(1, stored, transfers)
    assert b"old" in index and b"new" not in index
    for block_id, digest in enumerate((b"new", b"new", b"old")):
        index.save(PrefixNode(None, (), digest), block_id)
    key = f"1-{b'new'.hex()}"
    assert transfers == [BlockSave(1, 0, key)]
    assert b"new" in index
    node = PrefixNode(None, (), b"new")
    index.load(node, 7)
    assert transfers[1:] == [BlockLoad(1, 7, key, node)]


def test_what_could_not_be_saved_is_not_stored_once_the_transfers_are_done() -> None:
    stored = set[str]()
    index = GroupStoreIndex(0, stored, [])
    index.save(PrefixNode(None, (), b"lost"), 3)
    index.save(PrefixNode(None, (), b"kept"), 4)
    stored.add(index.key(b"kept"))
    index.transfers_done()
    assert b"lost" not in index and b"kept" in index


def test_a_group_does_not_find_what_another_has_stored() -> None:
    stored = {GroupStoreIndex(0, (), []).key(b"one")}
    assert [b"one" in GroupStoreIndex(group, stored, []) for group in (0, 1)] == [True, False]
