"""How long a GPU takes to read a prefix once for several sequences, and for each of them: measured at load."""

import time

import mlx.core as mx

from mlx_paged.attention.cpu import MIN_SAVED, CpuBackend
from mlx_paged.attention.found_at_load import ASSUMED, MIN_ROWS, SharingCosts, least_members
from mlx_paged.attention.kernel_backend import KernelBackend
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.models.patch import PatchedModel
from mlx_paged.runner.layer_kinds import LayerKind, TrialStep, kinds_of, named

_SHORT, _LONG = 512, 4096  # tokens of a prefix
_BYTES = 128 << 20  # of K and V that a chain goes through: a GPU's caches have forgotten those it comes back to
_TOLD = 1024, 8192  # tokens
_MOST_REGIONS = 64  # for tiny layers, each of which has to be planned
_CHAIN_S = 5e-3
_NUM_CHAINS = 3  # of which the fastest counts: clocks have to rise first
_APART, _TOGETHER = SharingCosts(0.0, 1.0, 1.0, "us"), SharingCosts(1.0, 0.0, 0.0, "us")  # that leave no choice


def measure_costs(kind: LayerKind, block_size: int) -> SharingCosts:
    """Time decodes of a tile of sequences that share a short prefix, or a long one, and read it either way.

    For each of them it is read again out of the GPU's caches, if it fits into those, as in a model.
    """
    costs, shape = kind.backend.found.costs, kind.shape
    rows = kind.backend.tiles(shape).tile.rows
    num_seqs = max(2, -(-max(MIN_ROWS, rows) // shape.heads_per_kv_head))
    num_tiles = -(-num_seqs * shape.heads_per_kv_head // rows)
    times: dict[tuple[SharingCosts, int], float] = {}
    for length in (_SHORT, _LONG):
        step = TrialStep(num_seqs, 1, length + 1, length)
        num_regions = min(_MOST_REGIONS, -(-_BYTES // (kind.layer.bytes_per_token * step.context_len)))
        pool = LayerPool.zeros(kind.layer, num_regions * step.num_blocks(block_size), block_size)
        mx.eval(pool.arrays)
        for way in (_APART, _TOGETHER):
            costs[shape] = way
            regions = [step.metadata(block_size, i * step.num_blocks(block_size)) for i in range(num_regions)]
            times[way, length] = 1e6 * _seconds(kind, pool, regions)
    del pool
    mx.clear_cache()
    apart, together = ((times[way, _LONG] - times[way, _SHORT]) / (_LONG - _SHORT) for way in (_APART, _TOGETHER))
    start = times[_TOGETHER, _SHORT] - times[_APART, _SHORT] + (apart - together) * _SHORT
    return SharingCosts(max(0.0, apart / num_seqs), max(0.0, together / num_tiles), max(0.0, start), "us")


def _seconds(kind: LayerKind, pool: LayerPool, regions: list[AttentionMetadata]) -> float:
    """Time one step of a chain, in which each waits for the one before it."""

    def chain(num_steps: int) -> float:
        started, q = time.perf_counter(), kind.queries(len(regions[0].context_lens))
        for i in range(num_steps):
            out = kind.backend.attend(q, pool, regions[i % len(regions)], kind.options)
            q = q + 0 * out[..., :1]
        mx.eval(q)
        mx.synchronize()
        return (time.perf_counter() - started) / num_steps

    first = min(chain(len(regions)) for _ in range(2))  # the work is planned in the first
    num_steps = max(len(regions), round(_CHAIN_S / first))
    return min(chain(num_steps) for _ in range(_NUM_CHAINS))


def describe_sharing(model: PatchedModel, block_size: int) -> list[str]:
    """Say, in a line for each kind of layers, which shared prefixes are computed once, and what that follows from."""
    lines = [f"shared prefixes in {named(kind.numbers)}: {_rule(kind)}" for kind in kinds_of(model, block_size)]
    for backend in {backend for backend in model.backends(block_size) if backend is not None}:
        if not isinstance(backend, KernelBackend):
            once = f"computed once where that saves reading {MIN_SAVED:,} keys or more"
            rule = once if isinstance(backend, CpuBackend) else "read by each sequence"
            lines.append(f"shared prefixes: {rule}; no kernel is used here, and plain operations are not timed")
    return lines


def _rule(kind: LayerKind) -> str:
    if not kind.shares_prefixes:
        latent = "latents" if kind.layer.value_in_key else "too many heads to a KV head, or too long ones"
        return f"read by each sequence, since these layers have {'a window' if kind.options.window else latent}"
    found, shape = kind.backend.found, kind.shape
    costs, tile = found.costs.get(shape, ASSUMED), kind.backend.tiles(shape).tile
    least = {length: least_members(costs, length, shape, tile) for length in _TOLD}
    worth = [f"for {count} or more sequences of {length:,} tokens" for length, count in least.items() if count]
    keys = f"for each tile of {tile.rows} queries and heads, another launch and merging"
    if costs.unit == "us":
        times = f"{1e3 * costs.decode_key:.2f} ns for each sequence, {1e3 * costs.tile_key:.2f} ns"
        why = f"a key takes {times} {keys} {costs.start:.0f} us, measured at load"
    else:
        why = f"a key counts as much for each sequence as {keys} as {costs.start:.0f} keys, assumed without a GPU"
    return f"{'computed once ' + ', '.join(worth) if worth else 'hardly ever computed once'}: {why}"
