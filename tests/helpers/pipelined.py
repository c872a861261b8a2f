"""Engines whose steps overlap, and what is left in one that has nothing to do."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from mlx_paged import LLM
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import BeamSearchOutput, RequestOutput

END = 4  # the demo tokenizer's end token
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
OVERLAPPING = ("build", "submit")
MEGABYTE = 1 << 20
Output = RequestOutput | BeamSearchOutput


def make_engine(model: nn.Module, tokenizer: Any = None, **config: Any) -> Engine:
    settings = {"block_size": 4, "num_kv_blocks": 200, "max_num_seqs": 16, "check_invariants": True}
    return LLM.from_model(model, tokenizer, **(settings | config)).engine


def run(engine: Engine) -> list[Output]:
    """Step until nothing is left; everything that was handed out."""
    outputs = []
    for _ in range(1000):
        if not engine.has_unfinished():
            return outputs
        outputs += engine.step()
    raise AssertionError("the engine does not come to an end")


def assert_idle(engine: Engine) -> None:
    """Nothing is held, of tokens, rows or blocks; and another step does nothing."""
    assert engine.step() == []
    stats = engine.stats()
    assert (stats.num_free_blocks, stats.kv_tokens) == (stats.num_blocks, 0)
    assert engine.block_manager.seq_ids == []
    assert engine._batch.sequences == [None] * engine.config.max_num_seqs
    assert engine._scheduler._num_reserved_rows == 0
    assert engine._in_flight is None and engine._steps.unfinished == []
