"""The calls of the attention kernels, the same for every kind of GPU; what differs, a `Gpu` tells.

A call is prepared once for the layers of a step that are alike, and then takes the arrays that differ: building a
step's graph should not cost more on the host than what the kernels take the place of.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention.work_items import Items, Shape

_LOG2E = 1.4426950408889634
_NO_WINDOW = 1 << 30
_SIMDGROUPS_OF_MERGE = 8
SMALL = 8  # a Metal kernel takes an input with fewer elements in another way: plans have none

Kernel = Callable[..., list[mx.array]]
Call = Callable[[mx.array, mx.array, mx.array, mx.array, mx.array | None, mx.array | None], mx.array]
Parts = list[mx.array]  # of keys: means [num_parts, num_heads, value_dim], logs of sums [num_parts, num_heads]
PartsCall = Callable[..., Parts]


class Launch(NamedTuple):
    """Which kernel, how many threads to an item and KV head, template arguments of its own, bytes of shared memory."""

    stem: str
    threads: int
    template: dict[str, Any]
    shared_bytes: int = 0


def shape_of(q: mx.array, k_cache: mx.array, v_cache: mx.array) -> Shape:
    """What a plan for these arrays depends on."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    return Shape(num_kv_heads, q.shape[1] // num_kv_heads, head_dim, v_cache.shape[3], q.dtype.size)


@dataclass(eq=False)
class Plan:
    """A step's items on the device, the same for all layers of one shape and window: kernel_plan.Items tells.

    work and cu_parts have at least 8 elements; is_split: whether what cu_parts tells has to be merged.
    """

    work: mx.array
    num_items: int
    num_parts: int
    cu_parts: mx.array
    is_split: bool
    calls: dict[Any, Call] = field(default_factory=dict)


class SharedPlan(NamedTuple):
    """The items of shared prefixes on the device: kernel_plan.SharedItems tells."""

    plan: Plan
    members: mx.array
    ranges: mx.array


@dataclass(eq=False)
class DecodePlan:
    """The items of each sequence's own keys, and those of the keys that sequences share."""

    own: Plan
    shared: SharedPlan | None
    calls: dict[Any, Call] = field(default_factory=dict)


def put_on_device(items: Items) -> Plan:
    """The items as the kernels take them."""
    return Plan(padded(items.work), len(items.work), items.num_parts, padded(items.cu_parts), items.is_split)


def padded(values: np.ndarray) -> mx.array:
    """int32 on the device, with zeros for rows until there are 8 elements: the text of a kernel depends on that."""
    missing = max(0, -(-SMALL // max(1, values[:1].size)) - len(values))
    return mx.array(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))


class Logits(NamedTuple):
    """How scores become logits, as in `paged_attention`."""

    scale: float
    softcap: float | None


class Gpu(NamedTuple):
    """What a kind of GPU brings, and the calls of its kernels.

    kernel: makes the kernel of a stem for inputs like those given by name, with names of outputs and bytes of shared
    memory. launch_decode, launch_tiles: how paged_decode and paged_prefill are launched for a shape. check: raises
    ValueError for arrays that no kernel takes. is_flat: items lie along the grid's first dimension, not the last.
    writes: it has a kernel that writes into the pools, and what that returns is an input of those that read them.
    """

    kernel: Callable[[str, dict[str, mx.array], tuple[str, ...], int], Kernel]
    launch_decode: Callable[[Shape], Launch]
    launch_tiles: Callable[[Shape], Launch]
    check: Callable[[mx.array, mx.array, mx.array, mx.array, mx.array | None], None]
    is_flat: bool
    writes: bool

    def grid(self, threads: int, second: int, items: int) -> tuple[int, int, int]:
        """In threads."""
        return (threads * items, second, 1) if self.is_flat else (threads, second, items)

    def decode(
        self,
        q: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        block_tables: mx.array,
        plan: DecodePlan,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: mx.array | None = None,
        written: mx.array | None = None,
    ) -> mx.array:
        """Attention of one query per sequence: q [num_seqs, num_heads, head_dim] -> [num_seqs, num_heads, value_dim].

        The other arguments are those of `paged_attention`; contexts and window are in the plan. Rows of q and of
        block_tables are contiguous, pools as a whole. written: what the last call of a kernel that wrote into the pools
        returned, so that it is waited for. Raises ValueError for arrays that have no kernel.
        """
        arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_tables": block_tables}
        logits = Logits(scale, softcap)
        prepare = partial(_prepare_decode, self, arrays, plan, logits, sinks)
        return self._call(plan.calls, arrays, logits, None, sinks, written, prepare)

    def prefill(
        self,
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
        written: mx.array | None = None,
    ) -> mx.array:
        """Attention of any number of queries per sequence; otherwise as `decode`.

        q [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads, value_dim].
        """
        arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_tables": block_tables}
        logits = Logits(scale, softcap)

        def prepare() -> Call:
            return _merged(self, _prepare_tiles(self, arrays, plan, logits, window, sinks, None), plan, q, v_cache)

        return self._call(plan.calls, arrays, logits, window, sinks, written, prepare)

    def _call(
        self,
        calls: dict[Any, Call],
        arrays: dict[str, mx.array],
        logits: Logits,
        window: int | None,
        sinks: mx.array | None,
        written: mx.array | None,
        prepare: Callable[[], Call],
    ) -> mx.array:
        """Calls what `prepare` returns, which is made, and the arrays checked, for the first of the layers alike."""
        q, k_cache, v_cache, block_tables = arrays.values()
        key = (logits, window, q.dtype, None if sinks is None else sinks.dtype)
        if key not in calls:
            self.check(q, k_cache, v_cache, block_tables, sinks)
            calls[key] = prepare() if q.shape[0] else _nothing
        return calls[key](q, k_cache, v_cache, block_tables, sinks, written)


def _prepare_decode(
    gpu: Gpu, arrays: dict[str, mx.array], plan: DecodePlan, logits: Logits, sinks: mx.array | None
) -> Call:
    q, k_cache, v_cache, _ = arrays.values()
    own = _prepare(gpu, gpu.launch_decode(shape_of(q, k_cache, v_cache)), arrays, {}, plan.own, logits, sinks)
    if plan.shared is None:
        return _merged(gpu, own, plan.own, q, v_cache)
    # A sink is one of a sequence's own keys.
    shared = _prepare_tiles(gpu, arrays, plan.shared.plan, logits, None, None, plan.shared.members)
    merge = prepare_merge(gpu, q.dtype, q.shape[:2], v_cache.shape[3], plan.own.cu_parts, plan.shared.ranges)
    return lambda *arrays: merge(own(*arrays), shared(*arrays[:4], None, arrays[5]))


def _nothing(q: mx.array, _k: mx.array, v_cache: mx.array, *_: mx.array | None) -> mx.array:
    return mx.zeros((0, q.shape[1], v_cache.shape[3]), q.dtype)


def _merged(gpu: Gpu, parts: PartsCall, plan: Plan, q: mx.array, v_cache: mx.array) -> Call:
    """The parts of each row of q joined, where rows have several."""
    if not plan.is_split:
        return lambda *arrays: parts(*arrays)[0]
    merge = prepare_merge(gpu, q.dtype, q.shape[:2], v_cache.shape[3], plan.cu_parts)
    return lambda *arrays: merge(parts(*arrays))


def _prepare_tiles(
    gpu: Gpu,
    arrays: dict[str, mx.array],
    plan: Plan,
    logits: Logits,
    window: int | None,
    sinks: mx.array | None,
    members: mx.array | None,
) -> PartsCall:
    """paged_prefill; members: the plan is one of shared prefixes, and these are its queries."""
    launch = gpu.launch_tiles(shape_of(arrays["q"], arrays["k_cache"], arrays["v_cache"]))
    launch = launch._replace(template=launch.template | {"SHARED": members is not None})
    constants = {
        "members": plan.work if members is None else members,
        "window": mx.array(_NO_WINDOW if window is None else min(window, _NO_WINDOW), mx.int32),
    }
    return _prepare(gpu, launch, arrays, constants, plan, logits, sinks)


def _prepare(
    gpu: Gpu,
    launch: Launch,
    arrays: dict[str, mx.array],
    constants: dict[str, mx.array],
    plan: Plan,
    logits: Logits,
    sinks: mx.array | None,
) -> PartsCall:
    """What both kernels have in common: items, logits, outputs."""
    q, v_cache = arrays["q"], arrays["v_cache"]
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, value_dim = v_cache.shape[2:]
    scale, softcap = logits
    constants = {
        "work": plan.work,
        "scale": mx.array(scale * _LOG2E if softcap is None else scale / softcap, mx.float32),
        "cap": mx.array(0 if softcap is None else softcap * _LOG2E, mx.float32),
    } | constants
    inputs = arrays | constants | {"sinks": q if sinks is None else sinks}
    if gpu.writes:
        inputs["written"] = plan.work
    kernel = gpu.kernel(launch.stem, inputs, ("out", "lse"), launch.shared_bytes)
    sizes = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "SOFTCAP": softcap is not None, "SINKS": sinks is not None}
    options: dict[str, Any] = {
        "template": [("T", q.dtype), *sizes.items(), *launch.template.items()],
        "grid": gpu.grid(launch.threads, num_kv_heads, plan.num_items),
        "threadgroup": (launch.threads, 1, 1),
        "output_shapes": [(plan.num_parts, num_heads, value_dim), (plan.num_parts, num_heads)],
        "output_dtypes": [q.dtype, mx.float32],
    }
    fixed = tuple(constants.values())

    def call(
        q: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        block_tables: mx.array,
        sinks: mx.array | None,
        written: mx.array | None,
    ) -> Parts:
        inputs = [q, k_cache, v_cache, block_tables, *fixed, q if sinks is None else sinks]
        if gpu.writes:
            inputs.append(plan.work if written is None else written)
        return kernel(inputs=inputs, **options)

    return call


def prepare_merge(
    gpu: Gpu,
    dtype: mx.Dtype,
    rows_and_heads: tuple[int, ...],
    value_dim: int,
    cu_parts: mx.array,
    ranges: mx.array | None = None,
) -> Callable[..., mx.array]:
    """paged_merge of parts, and with `ranges` of the parts of shared prefixes, to [*rows_and_heads, value_dim]."""
    num_rows, num_heads = rows_and_heads
    options: dict[str, Any] = {
        "template": [("T", dtype), ("VALUE_DIM", value_dim), ("SHARED", ranges is not None)],
        "grid": gpu.grid(32, num_heads, num_rows),
        "threadgroup": (32, int(np.gcd(num_heads, _SIMDGROUPS_OF_MERGE)), 1),
        "output_shapes": [(num_rows, num_heads, value_dim)],
        "output_dtypes": [dtype],
    }
    last = cu_parts if ranges is None else ranges
    names = ("parts", "lse", "cu_parts", "shared_parts", "shared_lse", "ranges")
    kernels: list[Kernel] = []  # the kernel, once it is known what the parts are like

    def merge(parts: Parts, shared: Parts | None = None) -> mx.array:
        inputs = [*parts, cu_parts, *(shared or parts), last]
        if not kernels:
            kernels.append(gpu.kernel("paged_merge", dict(zip(names, inputs, strict=True)), ("out",), 0))
        return kernels[0](inputs=inputs, **options)[0]

    return merge
