"""Streams and waiting answers end with their client; slow ones hurt nobody; too many are told to come back."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx
import openai
import pytest
from helpers.servers import engine_held, post, serving, wait_for

from mlx_paged import SamplingParams, engine_thread
from mlx_paged.async_llm import AsyncLLM
from mlx_paged.runner.model_runner import ModelRunner

ENDLESS: Any = [{"role": "system", "content": "SCRIPT:endless"}, {"role": "user", "content": "x " * 200}]
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def nothing_is_left(llm: AsyncLLM) -> Iterator[None]:
    yield
    wait_for(lambda: llm.num_requests == 0)
    stats = asyncio.run(llm.stats())
    assert stats.num_free_blocks == stats.num_blocks and stats.num_running == stats.num_waiting == 0


def hang_up(url: str, body: Any, after: float) -> None:
    """Ask, and close the connection some seconds later without having read."""
    port = httpx.URL(url).port
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(after)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 0.3])
def test_a_request_ends_when_its_client_goes(stream: bool, after: float, llm: AsyncLLM, url: str) -> None:
    hang_up(url, {"messages": ENDLESS, "stream": stream, "max_tokens": 20_000}, after)
    wait_for(lambda: llm.num_requests == 0, seconds=10)


def test_an_engine_whose_last_client_went_counts_nothing_as_running(llm: AsyncLLM) -> None:
    async def leave_while_it_is_counted() -> None:
        async with aclosing(llm.chat(ENDLESS, SamplingParams(max_tokens=20_000))) as outputs:
            async for _ in outputs:
                if llm.snapshot.num_running:
                    return

    asyncio.run(leave_while_it_is_counted())
    wait_for(lambda: llm.snapshot.num_running == 0 and llm.snapshot.num_free_blocks == llm.snapshot.num_blocks)


def test_a_silent_stream_is_kept_alive(llm: AsyncLLM) -> None:
    body = {"messages": ENDLESS, "max_tokens": 2, "stream": True}
    with (
        serving(llm, keepalive_s=0.05) as url,
        engine_held(llm) as go_on,
        httpx.stream("POST", url + CHAT, json=body) as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == ": keepalive waiting"
        go_on.set()
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"


@pytest.mark.parametrize(
    "path, body, said",
    [
        (CHAT, {"messages": [{"role": "user", "content": "x " * 1300}]}, r": keepalive (\d+)% of the prompt"),
        ("/v1/completions", {"prompt": ["y " * 1300] * 2}, r": keepalive (\d+)% of the prompt"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "z " * 1300}]},
            r'"ping","prompt_progress":0.(\d\d)',
        ),
        ("/v1/responses", {"input": "w " * 2600}, r'"prompt_progress":0.(\d\d)'),
    ],
)
def test_a_stream_whose_prompt_is_computed_says_how_far_it_is(
    path: str, body: Any, said: str, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls, go_on = ModelRunner.run, [], threading.Event()

    def hold(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            assert go_on.wait(60)
        return run(self, *arguments)

    monkeypatch.setattr(ModelRunner, "run", hold)
    monkeypatch.setattr(engine_thread, "_SNAPSHOT_S", 0)
    body = body | {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 2, "stream": True}
    try:
        with (
            serving(llm, keepalive_s=0.05) as url,
            httpx.stream("POST", url + path, json=body, timeout=30) as response,
        ):
            lines = response.iter_lines()
            share = next(int(found[1]) for line in lines if (found := re.search(said, line)) and int(found[1]))
            assert 10 < share < 95
            go_on.set()
            rest = [line for line in lines if line.startswith("data:")]
            assert rest and '"error":{' not in rest[-1]
    finally:
        go_on.set()


def test_a_reader_that_does_not_read_hurts_nobody(llm: AsyncLLM, url: str, client: openai.OpenAI) -> None:
    body = {"messages": ENDLESS, "stream": True, "max_tokens": 600}
    with httpx.stream("POST", url + CHAT, json=body) as unread:
        for _ in range(3):
            answer = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "hi"}])
            assert answer.choices[0].finish_reason == "stop"
        text = "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            for line in unread.iter_lines()
            if line.startswith("data: {")
        )
    assert text == "tick tack " * 300


def test_more_than_may_wait_are_told_to_come_back(llm: AsyncLLM) -> None:
    with serving(llm) as url:
        llm.max_waiting, most = 0, llm._thread.max_num_seqs
        try:
            llm._thread.max_num_seqs = 1
            body = {"messages": ENDLESS, "stream": True, "max_tokens": 20_000}
            with httpx.stream("POST", url + CHAT, json=body) as running:
                lines = running.iter_lines()
                next(lines)
                for stream in (False, True):
                    refused = post(url + CHAT, {"messages": ENDLESS, "stream": stream})
                    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
                    assert refused.json()["error"]["code"] == "queue_full"
        finally:
            llm.max_waiting, llm._thread.max_num_seqs = None, most


def test_many_at_once_get_their_own_answers(url: str) -> None:
    async def ask(client: openai.AsyncOpenAI, name: str, stream: bool) -> str:
        request: Any = {
            "model": "scripted",
            "max_tokens": 8,
            "messages": [{"role": "system", "content": f"SCRIPT:{name}"}, {"role": "user", "content": name}],
        }
        if not stream:
            return (await client.chat.completions.create(**request)).choices[0].message.content or ""
        chunks = [chunk async for chunk in await client.chat.completions.create(**request, stream=True)]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            names = ["answer", "endless", "emoji", "not_a_tool"] * 8
            return await asyncio.gather(*(ask(client, name, bool(i % 3)) for i, name in enumerate(names)))

    texts = asyncio.run(ask_all())
    first = ["All done: the tool said so.", "tick tack " * 4, "\U0001f600"]
    assert texts[:3] == first and all(text == texts[i % 4] for i, text in enumerate(texts))


def test_an_engine_that_breaks_in_a_step_ends_that_request_with_an_error(
    llm: AsyncLLM, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = ModelRunner.run, []

    def break_once(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return run(self, *arguments)

    for stream in (True, False):
        calls.clear()
        monkeypatch.setattr(ModelRunner, "run", break_once)
        response = post(url + CHAT, {"messages": ENDLESS, "stream": stream, "max_tokens": 20})
        monkeypatch.setattr(ModelRunner, "run", run)
        assert response.status_code == (200 if stream else 500)
        assert '"type":"server_error"' in response.text and "device" not in response.text
        assert "[DONE]" not in response.text
    assert post(url + CHAT, {"messages": ENDLESS, "max_tokens": 2}).status_code == 200
