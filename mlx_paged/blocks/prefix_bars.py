"""Look at the prefix tree: what is cached, as bars that branch, and how a prompt compares with it."""

import heapq
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import islice

from mlx_paged.blocks.prefix_tree import PrefixNode, PrefixTree
from mlx_paged.outputs import PrefixBar

# Of a larger tree a look takes in only so many blocks, so that no step waits long for it.
MAX_NODES = 10_000  # those that were cached first, which are what most prompts begin with
MAX_SIBLINGS = 50_000  # those that were cached last, among which the blocks after a prefix are looked for
_FIRST_TOKENS = 200


def prefix_bars(tree: PrefixTree, ref_counts: Sequence[int], block_size: int, most: int) -> tuple[list[PrefixBar], int]:
    """Return the bars with most blocks in and behind them, at most `most`, in depth-first order; and how many are left.

    Of a tree that is too large for a look, each block that was not looked at counts as a bar.
    """
    nodes = list(islice(tree.nodes(), MAX_NODES))
    weights = [0] * len(nodes)  # blocks of a prefix and of all that go on from it
    places = {node: place for place, node in enumerate(nodes)}
    children: dict[PrefixNode, list[PrefixNode]] = defaultdict(list)
    heads: list[PrefixNode] = []  # the first blocks
    for node in nodes:
        assert node.parent is not None
        (children[node.parent] if node.parent in places else heads).append(node)
    for place in range(len(nodes) - 1, -1, -1):
        weights[place] += nodes[place].block_id is not None
        above = places.get(nodes[place].parent)  # type: ignore[arg-type]
        if above is not None:
            weights[above] += weights[place]

    runs: list[list[PrefixNode]] = []  # heaviest first
    behind: dict[int, list[int]] = defaultdict(list)  # the runs that go on from each, -1: from nothing
    ahead = [(-weights[places[node]], places[node], -1) for node in heads]
    heapq.heapify(ahead)
    while ahead and len(runs) < most:
        _, place, above = heapq.heappop(ahead)
        run = [nodes[place]]
        while len(below := children.get(run[-1], ())) == 1:
            run += below
        for node in below:
            heapq.heappush(ahead, (-weights[places[node]], places[node], len(runs)))
        behind[above].append(len(runs))
        runs.append(run)

    bars: list[PrefixBar] = []
    to_write = [(number, 0, number == behind[-1][-1]) for number in reversed(behind[-1])]
    while to_write:
        number, depth, last = to_write.pop()
        bars.append(_bar(runs[number], ref_counts, block_size, depth, last))
        below_it = behind.get(number, [])
        to_write += [(each, depth + 1, each == below_it[-1]) for each in reversed(below_it)]
    num_bars = len(heads) + sum(len(below) for below in children.values() if len(below) > 1)
    return bars, num_bars - len(bars) + tree.num_nodes - len(nodes)


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
    rest = token_ids[num_alike : num_alike + block_size]
    latest = islice(tree.nodes(latest_first=True), MAX_SIBLINGS if node.num_children else 0)
    siblings = islice((other.tokens for other in latest if other.parent is node), node.num_children)
    num_more, tokens = max(((_num_alike(rest, tokens), tokens) for tokens in siblings), default=(0, ()))
    return num_in_blocks, num_alike + num_more, tokens[num_more:]


def _num_alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences have in common at their start."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
