"""A model on several ranks: what it answers is what one process answers, and what can't be is told in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import rank_program
from helpers.budget import budget
from helpers.rank_program import CASES, answers, make_llm, soak
from helpers.tiny_models import make_model

from mlx_paged import LLM, EngineConfig, ModelError
from mlx_paged.distributed.launch import free_ports
from mlx_paged.distributed.ranks import Message, Ranks
from mlx_paged.distributed.shard import shard_layers, shard_tensors
from mlx_paged.errors import LostRanks
from mlx_paged.runner import follower
from mlx_paged.runner.rank_runner import _end

QUICK = ["llama", "qwen2 by layers"]


class OneOf(Ranks):
    """A rank whose others are made up: what they say, and what is summed up with what this one says."""

    def __init__(self, rank: int, size: int = 2, said: Sequence[str] = ()) -> None:
        super().__init__(SimpleNamespace(rank=lambda: rank, size=lambda: size))
        self.said, self.sums = said, list[mx.array]()

    def gather(self, text: str) -> list[str]:
        return [text, *self.said]

    def share(self, array: mx.array) -> mx.array:
        if self.rank:
            return self.sums.pop(0)
        self.sums.append(array)
        return array


@pytest.mark.parametrize(
    "names",
    [
        *(
            pytest.param(names, id=size, marks=pytest.mark.slow)
            for size, names in {
                "two": QUICK,
                "two, other families": [n for n in CASES if CASES[n][0] == 2 and n not in QUICK],
                "three": ["SmolLM2's heads"],
                "four": [n for n in CASES if CASES[n][0] == 4],
            }.items()
        ),
    ],
)
def test_ranks_that_mlx_launch_starts_answer_as_one_process_does(names: list[str], tmp_path: Path) -> None:
    found = run_program(CASES[names[0]][0], tmp_path / "found", *names)
    for name in names:
        memory = found[name].pop("memory").splitlines()
        assert [line.startswith(f"rank {rank} on ") for rank, line in enumerate(memory)] == [True] * CASES[name][0]
        alone = make_llm(name, alone=True)
        expected = json.loads(json.dumps(answers(alone)))
        for kind, values in expected.items():
            assert_close(found[name][kind], values, f"{name}: {kind}")
    preempts = any(found[name]["counts"][0] for name in names)
    assert preempts == any(CASES[name][3].get("num_kv_blocks") for name in names)


@pytest.mark.slow
def test_requests_that_come_end_and_are_given_up_leave_no_block_and_have_the_tokens_of_one_process(
    tmp_path: Path,
) -> None:
    count = budget(60, 500)
    found = run_program(2, tmp_path / "found", str(count), "llama")["llama"]
    alone = soak(make_llm("llama", alone=True), count)
    assert found["ends"] == alone["ends"] == [True, True]
    ended = found["tokens"].keys() & alone["tokens"].keys()  # when one is given up depends on how steps overlap
    assert len(ended) > count // 2
    assert {each: found["tokens"][each] for each in ended} == {each: alone["tokens"][each] for each in ended}


def run_program(size: int, file: Path, *arguments: str) -> Any:
    """What the program of `rank_program.py` finds on so many ranks."""
    launch = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
    launch += ["-n", str(size), "--backend", "ring"]
    program = [sys.executable, str(Path(rank_program.__file__)), str(file), *arguments]
    command = [*launch, "--starting-port", str(free_ports(size)), "--", *program]
    stdin, writer = os.pipe()  # that stays open: mlx.launch would look at one that has ended all the time
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, stdin=stdin)
    os.close(stdin)
    os.close(writer)
    assert file.exists(), ended.stderr[-3000:]
    return json.loads(file.read_text())


def assert_close(found: Any, expected: Any, where: str) -> None:
    """Tokens and counts are the same, log-probabilities nearly."""
    if isinstance(expected, list):
        assert len(found) == len(expected), where
        for pair in zip(found, expected, strict=True):
            assert_close(*pair, where)
    else:
        assert found == (pytest.approx(expected, abs=1e-3) if isinstance(expected, float) else expected), where


def test_a_program_that_was_started_alone_is_told_how_to_start_it() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 takes 2 .* there is one: .*mlx\.launch -n 2 python"):
        LLM.from_model(make_model("llama"), tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be a whole number of at least 1"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "not both"),
        ({"tensor_parallel_size": 2, "swap_space": "1GB"}, "swap_space can't be used with tensor_parallel_size"),
        ({"pipeline_parallel_size": 2, "prefix_cache_dir": "x"}, "prefix_cache_dir can't .* pipeline_parallel_size"),
        ({"tensor_parallel_size": 2, "adapter_path": "x"}, "adapter_path can't be used with tensor_parallel_size"),
    ],
)
def test_what_ranks_cannot_do_is_refused_by_its_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "message"),
    [
        (2, 9, 3, "9 query heads and 3 KV heads, which 2 ranks .* tensor_parallel_size 3 or 9 would do"),
        (4, 8, 3, "8 query heads and 3 KV heads, which 4 ranks .* it has to run on one"),
        (8, 4, 2, "4 query heads and 2 KV heads, which 8 ranks .* tensor_parallel_size 2 or 4 would do"),
    ],
)
def test_heads_that_ranks_cannot_share_are_counted(size: int, heads: int, kv_heads: int, message: str) -> None:
    shape = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    with pytest.raises(ModelError, match=message):
        shard_tensors(make_model("llama", **shape), OneOf(0, size))


def test_a_family_that_mlx_lm_does_not_divide_is_named() -> None:
    with pytest.raises(ModelError, match="mlx-lm does not divide mixtral by heads"):
        shard_tensors(make_model("mixtral"), OneOf(0))
    with pytest.raises(ModelError, match="mlx-lm does not divide llama by layers"):
        shard_layers(make_model("llama"), OneOf(0))
    with pytest.raises(ModelError, match="pipeline_parallel_size=4 is more than the 3 layers of qwen2"):
        shard_layers(make_model("qwen2"), OneOf(0, 4))


def test_ranks_that_are_not_alike_are_told_what_differs_and_where() -> None:
    ranks = OneOf(0, said=[json.dumps({"host": "mac2", "mlx": "0.1", "mlx-lm": "7"})])
    with pytest.raises(ValueError, match=r"mlx is 0\.2 on rank 0 on .*, and 0\.1 on rank 1 on mac2"):
        ranks.compare({"mlx": "0.2", "mlx-lm": "7"})
    OneOf(0, said=[json.dumps({"host": "mac2", "mlx": "0.2"})]).compare({"mlx": "0.2"})


@pytest.mark.parametrize("length", [0, 1, 505, 506, 507, 508, 600, 5000])
def test_what_rank_0_tells_arrives_however_long_it_is(length: int) -> None:
    told = [np.arange(length, dtype=np.int32), np.array([[-7, 1 << 30]], np.int32), np.zeros(0, np.int32)]
    leader, other = OneOf(0), OneOf(1)
    leader.tell(Message.STEP, *told)
    assert leader.num_messages == len(leader.sums) <= 2
    assert leader.num_bytes == sum(each.nbytes for each in leader.sums)
    other.sums = leader.sums
    kind, arrays = other.listen(is_resting=False)
    assert kind is Message.STEP
    assert [each.tolist() for each in arrays] == [each.reshape(-1).tolist() for each in told]
    assert not other.sums


def test_ranks_that_were_told_nothing_yet_are_told_of_the_end() -> None:
    leader, other = OneOf(0), OneOf(1)
    _end(leader)
    other.sums = leader.sums
    assert other.listen(is_resting=False) == (Message.END, [])


def test_zeros_are_what_mlx_s_ring_gives_of_a_rank_that_has_gone() -> None:
    other = OneOf(1)
    other.sums = [mx.zeros(512, mx.int32)]
    with pytest.raises(LostRanks, match="another rank has gone"):
        other.listen(is_resting=False)


def test_a_second_llm_of_a_program_s_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = SimpleNamespace(is_heard=True)
    monkeypatch.setattr(follower, "LEADERS", [leader])
    with pytest.raises(ValueError, match="tensor_parallel_size=2: the ranks of this program follow another LLM, which"):
        LLM.from_model(make_model("llama"), tensor_parallel_size=2)
    leader.is_heard = False
    with pytest.raises(ValueError, match="takes 2 processes"):
        LLM.from_model(make_model("llama"), tensor_parallel_size=2)
    with pytest.raises(ValueError, match="the other ranks do not answer: a program's ranks end with the first LLM"):
        OneOf(0, said=[""]).compare({"mlx": "0.2"})
