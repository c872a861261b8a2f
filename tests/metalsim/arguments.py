"""A kernel's arguments: MLX arrays copied to guarded memory and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from . import abi
from .buffers import GuardedBuffer
from .config import Config
from .report import Finding, FindingKind

if TYPE_CHECKING:
    from .kernel import MetalKernel


class KernelArguments:
    """The kernel's buffers, in the order MLX binds them."""

    def __init__(
        self,
        kernel: MetalKernel,
        arrays: Sequence[mx.array],
        shape_arguments: Sequence[tuple[bool, bool, bool]],
        config: Config,
    ) -> None:
        self.kernel = kernel
        self.specs: list[abi.BufferSpec] = []
        self.outputs: dict[str, int] = {}  #: name to index in specs
        self._buffers: list[GuardedBuffer] = []
        self._formats: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {}
        self._writable: list[tuple[str, int, mx.array]] = []
        for name, array, (shape, strides, ndim) in zip(kernel.input_names, arrays, shape_arguments, strict=True):
            values, element_strides = self._input_values(array)
            writable = name in config.writable_inputs
            if writable:
                if values.shape != tuple(array.shape):
                    raise NotImplementedError(f"writable input {name} with strides")
                self._writable.append((name, len(self.specs), array))
            self._add(name, values.nbytes, values.itemsize, values, writable=writable)
            if array.ndim == 0:
                continue
            if shape:
                self._add_shape(f"{name}_shape", np.array(array.shape, np.int32))
            if strides:
                self._add_shape(f"{name}_strides", np.array(element_strides, np.int64))
            if ndim:
                self._add_shape(f"{name}_ndim", np.array([array.ndim], np.int32))

    def _input_values(self, array: mx.array) -> tuple[np.ndarray, list[int]]:
        """The memory the kernel gets for an input, and the strides it is told, in elements."""
        values = _view(array)
        if self.kernel.row_contiguous:
            values = np.ascontiguousarray(values)
        strides = [s // values.itemsize for s in values.strides]
        if any(s < 0 for s in strides):
            raise NotImplementedError(f"{self.kernel.name}: an input with negative strides")
        if not values.flags.c_contiguous:
            extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
            values = np.lib.stride_tricks.as_strided(values, (extent,), (values.itemsize,))
        return values, strides

    def _add(
        self,
        name: str,
        nbytes: int,
        item_bytes: int,
        values: np.ndarray | None = None,
        *,
        writable: bool,
    ) -> int:
        buffer = GuardedBuffer(nbytes)
        self._buffers.append(buffer)
        if values is not None:
            buffer.store(values)
        initialised = values is not None
        spec = abi.BufferSpec(buffer.address, nbytes, writable, item_bytes, initialised, _c_name(name))
        self.specs.append(spec)
        return len(self.specs) - 1

    def _add_shape(self, name: str, values: np.ndarray) -> None:
        self._add(name, values.nbytes, values.itemsize, values, writable=False)

    def add_outputs(
        self,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
        init_value: float | None,
    ) -> None:
        for name, shape, dtype in zip(self.kernel.output_names, shapes, dtypes, strict=True):
            size = math.prod(shape)
            item_bytes = dtype.size
            values = None
            if init_value is not None:
                values = _view(mx.full((size,), init_value, dtype=dtype))
            nbytes = size * item_bytes
            self.outputs[name] = self._add(name, nbytes, item_bytes, values, writable=True)
            self._formats[name] = (tuple(shape), dtype)

    def unwritten_findings(self, unwritten: Mapping[str, tuple[int, int]]) -> list[Finding]:
        findings = []
        for name, (count, first) in unwritten.items():
            shape, _ = self._formats[name]
            index = tuple(int(i) for i in np.unravel_index(first, shape or (1,)))
            detail = f"({count} of {math.prod(shape)}, first {index})"
            findings.append(Finding(FindingKind.UNWRITTEN_OUTPUT, memory=name, detail=detail))
        return findings

    def collect_outputs(self) -> list[mx.array]:
        return [self._array(self.outputs[name], *self._formats[name]) for name in self.outputs]

    def collect_inputs(self) -> dict[str, mx.array]:
        """The writable inputs' contents, also written to the caller's arrays as a GPU would.

        MLX gives a kernel the array's own memory unless it has to make it contiguous first.
        """
        contents = {}
        for name, index, array in self._writable:
            contents[name] = self._array(index, tuple(array.shape), array.dtype)
            view = _view(array)
            if view.flags.c_contiguous:
                view[...] = _view(contents[name])
        return contents

    def _array(self, index: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        values = self._buffers[index].load(_numpy_dtype(dtype), shape)
        array = mx.array(values)
        return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array

    def free(self) -> None:
        for buffer in self._buffers:
            buffer.free()


def _c_name(name: str) -> bytes:
    return name.encode()[:43]


def _numpy_dtype(dtype: mx.Dtype) -> np.dtype:
    if dtype == mx.bfloat16:
        return np.dtype(np.uint16)
    name = str(dtype).rsplit(".", 1)[-1]
    if name == "bool":
        name = "bool_"
    return np.dtype(getattr(np, name))


def _view(array: mx.array) -> np.ndarray:
    """The array's memory; bfloat16 as uint16."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array, copy=None)
