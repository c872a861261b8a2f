"""Runs ``mx.fast.metal_kernel`` kernels on a Linux CPU, with Metal's execution model, and checks them: README.md."""

from .config import Config
from .kernel import Simulator, simulator
from .report import Finding, FindingKind, LaunchReport, SimulationError, Traffic
from .toolchain import CompileError, ToolchainError

__all__ = [
    "CompileError",
    "Config",
    "Finding",
    "FindingKind",
    "LaunchReport",
    "SimulationError",
    "Simulator",
    "ToolchainError",
    "Traffic",
    "simulator",
]
