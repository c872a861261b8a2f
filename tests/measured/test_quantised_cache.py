"""What a quantised cache costs: a run measures all kinds; what is committed keeps to the bounds that pages claim."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.budget import LONG
from helpers.run_benchmark import RESULTS, check_machine, run_benchmark

from mlx_paged.config import KV_CACHE_DTYPES

KINDS = ("plain", *KV_CACHE_DTYPES)


def quality_of(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows by kind. Fails unless they are complete, and plain ones compared with themselves are equal."""
    check_machine(content, "quantised_cache.py", "mlx_lm", "model", "text")
    rows = {row["kv_cache_dtype"]: row for row in content["results"]["quality"]}
    assert tuple(rows) == KINDS
    assert (rows["plain"]["ratio"], rows["plain"]["kl"], rows["plain"]["equal_greedy"]) == (1, 0, 1)
    assert all(row["kl"] > 0 and math.isfinite(row["perplexity"]) for kind, row in rows.items() if kind != "plain")
    return rows


@pytest.mark.skipif(not LONG, reason="takes long: MLX_PAGED_LONG_TESTS=1 runs it")
@pytest.mark.slow
def test_a_quick_run_reads_and_continues_a_text_with_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    run_benchmark("--quick", "--json", file, script="quantised_cache.py")
    content = json.loads(file.read_text())
    quality_of(content)
    assert len(content["results"]["speed"]) == 2 * len(KINDS) + 2


@pytest.mark.parametrize(
    ("model", "limits"),
    [
        ("smollm2", {"int8": 1.005, "k8v4": 1.03, "fp8": 1.02}),
        ("gemma3", {"int8": 1.01, "k8v4": 1.05, "fp8": 1.02}),
    ],
)
def test_perplexity_over_900_tokens_of_prose_is_within_its_bounds(model: str, limits: dict[str, float]) -> None:
    rows = quality_of(json.loads((RESULTS / f"quantised-cache-{model}-linux-cpu.json").read_text()))
    for kind, limit in limits.items():
        assert rows[kind]["tokens"] == 900
        assert rows[kind]["ratio"] <= limit


def test_the_committed_runs_took_the_memory_that_codes_and_scales_add_up_to() -> None:
    content = json.loads((RESULTS / "quantised-cache-speed-linux-cpu.json").read_text())
    check_machine(content, "quantised_cache.py", "mlx_lm", "model", "text")
    rows = {row["system"]: row["kv_bytes"] for row in content["results"]["speed"]}
    plain = rows["mlx-paged, 1 at once, plain"]
    assert plain / rows["mlx-paged, 1 at once, int8"] == 512 / 144
    assert plain / rows["mlx-paged, 1 at once, k8v4"] == 512 / 120
    assert plain / rows["mlx-paged, 1 at once, fp8"] == 512 / 136
