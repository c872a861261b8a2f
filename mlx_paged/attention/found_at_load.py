"""What has been found out about a GPU at load: kernels that run with fewer threads only, and what prefixes cost.

Nothing is found out where there is no GPU: then all kernels are launched as they are laid out, and costs are assumed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlx_paged.attention.kernel_plan import Launch
from mlx_paged.attention.latent_layout import LatentLayout
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.attention.work_items import Shape, Tile

MIN_ROWS = 16
"""Of queries and heads that see a prefix: fewer leave most of a tile of paged_prefill empty."""
MOST_HALVINGS = 2
_LEAST_ROWS = 8  # of a tile: those of a simdgroup
_LEAST_THREADS = 32  # a simdgroup, or a warp


class SharingCosts(NamedTuple):
    """What it takes to read a prefix for each of its sequences, or once for all of them."""

    decode_key: float
    """Of one sequence, which paged_decode reads."""
    tile_key: float
    """Of all sequences of a tile, which paged_prefill reads."""
    start: float
    """Another launch, and merging what it has computed."""
    unit: str
    """"us", or "keys": as long as it takes to read so many."""


ASSUMED = SharingCosts(1.0, 1.0, 512.0, "keys")
"""Where nothing was measured."""


class FoundAtLoad:
    """What has been found out about a GPU. Shapes are those of layers."""

    def __init__(self) -> None:
        self.halvings: dict[tuple[str, Shape], int] = {}
        """How often the threads of a kernel had to be halved, by its name."""
        self.costs: dict[Shape, SharingCosts] = {}

    def fitted(self, launch: Launch, shape: Shape) -> Launch:
        """A launch as this GPU takes it."""
        for _ in range(self.halvings.get((launch.kernel_name, shape), 0)):
            launch = smaller(launch)
        return launch

    def fitted_tiles(self, layout: LatentLayout, shape: Shape) -> LatentLayout:
        """Likewise, with the tile that its threads then compute."""
        launch = self.fitted(layout.launch, shape)
        return LatentLayout(layout.tile._replace(rows=launch.template["TILE_ROWS"]), launch)

    def worth_sharing(
        self, prefixes: Sequence[SharedPrefix], shape: Shape, layout: Callable[[Shape], LatentLayout]
    ) -> list[SharedPrefix]:
        """Those of the prefixes that cost less if they are read once, if that pays for the launch that takes."""
        if not prefixes:
            return []
        costs, tile = self.costs.get(shape, ASSUMED), layout(shape).tile
        saved = [(saving(costs, len(each.members), each.num_tokens, shape, tile), each) for each in prefixes]
        worth = [(amount, each) for amount, each in saved if amount > 0]
        return [each for _, each in worth] if sum(amount for amount, _ in worth) >= costs.start else []


def saving(costs: SharingCosts, num_members: int, num_tokens: int, shape: Shape, tile: Tile) -> float:
    """What is saved by reading a prefix once for its members, `SharingCosts.start` not counted. 0 of too few rows."""
    num_rows = num_members * shape.heads_per_kv_head
    num_tiles = -(-num_rows // tile.rows)
    return num_tokens * (num_members * costs.decode_key - num_tiles * costs.tile_key) if num_rows >= MIN_ROWS else 0.0


def least_members(costs: SharingCosts, num_tokens: int, shape: Shape, tile: Tile) -> int | None:
    """The fewest sequences for which, as for all greater numbers, a prefix is computed once. None: not for 256."""
    too_few = (n for n in range(256, 1, -1) if saving(costs, n, num_tokens, shape, tile) < max(costs.start, 1e-9))
    found = next(too_few, 1) + 1
    return found if found <= 256 else None


def smaller(launch: Launch) -> Launch:
    """The same kernel with half of its threads, or half as much for each of them to keep; or as it is, if it can't.

    A KV head's decode has half as many simdgroups, or warps, at a time. A tile has half of the rows.
    """
    template, threads = launch.template, launch.threads // 2
    halved = [name for name in ("TILE_ROWS", "MATRICES", "SIMDGROUPS", "WARPS") if template.get(name, 1) > 1]
    if "TILE_ROWS" in template:
        if template["TILE_ROWS"] <= _LEAST_ROWS:
            return launch
        halved = halved[:2] if "MATRICES" in halved else halved[:1]
        if "MATRICES" in halved or "SIMDGROUPS" in template:  # rows of a thread become fewer, not threads
            threads = launch.threads
    if not halved or threads < _LEAST_THREADS:
        return launch
    return launch._replace(threads=threads, template=template | {name: template[name] // 2 for name in halved})
