"""The prefix tree: which full block holds which prefix, the tokens from the start of a sequence to the block's end.

A prefix is a path in a tree: a node stands for the tokens of one full block after those of its parent, and is found
by (parent, tokens). Tokens are compared, not only their hashes, and the parent is a node and not a hash of it, so no
collision can serve another prompt's block.
"""

from collections.abc import Container, Hashable, Iterable, Iterator, KeysView, Sequence
from hashlib import sha256
from weakref import WeakValueDictionary


class PrefixNode:
    """The tokens from the start of a sequence to the end of one full block, and the block that has their K/V.

    `worth_storing`: the block has been hit, or its sequence will come back, so it should outlive its eviction.
    """

    __slots__ = ("__weakref__", "_digest", "block_id", "num_children", "parent", "tokens", "worth_storing")

    def __init__(self, parent: "PrefixNode | None", tokens: tuple[int, ...], digest: bytes | None = None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.block_id: int | None = None
        self.num_children = 0
        self.worth_storing = False
        self._digest = digest

    @property
    def digest(self) -> bytes:
        """The prefix's name outside this process: SHA-256 of what it consists of, block by block."""
        missing = []
        node = self
        while node._digest is None:
            assert node.parent is not None
            missing.append(node)
            node = node.parent
        for node in reversed(missing):
            assert node.parent is not None
            node._digest = next_digest(node.parent.digest, node.tokens)
        assert self._digest is not None
        return self._digest


def next_digest(digest: bytes, tokens: tuple[int, ...]) -> bytes:
    """Return the digest of the prefix that goes on with `tokens`."""
    return sha256(digest + b",".join(b"%d" % token for token in tokens)).digest()


class PrefixTree:
    """Find blocks by prefix. Every operation costs what hashing one block's tokens costs."""

    def __init__(self) -> None:
        # A root lives as long as a sequence or a longer prefix refers to it, so that salts don't pile up.
        self._roots: WeakValueDictionary[Hashable, PrefixNode] = WeakValueDictionary()
        self._nodes: dict[tuple[PrefixNode, tuple[int, ...]], PrefixNode] = {}
        self._node_of_block: dict[int, PrefixNode] = {}

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._node_of_block

    @property
    def num_nodes(self) -> int:
        """How many prefixes it knows, but for the empty ones."""
        return len(self._nodes)

    def nodes(self, *, latest_first: bool = False) -> Iterator[PrefixNode]:
        """All of these, each after the shorter ones that it goes on from; or the other way round."""
        nodes = self._nodes.values()
        return reversed(nodes) if latest_first else iter(nodes)

    @property
    def block_ids(self) -> KeysView[int]:
        """All blocks that can be found."""
        return self._node_of_block.keys()

    def cached_blocks(self, block_ids: Iterable[int]) -> list[int]:
        """Return those of the blocks that can be found."""
        nodes = self._node_of_block
        return [block_id for block_id in block_ids if block_id in nodes]

    def root(self, salt: Hashable = None) -> PrefixNode:
        """Return the empty prefix of the requests with this salt; others never see theirs."""
        return self._roots.setdefault(salt, PrefixNode(None, (), sha256(repr(salt).encode()).digest()))

    def find_blocks(self, node: PrefixNode | None, chunks: list[tuple[int, ...]]) -> list[int | None]:
        """Return the block of each prefix that goes on with the chunks one by one; None where no block holds it."""
        blocks = []
        for chunk in chunks:
            node = self._nodes.get((node, chunk)) if node is not None else None
            blocks.append(node.block_id if node is not None else None)
        return blocks

    def walk(
        self, salt: Hashable, tokens: Sequence[int], block_size: int, num_blocks: int, store: Container[bytes] | None
    ) -> Iterator[bool]:
        """Say of each of the first `num_blocks` blocks of `tokens` whether the pool or the store has it.

        Ends where neither knows of a longer prefix. store: the digests of the prefixes that it has.
        """
        node: PrefixNode | None = self.root(salt)
        digest = b"" if node is None or store is None else node.digest
        for start in range(0, num_blocks * block_size, block_size):
            block_tokens = tuple(tokens[start : start + block_size])
            node = self.find(node, block_tokens) if node is not None else None
            if store is None and node is None:
                return
            digest = b"" if store is None else next_digest(digest, block_tokens)
            yield (node is not None and node.block_id is not None) or (store is not None and digest in store)

    def child(self, parent: PrefixNode, tokens: tuple[int, ...]) -> PrefixNode:
        """Return the node of `tokens` after `parent`, made if it is not known."""
        parent = self._reattach(parent)
        node = self._nodes.get((parent, tokens))
        if node is None:
            node = self._nodes[parent, tokens] = PrefixNode(parent, tokens)
            parent.num_children += 1
        return node

    def find(self, parent: PrefixNode, tokens: tuple[int, ...]) -> PrefixNode | None:
        """Return the node of `tokens` after `parent`, if it is known; its block may have been evicted."""
        return self._nodes.get((parent, tokens))

    def insert(self, parent: PrefixNode, tokens: tuple[int, ...], block_id: int) -> PrefixNode:
        """Return the node of `tokens` after `parent`, held by `block_id` from now on unless another block has them."""
        node = self.child(parent, tokens)
        if node.block_id is None:
            node.block_id = block_id
            self._node_of_block[block_id] = node
        return node

    def evict(self, block_id: int) -> PrefixNode | None:
        """Let a block that will be overwritten be found no more. Returns the node that it held, if any."""
        evicted = node = self._node_of_block.pop(block_id, None)
        if node is None:
            return None
        node.block_id = None
        # A node without a block stays while longer prefixes need it, so that they are found again once it is back.
        while node.parent is not None and node.block_id is None and node.num_children == 0:
            del self._nodes[node.parent, node.tokens]
            node = node.parent
            node.num_children -= 1
        return evicted

    def move(self, src: int, dst: int) -> None:
        """Follow the content of `src` to `dst`; what `dst` held is gone."""
        self.evict(dst)
        node = self._node_of_block.pop(src, None)
        if node is not None:
            node.block_id = dst
            self._node_of_block[dst] = node

    def _reattach(self, node: PrefixNode) -> PrefixNode:
        """Return the same prefix's node in the tree: a live sequence may hold one that eviction has dropped."""
        dropped = []
        while node.parent is not None and self._nodes.get((node.parent, node.tokens)) is not node:
            dropped.append(node.tokens)
            node = node.parent
        for tokens in reversed(dropped):
            node = self.child(node, tokens)
        return node

    def check(self) -> None:
        """Raise AssertionError if blocks and nodes disagree."""
        for block_id, node in self._node_of_block.items():
            assert node.block_id == block_id, f"block {block_id} and its prefix node disagree"
            assert node.parent is not None, f"block {block_id} is said to hold the empty prefix"
            assert self._nodes.get((node.parent, node.tokens)) is node, f"block {block_id} can't be found"
        with_block = sum(node.block_id is not None for node in self._nodes.values())
        assert with_block == len(self._node_of_block), "a prefix node names a block that does not hold it"
