"""What answers conversations for server.py: two servers in processes of their own, and AsyncLLM within one.

A process of the third kind is this file's: it reads lines of JSON with conversations, and writes when tokens came.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from mlx_paged.distributed.launch import free_ports

MAX_AT_ONCE = 32
NUM_BLOCKS = 4096  # of 16 tokens: room for all requests at once
OPENBLAS = "libopenblas.so.0"

Messages = list[dict[str, str]]


class Answered(NamedTuple):
    """When one conversation was answered."""

    num_tokens: int
    first_s: float
    """From the request to its first text."""
    total_s: float
    """To its end."""


class Process:
    """A process that answers. Its CPU time is that of all its threads."""

    def __init__(self, name: str, command: Sequence[str], **more: Any) -> None:
        self.name = name
        self.process: Any = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **more)

    def ask(self, conversations: Sequence[Messages], max_tokens: int) -> list[Answered]:
        """Ask for all answers at once, and wait for all."""
        raise NotImplementedError

    def cpu_s(self) -> float | None:
        """Seconds of CPU time that it has used; None where the system does not tell."""
        return _of_proc(self.process.pid, "stat", lambda text: sum(map(int, text.rpartition(")")[2].split()[11:13])))

    def rss(self) -> int:
        """Bytes of memory that it has now; 0 where the system does not tell."""
        return _of_proc(self.process.pid, "status", lambda text: int(re.findall(r"VmRSS:\s+(\d+)", text)[0])) or 0

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _of_proc(pid: int, name: str, read: Any) -> Any:
    try:
        value = read(Path(f"/proc/{pid}/{name}").read_text())
    except OSError:
        return None
    return value / os.sysconf("SC_CLK_TCK") if name == "stat" else value << 10


class InProcess(Process):
    """AsyncLLM, whose answers are read in its own process."""

    def __init__(self, model: str) -> None:
        super().__init__("AsyncLLM", [sys.executable, __file__, model], stdin=subprocess.PIPE)
        self.process.stdout.readline()

    def ask(self, conversations: Sequence[Messages], max_tokens: int) -> list[Answered]:
        """Ask for all answers at once, and wait for all."""
        self.process.stdin.write(json.dumps({"conversations": conversations, "max_tokens": max_tokens}) + "\n")
        self.process.stdin.flush()
        return [Answered(*each) for each in json.loads(self.process.stdout.readline())]


class Server(Process):
    """A server of chat completions, whose streams are read here."""

    port: int

    def ask(self, conversations: Sequence[Messages], max_tokens: int) -> list[Answered]:
        """Ask for all answers at once, and wait for all."""

        async def run() -> list[Answered]:
            return await asyncio.gather(*(ask(self.port, each, max_tokens) for each in conversations))

        return asyncio.run(run())

    def wait_for(self, path: str) -> None:
        """Wait until it answers there. Raises RuntimeError if it ends."""
        while self.process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}").read()
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} ended with exit code {self.process.returncode}")


class Ours(Server):
    """`mlx-paged serve`."""

    def __init__(self, model: str, *more: str) -> None:
        options = ["--model", model, "--port", "0", "--num-kv-blocks", str(NUM_BLOCKS), "--log-level", "warning"]
        options += ["--max-num-seqs", str(MAX_AT_ONCE)]
        super().__init__("mlx-paged serve", [sys.executable, "-m", "mlx_paged", "serve", *options, *more])
        line = self.process.stdout.readline()
        self.port = int(re.findall(r":(\d+)/v1", line)[0])


class MlxLm(Server):
    """mlx-lm's server, with the BLAS that mlx_paged loads by itself."""

    def __init__(self, model: str) -> None:
        self.port = free_ports(1)
        options = ["--model", model, "--port", str(self.port), "--log-level", "ERROR"]
        options += ["--decode-concurrency", str(MAX_AT_ONCE), "--prompt-concurrency", str(MAX_AT_ONCE)]
        environment = os.environ | ({"LD_PRELOAD": OPENBLAS} if sys.platform == "linux" else {})
        command = [sys.executable, "-m", "mlx_lm", "server", *options]
        super().__init__("mlx_lm.server", command, env=environment, stderr=subprocess.DEVNULL)
        self.wait_for("/v1/models")


class LlamaCppServer(Server):
    """llama.cpp's server, with K and V in float32, as the others have them of a float32 model."""

    def __init__(self, executable: str, gguf: Path, slots: int = MAX_AT_ONCE, context: int = 0) -> None:
        """context: tokens of a slot; as many as the others have at once among all slots, if not given."""
        self.port = free_ports(1)
        tokens = slots * context or NUM_BLOCKS * 16
        threads = str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())
        options = ["--model", str(gguf), "--port", str(self.port), "--threads", threads, "--fit", "off", "--verbose"]
        options += ["--parallel", str(slots), "--ctx-size", str(tokens), "--kv-unified"]
        options += ["--cache-type-k", "f32", "--cache-type-v", "f32"]
        with tempfile.NamedTemporaryFile("r") as log:
            super().__init__(
                "llama.cpp's server", [executable, *options, "--log-file", log.name], stderr=subprocess.DEVNULL
            )
            self.wait_for("/health")
            said = log.read()
        self.kv_bytes, self.compute_bytes = (_told(said, f"{kind} buffer size") for kind in ("KV", "compute"))
        """What its log says that its buffers take."""


def _told(said: str, what: str) -> int:
    return round(sum(float(mib) for mib in re.findall(rf"{what} += +([\d.]+) MiB", said)) * 2**20)


@contextmanager
def closing_all(systems: list[Process]) -> Iterator[list[Process]]:
    """Yield systems, and end them."""
    try:
        yield systems
    finally:
        for system in systems:
            system.close()


async def ask(port: int, messages: Messages, max_tokens: int) -> Answered:
    """Stream an answer, and look no closer at it than to find its first text and its usage."""
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    start = time.perf_counter()
    first, num_tokens = 0.0, 0
    async for line in stream_json(port, "/v1/chat/completions", body):
        if not first and _has_text(line):
            first = time.perf_counter()
        if b'"completion_tokens"' in line:
            num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    if not num_tokens:
        raise RuntimeError(f"the server at port {port} broke off an answer")
    return Answered(num_tokens, first - start, time.perf_counter() - start)


async def stream_json(port: int, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Post a body, and yield the lines of its stream that have JSON, each as it comes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        async for line in reader:
            if line.startswith(b"data: {"):
                yield line
    finally:
        writer.close()


def _has_text(line: bytes) -> bool:
    delta = [choice["delta"] for choice in json.loads(line[6:])["choices"]]
    return any(each.get("content") or each.get("reasoning") or each.get("reasoning_content") for each in delta)


def answer_lines(model: str) -> None:
    """Be the process that `InProcess` asks."""
    from mlx_paged import AsyncLLM, SamplingParams

    async def answer(llm: Any, messages: Messages, max_tokens: int) -> Answered:
        start = time.perf_counter()
        first, num_tokens, text = 0.0, 0, ""
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        async for output in llm.chat(messages, params):
            text += output.outputs[0].text
            num_tokens += len(output.outputs[0].token_ids)
            first = first or (time.perf_counter() if text else 0.0)
        return Answered(num_tokens, first - start, time.perf_counter() - start)

    async def run() -> None:
        async with AsyncLLM(model, num_kv_blocks=NUM_BLOCKS, max_num_seqs=MAX_AT_ONCE) as llm:
            print((await llm.stats()).blas, flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                asked = json.loads(line)
                answers = [answer(llm, each, asked["max_tokens"]) for each in asked["conversations"]]
                print(json.dumps(await asyncio.gather(*answers)), flush=True)

    with suppress(KeyboardInterrupt):
        asyncio.run(run())


if __name__ == "__main__":
    answer_lines(sys.argv[1])
