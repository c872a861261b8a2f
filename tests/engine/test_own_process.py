"""What a forked child is told that inherits an LLM: it can't be used there, and nothing hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_paged

PROCESS = """
import asyncio, os, sys
from mlx_paged import LLM, AsyncLLM, SamplingParams
from helpers.tiny_models import make_model

def load():
    model = make_model("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=48)
    return LLM.from_model(model, block_size=4, num_kv_blocks=16)

async def first(llm):
    async for output in llm.generate([1, 2, 3], SamplingParams(max_tokens=5)):
        return output

kind, calls = sys.argv[1], []
if kind == "LLM":
    llm = load()
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5))
    stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=50))
    next(stream)
    calls = [lambda: llm.generate([[1, 2, 3]]), llm.stats, llm.engine.compact, lambda: next(stream)]
else:
    llm = AsyncLLM.from_loader(load)
    asyncio.run(first(llm))
    calls = [lambda: asyncio.run(first(llm)), lambda: asyncio.run(llm.stats())]
sys.stdout.flush()
if os.fork():
    os.wait()
    answer = list(stream) if kind == "LLM" else asyncio.run(first(llm))
    print("parent:", "ok" if answer else "nothing")
    sys.exit()
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(str(error).replace(str(os.getppid()), "PARENT").replace(str(os.getpid()), "CHILD"))
"""
SAID = (
    "this engine was made in process PARENT and can't be used in its fork CHILD: make it in the process that uses it, "
    'or start processes with multiprocessing\'s "spawn"'
)


@pytest.mark.parametrize(("kind", "num_calls"), [("LLM", 4), ("AsyncLLM", 2)])
def test_a_fork_that_inherits_an_llm_is_told_so_and_the_parent_goes_on(kind: str, num_calls: int) -> None:
    roots = [str(Path(__file__).parents[1]), str(Path(next(iter(mlx_paged.__path__))).parent)]
    path = os.pathsep.join(filter(None, [*roots, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PROCESS, kind]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [SAID] * num_calls + ["parent: ok"]
