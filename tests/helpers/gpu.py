"""The kernels under test, of either kind of GPU: both kinds have to pass the same cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from metalsim import simulator
from metalsim.report import LaunchReport

from helpers.attention_cases import Arrays, Case, check
from helpers.budget import LONG
from helpers.planted import Mistake, with_mistake
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.kernel_backend import shape_of
from mlx_paged.attention.paged_attention import BACKENDS


class Gpu:
    """A kind of GPU, and what runs its kernels: a simulator, or the device itself where there is one.

    On a device a test ends where it asks for what only the simulator knows, with what it has compared before.
    """

    def __init__(self, name: str, device: Any) -> None:
        self.name = name
        self.backend: Any = BACKENDS[name]
        self.backend.writes_in_place = True  # as before a model has been loaded
        self.only_simulated: Callable[[str], object] = device.only_simulated
        self.configure: Callable[..., None] = device.configure
        self.simulated: bool = device.simulated
        self._device = device

    def compile_ahead(self, run: Callable[[], object]) -> None:
        """Compile what `run` launches on all cores at once, where that can be done."""
        if self.name == "metal":
            self._device.compile_ahead(run)

    @property
    def reports(self) -> list[LaunchReport]:
        return self._device.reports  # type: ignore[no-any-return]

    @property
    def report(self) -> LaunchReport:
        return self.reports[-1]

    @property
    def kernels_run(self) -> list[str]:
        """ "decode", "prefill", "merge" or "write", one per launch of a kernel over blocks."""
        return [name.removeprefix("paged_") for report in self.reports if (name := report.kernel).startswith("paged_")]

    def check(self, case: Case, seed: int = 0) -> None:
        """The kernels' result for a case against the dense one."""
        check(case, seed, self.name)

    def take_part(self, part: int) -> None:
        """Go on with a part of a grid, of which CUDA's kernels take every second one: they are the others' twins."""
        if self.name == "cuda" and part % 2 and not LONG:
            pytest.skip("CUDA's kernels take half of the grid: MLX_PAGED_LONG_TESTS=1 has them take all of it")

    def prefill(self, arrays: Arrays) -> mx.array:
        """paged_prefill's result, also for sequences with one query, which `paged_attention` gives to paged_decode."""
        options = AttentionOptions(**arrays.options)
        shape = shape_of(arrays.q, arrays.pool)
        plan = self.backend.plan_prefill(arrays.context_lens, arrays.cu_seqlens_q, options.window, shape)
        return self.backend.run(arrays.q, arrays.pool, arrays.block_tables, plan, options)  # type: ignore[no-any-return]

    def plant(self, mistake: Mistake, patches: pytest.MonkeyPatch) -> list[str]:
        """Make kernels with the mistake from here on. Returns the names of those that have it, as they are made."""
        self.only_simulated("wrong kernels are run")
        make = simulator.metal_kernel if self.name == "metal" else self._device.cuda_kernel
        planted: list[str] = []

        def kernel(*, name: str, source: str, header: str, **arguments: Any) -> Any:
            texts = [with_mistake(text, mistake.old, mistake.new, mistake.occurrence) for text in (source, header)]
            planted.extend(name for before, after in zip((source, header), texts, strict=True) if before != after)
            return make(name=name, source=texts[0], header=texts[1], **arguments)

        patches.setattr(mx.fast, f"{self.name}_kernel", kernel)
        return planted

    def unnoticed(self, mistakes: dict[str, Mistake], monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of mistakes with which the kernels still pass their case without a finding."""

        def is_noticed(mistake: Mistake) -> bool:
            with monkeypatch.context() as patches:
                planted = self.plant(mistake, patches)
                mistake.set_up(patches)
                try:
                    self.check(mistake.case)
                except AssertionError as error:  # a SimulationError is one
                    return mistake.finding in str(error)
                finally:
                    assert planted, f"not in any kernel: {mistake.old}"
            return False

        self.compile_ahead(lambda: [is_noticed(mistake) for mistake in mistakes.values()])
        return [name for name, mistake in mistakes.items() if not is_noticed(mistake)]

    def check_without(self, mistakes: dict[str, Mistake], monkeypatch: pytest.MonkeyPatch) -> None:
        """The same cases pass where nothing is wrong."""
        for mistake in {mistake._replace(old="", new="", occurrence=0) for mistake in mistakes.values()}:
            with monkeypatch.context() as patches:
                mistake.set_up(patches)
                self.check(mistake.case)


@pytest.fixture(params=["metal", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """The kernels of each kind of GPU in turn."""
    yield Gpu(request.param, request.getfixturevalue(request.param))
