"""All kernels that requests can need are built at load, as the GPU takes them; otherwise plain operations are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.attention_cases import share_all, split
from helpers.fake_device import FakeDevice
from helpers.fake_device import device as device
from helpers.families import family_model
from helpers.tiny_models import VOCAB_SIZE

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.attention.backend import AttentionOptions
from mlx_paged.attention.found_at_load import SharingCosts
from mlx_paged.attention.paged_attention import BACKEND_VARIABLE, BACKENDS
from mlx_paged.cache.kv_cache import LayerPool
from mlx_paged.cache.layer_spec import LayerSpec
from mlx_paged.errors import EngineWarning
from mlx_paged.runner import prepare_kernels, trial_writes
from mlx_paged.runner.layer_kinds import LayerKind, TrialStep

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
LATENT = {"kv_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 12, "v_head_dim": 20, "q_lora_rank": None}


@pytest.fixture(autouse=True)
def a_gpu(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which whatever is written is seen, and prefixes are always worth reading once."""
    monkeypatch.setattr(prepare_kernels, "is_gpu", lambda: True)
    monkeypatch.setattr(prepare_kernels, "measure_costs", lambda *_: SharingCosts(1.0, 0.0, 0.0, "us"))
    monkeypatch.setattr(trial_writes, "seems_written", lambda *_: True)
    share_all(monkeypatch)


def load(model: Any, **settings: Any) -> LLM:
    return LLM.from_model(model, **{"num_kv_blocks": 128, "block_size": 8, "max_num_seqs": 4} | settings)


def run_all_sorts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request that outgrows a few blocks; prompts in chunks beside decodes; samples, beams, parts of contexts."""
    long = np.random.default_rng(0).integers(0, VOCAB_SIZE, 90).tolist()
    llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=70, ignore_eos=True))
    llm.generate([[1], [1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], long], GREEDY)
    for part_size in (None, 32):
        with monkeypatch.context() as patches:
            split(patches, part_size)
            llm.generate([long, [3, 4]], SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True))
            llm.generate([[*long, 7], [*long, 8], [5]], GREEDY)
            llm.beam_search([long], BeamSearchParams(beam_width=3, max_tokens=4))


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "gemma4_text", "glm4_moe_lite"])
def test_no_kernel_is_compiled_for_the_first_time_while_texts_are_generated(
    family: str, device: FakeDevice, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows, sinks, soft caps, layers of different heads, latents."""
    if family == "glm4_moe_lite":
        model = tiny_model(family, num_hidden_layers=2, **LATENT)
    else:
        model = tiny_model(family) if family in ("llama", "gpt_oss") else family_model(family)
    llm = load(model)
    built, before = device.compiled(), len(device.calls)
    run_all_sorts(llm, monkeypatch)
    assert not device.compiled() - built
    used = {name for name, _ in device.calls[before:]}
    attention = {"paged_latent"} if family == "glm4_moe_lite" else {"paged_decode", "paged_prefill"}
    assert used == attention | {"paged_write", "paged_merge", "draw_tokens"}
    shared = [dict(call["template"]).get("SHARED") for name, call in device.calls[before:] if name == "paged_prefill"]
    assert any(shared) == (family != "glm4_moe_lite")


def test_nothing_is_built_ahead_on_a_cpu(
    device: FakeDevice, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert not prepare_kernels.is_gpu()


def test_a_kernel_that_may_have_fewer_threads_is_launched_with_fewer_from_the_start(
    device: FakeDevice, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(tiny_model("llama"))
    sizes = {(name, call["threadgroup"]) for name, call in device.calls if name in ("paged_decode", "paged_prefill")}
    assert sizes == {("paged_decode", (256, 1, 1)), ("paged_prefill", (128, 1, 1))}
    assert whole.attention_backends == ["metal"]
    drawing = device.compiled("draw_tokens")
    device.calls.clear()
    device.limits = {"paged_decode": 200, "paged_prefill": 40}
    llm = load(tiny_model("llama"))
    built = device.compiled() | drawing
    run_all_sorts(llm, monkeypatch)
    assert not device.compiled() - built and llm.attention_backends == ["metal"]
    (decode,) = {(call["threadgroup"], dict(call["template"])["SIMDGROUPS"]) for call in device.use("paged_decode")}
    assert decode == ((128, 1, 1), 4)
    prefills = {(call["threadgroup"], dict(call["template"])["TILE_ROWS"]) for call in device.use("paged_prefill")}
    assert prefills == {((32, 1, 1), 8)}
    grids = [call["grid"] for call in device.use("paged_prefill") if call["output_shapes"][0][0] == 64]
    assert grids and set(grids) == {(32, 2, 64 * 2 // 8)}  # tiles of 8 rows, of 2 heads each


def built_later(device: FakeDevice, window: int | None, count: Callable[[], None] = lambda: None) -> set[str]:
    """What steps of 1 to 9 queries a sequence have built that was not at load, of layers with 2 heads to a KV head."""
    layer = LayerSpec(2, 64, 64, mx.float16)
    kind = LayerKind(BACKENDS["metal"], layer, 4, AttentionOptions(0.125, window))  # type: ignore[arg-type]
    assert prepare_kernels.failure_of(kind, 16, count) is None
    built, pool = device.compiled(), LayerPool.zeros(layer, 1, 16)
    device.calls.clear()
    for num_queries in range(1, 10):
        step = TrialStep(2, num_queries, 400)
        kind.backend.attend(kind.queries(2 * num_queries), pool, step.metadata(16), kind.options)
    return device.compiled() - built


def test_where_few_queries_need_fewer_threads_all_other_kernels_of_that_layout_are_built_too(
    device: FakeDevice,
) -> None:
    device.limits = {("paged_decode", "QUERIES", 8): 200}
    counted: list[None] = []
    assert not built_later(device, None, lambda: counted.append(None))
    assert len(counted) == 13  # each step once, of those that the line on the terminal speaks of
    decodes = [dict(call["template"]) for call in device.use("paged_decode")]
    assert {each["QUERIES"] for each in decodes} == {1, 2, 4, 8} and {each["SIMDGROUPS"] for each in decodes} == {4}


@pytest.mark.parametrize("window", [128, 249, 256, 300])
def test_a_window_that_only_a_few_queries_see_in_parts_has_its_parts_merged_at_load(
    window: int, device: FakeDevice
) -> None:
    assert not built_later(device, window)


def test_what_was_measured_stays_when_later_layers_of_the_same_shape_have_a_window(
    device: FakeDevice, tiny_model: Callable[..., Any]
) -> None:
    for order in ("full_attention", "sliding_attention"), ("sliding_attention", "full_attention"):
        BACKENDS["metal"].found.costs.clear()  # type: ignore[attr-defined]
        llm = load(tiny_model("gpt_oss", num_hidden_layers=2, layer_types=order))
        (told,) = (line for line in llm.describe_shared_prefixes() if "window" not in line)
        assert told.endswith("measured at load")


@pytest.mark.parametrize("kernel", ["paged_decode", "paged_prefill", "paged_merge"])
def test_layers_whose_kernels_never_fit_are_computed_by_plain_operations_and_named(
    kernel: str, device: FakeDevice, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = tiny_model("llama"), [[3, 1, 4, 1, 5], [9, 2]]
    device.limits = {kernel: 16}
    text = rf"^attention layers 0, 1, 2 can't use Metal kernels here: {kernel}: Thread group size .* \(16\)\."
    with pytest.warns(EngineWarning, match=text + "; plain MLX operations compute them, more slowly$") as warned:
        llm = load(model)
    assert len(warned) == 1 and llm.attention_backends == ["reference"]
    device.calls.clear()
    found = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    assert not device.calls
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert [output.outputs[0].token_ids for output in load(model).generate(prompts, GREEDY)] == found
    monkeypatch.setenv(BACKEND_VARIABLE, "metal")
    with pytest.raises(ValueError, match=text + rf" \({BACKEND_VARIABLE}\)$"):
        load(model)


def test_only_the_layers_that_a_kernel_does_not_fit_go_without(device: FakeDevice) -> None:
    """Layers with a window have heads of 32, the others of 64."""
    model = family_model("gemma4_text", global_head_dim=64)
    load(model)
    sizes = {(dict(call["template"])["HEAD_DIM"]) for call in device.use("paged_decode")}
    assert len(sizes) == 2
    device.unfit = max(sizes)
    with pytest.warns(EngineWarning, match="^attention layer 1 can't use Metal kernels here"):
        llm = load(model)
    assert llm.attention_backends == ["metal", "reference"]
    llm.generate([[1, 2, 3]], GREEDY)
