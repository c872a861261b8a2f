"""The Metal kernels: what they can compute, and their calls.

A kernel is made at its first use, by `mx.fast.metal_kernel` as it is found then, so that a simulator can take its
place. MLX keeps one compiled library per kernel name and throws it away when the same name comes with another text.
The text depends on which inputs have fewer than 8 elements and on their dtypes, so the names say that.

No input is ever copied to make it contiguous: a pool must not be. The kernels take q and block_tables with any stride
between rows, and rely on pools being contiguous, as they are since they were allocated.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged import kernel_plan
from mlx_paged.kernel_plan import SCRATCH, SIMDGROUPS, Items, Shape, Tile, decode_layout, tile_for
from mlx_paged.shared_prefix import SharedPrefix

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
BLOCK_SIZES = (8, 16, 32, 64)
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KV_HEAD = 16

_LOG2E = 1.4426950408889634
_NO_WINDOW = 1 << 30
_SMALL = 8  # an input with fewer elements is another kind of argument to a kernel
_HEADERS = {
    "paged_decode": ("packed.h",),
    "paged_prefill": ("packed.h", "tiles.h"),
    "paged_merge": ("packed.h",),
}


def is_available() -> bool:
    """Whether Metal kernels run here: there is a Metal device, and work was not put on the CPU instead of it."""
    on_cpu_by_choice = mx.is_available(mx.gpu) and mx.default_device() == mx.cpu
    return mx.metal.is_available() and not on_cpu_by_choice


def unsupported(dtype: mx.Dtype, num_heads: int, block_shape: Sequence[int], value_dim: int) -> str | None:
    """Why no kernel takes arrays like these, or None if one does. block_shape: block_size, num_kv_heads, head_dim."""
    block_size, num_kv_heads, head_dim = block_shape
    if dtype not in DTYPES:
        return f"no Metal kernel for dtype {dtype}: float16, bfloat16 and float32 have one"
    if block_size not in BLOCK_SIZES:
        return f"no Metal kernel for block_size {block_size}: {', '.join(map(str, BLOCK_SIZES))} have one"
    for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
        if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            return f"no Metal kernel for {name} {dim}: multiples of 8 up to {MAX_HEAD_DIM} have one"
    if num_heads // num_kv_heads > MAX_HEADS_PER_KV_HEAD:
        return (
            f"no Metal kernel for {num_heads} query heads on {num_kv_heads} KV heads: "
            f"at most {MAX_HEADS_PER_KV_HEAD} may share one"
        )
    return None


@cache
def num_cores() -> int:
    """Cores of the GPU: MLX does not tell, so the most that the class of chip has, which its name ends with."""
    architecture = str(mx.device_info().get("architecture", ""))
    if not architecture.startswith("applegpu"):
        return 40
    return {"p": 6, "g": 20, "s": 40, "c": 40, "d": 80}.get(architecture[-1], 40)


def shape_of(q: mx.array, k_cache: mx.array, v_cache: mx.array) -> Shape:
    """What a plan for these arrays depends on."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    return Shape(num_kv_heads, q.shape[1] // num_kv_heads, head_dim, v_cache.shape[3], q.dtype.size)


class Plan(NamedTuple):
    """A step's items on the device, the same for all layers of one shape and window: kernel_plan.Items tells.

    work and cu_parts have at least 8 elements; is_split: whether what cu_parts tells has to be merged.
    """

    work: mx.array
    num_items: int
    num_parts: int
    cu_parts: mx.array
    is_split: bool


class SharedPlan(NamedTuple):
    """The items of shared prefixes on the device: kernel_plan.SharedItems tells."""

    plan: Plan
    members: mx.array
    ranges: mx.array


class DecodePlan(NamedTuple):
    """The items of each sequence's own keys, and those of the keys that sequences share."""

    own: Plan
    shared: SharedPlan | None


class Division(NamedTuple):
    """What a plan depends on beside shapes and lengths: the device's cores, and the tile of its prefill kernel."""

    num_cores: int
    tile: Tile


def plan_decode(
    context_lens: np.ndarray,
    window: int | None,
    shape: Shape,
    prefixes: Sequence[SharedPrefix] = (),
    division: Division | None = None,
) -> DecodePlan:
    """The plan for one query per sequence.

    context_lens: int32 [num_seqs]. prefixes: only without a window. division: None is the one for Metal.
    """
    cores, tile = division or Division(num_cores(), tile_for(shape))
    num_keys = context_lens if window is None else np.minimum(context_lens, window)
    shared = None
    if prefixes:
        num_keys = context_lens.copy()
        for prefix in prefixes:
            num_keys[prefix.members] -= prefix.num_tokens
        items, members, ranges = kernel_plan.shared_items(prefixes, len(context_lens), shape, cores, tile)
        shared = SharedPlan(put_on_device(items), _padded(members), _padded(ranges))
    size = kernel_plan.keys_per_item(num_keys, shape, cores)
    return DecodePlan(put_on_device(kernel_plan.decode_items(context_lens, num_keys, size)), shared)


def plan_prefill(
    context_lens: np.ndarray,
    cu_seqlens_q: np.ndarray,
    window: int | None,
    shape: Shape,
    division: Division | None = None,
) -> Plan:
    """The plan for any number of queries per sequence. context_lens: int32 [num_seqs], cu_seqlens_q: [num_seqs + 1]."""
    cores, tile = division or Division(num_cores(), tile_for(shape))
    return put_on_device(kernel_plan.prefill_items(context_lens, cu_seqlens_q, window, shape, cores, tile))


def put_on_device(items: Items) -> Plan:
    """The items as the kernels take them."""
    return Plan(_padded(items.work), len(items.work), items.num_parts, _padded(items.cu_parts), items.is_split)


def decode(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    block_tables: mx.array,
    plan: DecodePlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of one query per sequence: q [num_seqs, num_heads, head_dim] -> [num_seqs, num_heads, value_dim].

    The other arguments are those of `paged_attention`; contexts and window are in the plan of `plan_decode`. Rows of q
    and of block_tables are contiguous, pools as a whole. Raises ValueError for arrays that have no kernel.
    """
    check(q, k_cache, v_cache, block_tables, sinks)
    if q.shape[0] == 0:
        return mx.zeros((0, q.shape[1], v_cache.shape[3]), q.dtype)
    shape = shape_of(q, k_cache, v_cache)
    layout = decode_layout(shape)
    template = {
        "HEADS": shape.heads_per_kv_head,
        "LANES": layout.lanes,
        "PARTS": layout.parts,
        "WIDTH": layout.width,
        "BATCH": layout.batch,
        "QUERY_IN_REGISTERS": layout.query_in_registers,
        "SIMDGROUPS": SIMDGROUPS,
        "SCRATCH": SCRATCH,
    }
    inputs = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_tables": block_tables}
    logits = Logits(scale, softcap, sinks)
    parts = _attend("paged_decode", inputs, plan.own, template, 32 * SIMDGROUPS, logits)
    if plan.shared is None:
        return _merged(parts, plan.own, q.shape[0])
    # A sink is one of a sequence's own keys.
    shared = _attend_tiles(inputs, plan.shared.plan, logits._replace(sinks=None), None, plan.shared.members)
    return _merge(parts, plan.own.cu_parts, q.shape[0], shared, plan.shared.ranges)


def prefill(
    q: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    block_tables: mx.array,
    plan: Plan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of any number of queries per sequence: q [num_tokens, num_heads, head_dim] -> the same of value_dim.

    As `decode`, with the plan of `plan_prefill`.
    """
    check(q, k_cache, v_cache, block_tables, sinks)
    if q.shape[0] == 0:
        return mx.zeros((0, q.shape[1], v_cache.shape[3]), q.dtype)
    inputs = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_tables": block_tables}
    return _merged(_attend_tiles(inputs, plan, Logits(scale, softcap, sinks), window, None), plan, q.shape[0])


class Logits(NamedTuple):
    """How scores become logits, and a logit without a key; as in `paged_attention`."""

    scale: float
    softcap: float | None
    sinks: mx.array | None


class Parts(NamedTuple):
    """What a kernel computed of parts of keys: out [num_parts, num_heads, value_dim] and lse [num_parts, num_heads]."""

    out: mx.array
    lse: mx.array


def _attend_tiles(
    inputs: dict[str, mx.array], plan: Plan, logits: Logits, window: int | None, members: mx.array | None
) -> Parts:
    """paged_prefill; members: the plan is one of shared prefixes, and these are its queries."""
    tile = tile_for(shape_of(inputs["q"], inputs["k_cache"], inputs["v_cache"]))
    inputs = inputs | {
        "members": plan.work if members is None else members,
        "window": mx.array(_NO_WINDOW if window is None else min(window, _NO_WINDOW), mx.int32),
    }
    template = {"TILE_ROWS": tile.rows, "TILE_KEYS": tile.keys, "SHARED": members is not None}
    return _attend("paged_prefill", inputs, plan, template, 4 * tile.rows, logits)


def _attend(
    stem: str, inputs: dict[str, mx.array], plan: Plan, template: dict[str, Any], threads: int, logits: Logits
) -> Parts:
    """What both kernels have in common: items, logits, outputs. threads: of a threadgroup, one per item and KV head."""
    q, v_cache = inputs["q"], inputs["v_cache"]
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, value_dim = v_cache.shape[2:]
    scale, softcap, sinks = logits
    inputs = inputs | {
        "work": plan.work,
        "scale": mx.array(scale * _LOG2E if softcap is None else scale / softcap, mx.float32),
        "cap": mx.array(0 if softcap is None else softcap * _LOG2E, mx.float32),
        "sinks": q if sinks is None else sinks,
    }
    constants = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "SOFTCAP": softcap is not None}
    return Parts(
        *_kernel(stem, inputs, ("out", "lse"))(
            inputs=list(inputs.values()),
            template=[("T", q.dtype), *constants.items(), ("SINKS", sinks is not None), *template.items()],
            grid=(threads, num_kv_heads, plan.num_items),
            threadgroup=(threads, 1, 1),
            output_shapes=[(plan.num_parts, num_heads, value_dim), (plan.num_parts, num_heads)],
            output_dtypes=[q.dtype, mx.float32],
        )
    )


def _merged(parts: Parts, plan: Plan, num_rows: int) -> mx.array:
    """The parts of each row of q joined, [num_rows, num_heads, value_dim]: the rows' own where each has one."""
    return _merge(parts, plan.cu_parts, num_rows) if plan.is_split else parts.out


def _merge(
    parts: Parts, cu_parts: mx.array, num_rows: int, shared: Parts | None = None, ranges: mx.array | None = None
) -> mx.array:
    """paged_merge. shared, ranges: the parts of shared prefixes, and which of them belong to each row."""
    num_heads, value_dim = parts.out.shape[1:]
    more = parts if shared is None else shared
    inputs = {
        "parts": parts.out,
        "lse": parts.lse,
        "cu_parts": cu_parts,
        "shared_parts": more.out,
        "shared_lse": more.lse,
        "ranges": cu_parts if ranges is None else ranges,
    }
    (out,) = _kernel("paged_merge", inputs, ("out",))(
        inputs=list(inputs.values()),
        template=[("T", parts.out.dtype), ("VALUE_DIM", value_dim), ("SHARED", shared is not None)],
        grid=(32, num_heads, num_rows),
        threadgroup=(32, int(np.gcd(num_heads, SIMDGROUPS)), 1),
        output_shapes=[(num_rows, num_heads, value_dim)],
        output_dtypes=[parts.out.dtype],
    )
    return out


def check(q: mx.array, k_cache: mx.array, v_cache: mx.array, block_tables: mx.array, sinks: mx.array | None) -> None:
    """Raise ValueError for arrays that do not fit together or that no kernel takes."""
    if reason := unsupported(q.dtype, q.shape[1], k_cache.shape[1:], v_cache.shape[3]):
        raise ValueError(reason)
    if not (q.dtype == k_cache.dtype == v_cache.dtype and block_tables.dtype == mx.int32):
        raise ValueError(
            "q, k_cache and v_cache must have one dtype and block_tables be int32; "
            f"got {q.dtype}, {k_cache.dtype}, {v_cache.dtype} and {block_tables.dtype}"
        )
    if k_cache.shape[:3] != v_cache.shape[:3] or q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"q {q.shape}, k_cache {k_cache.shape} and v_cache {v_cache.shape} do not fit together")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must have one value per query head, [{q.shape[1]}], got {sinks.shape}")


def _kernel(stem: str, inputs: dict[str, mx.array], outputs: tuple[str, ...]) -> Callable[..., list[mx.array]]:
    """The kernel metal/{stem}.metal for arrays like `inputs`."""
    if not mx.metal.is_available():
        raise RuntimeError("Metal kernels need a Metal device, and there is none here")
    name = f"{stem}_" + "".join(str(int(array.size < _SMALL)) for array in inputs.values())
    if "sinks" in inputs:
        name += f"_{str(inputs['sinks'].dtype).removeprefix('mlx.core.')}"
    return _make(mx.fast.metal_kernel, name, stem, tuple(inputs), outputs)


@cache
def _make(
    metal_kernel: Callable[..., Any], name: str, stem: str, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Callable[..., list[mx.array]]:
    folder = files("mlx_paged.metal")
    header = "\n".join(folder.joinpath(file).read_text() for file in _HEADERS[stem])
    return metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        header=header,
        source=folder.joinpath(f"{stem}.metal").read_text(),
        ensure_row_contiguous=False,
    )


def _padded(values: np.ndarray) -> mx.array:
    """int32 on the device, with zeros for rows until there are 8 elements: the text of a kernel depends on that."""
    missing = max(0, -(-_SMALL // max(1, values[:1].size)) - len(values))
    return mx.array(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))
