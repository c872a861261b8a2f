"""A stand-in for ``mx.fast.cuda_kernel`` that runs on the CPU, with the runtime of tests/metalsim."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import mlx.core as mx
from helpers.cuda_text import extras_of, kernel_text, type_of
from metalsim import abi
from metalsim.arguments import KernelArguments
from metalsim.build import CompiledKernel
from metalsim.config import Config
from metalsim.library import KernelLibrary
from metalsim.order import AccessOrder
from metalsim.report import LaunchReport, SimulationError

from .build import CudaSourceMap, compile_kernel

_FIRST_LINE = 100_001  # from which SourceMap counts the kernel's lines
_MAX_SHARED_BYTES = 227 << 10


class CudaSimulator:
    """The simulated card: how it runs kernels, and what came of the launches, the latest last."""

    def __init__(self) -> None:
        self.config = Config()
        self.reports: list[LaunchReport] = []
        self.order = AccessOrder()

    @property
    def report(self) -> LaunchReport:
        return self.reports[-1]

    def configure(self, **changes: Any) -> None:
        """Change options, the fields of metalsim's Config."""
        self.config = replace(self.config, **changes)

    def cuda_kernel(self, **options: Any) -> CudaKernel:
        """Takes the arguments of ``mx.fast.cuda_kernel``."""
        return CudaKernel(self, **options)


class CudaKernel:
    """A kernel as ``mx.fast.cuda_kernel`` returns it, run by the simulator."""

    def __init__(
        self,
        simulator: CudaSimulator,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        shared_memory: int = 0,
    ) -> None:
        if shared_memory > _MAX_SHARED_BYTES:
            raise ValueError(f"{name}: {shared_memory} bytes of shared memory")
        self.name, self.input_names, self.output_names = name, list(input_names), list(output_names)
        self.row_contiguous, self.shared_memory = ensure_row_contiguous, shared_memory
        self._simulator = simulator
        self._given = source, header
        self._source_map = CudaSourceMap(name, header.count("\n") + 1)
        self._header, self._source = _with_stand_ins(header, source, self._source_map)
        self._libraries: dict[str, _CudaLibrary] = {}
        #: Inputs that the text writes, which MLX declares `const`: it says so with a cast.
        self._written = frozenset(re.findall(r"const_cast<\w+\*>\((\w+)\)", source))

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] = (),
        verbose: bool = False,
    ) -> list[mx.array]:
        """Run the kernel at once and return its outputs. Raises SimulationError for findings, CompileError."""
        if any(size % block for size, block in zip(grid, threadgroup, strict=True)):
            raise ValueError(f"{self.name}: MLX would round {grid} up to whole blocks of {threadgroup}")
        config = replace(self._simulator.config, writable_inputs=self._written)
        arrays = [array if isinstance(array, mx.array) else mx.array(array) for array in inputs]
        mx.eval(arrays)
        if verbose:
            inputs_by_name = dict(zip(self.input_names, arrays, strict=True))
            outputs_by_name = dict(zip(self.output_names, output_dtypes, strict=True))
            text = kernel_text(f"custom_kernel_{self.name}", *self._given, inputs_by_name, outputs_by_name, template)
            os.write(1, f"Generated source code:\n```\n{text}\n```\n".encode())
        library = self._load(arrays, output_dtypes, template)
        extras = [extras_of(name, array, self._source) for name, array in zip(self.input_names, arrays, strict=True)]
        flags = [("shape" in extra, "strides" in extra, "ndim" in extra) for extra in extras]
        arguments = KernelArguments(self, arrays, flags, config)  # type: ignore[arg-type]
        inputs = dict(zip(self.input_names, arrays, strict=True))
        try:
            number = self._simulator.order.check(self.name, inputs, arguments.memory, self._written)
            arguments.add_outputs(output_shapes, output_dtypes, None)
            launch = library.launch(arguments.specs, grid, threadgroup, config, arguments.outputs.values())
            findings = launch.findings + arguments.unwritten_findings(launch.unwritten)
            kept = tuple(finding for finding in findings if finding.kind not in config.ignore)
            report = LaunchReport(self.name, findings=kept, traffic=launch.traffic)
            self._simulator.reports.append(report)
            if kept and config.raise_on_findings:
                raise SimulationError(report)
            arguments.collect_inputs()
            self._simulator.order.is_over(arguments.memory, self._written)
            return arguments.collect_outputs(number)
        finally:
            arguments.free()

    def _load(
        self, arrays: list[mx.array], output_dtypes: Sequence[mx.Dtype], template: Sequence[tuple[str, Any]]
    ) -> _CudaLibrary:
        inputs = dict(zip(self.input_names, arrays, strict=True))
        outputs = dict(zip(self.output_names, output_dtypes, strict=True))
        text = kernel_text(self.name, self._source, self._header, inputs, outputs, template)
        text = text[text.index("\n#line") :]  # MLX's own includes
        values, names = [], []
        for name, array in inputs.items():
            values.append(f"(const {type_of(array.dtype)}*)metalsim_buffer({len(names)})")
            names.append(name)
            for extra in extras_of(name, array, self._source):
                kind = {"shape": "Shape", "strides": "Strides"}[extra]
                values.append(f"cudasim_dimensions<{kind}>({len(names)}, {array.ndim})")
                names.append(f"{name}_{extra}")
        for name, dtype in outputs.items():
            values.append(f"({type_of(dtype)}*)metalsim_buffer({len(names)})")
            names.append(name)
        text = (
            f'#include "cudasim.h"\n{text}\n#line 1 "cudasim"\n'
            f"namespace mlx::core::cu {{ alignas(128) uint4 shared_memory[{max(1, self.shared_memory // 16)}]; }}\n"
            f'extern "C" void cudasim_entry() {{ using namespace mlx::core::cu; cudasim_start(); '
            f"{self.name}({', '.join(values)}); }}\n"
        )
        if text not in self._libraries:
            compiled = compile_kernel("cudasim_entry", text, self._source_map, tuple(names))
            self._libraries[text] = _CudaLibrary(compiled, self.shared_memory)
        return self._libraries[text]


class _CudaLibrary(KernelLibrary):
    """A compiled kernel, loaded; all its shared memory is one variable."""

    def __init__(self, compiled: CompiledKernel, shared_memory: int) -> None:
        self._shared_memory = shared_memory
        super().__init__(compiled)

    def _find_variables(self) -> list[abi.ThreadgroupVariable]:
        if not self._shared_memory:
            return []
        memory = ctypes.c_char.in_dll(self._library, "_ZN3mlx4core2cu13shared_memoryE")
        return [abi.ThreadgroupVariable(ctypes.addressof(memory), self._shared_memory, b"shared_memory")]


def _with_stand_ins(header: str, source: str, source_map: CudaSourceMap) -> tuple[str, str]:
    """Header and source with line numbers, and cuda/intrinsics.cuh replaced by its stand-in."""
    intrinsics = files("mlx_paged.cuda").joinpath("intrinsics.cuh").read_text()
    before, found, after = header.partition(intrinsics)
    if not found:
        raise ValueError(f"{source_map.kernel}: the header does not contain cuda/intrinsics.cuh")
    resumed = _FIRST_LINE + (before + found).count("\n")
    file = source_map.file
    return (
        f'\n#line {_FIRST_LINE} "{file}"\n{before}\n#include "intrinsics.h"\n#line {resumed} "{file}"{after}',
        f'#line {_FIRST_LINE + source_map.header_lines} "{file}"\n{source}',
    )
