"""A Metal device that computes nothing, and remembers what kernels were made and called, and with what."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest

from mlx_paged.attention import paged_attention as attention
from mlx_paged.attention.found_at_load import FoundAtLoad
from mlx_paged.sampling import draw_kernel


class FakeDevice:
    """Takes the place of `mx.fast.metal_kernel`: remembers what is made and called, and computes zeros."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.limits: dict[Any, int] = {}
        """The most threads of a threadgroup that kernels with these names may have, or with a name and a template
        argument."""
        self.unfit = 0
        """The size of heads for which no kernel builds."""

    def metal_kernel(
        self, *, name: str, input_names: Any, output_names: Any, source: str, header: str, **options: Any
    ) -> Any:
        self.made.append(name)
        self.options.append(options)

        def call(**arguments: Any) -> list[mx.array]:
            if self.unfit and dict(arguments["template"]).get("HEAD_DIM") == self.unfit and name != "paged_write":
                raise RuntimeError("[metal::Device] Unable to load kernel")
            keys = [name, *((name, *argument) for argument in arguments["template"])]
            size, limit = math.prod(arguments["threadgroup"]), min(self.limits.get(key, 1024) for key in keys)
            if size > limit:  # as MLX has it, which says so when it is evaluated
                most = f"the maximum allowed threads per threadgroup ({limit})."
                raise ValueError(f"Thread group size ({size}) is greater than  {most}")
            self.calls.append((name, arguments))
            shapes = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]

        return call

    def compiled(self, *names: str) -> set[str]:
        """What MLX compiles kernels for: their inputs of fewer than 8 elements are in another address space."""
        calls = [(name, call) for name, call in self.calls if not names or name in names]
        return {
            str((name, call["template"], [(x.dtype, x.ndim == 0, x.size < 8) for x in call["inputs"]]))
            for name, call in calls
        }

    def use(self, name: str) -> list[dict[str, Any]]:
        """The calls of a kernel."""
        return [arguments for other, arguments in self.calls if other == name]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "metal_kernel", fake.metal_kernel)
    monkeypatch.delenv(attention.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(attention.BACKENDS["metal"], "found", FoundAtLoad())
    try_to_draw = draw_kernel._failure  # zeros are other tokens than plain operations draw
    monkeypatch.setattr(draw_kernel, "_failure", lambda *arguments: (try_to_draw(*arguments), None)[1])
    attention._warn_once.cache_clear()
    return fake
