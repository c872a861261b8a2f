"""llama.cpp's server as a system of a comparison: a slot for each request at once, prompts as token ids, streams."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from served import LlamaCppServer, stream_json

from comparison.systems import Memory, RequestTimes, Run
from comparison.workloads import LlamaCpp, Task, one_by_one
from mlx_paged.outputs import RequestMetrics


class LlamaCppSystem:
    """The server, with room for the requests that it serves at once. Samples of a prompt are requests of their own."""

    def __init__(self, executable: str, gguf: Path, system: LlamaCpp, tasks: Sequence[Task]) -> None:
        self.system = system
        requests = one_by_one(tasks)
        slots = min(system.concurrency, len(requests))
        self._server = LlamaCppServer(executable, gguf, slots, max(task.longest for task in requests) + 1)
        weakref.finalize(self, self._server.close)

    def size_pool(self, tasks: Sequence[Task]) -> Memory:
        """Serve the tasks once, as the other systems do. What is empty of its memory is not told."""
        self.run(tasks)
        return Memory(peak_bytes=self._server.kv_bytes)

    def run(self, tasks: Sequence[Task]) -> Run:
        """Serve the tasks, and measure what that takes: the server's CPU time alone, and its buffers."""
        before = self._server.cpu_s() or 0.0
        started = time.monotonic()
        times = asyncio.run(self._ask_all(one_by_one(tasks)))
        seconds = time.monotonic() - started
        return Run(
            seconds,
            sum(one.num_tokens for one in times),
            times,
            cpu_seconds=(self._server.cpu_s() or 0.0) - before,
            peak_bytes=self._server.kv_bytes + self._server.compute_bytes,
        )

    async def _ask_all(self, requests: Sequence[Task]) -> list[RequestTimes]:
        return await asyncio.gather(*map(self._ask, requests))

    async def _ask(self, task: Task) -> RequestTimes:
        times = RequestTimes(RequestMetrics(time.monotonic()))
        body = {"prompt": task.prompt, "n_predict": task.num_tokens, "ignore_eos": True, "stream": True}
        body |= {"temperature": 0.0 if task.num_samples == 1 else 1.0, "cache_prompt": True}
        async for line in stream_json(self._server.port, "/completion", body):
            now = time.monotonic()
            if (said := json.loads(line[6:])).get("stop"):
                times.moments.finished_time = now
                times.num_tokens = said["tokens_predicted"]
            # How long a request has waited for a slot is not told. Half a letter is not sent by itself.
            times.moments.first_scheduled_time = times.moments.first_scheduled_time or now
            times.moments.first_token_time = times.moments.first_token_time or now
        if times.num_tokens != task.num_tokens:
            raise RuntimeError(f"llama.cpp gave {times.num_tokens} tokens of {task.num_tokens}")
        return times
