"""A look inside a running server: what it shows, to whom, what it costs, and how one ends a request there."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.scripted_model import make_scripted_model
from helpers.servers import engine_held, post, serving, wait_for

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.outputs import EngineStats
from mlx_paged.server.debug import Debug
from mlx_paged.server.guard import Access
from mlx_paged.server.service import ServerOptions, Service

CHAT = "/v1/chat/completions"
LONG = "a few words that fill some blocks of the pool " * 8


def ask(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 4} | more


def look(url: str, **more: Any) -> dict[str, Any]:
    response = httpx.get(f"{url}/debug/blocks", timeout=30, **more)
    assert response.status_code == 200, response.text
    return dict(response.json())


@contextmanager
def streamed(url: str, **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The snapshots of a stream, as they come."""
    with httpx.stream("GET", f"{url}/debug/blocks?stream=1", timeout=30, **more) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        yield (json.loads(line.removeprefix("data: ")) for line in lines)


@contextmanager
def long_answer(url: str, name: str, *, stream: bool, path: str = CHAT, **body: Any) -> Iterator[list[httpx.Response]]:
    """An answer that would take long, to a request of that name. Yields where it is found once it has come."""
    answers: list[httpx.Response] = []
    asked = ask("count", max_tokens=20_000, ignore_eos=True, stream=stream) | body

    thread = threading.Thread(target=lambda: answers.append(post(url + path, asked, headers={"x-request-id": name})))
    thread.start()
    try:
        yield answers
    finally:
        thread.join(30)


def running(url: str, name: str | None, **more: Any) -> list[int]:
    """The numbers of running requests that are shown with a name; a look may be a quarter of a second old."""
    shown = look(url, **more)["requests"]
    return [each["id"] for each in shown if each["request_id"] == name and each["state"] == "running"]


# -- snapshots ----------------------------------------------------------------------------------------------------


def test_a_snapshot_has_counters_pools_requests_and_prefixes(url: str) -> None:
    assert post(url + CHAT, ask(LONG)).status_code == 200
    shown = look(url)
    assert (shown["model"], shown["unloaded"], shown["page"]) == ("scripted", False, {"log_prompts": False})
    assert {field.name for field in fields(EngineStats)} == set(shown["stats"])
    (pool,) = shown["pools"]
    assert (pool["window"], pool["num_blocks"], pool["block_size"], pool["blocks_per_cell"]) == (None, 2000, 16, 1)
    assert len(pool["cells"]) == 2000 and all(len(cell) == 5 for cell in pool["cells"])
    assert sum(cell[1] for cell in pool["cells"]) >= sum(bar["num_blocks"] for bar in shown["prefixes"]) > 0
    assert shown["num_more_requests"] == shown["num_more_prefixes"] == 0


def test_a_stream_shows_a_request_come_and_go_and_one_aborts_it(url: str) -> None:
    with streamed(url) as snapshots, long_answer(url, "watched", stream=False) as answers:
        shown = next(each for each in snapshots if any(r["request_id"] == "watched" for r in each["requests"]))
        (request,) = shown["requests"]
        assert request["kind"] == "sample"
        assert post(f"{url}/debug/abort", {"id": request["id"]}).json() == {"aborted": True}
        after = next(each for each in snapshots if not each["requests"])
        assert after["stats"]["num_free_blocks"] == 2000 and after["time"] > shown["time"]
        assert after["stats"]["num_output_tokens"] > 0
    assert answers[0].status_code == 410 and answers[0].json()["error"]["message"] == "this request was aborted"
    assert post(f"{url}/debug/abort", {"id": request["id"]}).json() == {"aborted": False}


@pytest.mark.parametrize(
    "path, body, end",
    [
        (CHAT, {}, 'data: {"error":{"message":"this request was aborted"'),
        (
            "/v1/completions",
            {"prompt": "count", "messages": None},
            'data: {"error":{"message":"this request was aborted"',
        ),
        ("/v1/responses", {"input": "count", "messages": None, "max_output_tokens": 20_000}, '"code":"aborted"'),
        ("/v1/messages", {}, "event: error"),
    ],
)
def test_an_aborted_stream_ends_as_its_dialect_has_it(path: str, body: dict[str, Any], end: str, url: str) -> None:
    name = path.replace("/", ".")
    with long_answer(url, name, stream=True, path=path, **body) as answers:
        wait_for(lambda: running(url, name))
        (number,) = running(url, name)
        assert post(f"{url}/debug/abort", {"id": number}).json() == {"aborted": True}
    assert end in answers[0].text and "this request was aborted" in answers[0].text
    assert post(url + CHAT, ask("and on it goes")).status_code == 200


@pytest.mark.parametrize("number", [-1, 10**9])
def test_a_number_that_no_request_has_aborts_nothing(number: int, url: str) -> None:
    assert post(f"{url}/debug/abort", {"id": number}).json() == {"aborted": False}


@pytest.mark.parametrize("body", [{}, {"id": "7"}, {"id": None}, {"id": True}, {"id": 1.5}])
def test_an_abort_names_a_request_by_its_number(body: dict[str, Any], url: str) -> None:
    response = post(f"{url}/debug/abort", body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "id"


class Counted(AsyncLLM):
    """Counts how often somebody looks at it."""

    num_looks = 0

    async def look(self) -> Any:
        self.num_looks += 1
        return await super().look()


def test_browsers_share_snapshots_and_an_engine_that_rests_makes_none(llm: AsyncLLM) -> None:
    async def run() -> None:
        counted = Counted.__new__(Counted)
        counted.__dict__ |= llm.__dict__
        debug = Debug(Service(counted, ServerOptions(["m"])))
        streams = [debug._events(False) for _ in range(3)]
        first = await asyncio.gather(*(anext(stream) for stream in streams))
        assert len(set(first)) == 1 and counted.num_looks == 1
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.wait(waiting, timeout=0.5)
        assert not any(each.done() for each in waiting) and counted.num_looks == 1  # nothing has happened
        [output async for output in llm.generate([5] * 40)]
        second = await asyncio.gather(*waiting)
        assert len(set(second)) == 1 and second[0] != first[0]
        for stream in streams:
            await stream.aclose()
        num_looks = counted.num_looks
        [output async for output in llm.generate([6] * 40)]
        assert counted.num_looks == num_looks  # nobody looks

    asyncio.run(run())


def test_a_large_pool_is_looked_at_less_often(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        counted = Counted.__new__(Counted)
        counted.__dict__ |= llm.__dict__
        debug, now = Debug(Service(counted, ServerOptions(["m"]))), [1000.0]
        monkeypatch.setattr("mlx_paged.server.debug.time.monotonic", lambda: now[0])
        await debug._renew()
        assert debug._snapshot is not None
        debug._snapshot.took_s = 0.1
        debug._keep(debug._snapshot)
        for now[0], expected in ((1001.9, 1), (1002.1, 2)):  # a twentieth of the time at most
            await debug._renew()
            assert counted.num_looks == expected

    asyncio.run(run())


def test_a_model_that_was_unloaded_is_shown_as_that_and_not_woken(tmp_path: Path) -> None:
    folder = make_scripted_model(tmp_path / "model")

    async def run() -> None:
        def load() -> AsyncLLM:
            return AsyncLLM(folder, num_kv_blocks=30)

        service = Service(load(), ServerOptions(["m"], idle_unload_s=0.01), load=load)
        events = Debug(service)._events(False)
        assert json.loads((await anext(events)).removeprefix(b"data: "))["unloaded"] is False
        await asyncio.sleep(0.02)
        await service.unload_if_idle()
        shown = json.loads((await anext(events)).removeprefix(b"data: "))
        assert shown["unloaded"] is True and shown["pools"] == shown["requests"] == shown["prefixes"] == []
        assert shown["stats"]["num_blocks"] == 30 and service.is_unloaded
        await service.become_ready()
        assert json.loads((await anext(events)).removeprefix(b"data: "))["pools"]
        await service.drain()
        assert [each async for each in events] == []

    asyncio.run(run())


def test_a_server_that_ends_shows_nothing_any_more(tmp_path: Path) -> None:
    llm = AsyncLLM(make_scripted_model(tmp_path / "model"), num_kv_blocks=30)
    with serving(llm) as url:
        with streamed(url) as snapshots:
            next(snapshots)
            llm.close()
            assert not list(snapshots)
        response = httpx.get(f"{url}/debug/blocks")
        assert response.status_code == 503 and response.json()["error"]["message"] == "the engine has ended"


# -- who sees what ------------------------------------------------------------------------------------------------


def test_looking_needs_a_key_where_there_is_one(llm: AsyncLLM) -> None:
    with serving(llm, Access(keys=(b"k",))) as url:
        for path in ("/debug/blocks", "/debug/blocks?stream=1", "/debug/prefix"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers={"Host": "evil.example"}).status_code == 403
            assert httpx.get(url + path, headers={"Origin": "http://evil.example"}).status_code == 403
        assert post(f"{url}/debug/abort", {"id": 1}).status_code == 401
        assert post(f"{url}/debug/prefix", {"prompt": "x"}).status_code == 401
        assert look(url, headers={"x-api-key": "k"})["model"] == "scripted"


def everything(url: str, content: str, **more: Any) -> str:
    """All that is told under /debug, while a prompt waits, and after it has run."""
    told = "".join(httpx.get(url + path, **more).text for path in ("/debug/prefix", "/debug/blocks"))
    return told + post(f"{url}/debug/prefix", ask(content + " else"), **more).text


@pytest.mark.parametrize("log_prompts", [False, True])
def test_text_is_told_with_log_prompts_alone(log_prompts: bool, llm: AsyncLLM) -> None:
    secret = f"the secret of {log_prompts} is in the cellar "
    with serving(llm, log_prompts=log_prompts) as url:
        httpx.get(f"{url}/debug/prefix")
        post(url + CHAT, ask(secret * 6))
        post(url + CHAT, ask(secret * 5 + "other"))
        with (
            engine_held(llm) as go_on,
            long_answer(url, "w", stream=False, messages=ask(secret)["messages"], max_tokens=40),
        ):
            threading.Timer(0.3, go_on.set).start()
            told = everything(url, secret * 5)
    assert ("cellar" in told) == log_prompts
    found = json.loads(told[told.rindex('{"num_tokens"') :])
    assert (found["differs"]["cached_token"] is None) == (not log_prompts) and found["num_cached_tokens"] > 0


def test_with_several_keys_nobody_is_told_of_anothers_prompts_or_ends_them(llm: AsyncLLM) -> None:
    secret = "what one key asks is nobody else's business " * 6
    one, two = {"x-api-key": "first"}, {"x-api-key": "second"}
    with serving(llm, Access(keys=(b"first", b"second")), log_prompts=True) as url:
        for headers in (one, two):
            httpx.get(f"{url}/debug/prefix", headers=headers)
        post(url + CHAT, ask(secret), headers=one | {"x-request-id": "mine"})
        assert [r["request_id"] for r in httpx.get(f"{url}/debug/prefix", headers=one).json()["requests"]] == ["mine"]
        assert httpx.get(f"{url}/debug/prefix", headers=two).json() == {"requests": []}
        assert post(f"{url}/debug/prefix", ask(secret), headers=one).json()["num_cached_tokens"] > 0
        found = post(f"{url}/debug/prefix", ask(secret), headers=two).json()
        assert (found["num_cached_tokens"], found["num_matching_tokens"], found["differs"]) == (0, 0, None)
        shown = httpx.get(f"{url}/debug/blocks", headers=two)
        assert "business" not in shown.text and "mine" not in shown.text
        body = ask("count", max_tokens=20_000, ignore_eos=True, stream=True)
        with httpx.stream("POST", url + CHAT, json=body, headers=one, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            wait_for(lambda: running(url, None, headers=two))
            (number,) = running(url, None, headers=two)
            assert post(f"{url}/debug/abort", {"id": number}, headers=two).json() == {"aborted": False}
            assert post(f"{url}/debug/abort", {"id": number}, headers=one).json() == {"aborted": True}


# -- why a prompt was not cached ----------------------------------------------------------------------------------


def test_a_prompt_is_told_where_it_leaves_what_is_cached(url: str) -> None:
    head = "every prompt of this test begins with these words, which fill some blocks " * 3
    tokens = post(f"{url}/tokenize", {"prompt": head + "one"}).json()["tokens"]
    post(
        f"{url}/v1/completions", {"prompt": head + "one and more, to the end of the block and beyond", "max_tokens": 1}
    )
    other = post(f"{url}/tokenize", {"prompt": head + "two"}).json()["tokens"]
    position = next(i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b)
    for prompt in (head + "two", other):
        found = post(f"{url}/debug/prefix", {"prompt": prompt}).json()
        assert found["num_matching_tokens"] == position and found["num_cached_tokens"] == position // 16 * 16
        assert found["differs"] == {"position": position, "token": other[position], "cached_token": None}
    assert post(f"{url}/debug/prefix", {"prompt": head + "two", "cache_salt": "s"}).json()["num_matching_tokens"] == 0
    bad: list[dict[str, Any]] = [{}, {"prompt": "a", "messages": []}, {"prompt": 5}, {"prompt": [10**9]}]
    assert [post(f"{url}/debug/prefix", body).status_code for body in bad] == [400] * 4


def test_requests_are_compared_as_they_come_once_somebody_wants_to_know(llm: AsyncLLM) -> None:
    with serving(llm) as url:
        head = "this one is compared with what was there before it, and not with itself " * 3
        post(url + CHAT, ask(head + "alpha"), headers={"x-request-id": "before"})
        assert httpx.get(f"{url}/debug/prefix").json() == {"requests": []}
        for stream in (False, True):
            for path in (CHAT, "/v1/messages", "/v1/responses"):
                dialect = {"input": head + "beta", "messages": None} if path == "/v1/responses" else {}
                assert post(url + path, ask(head + "beta", stream=stream) | dialect).status_code == 200
        texts_and_ids = {"prompt": [head + "gamma", [5] * 40], "max_tokens": 1}
        usage = post(f"{url}/v1/completions", texts_and_ids, headers={"x-request-id": "both"}).json()["usage"]
        newest = httpx.get(f"{url}/debug/prefix").json()["requests"]
    assert len(newest) == 8 and [each["request_id"] for each in newest[:2]] == ["both", "both"]
    assert sum(each["num_cached_tokens"] for each in newest[:2]) == usage["prompt_tokens_details"]["cached_tokens"]
    assert newest[-1]["differs"]["position"] == newest[-1]["num_matching_tokens"] < newest[-1]["num_tokens"]
    assert all("all is found that can be" in each["reason"] for each in newest[2:-1])


def test_verbose_logs_a_line_for_each_request(llm: AsyncLLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlx_paged.server")
    head = "a log has numbers, and words only if that is asked for; here is a lot of text " * 3
    for log_prompts in (False, True):
        caplog.clear()
        with serving(llm, log_matches=True, log_prompts=log_prompts) as url:
            post(url + CHAT, ask(head + f"wood{log_prompts}"))
            post(url + CHAT, ask(head + f"stone{log_prompts}"), headers={"x-request-id": "second"})
        (line,) = [r.message for r in caplog.records if r.message.startswith("id=second") and "cached" in r.message]
        assert " prompt tokens were cached: it differs from the nearest cached prefix at token " in line
        assert "(token " in line and ("stone" in line) == ("instead of" in line) == log_prompts


def test_usage_says_what_was_cached_in_every_dialect_whole_and_streamed(url: str) -> None:
    def cached(path: str, body: Any, stream: bool) -> int:
        body = ask("", stream=stream, stream_options={"include_usage": True}) | body
        text = post(url + path, body).text
        found = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
        usages = [each.get("usage") or each.get("response", {}).get("usage") for each in found] or [None]
        usage = next(filter(None, reversed(usages))) if stream else json.loads(text)["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        return int(details.get("cached_tokens", usage.get("cache_read_input_tokens", -1)))

    content = "all four dialects are asked the same, which is cached after the first time " * 3
    chat = {"messages": [{"role": "user", "content": content}]}
    cases: list[tuple[str, dict[str, Any]]] = [
        (CHAT, chat),
        ("/v1/completions", {"prompt": content, "messages": None}),
        ("/v1/responses", {"input": content, "messages": None}),
        ("/v1/messages", chat),
    ]
    for path, body in cases:
        cached(path, body, False)
        assert [cached(path, body, stream) >= 32 for stream in (False, True)] == [True, True], path
