"""Many clients at once, and bad ones: each gets its own answer, and afterwards everything is as it was."""

from __future__ import annotations

import asyncio
import os
import random
import re
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from helpers.raw_client import ask, request
from helpers.servers import post, running_server, url_of, wait_for
from starlette.applications import Starlette

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.server.app import make_app
from mlx_paged.server.guard import Access
from mlx_paged.server.service import ServerOptions, Service

CHAT = "/v1/chat/completions"
ANSWER = "All done: the tool said so."


@pytest.fixture
def server(llm: AsyncLLM) -> Iterator[uvicorn.Server]:
    with running_server(llm, keepalive_s=0.3) as server:
        yield server


def asking(path: str, text: str, script: str = "answer", **more: Any) -> dict[str, Any]:
    """A request in the dialect of a path. Its answer is a chain of the scripted model; in completions its own text."""
    user, system = {"role": "user", "content": text}, f"SCRIPT:{script} {text}"
    body: dict[str, Any] = {
        CHAT: {"messages": [{"role": "system", "content": system}, user]},
        "/v1/completions": {"prompt": text + ("<|run_endless|>" if script == "endless" else ""), "echo": True},
        "/v1/messages": {"messages": [user], "system": system},
        "/v1/responses": {"input": [user], "instructions": system},
    }[path]
    most = more.pop("most", 20)
    return {"model": "scripted", "max_output_tokens" if path == "/v1/responses" else "max_tokens": most} | body | more


PATHS = (CHAT, "/v1/completions", "/v1/messages", "/v1/responses")
BAD = (b"{", b'{"messages": 5}', b'{"n": 1000000000}', b"[" * 2000, b'{"model": "other"}')


def test_after_a_thousand_clients_that_leave_break_off_or_ask_badly_all_is_as_before(
    llm: AsyncLLM, server: uvicorn.Server
) -> None:
    url, rng = url_of(server), random.Random(0)

    async def come_and_go() -> None:
        path, stream = rng.choice(PATHS), rng.random() < 0.5
        text = "word " * rng.choice([1, 30, 600])
        sent = request(url, path, asking(path, text, "endless", most=20_000, stream=stream))
        kind = rng.randrange(6)
        if kind == 0:  # with half of the request
            await ask(url, sent[: rng.randrange(len(sent))], 0)
        elif kind == 1:
            answer = await ask(url, request(url, path, rng.choice(BAD)))
            assert re.match(rb"HTTP/1.1 40[04] ", answer), answer
        elif kind == 2:
            answer = await ask(url, request(url, path, asking(path, text, stream=stream)))
            assert b"HTTP/1.1 200 " in answer and (path == "/v1/completions" or b"said" in answer), answer
        elif kind == 3 and stream:  # in the middle of an answer
            assert len(await ask(url, sent, rng.choice([1, 500, 5000])))
        else:  # waiting, in the prompt, or in an answer that is not read
            leaving = asyncio.ensure_future(ask(url, sent, 10**9))
            for _ in range(rng.randrange(300)):
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    async def work(num: int) -> None:
        for _ in range(num):
            await come_and_go()

    async def all_at_once() -> None:
        await asyncio.gather(*(work(20) for _ in range(50)))

    assert post(url + CHAT, asking(CHAT, "hi")).status_code == 200
    num_tasks = len(asyncio.all_tasks(server.servers[0].get_loop()))
    asyncio.run(all_at_once())
    wait_for(lambda: llm.num_requests == 0)
    wait_for(lambda: len(asyncio.all_tasks(server.servers[0].get_loop())) <= num_tasks)
    stats = asyncio.run(llm.stats())
    assert stats.num_free_blocks == stats.num_blocks and stats.num_running == stats.num_waiting == 0
    assert post(url + CHAT, asking(CHAT, "hi")).json()["choices"][0]["message"]["content"] == ANSWER
    assert 'mlx_paged:http_clients{model_name="scripted"} 0.0' in httpx.get(f"{url}/metrics").text


def test_of_a_thousand_requests_sixty_four_at_once_no_answer_holds_anothers_secret(url: str) -> None:
    async def work(client: int) -> None:
        for i in range(16):
            path, secret = PATHS[i % 4], f"secret-{client}-{i}"
            body = asking(path, secret, most=3, stream=i // 4 % 2 == 0)
            answer = (await ask(url, request(url, path, body, X_Request_Id=secret))).decode()
            assert answer.startswith("HTTP/1.1 200 "), answer
            assert set(re.findall(r"secret-\d+-\d+", answer)) == {secret}

    async def all_at_once() -> None:
        await asyncio.gather(*map(work, range(64)))

    asyncio.run(all_at_once())


def test_what_a_slow_reader_has_not_read_is_one_output_and_a_bounded_buffer(
    llm: AsyncLLM, server: uvicorn.Server
) -> None:
    url, most = url_of(server), 800
    listening = server.servers[0].sockets[0]
    socket.socket(fileno=socket.dup(listening.fileno())).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        client.settimeout(30)
        client.connect(("127.0.0.1", httpx.URL(url).port))
        client.sendall(request(url, CHAT, asking(CHAT, "hi", "endless", most=most, stream=True)))
        wait_for(lambda: llm.num_requests == 1)
        (inbox,) = llm._running
        wait_for(lambda: inbox._item is not None and inbox._item.finished, 60)  # all is written, and nothing is read
        unread = inbox._item
        assert len(unread.outputs[0].token_ids) > 20
        waiting = [connection.transport.get_write_buffer_size() for connection in server.server_state.connections]
        assert max(waiting) < 70_000
        assert post(url + CHAT, asking(CHAT, "hi")).status_code == 200
        received = b""
        while part := client.recv(1 << 20):
            received += part
    texts = re.findall(r'"content":"([^"]+)"', received.decode())
    assert "".join(texts) == "tick tack " * (most // 2) and b"[DONE]" in received


def test_a_thousand_idle_connections_keep_nobody_from_being_answered(url: str) -> None:
    num_free = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
    num_connections = min(1000, num_free // 2 - 50)  # both ends of each are here
    assert num_connections > 20
    with ExitStack() as stack:
        for _ in range(num_connections):
            stack.enter_context(socket.create_connection(("127.0.0.1", httpx.URL(url).port), 10))
        assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        assert post(url + CHAT, asking(CHAT, "hi")).status_code == 200


def test_headers_are_bounded_in_number_and_size(url: str) -> None:
    many = httpx.get(f"{url}/health", headers={f"x-{i}": "y" for i in range(200)})
    assert many.status_code == 431 and "100 headers" in many.json()["error"]["message"]
    assert httpx.get(f"{url}/health", headers={"x": "y" * 70_000}).status_code == 431
    with suppress(ConnectionError):  # where it hangs up while we still send
        endless = asyncio.run(ask(url, b"GET /health HTTP/1.1\r\nx: " + b"y" * 2_000_000))
        assert endless.startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{url}/health", headers={f"x-{i}": "y" for i in range(50)}).status_code == 200


HUGE = 10**30
NUMBERS: dict[str, list[Any]] = {
    "max_tokens": [10**12, HUGE],
    "seed": [2**70, -(2**70)],
    "top_k": [HUGE, -5],
    "temperature": [1e308, 1e-320],
    "top_p": [1e-320],
    "min_p": [1e-320],
    "min_tokens": [HUGE],
    "priority": [HUGE, -HUGE],
    "repetition_penalty": [1e308, 1e-320],
    "max_thinking_tokens": [HUGE],
    "stop_token_ids": [[HUGE], [-1]],
    "logit_bias": [{"5": 1e308}, {str(HUGE): 1}],
    "top_logprobs": [HUGE],
    "n": [HUGE],
}


def test_no_number_is_too_large_or_too_small_for_an_answer_or_a_refusal(url: str) -> None:
    for name, values in NUMBERS.items():
        for value in values:
            body = asking(CHAT, "hi") | {name: value, "logprobs": True}
            response = post(url + CHAT, body)
            assert response.status_code in (200, 400), (name, value, response.text)
            assert response.status_code == 200 or name in response.text
    assert post(url + CHAT, asking(CHAT, "hi")).json()["choices"][0]["message"]["content"] == ANSWER


def test_a_client_that_is_told_to_come_back_does_and_is_answered(
    llm: AsyncLLM, url: str, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "max_waiting", 0)
    monkeypatch.setattr(llm._thread, "max_num_seqs", 1)
    refused = 'mlx_paged:rejected_total{model_name="scripted",status="429"}'

    def num_refused() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(refused))

    before, body = num_refused(), asking(CHAT, "hi", "endless", most=20_000, stream=True)
    with ThreadPoolExecutor() as pool:
        with httpx.stream("POST", url + CHAT, json=body) as running:
            lines = running.iter_lines()  # which must be kept: without it the connection is closed
            next(lines)
            messages: Any = [{"role": "user", "content": "hi"}]
            patient = client.with_options(max_retries=5).chat.completions
            answer = pool.submit(patient.create, model="scripted", messages=messages)
            wait_for(lambda: num_refused() > before or answer.done(), 60)
            assert num_refused() > before and not answer.done()
        assert answer.result(60).choices[0].message.content == ANSWER


def test_nothing_stands_between_an_endpoint_and_its_client_but_the_guard(llm: AsyncLLM) -> None:
    app = make_app(Service(llm, ServerOptions(["m"])), Access())._app
    assert isinstance(app, Starlette) and app.user_middleware == []
