"""Engines that search, and what their searches should find without a cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from helpers.beam_oracle import OracleResult, dense_beam_search, unpaged_logprobs
from helpers.tiny_models import VOCAB_SIZE, make_model
from mlx_paged import LLM, BeamSearchParams
from mlx_paged.engine.engine import Engine
from mlx_paged.outputs import BeamSearchOutput

EARLY_STOPPING = (False, True, "never")
NEAR_TIE = 1e-4  # where a decision of the oracle is closer than this, either outcome is right
FAMILIES = ("llama", "qwen2", "gemma3_text")
PROMPTS = [np.random.default_rng(length).integers(1, VOCAB_SIZE, length).tolist() for length in (5, 8, 13, 30)]


class EndTokens:
    """All that beam search needs of a tokenizer: which tokens end a text, and no text."""

    bos_token = None
    has_chat_template = False

    def __init__(self, eos_token_ids: list[int]) -> None:
        self.eos_token_ids = set(eos_token_ids)
        self.all_special_ids = eos_token_ids

    def __len__(self) -> int:
        return VOCAB_SIZE

    def convert_tokens_to_ids(self, piece: str) -> None:
        return None

    def decode(self, token_ids: list[int], **options: bool) -> str:
        return ""


class Lab:
    """A tiny model sure enough of itself for searches to end in all manners, and its results without a cache."""

    def __init__(self, family: str) -> None:
        layers = {"num_hidden_layers": 3 if family == "gemma3_text" else 2}
        windows = {"sliding_window": 7} if family == "gemma3_text" else {}
        self.model = make_model(family, seed=1, **layers, **windows)
        self.model.model.norm.weight *= 2.0
        self._tables = [unpaged_logprobs(self.model, prompt) for prompt in PROMPTS]
        outputs = [dense_beam_search(tables, BeamSearchParams(4, 8), []).sequences for tables in self._tables]
        counts = np.bincount([t for found in outputs for s in found for t in s[0][1:]], minlength=VOCAB_SIZE)
        self.common = np.argsort(-counts, kind="stable").tolist()
        self.num_compared = self.num_near_ties = 0

    def engine(self, eos: list[int] | None = None, **config: Any) -> Engine:
        settings = {"block_size": 4, "num_kv_blocks": 400, "max_num_seqs": 16, "check_invariants": True} | config
        return LLM.from_model(self.model, EndTokens(eos) if eos else None, **settings).engine

    def compare(self, output: BeamSearchOutput, params: BeamSearchParams, eos: list[int] | None = None) -> None:
        tables = self._tables[PROMPTS.index(output.prompt_token_ids)]
        expected = dense_beam_search(tables, params, eos or [])
        self.num_compared += 1
        if expected.margin < NEAR_TIE:
            self.num_near_ties += 1
            return
        assert_same(output, expected)


@cache
def lab_of(family: str) -> Lab:
    return Lab(family)


def assert_same(output: BeamSearchOutput, expected: OracleResult) -> None:
    """The same sequences in the same order, but for the order of scores that are nearly equal."""
    found = [(one.token_ids, one.cum_logprob, one.score) for one in output.sequences]
    assert sorted(tokens for tokens, _, _ in found) == sorted(tokens for tokens, _, _ in expected.sequences)
    for (tokens, cum_logprob, score), (other, _, other_score) in zip(found, expected.sequences, strict=True):
        twin = next(each for each in expected.sequences if each[0] == tokens)
        assert (cum_logprob, score) == pytest.approx(twin[1:], abs=1e-3)
        assert tokens == other or abs(score - other_score) < NEAR_TIE


def run(engine: Engine, most_steps: int = 3000) -> dict[int, Any]:
    """Step until nothing is left; the finished outputs by request id."""
    finished = {}
    for _ in range(most_steps):
        if not engine.has_unfinished():
            assert is_idle(engine)
            return finished
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    raise AssertionError("the engine does not come to an end")


def is_idle(engine: Engine) -> bool:
    """Nothing is held, once a step too many has been looked at."""
    nothing, stats = engine.step(), engine.stats()
    return (
        nothing == []
        and stats.num_free_blocks == stats.num_blocks
        and engine.block_manager.seq_ids == []
        and engine._scheduler._num_reserved_rows == 0
        and engine._in_flight is None
    )


def search(engine: Engine, prompt: list[int], params: BeamSearchParams) -> BeamSearchOutput:
    request_id = engine.add_request(prompt, params)
    output = run(engine)[request_id]
    assert isinstance(output, BeamSearchOutput) and output.error is None and not output.aborted
    return output
