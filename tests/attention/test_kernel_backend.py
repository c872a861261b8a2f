"""The wrappers of the kernels: what they take, when kernels are made, which backend is chosen."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_paged import LLM, SamplingParams, paged_attention
from mlx_paged.attention import paged_attention as attention
from mlx_paged.attention import work_items as kernel_plan
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.cuda import CudaBackend
from mlx_paged.attention.kernel_backend import KernelBackend
from mlx_paged.attention.kernel_plan import Plan, to_device
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.attention.metal import MetalBackend
from mlx_paged.attention.work_items import Shape
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.errors import EngineWarning
from mlx_paged.runner import trial_writes as trial_writes
from mlx_paged.sampling import draw_kernel as draw_kernel


class FakeDevice:
    """Takes the place of `mx.fast.metal_kernel`: remembers what is made and called, and computes zeros."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def metal_kernel(
        self, *, name: str, input_names: Any, output_names: Any, source: str, header: str, **options: Any
    ) -> Any:
        self.made.append(name)
        self.options.append(options)

        def call(**arguments: Any) -> list[mx.array]:
            self.calls.append((name, arguments))
            shapes = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]

        return call

    def compiled(self, name: str) -> set[str]:
        """What MLX compiles a kernel for: its inputs of fewer than 8 elements are in another address space."""
        calls = [arguments for other, arguments in self.calls if other == name]
        return {str((call["template"], [(x.dtype, x.ndim == 0, x.size < 8) for x in call["inputs"]])) for call in calls}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "metal_kernel", fake.metal_kernel)
    monkeypatch.delenv(attention.BACKEND_VARIABLE, raising=False)
    attention._warn_once.cache_clear()
    return fake


METAL = MetalBackend()
SHAPE = Shape(2, 2, 16, 24, 4)
ARRAYS = {"q": mx.zeros((3, 4, 16)), "k_cache": mx.zeros((8, 8, 2, 16)), "v_cache": mx.zeros((8, 8, 2, 24))}


def call_decode(num_seqs: int = 3, max_blocks: int = 4, plan: Plan | None = None, **changes: Any) -> mx.array:
    """One query per sequence, 4 query and 2 KV heads."""
    plan = plan or METAL.plan_decode(np.full(num_seqs, 9, np.int32), None, SHAPE)
    return METAL.run(*arrays(num_seqs, max_blocks, changes), plan, AttentionOptions(1.0, **changes))


def call_prefill(num_seqs: int = 3, max_blocks: int = 4, **changes: Any) -> mx.array:
    """One query per sequence here as well, so that both take the same arrays."""
    cu_seqlens_q = np.arange(num_seqs + 1, dtype=np.int32)
    plan = METAL.plan_prefill(np.full(num_seqs, 9, np.int32), cu_seqlens_q, None, SHAPE)
    return METAL.run(*arrays(num_seqs, max_blocks, changes), plan, AttentionOptions(1.0, **changes))


CALLS = pytest.mark.parametrize("call", [call_decode, call_prefill])


def arrays(num_seqs: int, max_blocks: int, changes: dict[str, Any]) -> tuple[mx.array, LayerPool, mx.array]:
    """q, pool and tables; what is in `changes` is taken out of there."""
    own = {
        "q": mx.zeros((num_seqs, 4, 16)),
        "k_cache": mx.zeros((8, 8, 2, 16)),
        "v_cache": mx.zeros((8, 8, 2, 24)),
        "block_tables": mx.zeros((num_seqs, max_blocks), mx.int32),
    }
    q, k_cache, v_cache, tables = (changes.pop(name, array) for name, array in own.items())
    return q, LayerPool({"k": k_cache, "v": v_cache}), tables


# -- the wrappers --


@CALLS
def test_the_result_has_a_row_per_query_and_the_values_size(call: Callable[..., mx.array], device: FakeDevice) -> None:
    out = call()
    assert out.shape == (3, 4, 24) and out.dtype == mx.float32
    ((_, arguments),) = device.calls
    assert arguments["grid"][1:] == (2, 3) and arguments["grid"][0] == arguments["threadgroup"][0]


@CALLS
def test_no_queries_need_no_kernel(call: Callable[..., mx.array], device: FakeDevice) -> None:
    assert call(num_seqs=0).shape == (0, 4, 24)
    assert not device.calls


def test_a_context_in_several_parts_is_merged(device: FakeDevice) -> None:
    contexts = np.array([20, 5, 0], np.int32)
    plan = to_device(kernel_plan.decode_items(contexts, contexts, 8), METAL.launch_decode(SHAPE))
    assert call_decode(plan=plan).shape == (3, 4, 24)
    assert [name.split("_")[1] for name, _ in device.calls] == ["decode", "merge"]
    assert device.calls[0][1]["output_shapes"] == [(5, 4, 24), (5, 4), (8,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({name: mx.zeros(array.shape, mx.int32) for name, array in ARRAYS.items()}, "dtype mlx.core.int32"),
        ({"q": mx.zeros((3, 4, 16), mx.float16)}, "differ in dtype"),
        ({"block_tables": mx.zeros((3, 4), mx.int64)}, "be int32"),
        ({"k_cache": mx.zeros((8, 12, 2, 16)), "v_cache": mx.zeros((8, 12, 2, 24))}, "block_size 12"),
        ({"q": mx.zeros((3, 4, 12)), "k_cache": mx.zeros((8, 8, 2, 12))}, "head_dim 12"),
        ({"v_cache": mx.zeros((8, 8, 2, 264))}, "value_dim 264"),
        ({"q": mx.zeros((3, 34, 16))}, "34 query heads on 2 KV heads"),
        ({"q": mx.zeros((3, 5, 16))}, "5 query heads can't share 2 KV heads"),
        ({"q": mx.zeros((3, 4, 24))}, "head_dim of q is 24"),
        ({"v_cache": mx.zeros((9, 8, 2, 16))}, "differ in blocks"),
        ({"sinks": mx.zeros(3)}, "sinks"),
    ],
)
def test_arguments_without_a_kernel_are_named(device: FakeDevice, changes: dict[str, Any], message: str) -> None:
    lengths = mx.array([9, 9, 9], mx.int32), mx.array([0, 1, 2, 3], mx.int32)
    tables = {"block_tables": mx.zeros((3, 4), mx.int32)}
    with pytest.raises((ValueError, TypeError), match=message):
        paged_attention(
            **(ARRAYS | tables | changes), context_lens=lengths[0], cu_seqlens_q=lengths[1], scale=1.0, backend="metal"
        )
    assert not device.made


@pytest.mark.parametrize("backend", [MetalBackend(), CudaBackend()], ids=lambda backend: backend.name)
def test_without_a_device_the_wrapper_says_so(backend: KernelBackend) -> None:
    if backend.is_available():
        pytest.skip("there is one")
    plan = backend.plan_decode(np.full(3, 9, np.int32), None, SHAPE)
    with pytest.raises(RuntimeError, match=f"{backend.title} device"):
        backend.run(*arrays(3, 4, {}), plan, AttentionOptions(1.0))


@CALLS
def test_no_input_is_copied(call: Callable[..., mx.array], device: FakeDevice) -> None:
    """MLX is told not to make inputs contiguous, and gets the very arrays, strided ones too."""
    q = mx.zeros((3, 4, 48))[:, :, 16:32]
    k_cache, v_cache = mx.zeros((8, 8, 2, 16)), mx.zeros((8, 8, 2, 24))
    block_tables = mx.zeros((3, 9), mx.int32)[:, :4]
    call(q=q, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables)
    ((_, arguments),) = device.calls
    assert arguments["inputs"][0] is q and arguments["inputs"][3] is block_tables
    for given, passed in zip((k_cache, v_cache), arguments["inputs"][1:3], strict=True):
        assert passed.shape == (1, *given.shape[1:])
        assert np.array(passed, copy=None).ctypes.data == np.array(given, copy=None).ctypes.data
    assert device.options == [{"ensure_row_contiguous": False}]


# -- when kernels are made --


@CALLS
def test_a_kernel_is_made_once_for_a_device(
    call: Callable[..., mx.array], device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_seqs in (3, 4, 3):
        call(num_seqs)
    assert len(device.made) == 1
    other = FakeDevice()
    monkeypatch.setattr(mx.fast, "metal_kernel", other.metal_kernel)
    call()
    assert len(device.made) == len(other.made) == 1


@CALLS
def test_items_and_parts_are_never_so_few_that_another_kernel_is_compiled(
    call: Callable[..., mx.array], device: FakeDevice
) -> None:
    for num_seqs in (1, 2, 30):
        call(num_seqs=num_seqs, max_blocks=8)
    assert len(device.compiled(call.__name__.replace("call", "paged"))) == 1


def test_no_kernel_is_compiled_for_the_first_time_while_texts_are_generated(
    device: FakeDevice, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request whose context outgrows a few blocks, then several: as loading has compiled them."""
    try_to_draw = draw_kernel._failure
    monkeypatch.setattr(trial_writes, "seems_written", lambda *_: True)
    monkeypatch.setattr(draw_kernel, "_failure", lambda *arguments: (try_to_draw(*arguments), None)[1])
    llm = LLM.from_model(tiny_model("llama"), block_size=8, max_num_seqs=4)
    loaded = {name: device.compiled(name) for name in ("paged_prefill", "paged_decode", "paged_write", "draw_tokens")}
    params = SamplingParams(max_tokens=70, ignore_eos=True)
    for prompts in ([[1, 2]], [[1, 2, 3], [4, 5], [6]]):
        llm.generate(prompts, params)
    for name, variants in loaded.items():
        assert len(variants) == (2 if name == "paged_write" else 1) and device.compiled(name) == variants


def test_the_number_of_cores_is_told_from_the_architecture(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture, cores in (("applegpu_g13g", 20), ("applegpu_g15d", 80), ("applegpu_g99x", 40), ("cpu", 40)):
        monkeypatch.setattr(mx, "device_info", lambda name=architecture: {"architecture": name})
        assert MetalBackend().num_cores == cores


# -- which backend --


def test_work_that_was_put_on_the_cpu_beside_a_gpu_stays_there(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "is_available", lambda _: True)
    for default, expected in ((mx.cpu, False), (mx.gpu, True)):
        monkeypatch.setattr(mx, "default_device", lambda default=default: default)
        assert METAL.is_available() is expected


def arguments_of_attention(dtype: mx.Dtype = mx.float32, block_size: int = 8, head_dim: int = 16) -> list[Any]:
    return [
        mx.zeros((2, 4, head_dim), dtype),
        *[mx.zeros((8, block_size, 2, head_dim), dtype)] * 2,
        mx.array([[0, 1, 2], [3, 4, 0]], mx.int32),
        mx.array([20, 10], mx.int32),
        mx.array([0, 1, 2], mx.int32),
    ]


def test_the_best_backend_is_the_device_that_is_there(device: FakeDevice) -> None:
    paged_attention(*arguments_of_attention(), scale=1.0)
    assert len(device.calls) == 1


def test_the_environment_chooses_where_the_caller_does_not(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(attention.BACKEND_VARIABLE, "reference")
    paged_attention(*arguments_of_attention(), scale=1.0)
    assert not device.calls
    paged_attention(*arguments_of_attention(), scale=1.0, backend="metal")
    assert len(device.calls) == 1


@pytest.mark.parametrize("name", ["metal", "cuda", "abacus"])
def test_a_backend_that_is_not_there_is_one_clear_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    others = "cpu, reference" if mx.default_device() == mx.cpu else "reference"
    line = f"^backend '{name}' is not available here; there is: {others}$"
    with pytest.raises(ValueError, match=line):
        paged_attention(*arguments_of_attention(), scale=1.0, backend=name)
    monkeypatch.setenv(attention.BACKEND_VARIABLE, name)
    with pytest.raises(ValueError, match=rf"^backend '{name}' \(MLX_PAGED_BACKEND\) is not available here"):
        paged_attention(*arguments_of_attention(), scale=1.0)


@pytest.mark.parametrize("changes", [{"block_size": 12}, {"head_dim": 20}, {"head_dim": 264}])
def test_what_has_no_kernel_is_computed_without_and_said_once(device: FakeDevice, changes: dict[str, int]) -> None:
    (number,) = changes.values()
    with pytest.warns(EngineWarning, match=str(number)):
        paged_attention(*arguments_of_attention(**changes), scale=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineWarning)
        paged_attention(*arguments_of_attention(**changes), scale=1.0)
    assert not device.calls
    with pytest.raises(ValueError, match=str(number)):
        paged_attention(*arguments_of_attention(**changes), scale=1.0, backend="metal")


def test_the_layers_of_a_step_share_one_plan(device: FakeDevice) -> None:
    metadata = AttentionMetadata(
        mx.array([[0, 1, 2], [3, 4, 0]], mx.int32), np.array([20, 10], np.int32), np.array([0, 1, 2], np.int32)
    )
    q, pool, _ = arrays(2, 3, {})
    for window in (None, None, 8, 8):
        METAL.attend(q, pool, metadata, AttentionOptions(1.0, window))
    works = [call["inputs"][4] for _, call in device.calls]
    assert works[0] is works[1] and works[2] is works[3] and works[0] is not works[2]
    assert all(call["inputs"][3] is metadata.block_tables for _, call in device.calls)


def test_decodes_and_prompts_of_a_step_have_a_kernel_each_and_share_the_tables(device: FakeDevice) -> None:
    metadata = AttentionMetadata(
        mx.array([[0, 1, 2], [3, 4, 0]], mx.int32), np.array([20, 10], np.int32), np.array([0, 1, 8], np.int32)
    )
    q, pool, _ = arrays(8, 3, {})
    for _ in range(2):
        assert METAL.attend(q, pool, metadata, AttentionOptions(1.0)).shape == (8, 4, 24)
    assert [name.split("_")[1] for name, _ in device.calls] == ["decode", "prefill"] * 2
    tables = [call["inputs"][3] for _, call in device.calls]
    assert tables[0] is tables[2] and tables[1] is tables[3]


# -- CUDA alone --


@pytest.mark.parametrize("size", [2, 4])
def test_every_shape_has_a_layout_that_fits_every_card(size: int) -> None:
    cuda = CudaBackend()
    for heads, head_dim, value_dim in itertools.product(range(1, 17), range(8, 257, 8), range(8, 257, 8)):
        shape = Shape(1, heads, head_dim, value_dim, size)
        prefill = cuda.launch_prefill(shape)
        for launch in (cuda.launch_decode(shape), prefill):
            assert launch.shared_bytes <= 96 << 10 and launch.shared_bytes % 16 == 0
        tile = cuda.prefill_tile(shape)
        assert tile.rows % (16 * prefill.template["MATRICES"]) == 0 and tile.keys % 16 == 0


def test_a_latent_layout_fits_every_device_and_divides_a_row_evenly() -> None:
    for heads, value_dim, rest, size in itertools.product((5, 16, 128), range(64, 513, 64), (32, 64), (2, 4)):
        shape = Shape(1, heads, value_dim + rest, value_dim, size, value_in_key=True)
        if metal := METAL.latent_layout(shape):
            simdgroups = metal.launch.template["SIMDGROUPS"]
            assert metal.launch.threads == 32 * simdgroups <= 256 and metal.tile.rows in (8, 16)
            assert value_dim % (8 * simdgroups) == rest % (8 * simdgroups) == 0
            assert 4 * simdgroups * metal.tile.rows * (metal.tile.keys + 4) <= 12 << 10  # bytes of scores
        assert metal or (rest, size) == (32, 4)
        cuda = CudaBackend().latent_layout(shape)
        assert (cuda is None) == (size == 4)
        assert cuda is None or (cuda.launch.shared_bytes <= 96 << 10 and cuda.launch.shared_bytes % 16 == 0)


def test_an_older_card_takes_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    for generation, expected in ((7, False), (8, True), (9, True)):
        monkeypatch.setattr(mx, "device_info", lambda major=generation: {"compute_capability_major": major})
        assert CudaBackend().is_available() is expected
