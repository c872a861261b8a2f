"""Attention by kernels of our own: what is the same for every kind of GPU. Splits a step, plans it, launches, merges.

A call is prepared once for the layers of a step that are alike, and then takes the arrays that differ: building a
step's graph should not cost more on the host than what the kernels take the place of.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_paged import kernels
from mlx_paged.attention import gathered, work_items
from mlx_paged.attention.backend import MAX_DECODE_QUERIES, AttentionOptions, Backend, in_order
from mlx_paged.attention.found_at_load import FoundAtLoad
from mlx_paged.attention.kernel_plan import Launch, Parts, Plan, padded, split_by_kernel, to_device
from mlx_paged.attention.latent_layout import LatentLayout, unsupported_latents
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.shared_prefix import SharedPrefix
from mlx_paged.attention.work_items import Shape, Tile, WorkItems
from mlx_paged.cache.codes import KVCodes
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
BLOCK_SIZES = (8, 16, 32, 64)
MAX_HEAD_DIM = 256
MAX_HALF_DIM = 512  # of float16 and bfloat16; past MAX_HEAD_DIM only multiples of 16 have a kernel
MAX_DECODE_ROWS = 16  # of a KV head, pairs of a query and a query head: more fill the tiles of paged_prefill
_LOG2E = 1.4426950408889634
_NO_WINDOW = 1 << 30
_SIMDGROUPS_OF_MERGE = 8
_THREADS_OF_WRITE = 256

Partial = list[mx.array]  # of parts: means [num_parts, num_heads, value_dim], logs of sums [num_parts, num_heads]


class KernelBackend(Backend):
    """A backend of kernels. What a kind of GPU brings is in its subclass."""

    title: str
    """Its name in messages."""
    suffix: str
    """That of the files of its kernels, which lie in the folder with its name."""
    latent_layout: Callable[[Shape], LatentLayout | None]
    """How paged_latent, which computes what has its V in K, divides such a shape. None: it does not compute this."""
    writes_in_place = True
    """Whether `write` is by a kernel, which MLX does not know to change the pools. Otherwise MLX scatters, which copies
    a pool that an earlier step still reads."""

    def __init__(self) -> None:
        self.found = FoundAtLoad()

    def is_available(self) -> bool:
        return kernels.is_available(self.name)

    @property
    @abstractmethod
    def num_cores(self) -> int:
        """Of the GPU, each of which takes eight threadgroups."""

    @property
    @abstractmethod
    def has_matrix_units(self) -> bool:
        """Whether the GPU has units for matrix products that MLX's attention uses and these kernels do not."""

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
    def headers(self, kernel_name: str, with_codes: bool) -> tuple[str, ...]:
        """The files that a kernel's text begins with. with_codes: K and V are quantised."""

    def make_kernel(
        self, kernel_name: str, inputs: Iterable[str], outputs: tuple[str, ...], shared_bytes: int = 0
    ) -> kernels.Kernel:
        """The kernel with inputs of these names. Raises RuntimeError if there is no device."""
        texts = *self.headers(kernel_name, "k_codes" in inputs), f"{kernel_name}.{self.suffix}"
        return kernels.make_kernel(self.name, texts, inputs, outputs, shared_bytes)

    def unsupported(self, layer: LayerSpec, num_heads: int, block_size: int) -> str | None:
        if layer.dtype not in DTYPES:
            return f"no {self.title} kernel for dtype {layer.dtype}: float16, bfloat16 and float32 have one"
        if block_size not in BLOCK_SIZES:
            return f"no {self.title} kernel for block_size {block_size}: {', '.join(map(str, BLOCK_SIZES))} have one"
        if layer.value_in_key:
            shape = shape_of_layer(layer, num_heads)
            return unsupported_latents(self.title, shape) if self.latent_layout(shape) is None else None
        most = MAX_HALF_DIM if layer.dtype.size == 2 else MAX_HEAD_DIM
        for name, dim in (("head_dim", layer.key_dim), ("value_dim", layer.value_dim)):
            if dim % (8 if dim <= MAX_HEAD_DIM else 16) or not 8 <= dim <= most:
                have = f"multiples of 8 up to {MAX_HEAD_DIM}, in 16 bits of 16 up to {MAX_HALF_DIM}, have one"
                return f"no {self.title} kernel for {name} {dim} of {8 * layer.dtype.size} bits: {have}"
        return None

    def max_decode_queries(self, layer: LayerSpec, num_heads: int) -> int:
        shape = shape_of_layer(layer, num_heads)
        return self.decode_queries(shape) or max(1, self.tiles(shape).tile.rows // shape.heads_per_kv_head)

    def write(self, pool: LayerPool, metadata: AttentionMetadata, keys: mx.array, values: mx.array) -> None:
        """Put K and V of at least one token into their slots, in the pool's own memory.

        MLX does not know that the pool changes: it never copies it for that, whoever still reads it, and orders what
        reads and writes it only by `write_done` and `reads_done`, which the kernels make and take. Other operations
        have to come after `mx.synchronize()`.
        """
        if not self.writes_in_place and pool.write_done is None:  # another model's load does not change this one's way
            super().write(pool, metadata, keys, values)
            return
        dtype, value_dim = pool.dtype, 0 if pool.latent_dim else values.shape[2]
        keys, values = (mx.contiguous(rows.astype(dtype)) for rows in (keys, values))
        before = pool.reads_done or [mx.zeros(8, mx.int32) if pool.write_done is None else pool.write_done]
        slots: dict[str, Any] = {"block_ids": metadata.slot_block_ids, "offsets": metadata.slot_offsets}
        inputs = _caches(pool, values) | {"keys": keys, "values": values} | slots
        inputs["reads_done"] = reduce(mx.add, before)
        # 16 bytes of a thread; or the K, or the V, of a token in one head of a simdgroup.
        num_threads = (keys.nbytes + values.nbytes) // 16 if pool.codes is None else 64 * len(keys) * keys.shape[1]
        num_groups = -(-num_threads // _THREADS_OF_WRITE)
        kernel_name = "paged_write" if pool.codes is None else "paged_write_codes"
        (pool.write_done,) = self.make_kernel(kernel_name, inputs, ("write_done",))(
            inputs=list(inputs.values()),
            template=[("T", dtype), ("HEAD_DIM", keys.shape[2]), ("VALUE_DIM", value_dim), *_sizes(pool.codes)],
            grid=(num_groups * _THREADS_OF_WRITE, 1, 1),
            threadgroup=(_THREADS_OF_WRITE, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.int32],
        )
        pool.reads_done = []

    def attend(self, q: mx.array, pool: LayerPool, metadata: AttentionMetadata, options: AttentionOptions) -> mx.array:
        shape, window, outputs = shape_of(q, pool), options.window, []
        most = self.decode_queries(shape)
        gathers = gathered.is_for(q, pool, metadata, options, self.has_matrix_units)
        parts: Parts = metadata.plan_once(
            ("parts", most, gathers and (shape, window)),
            lambda: split_by_kernel(metadata, most, gathers and gathered.choose(metadata, pool, window)),
        )
        key = self.name, shape, window
        for part in (parts.decodes, parts.short, parts.prefills):
            if part is not None:
                tokens, of_part = part
                plan = of_part.plan_once(key, partial(self._plan, of_part, window, shape, part is not parts.prefills))
                outputs.append(self.run(q[tokens], pool, of_part.block_tables, plan, options))
        if parts.gathered is not None:
            tokens, prompts = parts.gathered
            outputs.append(gathered.attend(q[tokens], pool, prompts, options.scale))
        return in_order(outputs, parts.token_order, q.shape[0], (q.shape[1], shape.value_dim), q.dtype)

    # -- plans --

    def decode_queries(self, shape: Shape) -> int:
        """Queries of a sequence that paged_decode takes. 0: one has rows enough for the kernels of prompts."""
        return 0 if self.latent_layout(shape) else min(MAX_DECODE_QUERIES, MAX_DECODE_ROWS // shape.heads_per_kv_head)

    def _plan(self, metadata: AttentionMetadata, window: int | None, shape: Shape, is_decode: bool) -> Plan:
        lengths, find = (metadata.context_lens, metadata.cu_seqlens_q), metadata.find_shared_prefixes
        if not is_decode:
            return self.plan_prefill(*lengths, window, shape)
        shared = find(np.arange(len(lengths[0]))) if find is not None and window is None else []
        return self.plan_decode(*lengths, window, shape, self.found.worth_sharing(shared, shape, self.tiles))

    def plan_decode(
        self,
        context_lens: np.ndarray,
        cu_seqlens_q: np.ndarray,
        window: int | None,
        shape: Shape,
        prefixes: Sequence[SharedPrefix] = (),
    ) -> Plan:
        """The plan for at most `decode_queries` queries per sequence, int32 [num_seqs + 1], and contexts, [num_seqs].

        prefixes: only without a window.
        """
        query_lens = np.diff(cu_seqlens_q)
        longest = int(query_lens.max(initial=1))
        queries = min(self.decode_queries(shape), 1 << (longest - 1).bit_length())  # of few kernels
        num_keys = context_lens.copy() if window is None else np.minimum(context_lens, window + query_lens - 1)
        for prefix in prefixes:
            num_keys[prefix.members] -= prefix.num_tokens
        rows = shape._replace(heads_per_kv_head=queries * shape.heads_per_kv_head)
        items = work_items.decode_items(
            context_lens, cu_seqlens_q, num_keys, work_items.keys_per_item(num_keys, rows, self.num_cores)
        )
        plan = to_device(items, self.found.fitted(self.launch_decode(rows), shape))
        plan.launch.template.update(HEADS=shape.heads_per_kv_head, QUERIES=queries)
        plan.constants["window"] = _visible(window)
        if prefixes:
            tile, launch = self.tiles(shape)
            items, members, ranges = work_items.shared_items(prefixes, cu_seqlens_q, shape, self.num_cores, tile)
            plan.shared, plan.ranges = self._plan_tiles(items, None, launch, padded(members)), padded(ranges)
        return plan

    def plan_prefill(
        self, context_lens: np.ndarray, cu_seqlens_q: np.ndarray, window: int | None, shape: Shape
    ) -> Plan:
        """The plan for any number of queries per sequence, int32 [num_seqs + 1], and contexts, int32 [num_seqs]."""
        tile, launch = self.tiles(shape)
        items = work_items.prefill_items(context_lens, cu_seqlens_q, window, shape, self.num_cores, tile)
        return self._plan_tiles(items, window, launch, None)

    def tiles(self, shape: Shape) -> LatentLayout:
        """What a threadgroup of paged_prefill or paged_latent computes at once, and how it is launched."""
        chosen = self.latent_layout(shape) or LatentLayout(self.prefill_tile(shape), self.launch_prefill(shape))
        return self.found.fitted_tiles(chosen, shape)

    def _plan_tiles(self, items: WorkItems, window: int | None, launch: Launch, members: mx.array | None) -> Plan:
        """The plan of paged_prefill. members: the items are of shared prefixes, and these are its queries."""
        plan = to_device(items, launch)
        if launch.kernel_name == "paged_prefill":
            launch.template["SHARED"] = members is not None
            plan.constants["members"] = plan.work if members is None else members
        plan.constants["window"] = _visible(window)
        return plan

    # -- calls, which take q, pool, block_tables and the sinks, or None --

    def run(
        self, q: mx.array, pool: LayerPool, block_tables: mx.array, plan: Plan, options: AttentionOptions
    ) -> mx.array:
        """Attention of q [num_tokens, num_heads, head_dim], whose tokens and window are those of the plan.

        block_tables: int32 [num_seqs, max_blocks]. Returns [num_tokens, num_heads, value_dim].
        """
        if not q.shape[0]:
            return mx.zeros((0, q.shape[1], pool.value_dim), q.dtype)
        scale, _, softcap, sinks = options
        key = (scale, softcap, q.dtype, None if sinks is None else sinks.dtype)
        if key not in plan.calls:
            plan.calls[key] = self._prepare(q, pool, plan, options)
        return plan.calls[key](q, pool, block_tables, sinks)

    def _prepare(self, q: mx.array, pool: LayerPool, plan: Plan, options: AttentionOptions) -> Callable[..., mx.array]:
        """The call for arrays like these, with the merging of parts where a row of q has several."""
        own = self._prepare_parts(q, pool, plan, options)
        if plan.shared is None and not plan.is_split:
            return lambda *arrays: own(*arrays)[0]
        merge = self.prepare_merge(q, plan.launch.template["VALUE_DIM"], plan.cu_parts, plan.ranges)
        if plan.shared is None:
            return lambda *arrays: merge(own(*arrays))
        # A sink is one of a sequence's own keys.
        shared = self._prepare_parts(q, pool, plan.shared, options._replace(sinks=None))
        return lambda *arrays: merge(own(*arrays), shared(*arrays[:3], None))

    def _prepare_parts(
        self, q: mx.array, pool: LayerPool, plan: Plan, options: AttentionOptions
    ) -> Callable[..., Partial]:
        """The call of the plan's own kernel, with all that does not differ between layers."""
        launch = plan.launch
        scale, _, softcap, sinks = options
        constants = {
            "work": plan.work,
            "scale": mx.array(scale * _LOG2E if softcap is None else scale / softcap, mx.float32),
            "cap": mx.array(0 if softcap is None else softcap * _LOG2E, mx.float32),
        } | plan.constants
        names = ("q", *_caches(pool, q), "block_tables", *constants, "sinks", "write_done")
        kernel = self.make_kernel(launch.kernel_name, names, ("out", "lse", "read_done"), launch.shared_bytes)
        template: dict[str, Any] = {"T": q.dtype, "HEAD_DIM": q.shape[2]}
        template |= {"SOFTCAP": softcap is not None, "SINKS": sinks is not None} | launch.template
        template |= dict(_sizes(pool.codes))
        settings: dict[str, Any] = {
            "template": list(template.items()),
            "grid": self.grid(launch.threads, pool.block_shape[1], plan.num_items),
            "threadgroup": (launch.threads, 1, 1),
            "output_shapes": [
                (plan.num_parts, q.shape[1], launch.template["VALUE_DIM"]),
                (plan.num_parts, q.shape[1]),
                (8,),
            ],
            "output_dtypes": [q.dtype, mx.float32, mx.int32],
        }

        def call(q: mx.array, pool: LayerPool, block_tables: mx.array, sinks: mx.array | None) -> Partial:
            write_done = constants["work"] if pool.write_done is None else pool.write_done
            last = q if sinks is None else sinks, write_done
            inputs = [q, *_caches(pool, q).values(), block_tables, *constants.values(), *last]
            *parts, read_done = kernel(inputs=inputs, **settings)
            if pool.write_done is not None:
                pool.reads_done.append(read_done)
            return parts

        return call

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
        kernel = self.make_kernel("paged_merge", names, ("out",))

        def merge(own: Partial, shared: Partial | None = None) -> mx.array:
            return kernel(inputs=[*own, cu_parts, *(shared or own), last], **settings)[0]

        return merge


def shape_of(q: mx.array, pool: LayerPool) -> Shape:
    """What a plan for these arrays depends on."""
    _, heads, dim, value_dim = pool.block_shape
    return Shape(heads, q.shape[1] // heads, dim, value_dim, q.dtype.size, pool.latent_dim is not None, pool.codes)


def shape_of_layer(layer: LayerSpec, num_heads: int) -> Shape:
    """The same of a layer that attends with so many query heads."""
    heads, dim, value_dim, dtype, is_latent, codes = layer
    return Shape(heads, num_heads // heads, dim, value_dim, dtype.size, is_latent, codes)


def _visible(window: int | None) -> mx.array:
    """The keys that a query sees, as kernels take them."""
    return mx.array(_NO_WINDOW if window is None else min(window, _NO_WINDOW), mx.int32)


def _caches(pool: LayerPool, other: mx.array) -> dict[str, mx.array]:
    """The inputs of a kernel that are a pool's arrays. other: in place of V where that is not stored."""
    return pool.views() if pool.codes else dict.fromkeys(("k_cache", "v_cache"), other) | pool.views()


def _sizes(codes: KVCodes | None) -> list[tuple[str, int]]:
    """Template arguments of kernels for K and V that are quantised."""
    if codes is None:
        return []
    pairs = zip(("KEY", "VALUE"), codes[1:], strict=True)
    each = [(f"{of}_{name}", size) for of, sizes in pairs for name, size in zip(("BITS", "GROUP"), sizes, strict=False)]
    return [*each, ("NUM_PARAMS", codes.keys.num_params)]
