"""A kernel's arguments: MLX arrays copied to guarded memory and back."""

from __future__ import annotations

import ctypes
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
        self.memory: dict[str, np.ndarray] = {}  #: of inputs that are whole buffers
        for name, array, (shape, strides, ndim) in zip(kernel.input_names, arrays, shape_arguments, strict=True):
            values, element_strides = self._input_values(array)
            writable = name in config.writable_inputs
            if writable:
                if values.shape != tuple(array.shape):
                    raise NotImplementedError(f"writable input {name} with strides")
                self._writable.append((name, len(self.specs), array))
            if name in config.whole_buffers and values.flags.c_contiguous and array.ndim:
                values = self.memory[name] = _buffer_of(values)
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

    def collect_outputs(self, number: int) -> list[mx.array]:
        """The outputs' contents; of those that tell that a launch is over its number."""
        return [
            mx.full(self._formats[name][0], number, mx.int32)
            if name.endswith("_done")
            else self._array(index, *self._formats[name])
            for name, index in self.outputs.items()
        ]

    def collect_inputs(self) -> dict[str, mx.array]:
        """The writable inputs' contents, also written to the caller's arrays as a GPU would.

        MLX gives a kernel the array's own memory unless it has to make it contiguous first.
        """
        contents = {}
        for name, index, array in self._writable:
            view = _view(array)
            if view.flags.c_contiguous:
                memory = self.memory.get(name, view)
                memory[...] = self._buffers[index].load(memory.dtype, memory.shape)
            contents[name] = self._array(index, tuple(array.shape), array.dtype)
        return contents

    def _array(self, index: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        values = self._buffers[index].load(_numpy_dtype(dtype), (-1,))[: math.prod(shape)].reshape(shape)
        array = mx.array(values)
        return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array

    def free(self) -> None:
        for buffer in self._buffers:
            buffer.free()


def _buffer_of(values: np.ndarray) -> np.ndarray:
    """All of the memory that begins where an array's does, of which its rows are the first.

    Of what MLX allocates for a CPU the size lies before it, up to as much again as was asked for.
    """
    nbytes = ctypes.c_size_t.from_address(values.ctypes.data - ctypes.sizeof(ctypes.c_size_t)).value
    if not values.nbytes <= nbytes <= mx.get_active_memory():
        return values  # it begins within another array
    size = nbytes // values.nbytes * values.size
    return np.lib.stride_tricks.as_strided(values.reshape(-1), (size,), (values.itemsize,))


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
