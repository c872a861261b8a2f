"""What the host does in a step of decodes: counts of what is rebuilt, sent and called. Times are in the benchmarks."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_paged
from mlx_paged import SamplingParams
from mlx_paged.attention.metadata import ModelInputs
from mlx_paged.config import EngineConfig
from mlx_paged.engine.engine import Engine
from mlx_paged.runner.memory_plan import MemoryPlan

BLOCK_SIZE = 16
VOCAB_SIZE = 32
PRODUCT = str(Path(mlx_paged.__file__).parent)


class StubRunner:
    """In place of a ModelRunner: the same logits for every row, and a note of what it was given."""

    overlap_is_safe = True
    states = None
    kv_cache = SimpleNamespace(move_blocks=lambda moves, group: None, nbytes=0)
    vocab_size = VOCAB_SIZE

    def __init__(self, num_blocks: int) -> None:
        self.plan = MemoryPlan([num_blocks], [1], [None], BLOCK_SIZE, 0, 0, 0, "")
        self.steps: list[ModelInputs] = []

    def run(self, inputs: ModelInputs) -> mx.array:
        self.steps = [inputs]
        rows = inputs.token_ids if inputs.logits_indices is None else inputs.logits_indices
        return mx.zeros((rows.shape[0], VOCAB_SIZE))

    def rest(self) -> None:
        pass

    def reset(self, unfinished: Sequence[mx.array] = ()) -> None:
        pass

    def fingerprint(self) -> str:
        return ""


def params(number: int, max_tokens: int = 1000) -> SamplingParams:
    """Half of the requests are greedy, half are drawn."""
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": number} if number % 2 else {"temperature": 0}
    return SamplingParams(max_tokens=max_tokens, stop_token_ids=[VOCAB_SIZE - 1], logit_bias={31: -1e9}, **drawn)


def decoding(num_seqs: int, context: int = 1000, *, aligned: bool = False) -> Engine:
    """An engine in which `num_seqs` sequences decode.

    They share all blocks of their prompts but the last. aligned: their next blocks are all due at the same time;
    otherwise those of a sixteenth are due in each step.
    """
    shared = [3] * (context // BLOCK_SIZE * BLOCK_SIZE)
    config = EngineConfig(
        max_num_seqs=num_seqs + 1,
        max_num_batched_tokens=len(shared) + BLOCK_SIZE * num_seqs,
        num_kv_blocks=len(shared) // BLOCK_SIZE + 70 * num_seqs,
        block_size=BLOCK_SIZE,
    )
    runner: Any = StubRunner(config.num_kv_blocks or 0)
    engine = Engine(runner, None, config, None)
    engine.add_request([*shared, 1], params(0))
    engine.step()  # so that the others find its blocks
    for number in range(1, num_seqs):
        length = 2 if aligned else 2 + number % BLOCK_SIZE  # the first one has put out a token already
        engine.add_request([*shared, *[number % VOCAB_SIZE] * length], params(number))
    engine.step()
    for _ in range(4):
        engine.step()
    assert len(engine._scheduler.running) == num_seqs and not engine._batch.is_prefilling.any()
    return engine


def calls_of(engine: Engine, num_steps: int = 1) -> Counter[str]:
    """How often each Python function of the product is called in steps."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PRODUCT):
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(note)
    try:
        for _ in range(num_steps):
            engine.step()
    finally:
        sys.setprofile(None)
    return calls


def num_held(engine: Engine) -> int:
    return engine.block_manager.num_blocks - engine.block_manager.num_free_blocks


def skip_blocks(engine: Engine) -> None:
    """Step until no block is due for some steps, in an engine whose sequences are aligned."""
    before = num_held(engine)
    while num_held(engine) == before:
        engine.step()


def test_the_sampling_parameters_of_a_steady_batch_are_not_rebuilt() -> None:
    engine = decoding(256)
    before = engine._sampling._sampler.num_rebuilds
    for _ in range(40):
        engine.step()
    assert engine._sampling._sampler.num_rebuilds == before
    engine.add_request([1, 2], params(1))
    engine.step()
    engine.step()
    assert engine._sampling._sampler.num_rebuilds == before + 1


def test_a_step_sends_exactly_the_table_entries_of_its_new_blocks() -> None:
    engine = decoding(256)
    sent, held = engine._input_builder.num_sent_entries, num_held(engine)
    for _ in range(40):
        engine.step()
        new_sent, new_held = engine._input_builder.num_sent_entries, num_held(engine)
        assert new_sent - sent == new_held - held
        assert 15 <= new_sent - sent <= 17
        sent, held = new_sent, new_held


def test_a_request_that_joins_sends_its_own_entries_only() -> None:
    engine = decoding(64, aligned=True)
    skip_blocks(engine)
    before = engine._input_builder.num_sent_entries
    engine.add_request([5] * 100, params(1))
    engine.step()
    assert engine._input_builder.num_sent_entries - before == 7
    for _ in range(3):
        engine.step()
    assert engine._input_builder.num_sent_entries - before == 7


def test_the_devices_copy_of_the_block_tables_is_what_the_host_has() -> None:
    engine = decoding(64, context=100)
    for step in range(40):
        if step in (5, 20):
            engine.add_request([5] * 40, params(1, max_tokens=step))
        engine.step()
        manager = engine.block_manager
        (group,) = engine._runner.steps[-1].groups  # type: ignore[attr-defined]
        tables, contexts = np.array(group.block_tables), group.context_lens
        for sequence, table, context in zip(engine._scheduler.running, tables, contexts.tolist(), strict=True):
            used = -(-context // BLOCK_SIZE)
            assert table[:used].tolist() == manager.block_table(sequence.seq_id)[:used]


def test_nothing_is_asked_of_a_block_manager_when_no_block_is_due() -> None:
    engine = decoding(64, aligned=True)
    skip_blocks(engine)
    calls = calls_of(engine, 10)
    asked = {name for name in calls if name.startswith(("BlockManager.", "BlockAllocator.", "PrefixTree."))}
    assert asked <= {"BlockManager.num_free_blocks", "BlockAllocator.num_free"}  # for the peak


def test_the_functions_called_in_a_step_do_not_depend_on_the_number_of_sequences_or_their_contexts() -> None:
    per_step = []
    for num_seqs, context in ((64, 1000), (256, 1000), (64, 20_000)):
        engine = decoding(num_seqs, context, aligned=True)
        skip_blocks(engine)
        per_step.append(calls_of(engine, 10))
    assert per_step[0] == per_step[1] == per_step[2]
    assert per_step[0].total() < 10 * 100


@pytest.mark.parametrize("context", [1000, 20_000])
def test_the_arrays_of_a_step_are_as_long_as_the_batch(context: int) -> None:
    """But for the block tables, which are gathered on the device."""
    engine = decoding(64, context)
    engine.step()
    (inputs,) = engine._runner.steps  # type: ignore[attr-defined]
    (group,) = inputs.groups
    for array in (inputs.token_ids, inputs.positions, group.slot_block_ids, group.slot_offsets):
        assert array.shape == (64,)
    assert group.context_lens.shape == (64,) and group.cu_seqlens_q.shape == (65,)
    assert group.block_tables.shape[0] == 64


def test_all_new_blocks_of_a_step_are_taken_at_once_and_what_is_full_is_published_block_by_block() -> None:
    engine = decoding(256)
    before = num_held(engine)
    calls = calls_of(engine, 10)
    num_new = num_held(engine) - before
    assert calls["BlockManager.append_blocks"] == calls["BlockAllocator.allocate"] == 10
    assert calls["BlockManager.sync"] == calls["SequenceBlocks.publish"] == num_new > 100
    for name in ("append", "reserve", "attach", "block_table"):
        assert calls[f"BlockManager.{name}"] == 0


def test_only_blocks_that_are_due_make_a_step_call_more() -> None:
    few, many = (calls_of(decoding(num_seqs), 10) for num_seqs in (64, 256))
    more = {name for name in many if many[name] != few[name]}
    assert {name.split(".")[0] for name in more} <= {
        "BlockManager",
        "BlockAllocator",
        "SequenceBlocks",
        "PrefixTree",
        "PrefixNode",
    }


def test_stop_checks_look_at_no_sequence_that_goes_on() -> None:
    calls = calls_of(decoding(256), 20)
    assert calls["RunningBatch.append_tokens"] == 20
    assert calls["OutputProcessor._check_token"] == 0
