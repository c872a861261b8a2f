"""A process with an AsyncLLM ends cleanly in whatever state it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.budget import LONG, budget

import mlx_paged

PROCESS = """
import asyncio, signal, sys, threading
from mlx_paged import LLM, AsyncLLM, SamplingParams
from helpers.tiny_models import make_model

state = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)

def load():
    model = make_model("llama", num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    return LLM.from_model(model, block_size=4, num_kv_blocks=256)

async def finished(llm):
    async for _ in llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=5)):
        pass

async def begun(llm):
    stream = llm.generate([4, 5, 6], LONG)
    await anext(stream)
    return stream

async def main():
    llm = AsyncLLM.from_loader(load)
    if state == "finished":
        await finished(llm)
        await llm.aclose()
    elif state == "middle":
        stream = await begun(llm)
    elif state == "not closed":
        await finished(llm)
    elif state == "closed in the middle":
        stream = await begun(llm)
        llm.close()
    elif state == "exception":
        await begun(llm)
        raise ValueError("on purpose")
    elif state == "exit":
        stream = await begun(llm)
        sys.exit(3)
    elif state == "interrupted":
        stream = await begun(llm)
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

if state == "never used":
    llm = AsyncLLM.from_loader(load)
elif state == "loop left behind":
    llm = AsyncLLM.from_loader(load)
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(begun(llm))
elif state == "another thread's":
    thread = threading.Thread(target=lambda: asyncio.run(begun(AsyncLLM.from_loader(load))))
    thread.start()
elif state == "load error":
    try:
        AsyncLLM.from_loader(lambda: (load(), 1 / 0))
    except ZeroDivisionError:
        pass
elif state == "several":
    llms = [AsyncLLM.from_loader(load) for _ in range(3)]
    for llm in llms:
        asyncio.run(finished(llm))
    llms[0].close()
    streams = asyncio.run(begun(llms[1]))
else:
    asyncio.run(main())
"""
EXPECTED_ENDS = {
    "finished": (0, ""),
    "middle": (0, ""),
    "never used": (0, ""),
    "not closed": (0, ""),
    "closed in the middle": (0, ""),
    "exception": (1, "ValueError: on purpose"),
    "exit": (3, ""),
    "interrupted": (-2, "KeyboardInterrupt"),
    "loop left behind": (0, ""),
    "another thread's": (0, ""),
    "load error": (0, ""),
    "several": (0, ""),
}
WITH_MOST_ALIVE = ("middle", "interrupted", "another thread's", "load error")  # in every run: a process takes seconds


def end_of_process(state: str) -> tuple[int, str]:
    """Exit code and the last line of stderr of a process that ends in a state."""
    roots = [str(Path(__file__).parent), str(Path(next(iter(mlx_paged.__path__))).parent)]
    path = os.pathsep.join(filter(None, [*roots, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, state], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    return result.returncode, "" if not result.stderr else result.stderr.splitlines()[-1]


@pytest.mark.parametrize("state", EXPECTED_ENDS if LONG else WITH_MOST_ALIVE)
def test_a_process_ends_cleanly(state: str) -> None:
    for _ in range(budget(1, 10)):
        assert end_of_process(state) == EXPECTED_ENDS[state]
