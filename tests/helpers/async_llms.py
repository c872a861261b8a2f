"""An AsyncLLM over a tiny model, in an event loop whose hanging fails; and a look at the threads it leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import pytest

from helpers.tiny_models import make_model
from mlx_paged import LLM, SamplingParams
from mlx_paged.outputs import EngineStats, RequestOutput

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=150)


def load(tokenizer: Any = None, **config: Any) -> LLM:
    """A tiny random model in blocks of 4 that verifies itself after every step; always the same one."""
    model = make_model("llama", **SMALL, **({"vocab_size": len(tokenizer)} if tokenizer else {}))
    config = {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8, "check_invariants": True} | config
    return LLM.from_model(model, tokenizer, **config)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """asyncio.run, where a hang fails instead of lasting."""

    async def limited() -> Any:
        async with asyncio.timeout(120):
            return await main

    return asyncio.run(limited())


async def collect(stream: AsyncIterator[RequestOutput]) -> list[list[int]]:
    """The token ids of each sample of a stream, put together."""
    samples: dict[int, list[int]] = {}
    async for output in stream:
        for sample in output.outputs:
            samples.setdefault(sample.index, []).extend(sample.token_ids)
    return list(samples.values())


def all_free(stats: EngineStats) -> bool:
    return stats.num_free_blocks == stats.num_blocks


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlx-paged engine"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = engine_threads()  # of a server that lives longer than one test
    yield
    left = [thread for thread in engine_threads() if thread not in before]
    for thread in left:  # one that a finalizer has just asked to end
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in left)
