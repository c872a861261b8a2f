"""The Metal kernels: how they are made and launched.

A kernel is made at its first use, by `mx.fast.metal_kernel` as it is found then, so that a simulator can take its
place. MLX compiles it once for each set of template arguments, dtypes, and inputs of fewer than MIN_INPUT_SIZE
elements.

No input is ever copied to make it contiguous: a pool must not be. The kernels take q and block_tables with any stride
between rows, and rely on pools being contiguous, as they are since they were allocated.
"""

import re
from functools import cached_property

import mlx.core as mx

from mlx_paged.attention.kernel_backend import MAX_HEAD_DIM, KernelBackend
from mlx_paged.attention.kernel_plan import Launch
from mlx_paged.attention.latent_layout import metal_layout
from mlx_paged.attention.work_items import Shape, Tile, decode_layout, tile_for


class MetalBackend(KernelBackend):
    """The kernels in metal/, for Apple's GPUs."""

    name = "metal"
    title = "Metal"
    suffix = "metal"
    latent_layout = staticmethod(metal_layout)

    @cached_property
    def num_cores(self) -> int:
        """MLX does not tell, so the most that the class of chip has, which its architecture's name ends with."""
        architecture = str(mx.device_info().get("architecture", ""))
        if not architecture.startswith("applegpu"):
            return 40
        return {"p": 6, "g": 20, "s": 40, "c": 40, "d": 80}.get(architecture[-1], 40)

    @cached_property
    def has_matrix_units(self) -> bool:
        """Since the M5, whose architecture is applegpu_g17, and of phones one later, as MLX has it."""
        found = re.fullmatch(r"applegpu_g(\d+)(\w)", str(mx.device_info().get("architecture", "")))
        return found is not None and int(found[1]) >= (18 if found[2] == "p" else 17)

    def prefill_tile(self, shape: Shape) -> Tile:
        return tile_for(shape)

    def grid(self, threads: int, second: int, items: int) -> tuple[int, int, int]:
        return threads, second, items

    def launch_decode(self, shape: Shape) -> Launch:
        layout = decode_layout(shape)
        template = {"VALUE_DIM": shape.value_dim} | {name.upper(): n for name, n in layout._asdict().items()}
        return Launch("paged_decode", 32 * layout.simdgroups, template)

    def launch_prefill(self, shape: Shape) -> Launch:
        rows, keys = self.prefill_tile(shape)
        template = {"VALUE_DIM": shape.value_dim, "TILE_ROWS": rows, "TILE_KEYS": keys}
        return Launch("paged_prefill", (8 if shape.value_dim > MAX_HEAD_DIM else 4) * rows, template)

    def headers(self, kernel_name: str, with_codes: bool) -> tuple[str, ...]:
        tiles = ("tiles.h",) if kernel_name in ("paged_prefill", "paged_latent") else ()
        return "packed.h", *(("codes.h",) if with_codes else ()), *tiles
