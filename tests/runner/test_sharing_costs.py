"""What it costs to read a prefix either way, measured at load, and what of it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.fake_device import FakeDevice
from helpers.fake_device import device as device

from mlx_paged import LLM
from mlx_paged.attention.found_at_load import SharingCosts
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.runner import sharing_costs, trial_writes
from mlx_paged.runner.layer_kinds import LayerKind, TrialStep, kinds_of


def load(model: Any) -> tuple[LLM, LayerKind]:
    """On a simulated device, and the only kind of its layers."""
    llm = LLM.from_model(model, num_kv_blocks=8, block_size=16, pipelining="off")
    (kind,) = kinds_of(llm._runner._model, 16)
    return llm, kind


@pytest.fixture(autouse=True)
def writes_are_seen(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_writes, "seems_written", lambda *_: True)


def test_a_chain_runs_the_kernels_of_both_ways_over_blocks_that_caches_have_forgotten(
    device: FakeDevice, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kind = load(tiny_model("llama", num_hidden_layers=1))
    monkeypatch.setattr(sharing_costs, "_BYTES", 3 * kind.layer.bytes_per_token * 512)
    monkeypatch.setattr(sharing_costs, "_CHAIN_S", 0.0)
    device.calls.clear()
    costs = sharing_costs.measure_costs(kind, 16)
    assert costs.unit == "us" and min(costs[:3]) >= 0
    kernels = [name for name, _ in device.calls]
    assert set(kernels) == {"paged_decode", "paged_prefill", "paged_merge"}
    (queries,) = {call["inputs"][0].shape for name, call in device.calls if name == "paged_decode"}
    assert queries == (16, 4, 16)  # a tile of 32 rows, of 2 heads to a KV head
    tables = {tuple(call["inputs"][3][0].tolist()) for name, call in device.calls if name == "paged_decode"}
    assert {len(table) for table in tables} == {33, 257} and len(tables) == 3 + 1
    assert all(table[-1] - table[0] == len(table) - 1 for table in tables)


def test_costs_are_told_from_times_of_short_and_long_prefixes(
    device: FakeDevice, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kind = load(tiny_model("llama", num_hidden_layers=1))

    def seconds(kind: LayerKind, pool: Any, regions: list[AttentionMetadata]) -> float:
        num_keys, num_seqs = int(regions[0].context_lens[0]) - 1, len(regions[0].context_lens)
        costs = kind.backend.found.costs[kind.shape]
        is_shared = costs.start == 0
        return (30 + (num_keys * 0.5 + 25 if is_shared else num_seqs * num_keys * 0.125)) * 1e-6

    monkeypatch.setattr(sharing_costs, "_seconds", seconds)
    monkeypatch.setattr(sharing_costs, "_BYTES", 1)
    found = sharing_costs.measure_costs(kind, 16)
    assert found[:3] == pytest.approx((0.125, 0.5, 25.0)) and found.unit == "us"


def test_noise_makes_no_cost_negative(
    device: FakeDevice, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, kind = load(tiny_model("llama", num_hidden_layers=1))
    times = iter([5e-6, 4e-6, 3e-6, 2e-6])
    monkeypatch.setattr(sharing_costs, "_seconds", lambda *_: next(times))
    monkeypatch.setattr(sharing_costs, "_BYTES", 1)
    assert min(sharing_costs.measure_costs(kind, 16)[:3]) == 0


def test_what_was_chosen_is_told_with_what_it_follows_from(device: FakeDevice, tiny_model: Callable[..., Any]) -> None:
    llm, kind = load(tiny_model("llama"))
    assert llm.describe_shared_prefixes() == [
        "shared prefixes in attention layers 0, 1, 2: computed once for 8 or more sequences of 1,024 tokens, for 8 or "
        "more sequences of 8,192 tokens: a key counts as much for each sequence as for each tile of 32 queries and "
        "heads, another launch and merging as 512 keys, assumed without a GPU"
    ]
    kind.backend.found.costs[kind.shape] = SharingCosts(0.01, 0.05, 25.0, "us")
    (line,) = llm.describe_shared_prefixes()
    assert line == (
        "shared prefixes in attention layers 0, 1, 2: computed once for 8 or more sequences of 1,024 tokens, for 8 or "
        "more sequences of 8,192 tokens: a key takes 10.00 ns for each sequence, 50.00 ns for each tile of 32 queries "
        "and heads, another launch and merging 25 us, measured at load"
    )
    kind.backend.found.costs[kind.shape] = SharingCosts(0.01, 1.0, 25.0, "us")
    (line,) = llm.describe_shared_prefixes()
    assert line.startswith("shared prefixes in attention layers 0, 1, 2: hardly ever computed once: a key takes")


def test_layers_that_never_share_say_why(device: FakeDevice, tiny_model: Callable[..., Any]) -> None:
    llm = LLM.from_model(tiny_model("gpt_oss"), num_kv_blocks=8, pipelining="off")
    windows, _ = sorted(llm.describe_shared_prefixes())
    assert windows.endswith(" layers 0, 2: read by each sequence, since these layers have a window")
    model = tiny_model("llama", num_attention_heads=17, num_key_value_heads=1, head_dim=8)
    (heads,) = LLM.from_model(model, num_kv_blocks=8, pipelining="off").describe_shared_prefixes()
    assert heads.endswith(
        ": read by each sequence, since these layers have too many heads to a KV head, or too long ones"
    )


def test_blocks_of_a_trial_lie_where_they_are_said_to() -> None:
    metadata = TrialStep(2, 1, 33, 32).metadata(16, 5)
    assert metadata.block_tables.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0]] * 2
    assert TrialStep(1, 3, 9).metadata(16).block_tables.tolist() == [[0] * 8]
