"""Prefixes are found by their tokens from the start on: never by a hash alone, never across salts, never stale."""

import gc

import pytest

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.blocks.free_lists import POLICIES
from mlx_paged.blocks.prefix_tree import PrefixNode, PrefixTree


class SameHash(int):
    """A token whose hash is that of every other."""

    def __hash__(self) -> int:
        return 7


def insert_chain(tree: PrefixTree, blocks: dict[tuple[int, ...], int], salt: str | None = None) -> list[PrefixNode]:
    """Insert the blocks one below the other; the nodes from the first block on."""
    nodes = []
    node = tree.root(salt)
    for tokens, block_id in blocks.items():
        node = tree.insert(node, tokens, block_id)
        nodes.append(node)
    return nodes


def find_chain(tree: PrefixTree, *chain: tuple[int, ...], salt: str | None = None) -> list[int | None]:
    """The blocks found for a chain of tokens, up to the first that is missing."""
    node = tree.root(salt)
    found: list[int | None] = []
    for tokens in chain:
        child = tree.find(node, tokens)
        if child is None or child.block_id is None:
            break
        node = child
        found.append(child.block_id)
    return found


A, B, C = (1, 2), (3, 4), (5, 6)


def test_a_chain_is_found_block_by_block() -> None:
    tree = PrefixTree()
    insert_chain(tree, {A: 4, B: 2, C: 9})
    assert find_chain(tree, A, B, C) == [4, 2, 9]
    assert find_chain(tree, A, C) == [4]
    assert find_chain(tree, B) == []
    assert len(tree._node_of_block) == 3
    assert 2 in tree and 3 not in tree
    tree.check()


def test_equal_tokens_after_another_prefix_are_another_entry() -> None:
    tree = PrefixTree()
    insert_chain(tree, {A: 0, C: 1})
    insert_chain(tree, {B: 2, C: 3})
    assert find_chain(tree, A, C) == [0, 1]
    assert find_chain(tree, B, C) == [2, 3]


def test_the_first_block_with_a_prefix_stays_its_block() -> None:
    tree = PrefixTree()
    (first,) = insert_chain(tree, {A: 0})
    assert tree.insert(tree.root(), A, 5) is first
    assert find_chain(tree, A) == [0]
    assert 5 not in tree
    tree.check()


def test_an_evicted_block_is_not_found() -> None:
    tree = PrefixTree()
    insert_chain(tree, {A: 0, B: 1})
    tree.evict(1)
    assert find_chain(tree, A, B) == [0]
    assert 1 not in tree
    tree.evict(1)
    tree.evict(17)  # never cached: nothing to do
    tree.check()


def test_children_are_found_again_once_a_missing_middle_block_is_back() -> None:
    tree = PrefixTree()
    insert_chain(tree, {A: 0, B: 1, C: 2})
    tree.evict(1)
    assert find_chain(tree, A, B, C) == [0]
    insert_chain(tree, {A: 0, B: 8})
    assert find_chain(tree, A, B, C) == [0, 8, 2]
    tree.check()


def test_children_are_found_again_once_all_their_ancestors_are_back() -> None:
    tree = PrefixTree()
    insert_chain(tree, {A: 0, B: 1, C: 2})
    tree.evict(0)
    tree.evict(1)
    assert find_chain(tree, A, B, C) == []
    insert_chain(tree, {A: 6, B: 7})
    assert find_chain(tree, A, B, C) == [6, 7, 2]
    tree.check()


def test_a_node_that_was_dropped_while_held_is_put_back_by_the_next_insert_below_it() -> None:
    tree = PrefixTree()
    held = insert_chain(tree, {A: 0, B: 1})[-1]
    tree.evict(1)
    tree.evict(0)
    assert len(tree._node_of_block) == 0
    tree.insert(held, C, 5)
    tree.check()
    insert_chain(tree, {A: 2, B: 3})
    assert find_chain(tree, A, B, C) == [2, 3, 5]


def test_a_held_node_that_was_replaced_meanwhile_gives_way_to_the_new_one() -> None:
    tree = PrefixTree()
    held = insert_chain(tree, {A: 0, B: 1})[-1]
    tree.evict(1)
    tree.evict(0)
    insert_chain(tree, {A: 2, B: 3})
    tree.insert(held, C, 4)
    assert find_chain(tree, A, B, C) == [2, 3, 4]
    tree.check()


def test_a_moved_content_is_found_at_its_new_block_only() -> None:
    tree = PrefixTree()
    insert_chain(tree, {A: 0, B: 1})
    tree.move(1, 5)
    assert find_chain(tree, A, B) == [0, 5]
    assert 1 not in tree and 5 in tree
    tree.move(1, 7)  # block 1 holds nothing of use: nothing to find at 7
    assert 7 not in tree
    tree.move(7, 0)  # and what it overwrites is gone
    assert find_chain(tree, A, B) == []
    tree.check()


def test_salts_see_only_their_own_prefixes() -> None:
    tree = PrefixTree()
    insert_chain(tree, {A: 0}, salt=None)
    insert_chain(tree, {A: 1}, salt="mine")
    assert find_chain(tree, A) == [0]
    assert find_chain(tree, A, salt="mine") == [1]
    assert find_chain(tree, A, salt="yours") == []
    assert find_chain(tree, A, salt="") == []


def test_minus_one_and_minus_two_hash_alike_and_are_told_apart() -> None:
    assert hash((-1, 5)) == hash((-2, 5)), "the premise: CPython gives both the same hash"
    tree = PrefixTree()
    insert_chain(tree, {(-1, 5): 0})
    assert find_chain(tree, (-2, 5)) == []
    assert find_chain(tree, (-1, 5)) == [0]


def test_tokens_that_all_have_one_hash_are_told_apart() -> None:
    one, two, three = SameHash(1), SameHash(2), SameHash(3)
    assert hash((one, two)) == hash((two, three))
    tree = PrefixTree()
    insert_chain(tree, {(one, two): 0, (two, three): 1})
    assert find_chain(tree, (one, two), (one, two)) == [0]
    assert find_chain(tree, (one, three)) == []
    assert find_chain(tree, (one, two), (two, three)) == [0, 1]


def test_nodes_that_all_have_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixNode, "__hash__", lambda self: 7)
    tree = PrefixTree()
    insert_chain(tree, {A: 0, C: 1})
    insert_chain(tree, {B: 2, C: 3})
    assert find_chain(tree, A, C) == [0, 1]
    assert find_chain(tree, B, C) == [2, 3]
    assert find_chain(tree, A, B) == [0]
    tree.check()


@pytest.mark.parametrize("tokens, others", [([-1] * 9, [-2] * 9), ([SameHash(1)] * 9, [SameHash(2)] * 9)])
def test_a_block_manager_never_serves_a_colliding_prompt(tokens: list[int], others: list[int]) -> None:
    manager = BlockManager(12, 2)
    manager.allocate("first", tokens)
    manager.mark_computed("first", 9)
    assert manager.allocate("collides", others) == 0
    assert manager.allocate("same", tokens) == 8
    manager.check()


def test_a_prefix_has_the_same_name_in_every_process_and_no_other_prefix_has_it() -> None:
    """SHA-256 of the name before it and the tokens: another name would find nothing of what is on disk."""
    tree = PrefixTree()
    (one, below), (other, below_other) = (insert_chain(tree, {a: 2 * i, B: 2 * i + 1}) for i, a in enumerate((A, C)))
    split = [tree.insert(tree.root(), tokens, 4 + i) for i, tokens in enumerate([(1, 23), (12, 3)])]
    salted = [tree.root(salt) for salt in ("a", "b")]
    nodes = [tree.root(), one, below, other, below_other, *split, *salted]
    assert len({node.digest for node in nodes}) == len(nodes)
    chain = insert_chain(tree, {(1, 23): 6, (12, 3): 7}, salt="a")
    assert [node.digest.hex() for node in (tree.root(), split[0], *chain)] == [
        "dc937b59892604f5a86ac96936cd7ff09e25f18ae6b758e8014a24c7fa039e91",
        "dac921612dfbb41bc69d40799fd9c899a0c2dede87b643a4a8a5881ff5b0edac",
        "ff550a2a192cfac56e09ea2c546af6c111bca1e4177800288e2e20df33aa52b4",
        "7414bd6c24cfc3228a655437e0d16d64d2f96ef45017c7f343892d2a865791e2",
    ]


def test_the_name_of_a_prefix_of_thousands_of_blocks_is_found() -> None:
    tree = PrefixTree()
    nodes = insert_chain(tree, {(i,): i for i in range(5000)})
    assert nodes[-1].digest != nodes[-2].digest


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("allocator", sorted(POLICIES))
def test_nothing_is_kept_of_prefixes_that_are_gone(allocator: str, window: int | None) -> None:
    """The tree must not grow with the number of prompts, or of salts, that were ever served."""
    manager = BlockManager(4, 2, allocator=allocator, window=window)
    for turn in range(50):
        manager.allocate(turn, [turn, 1, 2, 3, 4], salt=f"user {turn}")
        manager.mark_computed(turn, 5)
        manager.free(turn)
        manager.compact()
    nodes = manager._tree._nodes.values()
    assert all(node.block_id is not None or node.num_children for node in nodes)
    assert [node.num_children for node in nodes] == [sum(one.parent is node for one in nodes) for node in nodes]
    gc.collect()
    alive = [node for node in gc.get_objects() if isinstance(node, PrefixNode)]
    reachable = [node for node in alive if _root_of(node) in set(manager._tree._roots.values())]
    assert len(reachable) <= 3 * 4


def _root_of(node: PrefixNode) -> PrefixNode:
    while node.parent is not None:
        node = node.parent
    return node
