"""States of recurrent layers in whole engines, exactly: a hash of all tokens in the place of the recurrence."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from helpers.beam_lab import EndTokens
from helpers.beam_oracle import dense_beam_search
from helpers.budget import budget
from helpers.hash_model import NUM_TOP, HashModel, expect_right_states, expected_logprobs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_paged import LLM, BeamSearchParams, SamplingParams
from mlx_paged.cache import block_store
from mlx_paged.cache.block_files import SUFFIX
from mlx_paged.cache.block_mover import BlockMover
from mlx_paged.cache.block_store import BlockStores, FolderStore, MemoryStore
from mlx_paged.engine import engine
from mlx_paged.errors import EngineWarning
from mlx_paged.outputs import BeamSearchOutput, Output

PICK = st.integers(0, 1 << 16)
END_TOKENS = [5, 11, 50, 70]
INTERVAL = "mlx_paged.runner.stretches.MAX_DECODE_INTERVAL"


class HashMachine(RuleBasedStateMachine):
    """Random requests in random steps, of an engine with few blocks, few checkpoints and few tokens a step."""

    @initialize(
        block_size=st.integers(1, 4),
        num_tokens=st.integers(40, 200),
        batch=st.sampled_from([2, 3, 7, 16, 64]),
        num_seqs=st.integers(2, 6),
        num_checkpoints=st.sampled_from([1, 2, 5, 40]),
        interval=st.integers(3, 9),
        pipelining=st.sampled_from(["submit", "build", "off"]),
        stores_keys=st.booleans(),
        swap=st.sampled_from([None, "files", "files", "memory"]),
        most_swapped=st.sampled_from([400, 3_000, 10**6]),
        saves=st.booleans(),
    )
    def start(
        self, block_size: int, num_tokens: int, batch: int, num_seqs: int, num_checkpoints: int, interval: int,
        pipelining: str, stores_keys: bool, swap: str | None, most_swapped: int, saves: bool,
    ) -> None:  # fmt: skip
        self.stack = ExitStack()
        self.stack.enter_context(patch(INTERVAL, interval))
        self.stack.enter_context(warnings.catch_warnings(action="ignore", category=EngineWarning))
        model = HashModel(stores_keys=stores_keys)
        options: dict[str, Any] = {"block_size": block_size, "max_num_seqs": num_seqs, "pipelining": pipelining}
        options |= {"num_kv_blocks": -(-num_tokens // block_size), "max_num_batched_tokens": batch}
        self.stack.enter_context(patch.object(BlockMover, "round_trip_s", None))  # storing pays, always
        if swap == "memory":  # as where the device has its own
            self.stack.enter_context(patch.object(block_store, "_open_swap", lambda _: MemoryStore(most_swapped)))
        self.folder = Path(self.stack.enter_context(TemporaryDirectory()))
        options |= {"swap_space": most_swapped} if swap else {}
        options |= {"prefix_cache_dir": self.folder / "saved"} if saves else {}
        self.num_checkpoints, self.most_tokens = num_checkpoints, num_tokens * 2 // 3
        self.histories: list[list[int]] = [[0]]
        self.asked: dict[int, tuple[list[int], SamplingParams | BeamSearchParams]] = {}
        self.make = lambda: LLM.from_model(model, EndTokens(END_TOKENS), check_invariants=True, **options)
        self.restart()

    @precondition(lambda self: not self.asked)
    @rule()
    def restart(self) -> None:
        """Another process begins: what was saved is what there is."""
        self.stores: BlockStores | None = None
        with patch.object(engine, "open_stores", self.open_stores):
            llm = self.make()
        self.engine, self.states = llm.engine, llm._runner.states
        assert self.engine.cache_groups.checkpoints is not None
        self.checkpoints = self.engine.cache_groups.checkpoints
        self.checkpoints._capacity = self.num_checkpoints

    def open_stores(self, *args: Any) -> BlockStores | None:
        self.stores = block_store.open_stores(*args)
        return self.stores

    @rule(
        latest=st.integers(1, 5), left_out=st.sampled_from([0, 0, 1, 3, 8]), num_outputs=st.integers(1, 20),
        more=st.lists(st.integers(0, 2), min_size=1, max_size=9), n=st.sampled_from([1, 1, 2, 4]),
        kind=st.sampled_from(["greedy", "greedy", "sampled", "beams"]), salt=st.sampled_from([None, None, None, "a"]),
    )  # fmt: skip
    def ask(
        self, latest: int, left_out: int, num_outputs: int, more: list[int], n: int, kind: str, salt: str | None
    ) -> None:
        """Go on from one of the latest prompts with their answers, perhaps without its last tokens."""
        before = self.histories[-min(latest, len(self.histories))]
        prompt = before[: max(0, min(len(before) - left_out, self.most_tokens - len(more)))] + more
        params: SamplingParams | BeamSearchParams
        if kind == "beams":
            width = min(n, self.engine.config.max_num_seqs, 2)
            params = BeamSearchParams(beam_width=width, max_tokens=num_outputs, cache_salt=salt)
        else:
            temperature = 1.0 if kind == "sampled" else 0.0
            params = SamplingParams(
                temperature=temperature, n=n, max_tokens=num_outputs, logprobs=NUM_TOP, cache_salt=salt
            )
        try:
            self.asked[self.engine.add_request(prompt, params)] = prompt, params
        except ValueError:  # more than the pool has room for
            return
        self.histories.append(prompt)

    @precondition(lambda self: self.engine.has_unfinished())
    @rule(num_steps=st.integers(1, 25))
    def go_on(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for output in self.engine.step():
                self.take(output)

    @precondition(lambda self: self.asked)
    @rule(pick=PICK)
    def abort(self, pick: int) -> None:
        request_id = sorted(self.asked)[pick % len(self.asked)]
        output = self.engine.abort(request_id)
        if output is not None:
            self.take(output)
        else:
            del self.asked[request_id]

    @precondition(lambda self: self.engine._scheduler.running)
    @rule(pick=PICK)
    def preempt(self, pick: int) -> None:
        self.engine._receive(self.engine._in_flight)
        running = self.engine._scheduler.running
        if running:
            self.engine._scheduler.preempt(running[pick % len(running)])

    @rule(after=st.booleans(), one_of_six=st.integers(0, 5))
    def let_the_next_step_fail(self, after: bool, one_of_six: int) -> None:
        if one_of_six:
            return
        run, inner = self.engine._runner.run, type(self.engine._runner).run.__get__(self.engine._runner)

        def fail(inputs: Any) -> None:
            self.engine._runner.run = inner  # type: ignore[method-assign]
            if after:
                run(inputs)
            raise RuntimeError("the device is gone")

        self.engine._runner.run = fail  # type: ignore[method-assign,assignment]

    @precondition(lambda self: self.stores is not None and self.stores._disk is not None)
    @rule(pick=PICK, how=st.sampled_from(["cut", "changed", "gone", "other"]), kind=st.sampled_from(["state", "0"]))
    def something_happens_to_a_saved_file(self, pick: int, how: str, kind: str) -> None:
        assert self.stores is not None and isinstance(self.stores._disk, FolderStore)
        found = sorted(self.stores._disk._folder.glob(f"{kind}-*{SUFFIX}"))
        if not found:
            return
        path = found[pick % len(found)]
        whole, other = path.read_bytes(), found[0].read_bytes()
        changed = {"cut": whole[: pick % (len(whole) + 1)], "other": other, "changed": whole[:-1] + b"?"}
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(changed[how])

    @invariant()
    def what_is_swapped_takes_what_is_counted(self) -> None:
        swap = self.stores._swap if hasattr(self, "stores") and self.stores is not None else None
        if isinstance(swap, MemoryStore):
            held = sum(sum(raw.nbytes for raw, _ in each.values()) or 256 for each in swap._blocks.values())
            assert held == swap._capacity - swap._bytes_available <= swap._capacity
        elif isinstance(swap, FolderStore):
            files = {path.stem: path.stat().st_size for path in swap._folder.glob(f"*{SUFFIX}")}
            assert files.keys() == swap._keys
            assert sum(files.values()) == swap._files._num_bytes <= (swap._files._capacity or 0)

    @invariant()
    def every_checkpoint_has_its_state(self) -> None:
        if hasattr(self, "states"):
            assert self.states is not None
            # What was loaded without a place for it has a name of its own for as long as the step is under way.
            others = {*self.states._checkpoints} - {*self.checkpoints._last_used}
            assert (
                len(others) == len(self.states._checkpoints) - len(self.checkpoints) <= self.engine.config.max_num_seqs
            )
            assert len(self.checkpoints) + len(self.states._latest) <= self.checkpoints._capacity

    def take(self, output: Output) -> None:
        assert output.finished
        prompt, params = self.asked.pop(output.request_id)
        if isinstance(output, BeamSearchOutput):
            assert isinstance(params, BeamSearchParams)
            if output.error is not None or output.aborted:
                assert output.aborted or "the device is gone" in str(output.error)
                return
            oracle = dense_beam_search(
                lambda outputs: np.stack([expected_logprobs([*prompt, *each]) for each in outputs]), params, END_TOKENS
            )
            if oracle.margin > 1e-3:
                assert [each.token_ids for each in output.sequences] == [each[0] for each in oracle.sequences]
            return
        assert isinstance(params, SamplingParams)
        for sample in output.outputs:
            failed = sample.finish_reason == "error" and "the device is gone" in str(sample.stop_reason)
            assert failed or sample.finish_reason in ("stop", "length", "abort"), sample.stop_reason
            expect_right_states(prompt, sample, is_greedy=params.temperature == 0)
            self.histories.append(prompt + sample.token_ids)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_unfinished():
                break
            self.go_on(1)
        assert not self.asked
        assert self.states is not None and not self.states._places and not self.states._latest
        assert not self.checkpoints._plans
        if self.checkpoints.stored is not None:
            assert not self.checkpoints.stored._parked and not self.checkpoints.stored._returning
            assert not any(key.startswith("sequence-") for key in self.swapped())
        self.stack.close()

    def swapped(self) -> list[str]:
        """The keys of what is in swap."""
        swap = None if self.stores is None else self.stores._swap
        assert swap is None or isinstance(swap, MemoryStore | FolderStore)
        return [*(() if swap is None else swap._blocks if isinstance(swap, MemoryStore) else swap._keys)]


HashMachine.TestCase.settings = settings(max_examples=budget(25, 5000), stateful_step_count=30, deadline=None)
test_every_token_is_chosen_by_the_state_after_all_tokens_before_it = HashMachine.TestCase
