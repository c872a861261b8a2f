"""OpenBLAS for MLX's CPU build on Linux, which brings a plain BLAS that multiplies float32 matrices slowly.

Whatever BLAS lies in the process's global scope when `mlx.core` is first imported takes the place of MLX's own, and
`load_openblas` puts the system's there. A product of 256 rows with a matrix of 896 x 4864 runs at 73 instead of 1.5
GFLOP per second of CPU time (AMD Zen 3, OpenBLAS 0.3.21). No mlx is imported here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from pathlib import Path

from mlx_paged.errors import EngineWarning

SLOW_BLAS = "MLX's own BLAS, a slow one"
_LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")  # Debian's, Fedora's, others' names


@functools.cache
def load_openblas() -> None:
    """Load the system's OpenBLAS, once and if there is one, so that MLX will use it.

    Does nothing on a Mac, with MLX_PAGED_BLAS=0, or where a BLAS is preloaded. Warns with an EngineWarning if it would
    help and comes too late, because MLX has been imported.
    """
    if sys.platform != "linux" or os.environ.get("MLX_PAGED_BLAS") == "0" or _has_blas(ctypes.CDLL(None)):
        return
    mlx = sys.modules.get("mlx.core")
    if mlx is None:
        _load_first(ctypes.RTLD_GLOBAL)
    elif mlx.default_device() == mlx.cpu and _version(_libmlx()) is None and _load_first(ctypes.RTLD_LOCAL):
        warnings.warn(
            "MLX was imported before mlx_paged, too late to give it OpenBLAS, with which prompts are many times "
            "faster: import mlx_paged's names first, or set LD_PRELOAD=libopenblas.so.0 (MLX_PAGED_BLAS=0 silences "
            "this)",
            EngineWarning,
            stacklevel=3,
        )


def blas_name() -> str | None:
    """Name what multiplies float32 matrices for MLX on a CPU: "OpenBLAS 0.3.21", say.

    Returns None where that is a GPU's work, or not known.
    """
    mlx = sys.modules["mlx.core"]
    if mlx.default_device() != mlx.cpu:
        return None
    if sys.platform == "darwin":
        return "Accelerate"
    if _has_blas(ctypes.CDLL(None)):
        return _version(ctypes.CDLL(None)) or "a preloaded BLAS"
    return _version(_libmlx()) or SLOW_BLAS


def advice() -> str | None:
    """Say what to install for MLX to be faster. Returns None where nothing would help, or it is not wanted."""
    if os.environ.get("MLX_PAGED_BLAS") == "0" or blas_name() != SLOW_BLAS:
        return None
    return (
        "prompts are many times faster with OpenBLAS: apt install libopenblas0, or dnf install openblas-threads "
        "(MLX_PAGED_BLAS=0 silences this)"
    )


def _load_first(mode: int) -> bool:
    """Load the first OpenBLAS there is. Returns whether there is one."""
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name, mode=mode)
            return True
        except OSError:
            pass
    return False


def _has_blas(library: ctypes.CDLL) -> bool:
    return hasattr(library, "cblas_sgemm")


def _version(library: ctypes.CDLL | None) -> str | None:
    """Name the OpenBLAS that a library is, or has loaded. Returns None if that is none."""
    if not hasattr(library, "openblas_get_config"):
        return None
    get_config = library.openblas_get_config  # type: ignore[union-attr]
    get_config.restype = ctypes.c_char_p
    return " ".join(get_config().decode().split()[:2])


def _libmlx() -> ctypes.CDLL | None:
    """Find MLX's library, which is in memory by now. Returns None where it lies elsewhere."""
    file = getattr(sys.modules["mlx.core"], "__file__", None)
    path = Path(file or "").parent / "lib" / "libmlx.so"
    return ctypes.CDLL(str(path)) if file and path.exists() else None
