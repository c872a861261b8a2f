"""A form that takes long to compile is refused in time, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from helpers.servers import post, wait_for

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.sampling import compilations, grammar

CHAT = "/v1/chat/completions"
USER: Any = [{"role": "user", "content": "hi"}]
ENDLESS: Any = [{"role": "system", "content": "SCRIPT:endless"}, *USER]


@contextmanager
def stream(url: str) -> Iterator[Iterator[str]]:
    """A stream that does not end. Yields its chunks."""
    body = {"messages": ENDLESS, "stream": True, "max_tokens": 20_000}
    with httpx.stream("POST", url + CHAT, json=body, timeout=30) as response:
        yield (line for line in response.iter_lines() if line)


def test_while_forms_are_compiled_that_never_end_all_others_are_answered(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, go_on, compiled = grammar._compile, threading.Event(), []

    def slow(vocabulary: Any, kind: str, text: str) -> Any:
        compiled.append(text)
        if text.startswith("slow"):
            assert go_on.wait(60)
        return compile_(vocabulary, kind, text)

    monkeypatch.setattr(grammar, "_compile", slow)
    monkeypatch.setattr(grammar, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(compilations, "TIMEOUT_S", 0.5)
    try:
        with ThreadPoolExecutor(12) as pool, stream(url) as chunks:
            bodies = [{"messages": USER, "guided_regex": f"slow{i}", "stream": bool(i % 2)} for i in range(12)]
            slow_ones = [pool.submit(post, url + CHAT, body) for body in bodies]
            wait_for(lambda: len(compiled) == compilations.MAX_AT_ONCE)
            while not all(each.done() for each in slow_ones):
                assert next(chunks)
                assert post(url + CHAT, {"messages": USER, "max_tokens": 2}).status_code == 200
                assert httpx.get(f"{url}/health").status_code == 200
            for each in slow_ones:
                error = each.result().json()["error"]
                assert each.result().status_code == 400 and error["param"] == "regex"
                assert "not compiled within 0.5 seconds" in error["message"]
        assert len(compiled) == compilations.MAX_AT_ONCE
    finally:
        go_on.set()
    wait_for(lambda: post(url + CHAT, {"messages": USER, "guided_regex": "fast"}).status_code == 200)


def test_steps_go_on_while_a_form_is_compiled(llm: AsyncLLM, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, steps = grammar._compile, []

    def counted(*arguments: Any) -> Any:
        steps.append(asyncio.run(llm.stats()).num_steps)
        try:
            return compile_(*arguments)
        finally:
            steps.append(asyncio.run(llm.stats()).num_steps)

    monkeypatch.setattr(grammar, "_compile", counted)
    with stream(url) as chunks:
        next(chunks)
        answer = post(url + CHAT, {"messages": USER, "guided_regex": "a?" * 4000})
    assert answer.status_code == 200 and steps[1] - steps[0] > 10, steps  # which take much less time than it does


@pytest.mark.parametrize(
    "body, param",
    [
        ({"guided_regex": "a?" * 40_000}, "regex"),
        ({"guided_grammar": "start: " + '"a" ' * 20_000}, "grammar"),
        ({"guided_json": {"enum": list(range(20_000))}}, "json_schema"),
    ],
)
def test_a_form_that_is_too_long_is_refused_by_name(body: Any, param: str, url: str) -> None:
    error = post(url + CHAT, {"messages": USER} | body).json()["error"]
    assert error["param"] == param and "longer than 65536 characters" in error["message"]


def test_tools_that_make_too_long_a_grammar_are_refused(url: str) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": ["x" * 300_000]}}}}
    body = {"messages": USER, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    error = post(url + CHAT, body).json()["error"]
    assert error["param"] == "tools" and "more than 262144 characters" in error["message"]
