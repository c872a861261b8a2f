"""The blocks of one sequence: its table, and how far slots, K/V and publishing have come."""

from dataclasses import dataclass, replace

from mlx_paged.blocks.prefix_tree import PrefixNode, PrefixTree

NO_BLOCK = -1  # in the table of a sequence with a window: the block has been given back


@dataclass(eq=False, slots=True)
class SequenceBlocks:
    """What a block manager knows of a sequence."""

    token_ids: list[int]
    """The list that the sequence's owner appends to; read when a block is full, and never copied."""
    table: list[int]
    """Block ids in order; those that have fallen out of the window are NO_BLOCK."""
    num_tokens: int
    """Tokens that have slots."""
    num_computed: int
    """Tokens that have their K/V in place."""
    num_published: int
    """Blocks, from the first, that are in the prefix tree."""
    last_node: PrefixNode
    """The last of these, or the empty prefix."""
    num_released: int = 0
    """Blocks, from the first, that are NO_BLOCK."""

    @property
    def held_blocks(self) -> list[int]:
        return self.table[self.num_released :]

    def fork(self, token_ids: list[int] | None, num_blocks: int) -> "SequenceBlocks":
        """Return a sequence with the same first blocks. token_ids: its list; None: a copy of the tokens with slots."""
        tokens = self.token_ids[: self.num_tokens] if token_ids is None else token_ids
        return replace(self, token_ids=tokens, table=self.table[:num_blocks])

    def publish(self, tree: PrefixTree, block_size: int, num_tokens: int) -> list[PrefixNode]:
        """Let the full blocks below `num_tokens` be found. Returns the prefixes that these blocks now hold."""
        nodes = []
        while (self.num_published + 1) * block_size <= num_tokens:
            start = self.num_published * block_size
            tokens = tuple(self.token_ids[start : start + block_size])
            block_id = self.table[self.num_published]
            self.last_node = tree.insert(self.last_node, tokens, block_id)
            if self.last_node.block_id == block_id:  # another sequence's block may have been there first
                nodes.append(self.last_node)
            self.num_published += 1
        return nodes

    def release(self, end: int) -> list[int]:
        """Take the blocks before the `end`-th out of the table. Returns them, deepest first."""
        released = self.table[self.num_released : end][::-1]
        self.table[self.num_released : end] = [NO_BLOCK] * len(released)
        self.num_released = max(self.num_released, end)
        return released

    def mark_worth_storing(self) -> None:
        """Note that its prefixes should outlive their eviction, whoever's blocks hold them."""
        node: PrefixNode | None = self.last_node
        for _ in range(self.num_published - self.num_released):
            if node is not None:
                node.worth_storing, node = True, node.parent

    def published_blocks(self) -> list[tuple[int, bytes]]:
        """Return the block id and prefix digest of each prefix of the sequence that can be found, in order."""
        found = []
        node: PrefixNode | None = self.last_node
        while node is not None:
            if node.block_id is not None:
                found.append((node.block_id, node.digest))
            node = node.parent
        return found[::-1]
