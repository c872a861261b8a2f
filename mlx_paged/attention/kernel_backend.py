"""Attention by kernels of our own: what is the same for every kind of GPU. Splits a step, plans it, launches, merges.

A call is prepared once for the layers of a step that are alike, and then takes the arrays that differ: building a
step's graph should not cost more on the host than what the kernels take the place of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.attention import work_items
from mlx_paged.attention.backend import AttentionOptions, Backend
from mlx_paged.attention.kernel_plan import Call, Parts, Plan, SharedPlan, padded, split_by_kernel, to_device
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.attention.work_items import Shape, Tile

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
BLOCK_SIZES = (8, 16, 32, 64)
MAX_HEAD_DIM = 256
MAX_HEADS_PER_KV_HEAD = 16
_LOG2E = 1.4426950408889634
_NO_WINDOW = 1 << 30
_SIMDGROUPS_OF_MERGE = 8

Kernel = Callable[..., list[mx.array]]
Partial = list[mx.array]  # of parts: means [num_parts, num_heads, value_dim], logs of sums [num_parts, num_heads]
PartialCall = Callable[..., Partial]


class Launch(NamedTuple):
    """How a kernel is launched for a shape."""

    kernel_name: str
    threads: int
    """Of an item and KV head."""
    template: dict[str, Any]
    """Template arguments that only this kind of GPU has."""
    shared_bytes: int = 0


class KernelBackend(Backend):
    """A backend of kernels. What a kind of GPU brings is in its subclass."""

    title: str
    """Its name in messages."""

    @property
    @abstractmethod
    def num_cores(self) -> int:
        """Of the GPU, each of which takes eight threadgroups."""

    @abstractmethod
    def prefill_tile(self, shape: Shape) -> Tile:
        """What a threadgroup of paged_prefill computes at once."""

    @abstractmethod
    def grid(self, threads: int, second: int, items: int) -> tuple[int, int, int]:
        """The grid, in threads, of `items` x `second` threadgroups."""

    @abstractmethod
    def launch_decode(self, shape: Shape) -> Launch: ...

    @abstractmethod
    def launch_prefill(self, shape: Shape) -> Launch: ...

    @abstractmethod
    def make_kernel(
        self, kernel_name: str, inputs: dict[str, mx.array], outputs: tuple[str, ...], shared_bytes: int
    ) -> Kernel:
        """The kernel for inputs like these. Raises RuntimeError if there is no device."""

    def unsupported(self, dtype: mx.Dtype, num_heads: int, block_shape: Sequence[int], value_dim: int) -> str | None:
        block_size, num_kv_heads, head_dim = block_shape
        if dtype not in DTYPES:
            return f"no {self.title} kernel for dtype {dtype}: float16, bfloat16 and float32 have one"
        if block_size not in BLOCK_SIZES:
            return f"no {self.title} kernel for block_size {block_size}: {', '.join(map(str, BLOCK_SIZES))} have one"
        for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
            if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
                return f"no {self.title} kernel for {name} {dim}: multiples of 8 up to {MAX_HEAD_DIM} have one"
        if num_heads // num_kv_heads > MAX_HEADS_PER_KV_HEAD:
            return (
                f"no {self.title} kernel for {num_heads} query heads on {num_kv_heads} KV heads: "
                f"at most {MAX_HEADS_PER_KV_HEAD} may share one"
            )
        return None

    def attend(
        self,
        q: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        write_done: mx.array | None = None,
    ) -> mx.array:
        parts: Parts = metadata.plan_once("parts", lambda: split_by_kernel(metadata, self.max_decode_queries))
        shape, window, outputs = shape_of(q, k_cache, v_cache), options.window, []
        if parts.decodes is not None:
            tokens, part = parts.decodes
            plan = part.plan_once(("decode", self.name, shape, window), lambda: self._plan_decode(part, window, shape))
            outputs.append(self.decode(q[tokens], k_cache, v_cache, part.block_tables, plan, options, write_done))
        if parts.prefills is not None:
            tokens, prompts = parts.prefills
            lengths = prompts.context_lens, prompts.cu_seqlens_q
            key = ("prefill", self.name, shape, window)
            plan = prompts.plan_once(key, lambda: self.plan_prefill(*lengths, window, shape))
            outputs.append(self.prefill(q[tokens], k_cache, v_cache, prompts.block_tables, plan, options, write_done))
        if not outputs:
            return _no_tokens(q, k_cache, v_cache)
        result = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        return result if parts.token_order is None else result[parts.token_order]

    # -- plans --

    def _plan_decode(self, metadata: AttentionMetadata, window: int | None, shape: Shape) -> Plan:
        contexts, find = metadata.context_lens, metadata.find_shared_prefixes
        shared = find(np.arange(len(contexts))) if find is not None and window is None else []
        return self.plan_decode(contexts, window, shape, shared)

    def plan_decode(
        self, context_lens: np.ndarray, window: int | None, shape: Shape, prefixes: Sequence[SharedPrefix] = ()
    ) -> Plan:
        """The plan for one query per sequence. context_lens: int32 [num_seqs]. prefixes: only without a window."""
        num_keys = context_lens if window is None else np.minimum(context_lens, window)
        shared = None
        if prefixes:
            num_keys = context_lens.copy()
            for prefix in prefixes:
                num_keys[prefix.members] -= prefix.num_tokens
            tile = self.prefill_tile(shape)
            items, members, ranges = work_items.shared_items(prefixes, len(context_lens), shape, self.num_cores, tile)
            shared = SharedPlan(to_device(items), padded(members), padded(ranges))
        size = work_items.keys_per_item(num_keys, shape, self.num_cores)
        plan = to_device(work_items.decode_items(context_lens, num_keys, size))
        plan.shared = shared
        return plan

    def plan_prefill(
        self, context_lens: np.ndarray, cu_seqlens_q: np.ndarray, window: int | None, shape: Shape
    ) -> Plan:
        """The plan for any number of queries per sequence, int32 [num_seqs + 1], and contexts, int32 [num_seqs]."""
        tile = self.prefill_tile(shape)
        return to_device(work_items.prefill_items(context_lens, cu_seqlens_q, window, shape, self.num_cores, tile))

    # -- calls --

    def decode(
        self,
        q: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        block_tables: mx.array,
        plan: Plan,
        options: AttentionOptions,
        write_done: mx.array | None = None,
    ) -> mx.array:
        """Attention of one query per sequence: q [num_seqs, num_heads, head_dim] -> [num_seqs, num_heads, value_dim].

        block_tables: int32 [num_seqs, max_blocks]; the window is in the plan. Raises ValueError for arrays that have
        no kernel.
        """
        arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_tables": block_tables}
        return self._call(arrays, plan, options, write_done, self._prepare_decode)

    def prefill(
        self,
        q: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        block_tables: mx.array,
        plan: Plan,
        options: AttentionOptions,
        write_done: mx.array | None = None,
    ) -> mx.array:
        """As `decode`, of any number of queries per sequence: q is [num_tokens, num_heads, head_dim]."""
        arrays = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_tables": block_tables}
        return self._call(arrays, plan, options, write_done, self._prepare_prefill)

    def _call(
        self,
        arrays: dict[str, mx.array],
        plan: Plan,
        options: AttentionOptions,
        write_done: mx.array | None,
        prepare: Callable[[dict[str, mx.array], Plan, AttentionOptions], Call],
    ) -> mx.array:
        """Call what `prepare` returns, which is made, and the arrays checked, for the first of the layers alike."""
        q, k_cache, v_cache, block_tables = arrays.values()
        sinks = options.sinks
        key = (*options[:3], q.dtype, None if sinks is None else sinks.dtype)
        if key not in plan.calls:
            self._check(q, k_cache, v_cache, block_tables, sinks)
            plan.calls[key] = prepare(arrays, plan, options) if q.shape[0] else _no_tokens
        return plan.calls[key](q, k_cache, v_cache, block_tables, sinks, write_done)

    def _check(
        self, q: mx.array, k_cache: mx.array, v_cache: mx.array, block_tables: mx.array, sinks: mx.array | None
    ) -> None:
        """Raise ValueError for arrays that do not fit together or that no kernel takes."""
        if reason := self.unsupported(q.dtype, q.shape[1], k_cache.shape[1:], v_cache.shape[3]):
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

    def _prepare_decode(self, arrays: dict[str, mx.array], plan: Plan, options: AttentionOptions) -> Call:
        launch = self.launch_decode(shape_of(arrays["q"], arrays["k_cache"], arrays["v_cache"]))
        own = self._prepare(launch, arrays, {}, plan, options)
        if plan.shared is None:
            return self._merged(own, plan, arrays)
        # A sink is one of a sequence's own keys.
        options = options._replace(window=None, sinks=None)
        shared = self._prepare_tiles(arrays, plan.shared.plan, options, plan.shared.members)
        merge = self.prepare_merge(arrays["q"], arrays["v_cache"].shape[3], plan.cu_parts, plan.shared.ranges)
        return lambda *arrays: merge(own(*arrays), shared(*arrays[:4], None, arrays[5]))

    def _prepare_prefill(self, arrays: dict[str, mx.array], plan: Plan, options: AttentionOptions) -> Call:
        return self._merged(self._prepare_tiles(arrays, plan, options, None), plan, arrays)

    def _prepare_tiles(
        self, arrays: dict[str, mx.array], plan: Plan, options: AttentionOptions, members: mx.array | None
    ) -> PartialCall:
        """paged_prefill. members: the plan is one of shared prefixes, and these are its queries."""
        launch = self.launch_prefill(shape_of(arrays["q"], arrays["k_cache"], arrays["v_cache"]))
        launch = launch._replace(template=launch.template | {"SHARED": members is not None})
        window = _NO_WINDOW if options.window is None else min(options.window, _NO_WINDOW)
        constants = {"members": plan.work if members is None else members, "window": mx.array(window, mx.int32)}
        return self._prepare(launch, arrays, constants, plan, options)

    def _prepare(
        self,
        launch: Launch,
        arrays: dict[str, mx.array],
        constants: dict[str, mx.array],
        plan: Plan,
        options: AttentionOptions,
    ) -> PartialCall:
        """What both kernels have in common: items, options, outputs."""
        q, v_cache = arrays["q"], arrays["v_cache"]
        num_kv_heads, value_dim = v_cache.shape[2:]
        scale, _, softcap, sinks = options
        constants = {
            "work": plan.work,
            "scale": mx.array(scale * _LOG2E if softcap is None else scale / softcap, mx.float32),
            "cap": mx.array(0 if softcap is None else softcap * _LOG2E, mx.float32),
        } | constants
        inputs = arrays | constants | {"sinks": q if sinks is None else sinks}
        if self.writes_in_place:
            inputs["write_done"] = plan.work
        kernel = self.make_kernel(launch.kernel_name, inputs, ("out", "lse"), launch.shared_bytes)
        sizes = {"HEAD_DIM": q.shape[2], "VALUE_DIM": value_dim}
        flags = {"SOFTCAP": softcap is not None, "SINKS": sinks is not None}
        settings: dict[str, Any] = {
            "template": [("T", q.dtype), *sizes.items(), *flags.items(), *launch.template.items()],
            "grid": self.grid(launch.threads, num_kv_heads, plan.num_items),
            "threadgroup": (launch.threads, 1, 1),
            "output_shapes": [(plan.num_parts, q.shape[1], value_dim), (plan.num_parts, q.shape[1])],
            "output_dtypes": [q.dtype, mx.float32],
        }
        fixed = tuple(constants.values())

        def call(
            q: mx.array,
            k_cache: mx.array,
            v_cache: mx.array,
            block_tables: mx.array,
            sinks: mx.array | None,
            write_done: mx.array | None,
        ) -> Partial:
            inputs = [q, k_cache, v_cache, block_tables, *fixed, q if sinks is None else sinks]
            if self.writes_in_place:
                inputs.append(plan.work if write_done is None else write_done)
            return kernel(inputs=inputs, **settings)

        return call

    def _merged(self, partial: PartialCall, plan: Plan, arrays: dict[str, mx.array]) -> Call:
        """The parts of each row of q joined, where rows have several."""
        if not plan.is_split:
            return lambda *arrays: partial(*arrays)[0]
        merge = self.prepare_merge(arrays["q"], arrays["v_cache"].shape[3], plan.cu_parts)
        return lambda *arrays: merge(partial(*arrays))

    def prepare_merge(
        self, q: mx.array, value_dim: int, cu_parts: mx.array, ranges: mx.array | None = None
    ) -> Callable[..., mx.array]:
        """paged_merge of parts, and with `ranges` of the parts of shared prefixes, for a q like this."""
        num_rows, num_heads = q.shape[:2]
        settings: dict[str, Any] = {
            "template": [("T", q.dtype), ("VALUE_DIM", value_dim), ("SHARED", ranges is not None)],
            "grid": self.grid(32, num_heads, num_rows),
            "threadgroup": (32, int(np.gcd(num_heads, _SIMDGROUPS_OF_MERGE)), 1),
            "output_shapes": [(num_rows, num_heads, value_dim)],
            "output_dtypes": [q.dtype],
        }
        last = cu_parts if ranges is None else ranges
        names = ("parts", "lse", "cu_parts", "shared_parts", "shared_lse", "ranges")
        kernels: list[Kernel] = []  # the kernel, once it is known what the parts are like

        def merge(own: Partial, shared: Partial | None = None) -> mx.array:
            inputs = [*own, cu_parts, *(shared or own), last]
            if not kernels:
                kernels.append(self.make_kernel("paged_merge", dict(zip(names, inputs, strict=True)), ("out",), 0))
            return kernels[0](inputs=inputs, **settings)[0]

        return merge


def shape_of(q: mx.array, k_cache: mx.array, v_cache: mx.array) -> Shape:
    """What a plan for these arrays depends on."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    return Shape(num_kv_heads, q.shape[1] // num_kv_heads, head_dim, v_cache.shape[3], q.dtype.size)


def _no_tokens(q: mx.array, _k: mx.array, v_cache: mx.array, *_: mx.array | None) -> mx.array:
    return mx.zeros((0, q.shape[1], v_cache.shape[3]), q.dtype)
