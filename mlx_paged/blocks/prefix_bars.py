"""Look at the prefix tree: what is cached, as bars that branch, and how a prompt compares with it."""

import heapq
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import islice

from mlx_paged.blocks.prefix_tree import PrefixNode, PrefixTree
from mlx_paged.outputs import PrefixBar

MAX_NODES = 50_000  # that a look takes in, the oldest ones: so many take some hundredths of a second
_FIRST_TOKENS = 200

Children = dict[PrefixNode, list[PrefixNode]]


def prefix_bars(tree: PrefixTree, ref_counts: Sequence[int], block_size: int, most: int) -> tuple[list[PrefixBar], int]:
    """Return the bars with most blocks in and behind them, at most `most`, in depth-first order, and how many are left.

    Of a tree that is too large for a look, blocks that were not looked at count as one bar each.
    """
    nodes = list(islice(tree.nodes, MAX_NODES))
    children: Children = defaultdict(list)
    weights = dict.fromkeys(nodes, 0)  # blocks of a prefix and of all that go on from it
    heads = []
    for node in nodes:
        assert node.parent is not None
        if node.parent.parent is None:
            heads.append(node)
        else:
            children[node.parent].append(node)
    for node in reversed(nodes):
        weights[node] += node.block_id is not None
        if node.parent in weights:
            weights[node.parent] += weights[node]
    num_bars = len(heads) + sum(len(below) for below in children.values() if len(below) > 1)
    kept: dict[int | None, list[int]] = defaultdict(list)  # bars, by the one that they go on from
    runs: list[list[PrefixNode]] = []
    ahead: list[tuple[int, int, PrefixNode, int | None]] = []
    numbered = {node: number for number, node in enumerate(nodes)}
    below, parent = heads, None
    while True:
        for node in below:
            heapq.heappush(ahead, (-weights[node], numbered[node], node, parent))
        if not ahead or len(runs) == most:
            break
        _, _, node, above = heapq.heappop(ahead)
        run, below, parent = [node], children[node], len(runs)
        while len(below) == 1:
            run.append(below[0])
            below = children[below[0]]
        kept[above].append(parent)
        runs.append(run)
    bars = []
    to_write = [(0, bar, i == 0) for i, bar in enumerate(kept[None][::-1])][::1]
    while to_write:
        depth, number, last = to_write.pop()
        bars.append(_bar(runs[number], ref_counts, block_size, depth, last))
        to_write += [(depth + 1, bar, i == 0) for i, bar in enumerate(kept[number][::-1])]
    return bars, num_bars - len(bars) + len(tree.nodes) - len(nodes)


def _bar(run: list[PrefixNode], ref_counts: Sequence[int], block_size: int, depth: int, last: bool) -> PrefixBar:
    blocks = [node.block_id for node in run if node.block_id is not None]
    return PrefixBar(
        depth=depth,
        num_blocks=len(blocks),
        num_tokens=len(blocks) * block_size,
        num_holders=max((ref_counts[block_id] for block_id in blocks), default=0),
        last=last,
        first_tokens=[token for node in run[: -(-_FIRST_TOKENS // block_size)] for token in node.tokens],
    )


def nearest_prefix(
    tree: PrefixTree, salt: Hashable, token_ids: Sequence[int], block_size: int
) -> tuple[int, int, tuple[int, ...]]:
    """Compare a prompt with the prefixes that were cached under its salt.

    Returns how many of its leading tokens are in blocks, how many it has in common with the nearest prefix, and with
    what that goes on, to the end of its block.
    """
    node, num_alike, num_in_blocks = tree.root(salt), 0, 0
    while (child := tree.find(node, tuple(token_ids[num_alike : num_alike + block_size]))) is not None:
        if child.block_id is not None and num_in_blocks == num_alike:
            num_in_blocks += block_size
        node = child
        num_alike += block_size
    if not node.num_children:
        return num_in_blocks, num_alike, ()
    rest = token_ids[num_alike : num_alike + block_size]
    siblings = (other.tokens for other in tree.nodes if other.parent is node)
    num_more, tokens = max((_num_alike(rest, tokens), tokens) for tokens in siblings)
    return num_in_blocks, num_alike + num_more, tokens[num_more:]


def _num_alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences have in common at their start."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
