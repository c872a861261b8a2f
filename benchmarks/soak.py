"""Ask a server for minutes, as streams, whole answers, clients that leave, bad requests; and look at its memory."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence

from served import Ours

CLIENTS = 16
LOOKS = 60
WARM_UP = 0.25  # of the time
MOST_GROWTH = 16 << 20  # bytes
BAD = (b"{", b'{"messages": 5}', b'{"messages": [], "n": 1000000000}', b'{"model": "none"}')
PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/responses")


async def one_request(port: int, rng: random.Random, system: str) -> str:
    """Make a request of some kind. Returns the kind, and "!" if its answer was not what it should be."""
    kind, path = rng.choice(["stream", "whole", "left", "bad"]), rng.choice(PATHS)
    text = " ".join(rng.choice(["sea", "dog", "bread", "moon"]) for _ in range(rng.choice([3, 30, 300])))
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    most = rng.choice([1, 20, 100])
    body: dict[str, object] = {"stream": kind == "stream" or (kind == "left" and rng.random() < 0.5)}
    if path == "/v1/responses":
        body |= {"input": messages, "max_output_tokens": most}
    else:
        body |= {"messages": messages, "max_tokens": most}
    content = rng.choice(BAD) if kind == "bad" else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        if kind == "left":
            async with asyncio.timeout(rng.random()):
                await reader.read(rng.choice([1, 1000]))
            return kind
        answer = await reader.read()
    except TimeoutError:
        return kind
    finally:
        writer.close()
    expected = rb"HTTP/1.1 40[04] " if kind == "bad" else rb"HTTP/1.1 200 "
    ends = (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete", b"}")
    return kind if re.match(expected, answer) and any(end in answer for end in ends) else f"{kind}!"


async def keep_asking(port: int, end: float, done: Counter[str], seed: int, system: str) -> None:
    """Be one client, until the end."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        done[await one_request(port, rng, system)] += 1


def metrics(port: int) -> dict[str, float]:
    """What the server says of itself."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    return {name: float(value) for name, value in re.findall(r"^([a-z_:]+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}


def growth(rss: Sequence[int]) -> float:
    """Bytes that memory has grown by, from the first third of what was seen after the warm-up to the last."""
    warm = rss[int(len(rss) * WARM_UP) :]
    third = max(1, len(warm) // 3)
    return statistics.median(warm[-third:]) - statistics.median(warm[:third])


def run(model: str, minutes: float, system: str) -> int:
    """Ask for so long, print what is seen, and return the exit code: 1 if memory grew or blocks are lost."""
    server = Ours(model)
    try:
        return asyncio.run(_watch(server, minutes, system))
    finally:
        server.close()


async def _watch(server: Ours, minutes: float, system: str) -> int:
    port, done, rss = server.port, Counter[str](), []
    start = time.monotonic()
    end = start + 60 * minutes
    clients = [asyncio.ensure_future(keep_asking(port, end, done, i, system)) for i in range(CLIENTS)]
    while time.monotonic() < end:
        await asyncio.sleep(60 * minutes / LOOKS)
        rss.append(server.rss())
        used = (await asyncio.to_thread(metrics, port))["vllm:kv_cache_usage_perc"]
        seconds = time.monotonic() - start
        print(f"{seconds:6.0f} s  {sum(done.values()):7,} requests  {rss[-1] / 1e6:7.1f} MB  {used:4.0%} of the blocks",
              flush=True)  # fmt: skip
    await asyncio.gather(*clients)
    for _ in range(100):
        last = await asyncio.to_thread(metrics, port)
        if not (last["vllm:kv_cache_usage_perc"] or last["vllm:num_requests_running"]):
            break
        await asyncio.sleep(0.1)
    grown, wrong = growth(rss), sum(count for kind, count in done.items() if kind.endswith("!"))
    print(", ".join(f"{count:,} {kind}" for kind, count in sorted(done.items())))
    print(f"memory grew by {grown / 1e6:.1f} MB after the warm-up; {MOST_GROWTH / 1e6:.1f} MB may be chance")
    print(f"{last['vllm:kv_cache_usage_perc']:.0%} of the blocks are held at the end; {wrong:,} answers were wrong")
    is_good = grown <= MOST_GROWTH and not wrong and not last["vllm:kv_cache_usage_perc"]
    return 0 if is_good else 1
