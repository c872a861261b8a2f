"""What the drivers of Python clients share: the server's address, what is asked of it, what it counts."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

BASE_URL, BUSY_URL, MODEL = (os.environ[name] for name in ("BASE_URL", "BUSY_URL", "MODEL"))
ANSWER = "All done: the tool said so."
THOUGHT = "I should run it."
CITY = 'Paris \u00e9\n"x"'
LONG = "x y z " * 60_000  # more than the context


def script(name: str) -> list[dict[str, Any]]:
    """A conversation whose answer is a chain of the scripted model."""
    return [{"role": "system", "content": f"SCRIPT:{name}"}, {"role": "user", "content": "hi"}]


def metric(name: str, url: str = BASE_URL) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def freed() -> None:
    """Wait until nothing runs and all blocks are free."""
    wait_for(lambda: metric("vllm:num_requests_running") + metric("vllm:kv_cache_usage_perc") == 0)


def retried(ask: Callable[[], T]) -> T:
    """Return what `ask` returns from a server that refuses it at first, as it is busy, and takes it later."""
    before = metric("mlx_paged:rejected_total", BUSY_URL)
    holder = http.client.HTTPConnection(BUSY_URL.removeprefix("http://"))
    body = json.dumps({"messages": script("endless"), "stream": True})
    holder.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = holder.getresponse()
    response.read(1)

    def let_go() -> None:
        wait_for(lambda: metric("mlx_paged:rejected_total", BUSY_URL) > before)
        response.close()
        holder.close()

    thread = threading.Thread(target=let_go)
    thread.start()
    try:
        return ask()
    finally:
        thread.join()
