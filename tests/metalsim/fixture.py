"""The fixture `metal`: code under test that makes Metal kernels runs on the simulator, on a Mac on its GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import pytest

from .kernel import simulator
from .report import LaunchReport, SimulationError
from .toolchain import CompileError, ToolchainError, find_toolchain


class Metal:
    """What runs the kernels of a test. Where that is a real GPU, a test ends where it asks for what only the
    simulator knows: it is skipped from there, with what it has compared before.
    """

    def __init__(self, *, simulated: bool) -> None:
        self.simulated = simulated

    def only_simulated(self, what: str) -> None:
        """Skips the rest of the test on a real GPU."""
        if not self.simulated:
            pytest.skip(f"this is a real GPU: {what} on the simulator only")

    def configure(self, **changes: Any) -> None:
        """Changes options of the simulator, the fields of Config, for the rest of the test."""
        simulator.configure(**changes)

    def compile_ahead(self, run: Callable[[], object]) -> None:
        """Compiles what `run` launches, on all cores at once, without running it. A GPU has nothing to do here."""
        if self.simulated:
            simulator.compile_ahead(run)

    @property
    def reports(self) -> list[LaunchReport]:
        """The reports of the test's launches so far."""
        self.only_simulated("findings and traffic are reported")
        return simulator.reports

    @property
    def report(self) -> LaunchReport:
        """The report of the latest launch."""
        if not self.reports:
            raise LookupError("no kernel was launched in this test")
        return self.reports[-1]

    def finds(self, pattern: str) -> AbstractContextManager[pytest.ExceptionInfo[SimulationError]]:
        """As pytest.raises: a kernel launched inside has findings whose text matches."""
        self.only_simulated("wrong kernels are run")
        return pytest.raises(SimulationError, match=pattern)

    def rejects(self, pattern: str) -> AbstractContextManager[pytest.ExceptionInfo[CompileError]]:
        """As pytest.raises: a kernel launched inside does not compile."""
        self.only_simulated("the compiler's messages are known")
        return pytest.raises(CompileError, match=pattern)


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metal]:
    """Kernels made with ``mx.fast.metal_kernel`` run during the test, and ``mx.metal.is_available()`` is true.

    On the simulator ``mx.compile`` is off, since it needs the arrays' values when a kernel is called.
    """
    if sys.platform == "darwin":
        if not mx.metal.is_available():
            pytest.skip("this Mac has no Metal device")
        yield Metal(simulated=False)
        return
    try:
        find_toolchain()
    except ToolchainError as error:
        pytest.fail(str(error), pytrace=False)
    monkeypatch.setattr(mx.fast, "metal_kernel", simulator.metal_kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    simulator.reset()
    mx.disable_compile()
    yield Metal(simulated=True)
    if "MLX_DISABLE_COMPILE" not in os.environ:
        mx.enable_compile()
