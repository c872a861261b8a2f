"""Prefixes are found by their tokens from the start on: never by a hash alone, never across salts, never stale."""

import gc

import pytest

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.prefix_tree import PrefixCache, PrefixNode


class SameHash(int):
    """A token whose hash is that of every other."""

    def __hash__(self) -> int:
        return 7


def insert_chain(cache: PrefixCache, blocks: dict[tuple[int, ...], int], salt: str | None = None) -> list[PrefixNode]:
    """Insert the blocks one below the other; the nodes from the first block on."""
    nodes = []
    node = cache.root(salt)
    for tokens, block_id in blocks.items():
        node = cache.insert(node, tokens, block_id)
        nodes.append(node)
    return nodes


def find_chain(cache: PrefixCache, *chain: tuple[int, ...], salt: str | None = None) -> list[int | None]:
    """The blocks found for a chain of tokens, up to the first that is missing."""
    node = cache.root(salt)
    found: list[int | None] = []
    for tokens in chain:
        child = cache.find(node, tokens)
        if child is None or child.block_id is None:
            break
        node = child
        found.append(child.block_id)
    return found


A, B, C = (1, 2), (3, 4), (5, 6)


def test_a_chain_is_found_block_by_block() -> None:
    cache = PrefixCache()
    insert_chain(cache, {A: 4, B: 2, C: 9})
    assert find_chain(cache, A, B, C) == [4, 2, 9]
    assert find_chain(cache, A, C) == [4]
    assert find_chain(cache, B) == []
    assert len(cache) == 3
    assert 2 in cache and 3 not in cache
    cache.check()


def test_equal_tokens_after_another_prefix_are_another_entry() -> None:
    cache = PrefixCache()
    insert_chain(cache, {A: 0, C: 1})
    insert_chain(cache, {B: 2, C: 3})
    assert find_chain(cache, A, C) == [0, 1]
    assert find_chain(cache, B, C) == [2, 3]


def test_the_first_block_with_a_prefix_stays_its_block() -> None:
    cache = PrefixCache()
    (first,) = insert_chain(cache, {A: 0})
    assert cache.insert(cache.root(), A, 5) is first
    assert find_chain(cache, A) == [0]
    assert 5 not in cache
    cache.check()


def test_an_evicted_block_is_not_found() -> None:
    cache = PrefixCache()
    insert_chain(cache, {A: 0, B: 1})
    cache.evict(1)
    assert find_chain(cache, A, B) == [0]
    assert 1 not in cache
    cache.evict(1)
    cache.evict(17)  # never cached: nothing to do
    cache.check()


def test_children_are_found_again_once_a_missing_middle_block_is_back() -> None:
    cache = PrefixCache()
    insert_chain(cache, {A: 0, B: 1, C: 2})
    cache.evict(1)
    assert find_chain(cache, A, B, C) == [0]
    insert_chain(cache, {A: 0, B: 8})
    assert find_chain(cache, A, B, C) == [0, 8, 2]
    cache.check()


def test_children_are_found_again_once_all_their_ancestors_are_back() -> None:
    cache = PrefixCache()
    insert_chain(cache, {A: 0, B: 1, C: 2})
    cache.evict(0)
    cache.evict(1)
    assert find_chain(cache, A, B, C) == []
    insert_chain(cache, {A: 6, B: 7})
    assert find_chain(cache, A, B, C) == [6, 7, 2]
    cache.check()


def test_a_node_that_was_dropped_while_held_is_put_back_by_the_next_insert_below_it() -> None:
    cache = PrefixCache()
    held = insert_chain(cache, {A: 0, B: 1})[-1]
    cache.evict(1)
    cache.evict(0)
    assert len(cache) == 0
    cache.insert(held, C, 5)
    cache.check()
    insert_chain(cache, {A: 2, B: 3})
    assert find_chain(cache, A, B, C) == [2, 3, 5]


def test_a_held_node_that_was_replaced_meanwhile_gives_way_to_the_new_one() -> None:
    cache = PrefixCache()
    held = insert_chain(cache, {A: 0, B: 1})[-1]
    cache.evict(1)
    cache.evict(0)
    insert_chain(cache, {A: 2, B: 3})
    cache.insert(held, C, 4)
    assert find_chain(cache, A, B, C) == [2, 3, 4]
    cache.check()


def test_a_moved_content_is_found_at_its_new_block_only() -> None:
    cache = PrefixCache()
    insert_chain(cache, {A: 0, B: 1})
    cache.move(1, 5)
    assert find_chain(cache, A, B) == [0, 5]
    assert 1 not in cache and 5 in cache
    cache.move(1, 7)  # block 1 holds nothing of use: nothing to find at 7
    assert 7 not in cache
    cache.move(7, 0)  # and what it overwrites is gone
    assert find_chain(cache, A, B) == []
    cache.check()


def test_salts_see_only_their_own_prefixes() -> None:
    cache = PrefixCache()
    insert_chain(cache, {A: 0}, salt=None)
    insert_chain(cache, {A: 1}, salt="mine")
    assert find_chain(cache, A) == [0]
    assert find_chain(cache, A, salt="mine") == [1]
    assert find_chain(cache, A, salt="yours") == []
    assert find_chain(cache, A, salt="") == []


def test_minus_one_and_minus_two_hash_alike_and_are_told_apart() -> None:
    assert hash((-1, 5)) == hash((-2, 5)), "the premise: CPython gives both the same hash"
    cache = PrefixCache()
    insert_chain(cache, {(-1, 5): 0})
    assert find_chain(cache, (-2, 5)) == []
    assert find_chain(cache, (-1, 5)) == [0]


def test_tokens_that_all_have_one_hash_are_told_apart() -> None:
    one, two, three = SameHash(1), SameHash(2), SameHash(3)
    assert hash((one, two)) == hash((two, three))
    cache = PrefixCache()
    insert_chain(cache, {(one, two): 0, (two, three): 1})
    assert find_chain(cache, (one, two), (one, two)) == [0]
    assert find_chain(cache, (one, three)) == []
    assert find_chain(cache, (one, two), (two, three)) == [0, 1]


def test_nodes_that_all_have_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixNode, "__hash__", lambda self: 7)
    cache = PrefixCache()
    insert_chain(cache, {A: 0, C: 1})
    insert_chain(cache, {B: 2, C: 3})
    assert find_chain(cache, A, C) == [0, 1]
    assert find_chain(cache, B, C) == [2, 3]
    assert find_chain(cache, A, B) == [0]
    cache.check()


@pytest.mark.parametrize("tokens, others", [([-1] * 9, [-2] * 9), ([SameHash(1)] * 9, [SameHash(2)] * 9)])
def test_a_block_manager_never_serves_a_colliding_prompt(tokens: list[int], others: list[int]) -> None:
    manager = BlockManager(12, 2)
    manager.allocate("first", tokens)
    manager.mark_computed("first", 9)
    assert manager.allocate("collides", others) == 0
    assert manager.allocate("same", tokens) == 8
    manager.check()


def test_nothing_is_kept_of_prefixes_that_are_gone() -> None:
    """The tree must not grow with the number of prompts, or of salts, that were ever served."""
    manager = BlockManager(4, 2)
    for turn in range(50):
        manager.allocate(turn, [turn, 1, 2, 3, 4], salt=f"user {turn}")
        manager.mark_computed(turn, 5)
        manager.free(turn)
    gc.collect()
    alive = [node for node in gc.get_objects() if isinstance(node, PrefixNode)]
    reachable = [node for node in alive if _root_of(node) in set(manager._prefixes._roots.values())]
    assert len(reachable) <= 3 * 4


def _root_of(node: PrefixNode) -> PrefixNode:
    while node.parent is not None:
        node = node.parent
    return node
