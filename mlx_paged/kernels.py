"""Kernels of our own for both kinds of GPU: where they can run, and how their texts become kernels."""

from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

BACKEND_VARIABLE = "MLX_PAGED_BACKEND"
TITLES = {"metal": "Metal", "cuda": "CUDA"}
"""The kinds of GPU: names of modules of mlx.core and of folders with kernels; and what messages call them."""
_AMPERE = 8  # the first of NVIDIA's with the instructions of intrinsics.cuh

Kernel = Callable[..., list[mx.array]]


def is_available(kind: str) -> bool:
    """Whether this process has the device for a kind of kernel, and work was not put on another."""
    on_cpu_by_choice = mx.is_available(mx.gpu) and mx.default_device() == mx.cpu
    if not getattr(mx, kind).is_available() or on_cpu_by_choice:
        return False
    return kind != "cuda" or int(mx.device_info().get("compute_capability_major", _AMPERE)) >= _AMPERE


def make_kernel(
    kind: str, texts: tuple[str, ...], inputs: Iterable[str], outputs: tuple[str, ...], shared_bytes: int = 0
) -> Kernel:
    """Make the kernel with inputs of these names, once. texts: the files of what comes before its body, and of that.

    It is made by `mx.fast`'s function for it as it is found at the time, so that a simulator can take its place. Raises
    RuntimeError if there is no device.
    """
    if not getattr(mx, kind).is_available():
        raise RuntimeError(f"{TITLES[kind]} kernels need a {TITLES[kind]} device, and there is none here")
    header, source = _texts(kind, texts)
    names = {"name": texts[-1].split(".")[0], "input_names": tuple(inputs), "output_names": outputs}
    settings = {"shared_memory": shared_bytes} if shared_bytes else {}
    make = getattr(mx.fast, f"{kind}_kernel")
    return _make(make, **names, header=header, source=source, ensure_row_contiguous=False, **settings)


@cache
def _make(make: Callable[..., Kernel], **arguments: Any) -> Kernel:
    return make(**arguments)


@cache
def _texts(folder: str, names: tuple[str, ...]) -> tuple[str, str]:
    texts = [files(f"mlx_paged.{folder}").joinpath(name).read_text() for name in names]
    return "\n".join(texts[:-1]), texts[-1]
