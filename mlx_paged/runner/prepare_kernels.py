"""Kernels are built and launched before the first request: all that a model's layers can need, as this GPU takes them.

Otherwise a request would wait for a compiler as soon as its context is long or its prefix shared; and a kernel that has
fewer registers for a thread here than it was laid out for would end the requests of a step.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from mlx_paged.attention.found_at_load import MIN_ROWS, MOST_HALVINGS
from mlx_paged.attention.kernel_backend import KernelBackend
from mlx_paged.attention.paged_attention import BACKEND_VARIABLE, BACKENDS
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.errors import EngineWarning, one_line
from mlx_paged.kernels import Kernel
from mlx_paged.models.patch import PatchedModel
from mlx_paged.progress import LoadingLine
from mlx_paged.runner.layer_kinds import LayerKind, TrialStep, kinds_of, named
from mlx_paged.runner.sharing_costs import measure_costs
from mlx_paged.runner.trial_writes import choose_writers

_FEW_QUERIES = range(1, 9)  # of a sequence: a kernel may be another one for each
_MANY_QUERIES = 64
_LONG_CONTEXT = 1 << 14  # tokens: if any context is computed in parts, one like this is
_PREFIX = 1 << 12  # tokens


class KernelFailure(Exception):
    """A kernel does not run here. The message is one line."""

    def __init__(self, kernel_name: str, error: Exception) -> None:
        super().__init__(f"{kernel_name}: {one_line(error)}")
        self.kernel_name = kernel_name


def is_gpu() -> bool:
    """Whether kernels run on a GPU. Those that a CPU simulates are built as they are needed."""
    return bool(mx.default_device() != mx.cpu)


def prepare_kernels(model: PatchedModel, block_size: int) -> set[str]:
    """Choose who writes K and V, and on a GPU build all kernels. Returns the names of the backends of all layers.

    A kernel that this GPU gives too few threads is launched with fewer from here on. Where that does not do either,
    plain operations compute the layers, and an EngineWarning names them. Raises ValueError instead if kernels were
    asked for by name.
    """
    choose_writers(model, block_size)
    backends = model.backends(block_size)
    if is_gpu():
        kinds = kinds_of(model, block_size)
        with LoadingLine("preparing kernels", sum(len(list(steps_of(kind))) for kind in kinds)) as line:
            for kind in kinds:
                if kind.shares_prefixes:
                    kind.backend.found.costs.pop(kind.shape, None)
                if failure := failure_of(kind, block_size, line.advance):
                    text = f"{named(kind.numbers)} can't use {kind.backend.title} kernels here: {failure}"
                    if os.environ.get(BACKEND_VARIABLE):
                        raise ValueError(f"{text} ({BACKEND_VARIABLE})")
                    warnings.warn(
                        f"{text}; plain MLX operations compute them, more slowly", EngineWarning, stacklevel=4
                    )
                    for number in kind.numbers:
                        backends[number] = BACKENDS["reference"]
                elif kind.shares_prefixes:
                    kind.backend.found.costs[kind.shape] = measure_costs(kind, block_size)
    return {backend.name for backend in backends if backend is not None}


def steps_of(kind: LayerKind) -> Iterator[TrialStep]:
    """Yield steps that take, together, all kernels that layers of this kind can need."""
    for num_queries in (*_FEW_QUERIES, _MANY_QUERIES):
        yield TrialStep(1, num_queries, num_queries)
    for num_queries in (1, _FEW_QUERIES[-1], _MANY_QUERIES):  # with a window few see a little more than one
        yield TrialStep(1, num_queries, _LONG_CONTEXT)
    if kind.shares_prefixes:
        yield TrialStep(MIN_ROWS, 1, _PREFIX + 1, _PREFIX)


def failure_of(kind: LayerKind, block_size: int, count: Callable[[], None]) -> KernelFailure | None:
    """Run all steps of a layer, and after one that fails all of them again with fewer threads of the kernel.

    count: called for each that runs, once. Returns what was wrong at first, if nothing helps.
    """
    backend, pool = _evaluating(kind.backend), LayerPool.zeros(kind.layer, 1, block_size)
    steps, number, num_counted, first = list(steps_of(kind)), 0, 0, None
    while number < len(steps):
        step = steps[number]
        q, metadata = kind.queries(step.num_seqs * step.num_queries), step.metadata(block_size)
        try:
            mx.eval(backend.attend(q, pool, metadata, kind.options))
        except KernelFailure as failure:
            first = first or failure
            halvings, key = kind.backend.found.halvings, (failure.kernel_name, kind.shape)
            halvings[key] = halvings.get(key, 0) + 1
            if halvings[key] > MOST_HALVINGS:
                return first
            number = 0  # other queries take that kernel with fewer threads, too
        else:
            number += 1
            if number > num_counted:
                num_counted = number
                count()
    return None


def _evaluating(backend: KernelBackend) -> KernelBackend:
    """The same backend with kernels that run when they are called. These raise KernelFailure."""
    trial = copy.copy(backend)

    def make_kernel(kernel_name: str, *arguments: Any) -> Kernel:
        kernel = backend.make_kernel(kernel_name, *arguments)

        def call(**settings: Any) -> list[mx.array]:
            try:
                outputs = kernel(**settings)
                mx.eval(outputs)
            except (RuntimeError, ValueError) as error:  # of MLX: what a compiler says, or of too many threads
                raise KernelFailure(kernel_name, error) from error
            return outputs

        return call

    vars(trial)["make_kernel"] = make_kernel
    return trial
