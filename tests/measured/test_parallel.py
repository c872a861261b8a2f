"""What ranks tell each other: the committed run's messages and bytes are those that the shape's arithmetic gives."""

from __future__ import annotations

import json

from helpers.run_benchmark import RESULTS, check_machine

LAYERS, ROW, TOLD = 6, 4 * 512, 4 * 512  # bytes of a token's row in float32, and of what rank 0 tells at once


def test_the_committed_run_tells_what_the_shape_needs() -> None:
    content = json.loads((RESULTS / "parallel-linux-cpu.json").read_text())
    check_machine(content, "parallel.py")
    rows = content["results"]["steps"]
    assert [(row["ranks"], row["batch"]) for row in rows] == [
        (ranks, batch) for ranks in ("1", "2 (tensor)", "2 (pipeline)") for batch in (1, 16)
    ]
    for row in rows:
        told = {"1": 0, "2 (tensor)": 2 * LAYERS, "2 (pipeline)": 2}[row["ranks"]]
        assert row["messages"] == (told and told + 2)
        assert row["bytes"] == (told and TOLD + row["batch"] * (4 + told * ROW))
        assert row["share"] == (row["alone_ms"] / row["step_ms"])
