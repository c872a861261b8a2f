"""Has MLX write the full Metal text of a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx


class KernelText:
    """The Metal text of one instance of a kernel, as MLX generates it."""

    def __init__(
        self,
        function: str,
        text: str,
        shape_arguments: Sequence[tuple[bool, bool, bool]],
        math_mode: int,
    ) -> None:
        self.function = function
        self.text = text
        #: Per input: whether the kernel also takes its shape, its strides, its ndim.
        self.shape_arguments = shape_arguments
        self.math_mode = math_mode

    @classmethod
    def from_mlx(cls, kernel: Any, arrays: Sequence[mx.array], **launch: Any) -> KernelText:
        """Has MLX write the text: exporting a function records its primitives, without a GPU."""
        recorded: list[Mapping[str, Any]] = []
        mx.export_function(recorded.append, lambda *xs: kernel(inputs=list(xs), **launch), *arrays)
        states = [
            entry["arguments"] for entry in recorded if entry["type"] == "primitive" and entry["name"] == "CustomKernel"
        ]
        try:
            (state,) = states
            function, text, shape_arguments = state[0], state[1], state[8]
            math_mode = state[13] if len(state) > 13 else 0
            if f"[[kernel]] void {function}(" not in text or len(shape_arguments) != len(arrays):
                raise ValueError("unexpected contents")
        except (ValueError, IndexError, TypeError) as error:
            raise RuntimeError(
                f"MLX {mx.__version__} records custom kernels differently than metalsim expects"
            ) from error
        return cls(function, text, shape_arguments, math_mode)
