"""The fixture `cuda`: code under test that makes CUDA kernels runs on the simulator, beside a card on that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from metalsim.report import LaunchReport
from metalsim.toolchain import ToolchainError, find_toolchain

from .kernel import CudaKernel, CudaSimulator


class Cuda:
    """What runs the kernels of a test. Where that is a real card, a test ends where it asks for what only the
    simulator knows: it is skipped from there, with what it has compared before.
    """

    def __init__(self, simulator: CudaSimulator | None) -> None:
        self._simulator = simulator

    @property
    def simulated(self) -> bool:
        return self._simulator is not None

    def only_simulated(self, what: str) -> CudaSimulator:
        """Skips the rest of the test on a real card."""
        if self._simulator is None:
            pytest.skip(f"this is a real card: {what} on the simulator only")
        return self._simulator

    def configure(self, **changes: Any) -> None:
        """Changes options of the simulator, the fields of metalsim's Config, for the rest of the test."""
        if self._simulator:
            self._simulator.configure(**changes)

    def cuda_kernel(self, **options: Any) -> CudaKernel:
        """Makes a kernel that may be wrong."""
        return self.only_simulated("wrong kernels are run").cuda_kernel(**options)

    @property
    def reports(self) -> list[LaunchReport]:
        """The reports of the test's launches so far."""
        return self.only_simulated("findings and traffic are reported").reports

    @property
    def report(self) -> LaunchReport:
        """The report of the latest launch."""
        return self.reports[-1]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """Kernels made with ``mx.fast.cuda_kernel`` run during the test, and ``mx.cuda.is_available()`` is true.

    On the simulator ``mx.compile`` is off, since it needs the arrays' values when a kernel is called.
    """
    if mx.cuda.is_available():
        yield Cuda(None)
        return
    try:
        find_toolchain()
    except ToolchainError as error:
        pytest.fail(str(error), pytrace=False)
    simulator = CudaSimulator()
    monkeypatch.setattr(mx.fast, "cuda_kernel", simulator.cuda_kernel)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    mx.disable_compile()
    yield Cuda(simulator)
    if "MLX_DISABLE_COMPILE" not in os.environ:
        mx.enable_compile()
