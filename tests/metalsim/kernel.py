"""A stand-in for ``mx.fast.metal_kernel`` that runs on the CPU."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import mlx.core as mx

from .arguments import KernelArguments
from .build import CompiledKernel, compile_kernel
from .config import Config
from .library import MAX_THREADS, KernelLibrary
from .mlx_text import KernelText
from .order import AccessOrder
from .report import Finding, FindingKind, LaunchReport, SimulationError

_MAX_THREADGROUP_BYTES = 32 * 1024
_MAX_BUFFERS = 31

_real_metal_kernel = mx.fast.metal_kernel


class Simulator:
    """The simulated GPU: how it runs kernels, and what came of the launches.

    There is one per process, `simulator`, because the code under test keeps the kernels it has made.
    """

    def __init__(self) -> None:
        self.config = Config()
        #: Of every launch, also of those that raised.
        self.reports: list[LaunchReport] = []
        self.order = AccessOrder()
        self.compilers: Executor | None = None

    def reset(self) -> None:
        """Forgets options and reports."""
        self.config = Config()
        self.reports.clear()
        self.order = AccessOrder()

    def configure(self, **changes: Any) -> None:
        """Changes options, the fields of Config."""
        self.config = replace(self.config, **changes)

    def compile_ahead(self, run: Callable[[], object]) -> None:
        """Compiles the kernels that `run` launches, on all cores at once; there they return zeros."""
        with ThreadPoolExecutor(os.cpu_count()) as self.compilers:
            try:
                run()
            finally:
                self.compilers = None

    def metal_kernel(self, *args: Any, **options: Any) -> MetalKernel:
        """Takes the arguments of ``mx.fast.metal_kernel``."""
        return MetalKernel(self, *args, **options)


class MetalKernel:
    """A kernel as ``mx.fast.metal_kernel`` returns it, run by the simulator."""

    def __init__(
        self,
        simulator: Simulator,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        **options: Any,
    ) -> None:
        self._simulator = simulator
        self.name = name
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self.row_contiguous = ensure_row_contiguous
        self._written = frozenset(re.findall(r"const_cast<device \w+\*>\((\w+)\)", source))
        self._real = _real_metal_kernel(
            name=name,
            input_names=self.input_names,
            output_names=self.output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
            **options,
        )
        self._texts: dict[object, KernelText] = {}
        self._libraries: dict[object, KernelLibrary] = {}
        self._compiling: set[object] = set()

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Runs the kernel at once and returns its outputs.

        Takes what MLX's kernels take; ``stream`` is ignored.

        Raises:
            SimulationError: if anything was found that the options do not ignore.
            CompileError: if the kernel does not compile.
            ToolchainError: without a compiler.
        """
        config = self._simulator.config
        config = replace(config, writable_inputs=config.writable_inputs | self._written)
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        mx.eval(arrays)
        text = self._generate(arrays, output_shapes, output_dtypes, grid, threadgroup, template)
        if verbose:
            print(text.text)
        if self._simulator.compilers:
            self._compile_ahead(self._simulator.compilers, text, config.check)
            return [mx.zeros(*output) for output in zip(output_shapes, output_dtypes, strict=True)]
        library = self._load(text, config.check)
        report = LaunchReport(
            self.name,
            findings=tuple(self._static_findings(library, threadgroup, config)),
            compile_seconds=library.compiled.compile_seconds,
        )
        self._simulator.reports.append(report)
        self._raise_findings(report, config)
        if math.prod(threadgroup) > MAX_THREADS:
            raise ValueError(f"{self.name}: more than {MAX_THREADS} threads cannot be simulated")
        arguments = KernelArguments(self, arrays, text.shape_arguments, config)
        inputs = dict(zip(self.input_names, arrays, strict=True))
        try:
            number = self._simulator.order.check(self.name, inputs, arguments.memory, self._written)
            arguments.add_outputs(output_shapes, output_dtypes, init_value)
            launch = library.launch(
                arguments.specs,
                grid,
                threadgroup,
                config,
                arguments.outputs.values() if init_value is None else (),
            )
            findings = launch.findings + arguments.unwritten_findings(launch.unwritten)
            report = replace(
                report,
                findings=report.findings + tuple(f for f in findings if f.kind not in config.ignore),
                traffic=launch.traffic,
                inputs_after=arguments.collect_inputs(),
            )
            self._simulator.order.is_over(arguments.memory, self._written)
            results = arguments.collect_outputs(number)
        finally:
            arguments.free()
        self._simulator.reports[-1] = report
        self._raise_findings(report, config)
        return results

    @staticmethod
    def _raise_findings(report: LaunchReport, config: Config) -> None:
        if report.findings and config.raise_on_findings:
            raise SimulationError(report)

    def _generate(
        self,
        arrays: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None,
    ) -> KernelText:
        if min(*grid, *threadgroup) < 1:
            raise ValueError(f"{self.name}: empty grid {grid} or threadgroup {threadgroup}")
        signature = [(a.ndim, min(a.size, 8), a.dtype) for a in arrays]
        key = str((signature, template, output_dtypes))
        if key not in self._texts:
            self._texts[key] = KernelText.from_mlx(
                self._real,
                arrays,
                output_shapes=[tuple(s) for s in output_shapes],
                output_dtypes=list(output_dtypes),
                grid=tuple(grid),
                threadgroup=tuple(threadgroup),
                template=list(template or ()),
            )
        return self._texts[key]

    def _load(self, text: KernelText, checked: bool) -> KernelLibrary:
        key = (text.function, text.text, checked)
        if key not in self._libraries:
            self._libraries[key] = KernelLibrary(self._compile(text, checked))
        return self._libraries[key]

    def _compile(self, text: KernelText, checked: bool) -> CompiledKernel:
        return compile_kernel(text.function, text.text, self.name, checked=checked, math_mode=text.math_mode)

    def _compile_ahead(self, compilers: Executor, text: KernelText, checked: bool) -> None:
        key = (text.function, text.text, checked)
        if key not in self._libraries and key not in self._compiling:
            self._compiling.add(key)
            compilers.submit(self._compile, text, checked)

    def _static_findings(
        self,
        library: KernelLibrary,
        threadgroup: Sequence[int],
        config: Config,
    ) -> list[Finding]:
        """What is wrong before the first thread runs."""
        findings = [
            Finding(
                FindingKind.MISSING_ADDRESS_SPACE,
                location=lint.location,
                memory=lint.variable,
                detail=f"(clang assumed `{lint.type}`)",
            )
            for lint in library.compiled.lint
        ]
        limits = (
            (FindingKind.TOO_MANY_THREADS, math.prod(threadgroup), MAX_THREADS, ""),
            (FindingKind.TOO_MUCH_THREADGROUP_MEMORY, library.threadgroup_memory, _MAX_THREADGROUP_BYTES, " bytes"),
            (
                FindingKind.TOO_MANY_BUFFERS,
                len(library.compiled.parameters),
                _MAX_BUFFERS,
                ", shapes and strides included",
            ),
        )
        for kind, number, limit, what in limits:
            if number > limit:
                findings.append(Finding(kind, detail=f"({number}{what}, at most {limit})"))
        return [f for f in findings if f.kind not in config.ignore]


#: The one of this process.
simulator = Simulator()
