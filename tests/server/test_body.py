"""What a request brings: JSON as its standard has it, of a size that holds nobody up."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from helpers.servers import post, wait_for

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.server.app import Post
from mlx_paged.server.body import parse_object
from mlx_paged.server.errors import ApiError
from mlx_paged.server.service import ServerOptions


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b" \n", "the body is empty"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"a": "\\ud83dx\\ude00"}', "surrogate"),
        (b'{"\\ude00": 1}', "surrogate"),
        (b'{"x": [' + b"[]," * 1_100_000 + b"[]]}", "2,000,000 commas and brackets"),
        (json.dumps(dict.fromkeys(map(str, range(30_000))))[:-1].encode() + b', "z": 1, "z": 2}', '"z" stands twice'),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_is_no_json_for_us_is_told_why(content: bytes, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(content)
    assert caught.value.status == 400 and words in caught.value.message


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


def test_a_body_that_is_packed_is_refused_as_such(url: str) -> None:
    content = gzip.compress(b'{"prompt": "a"}')
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    response = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 415 and "Content-Encoding" in response.json()["error"]["message"]


def test_an_error_does_not_send_back_all_that_was_sent(url: str) -> None:
    response = post(f"{url}/v1/completions", {"prompt": "a", "model": "m" * 100_000})
    assert response.status_code == 404 and len(response.content) < 3000


def test_many_tokens_are_not_turned_into_text_beyond_the_context(llm: AsyncLLM, url: str) -> None:
    response = post(f"{url}/detokenize", {"tokens": [1] * (llm.max_model_len + 1)})
    assert response.status_code == 400 and str(llm.max_model_len) in response.json()["error"]["message"]


def test_a_path_is_one_line_of_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlx_paged.server")
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 80)) as client:
        client.sendall(
            b"GET /x%0d%0aERROR%20of%20mine%1b[31m%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        client.settimeout(10)
        assert client.recv(1000).startswith(b"HTTP/1.1 404")
    wait_for(lambda: any("mine" in message for message in caplog.messages))
    (line,) = [message for message in caplog.messages if "mine" in message]
    assert line.startswith(r"GET /x\r\nERROR of mine\x1b[31m\x00 404")


def test_a_body_that_is_still_coming_at_the_end_is_let_go(llm: AsyncLLM) -> None:
    async def receive() -> Any:
        raise asyncio.CancelledError

    service: Any = SimpleNamespace(
        options=ServerOptions(["a"]),
        is_draining=True,
        num_clients=0,
        metrics=SimpleNamespace(clients=SimpleNamespace(set=lambda _: None)),
    )
    scope = {"headers": [(b"content-type", b"application/json")], "state": {"notes": {}}}
    asyncio.run(Post(service, None)(scope, receive, None))  # type: ignore[arg-type]
    service.is_draining = False
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Post(service, None)(scope, receive, None))  # type: ignore[arg-type]
