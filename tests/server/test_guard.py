"""Who may speak to the server, and what bad requests are told."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from typing import Any

import anthropic
import httpx
import openai
import pytest
from helpers.servers import post, serving, wait_for

from mlx_paged.async_llm import AsyncLLM
from mlx_paged.server.guard import Access

USER: list[Any] = [{"role": "user", "content": "a secret"}]
CHAT = "/v1/chat/completions"


def assert_answers(url: str, **more: Any) -> None:
    response = post(url + CHAT, {"messages": USER}, **more)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "localhost.evil.example"])
def test_a_page_of_another_name_that_leads_here_gets_nothing(host: str, url: str) -> None:
    response = post(url + CHAT, {"messages": USER}, headers={"Host": host})
    assert response.status_code == 403 and "--allowed-host" in response.text
    assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_names_of_the_loopback_are_its_own(host: str, url: str) -> None:
    assert_answers(url, headers={"Host": host})


def test_foreign_pages_are_refused_and_allowed_ones_are_named(llm: AsyncLLM, url: str) -> None:
    for method in ("POST", "OPTIONS"):
        response = httpx.request(
            method, url + CHAT, json={"messages": USER}, headers={"Origin": "https://evil.example"}
        )
        assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    assert_answers(url, headers={"Origin": url})
    assert_answers(url, headers={"Origin": url.replace("http:", "https:")})  # behind a proxy that encrypts
    assert "access-control-allow-origin" not in httpx.get(f"{url}/health").headers
    with serving(llm, Access(origins=("https://good.example",))) as open_url:
        headers = {"Origin": "https://good.example"}
        response = httpx.options(open_url + CHAT, headers=headers)
        assert response.status_code == 204 and response.headers["access-control-allow-origin"] == headers["Origin"]
        assert_answers(open_url, headers=headers)


def test_a_key_is_asked_for_everywhere_but_where_nothing_is_told(llm: AsyncLLM) -> None:
    with serving(llm, Access(keys=(b"k1", "schl\u00fcssel".encode()))) as url:
        for headers in ({}, {"Authorization": "Bearer no"}, {"x-api-key": b"\xff\xfe"}, {"Authorization": "Basic k1"}):
            response = post(url + CHAT, {"messages": USER}, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/metrics").status_code == httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        assert_answers(url, headers={"Authorization": "Bearer k1"})
        assert_answers(url, headers={"x-api-key": "schl\u00fcssel".encode()})
        assert post(f"{url}/v1/messages", {}).status_code == 401


def test_with_several_keys_nobody_hits_what_another_has_asked(llm: AsyncLLM) -> None:
    body = {"messages": [{"role": "user", "content": "a long prompt that only one of them knows " * 10}]}

    def num_cached(url: str, key: str) -> int:
        usage = post(url + CHAT, body, headers={"x-api-key": key}).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    with serving(llm, Access(keys=(b"k1", b"k2"))) as url:
        assert [num_cached(url, key) > 0 for key in ("k1", "k1", "k2", "k2")] == [False, True, False, True]


@pytest.mark.parametrize(
    "content, kind, status",
    [
        (b'{"messages": []}', "text/plain", 415),
        (b'{"messages": []}', "", 415),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{", "application/json", 400),
        (b'{"temperature": NaN}', "application/json", 400),
        (b'{"temperature": -Infinity}', "application/json", 400),
        (b'{"a": 1, "a": 2}', "application/json", 400),
        (b'{"a": "\xff"}', "application/json", 400),
        (rb'{"a": "\ud800"}', "application/json", 400),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "application/json", 400),
        (b'{"a": "' + b"x" * 2_000_000 + b'"}', "application/json", 413),
    ],
    ids=range(12),
)
def test_bad_bodies_are_told_what_is_wrong(content: bytes, kind: str, status: int, llm: AsyncLLM, url: str) -> None:
    if status == 413:
        with serving(llm, max_body=1 << 20) as small:
            for body in (content, iter([content])):  # by its length, and where that is not said
                response = httpx.post(small + CHAT, content=body, headers={"Content-Type": kind})
                assert response.status_code == 413 and "--max-body" in response.text
        return
    response = httpx.post(url + CHAT, content=content, headers={"Content-Type": kind})
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert_answers(url)


def test_braces_in_a_text_nest_nothing(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "{[" * 300}], "max_tokens": 1}
    assert post(url + CHAT, body).status_code == 200


def test_a_body_that_does_not_come_times_out(llm: AsyncLLM) -> None:
    with (
        serving(llm, body_timeout_s=0.3) as url,
        socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as client,
    ):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += "Content-Length: 100\r\n\r\n{"
        client.sendall(head.encode())
        client.settimeout(10)
        assert b"408" in client.recv(1000).split(b"\r\n")[0]


def test_unknown_paths_and_methods_get_json(url: str) -> None:
    for path in ("/api/tags", "/v1/embeddings", "/v1/v1/messages", "/../etc/passwd", "/v1/chat/completions/"):
        response = httpx.post(url + path, json={})
        assert response.status_code == 404 and response.json()["error"]
    assert "one /v1" in httpx.post(f"{url}/v1/v1/messages", json={}).text
    assert httpx.get(url + CHAT).status_code == 405
    assert httpx.head(f"{url}/health").status_code == httpx.head(url).status_code == 200
    assert httpx.head(url + CHAT).status_code == 405 and httpx.head(f"{url}/nothing").status_code == 404


def test_each_request_has_an_id_in_its_answer_and_in_the_log_which_has_no_prompts(
    llm: AsyncLLM, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "mlx_paged.server")
    response = post(url + CHAT, {"messages": USER, "top_fantasy": 1}, headers={"X-Request-Id": "my.id-1"})
    assert response.headers["x-request-id"] == "my.id-1"
    for bad in ("a b", "x" * 65, "<script>"):
        given = post(url + CHAT, {"messages": [{"role": "user"}] * 2}, headers={"X-Request-Id": bad})
        assert given.headers["x-request-id"] != bad and len(given.headers["x-request-id"]) == 32
    wait_for(lambda: "my.id-1" in caplog.text)
    assert "a secret" not in caplog.text and "POST /v1/chat/completions 200" in caplog.text
    assert caplog.text.count("top_fantasy") <= 1
    with serving(llm, log_prompts=True) as talkative:
        assert_answers(talkative)
    assert "a secret" in caplog.text


def test_health_models_and_metrics_tell_what_there_is(url: str, llm: AsyncLLM) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    (card,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert card["id"] == "scripted" and card["object"] == "model" and card["max_model_len"] == llm.max_model_len
    assert httpx.get(f"{url}/v1/models/scripted").json() == card
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        assert [each.id for each in client.models.list()] == ["scripted"]
    with anthropic.Anthropic(base_url=url, api_key="any") as claude:
        (info,) = claude.models.list(limit=20)
        assert info == claude.models.retrieve("scripted") == anthropic.types.ModelInfo.model_validate(card)
        assert (info.id, info.display_name, info.max_input_tokens) == ("scripted", "scripted", llm.max_model_len)
    assert httpx.get(f"{url}/v1/models/other/one").json()["error"]["code"] == "model_not_found"


METRICS = {
    "gauge": {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
              "mlx_paged:http_clients", "mlx_paged:max_step_seconds", "mlx_paged:state_bytes",
              "mlx_paged:checkpoints"},
    "counter": {"vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total",
                "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
                "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total",
                "vllm:spec_decode_num_accepted_tokens_total",
                "mlx_paged:cow_copies_total", "mlx_paged:swapped_blocks_total", "mlx_paged:swapped_states_total",
                "mlx_paged:steps_total", "mlx_paged:rejected_total"},
    "histogram": {"vllm:time_to_first_token_seconds", "vllm:time_per_output_token_seconds",
                  "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds", "vllm:request_prompt_tokens",
                  "vllm:request_generation_tokens", "vllm:iteration_tokens_total"},
}  # fmt: skip


def test_metrics_have_the_names_that_monitors_of_vllm_know(url: str) -> None:
    assert_answers(url)
    text = httpx.get(f"{url}/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    for kind, names in METRICS.items():
        found = {name for name, each in kinds.items() if each == kind and not name.endswith("_created")}
        assert found == names
        for name in names - {"mlx_paged:rejected_total"}:  # which may have nothing to tell
            sample = f"{name}_bucket" if kind == "histogram" else name
            assert re.search(rf'^{sample}\{{.*model_name="scripted".*\}} ', text, re.MULTILINE), name
    assert metric(url, "mlx_paged:max_step_seconds") >= 0.05


def test_each_step_is_counted_by_its_tokens(llm: AsyncLLM, url: str) -> None:
    def steps() -> list[float]:
        wait_for(lambda: llm.snapshot.num_steps == asyncio.run(llm.stats()).num_steps)
        names = ('_bucket{le="1.0"', '_bucket{le="64.0"', '_bucket{le="+Inf"', "_sum")
        return [metric(url, f"vllm:iteration_tokens_total{name}") for name in names]

    def complete(prompt: list[int]) -> None:
        post(f"{url}/v1/completions", {"prompt": prompt, "max_tokens": 5, "ignore_eos": True, "temperature": 0})

    complete([1])  # which leaves no step behind that was made for what might have gone on
    before = steps()
    complete([0] * 40 + [1])
    assert [new - old for new, old in zip(steps(), before, strict=True)] == [4, 5, 5, 41 + 4]


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("stream", [True, False])
def test_requests_are_counted_and_timed_once_by_the_names_that_monitors_know(stream: bool, url: str) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
    names += ("vllm:e2e_request_latency_seconds_count", "vllm:time_to_first_token_seconds_count")
    names += ("vllm:request_generation_tokens_sum", 'mlx_paged:rejected_total{model_name="scripted",status="400"}')
    before = [metric(url, name) for name in names]
    body = {"messages": USER, "n": 2, "stream": stream, "stream_options": {"include_usage": True}}
    answer = post(url + CHAT, body)
    post(url + CHAT, {"messages": []})
    num_prompt = post(f"{url}/tokenize", {"messages": USER}).json()["count"]
    assert answer.status_code == 200
    after = [metric(url, name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [num_prompt, 12, 2, 1, 1, 12, 1]
    assert metric(url, "mlx_paged:http_clients") == 0


def test_a_prompt_is_tokenised_and_back(url: str) -> None:
    tokens = post(f"{url}/tokenize", {"prompt": "Hello, caf\u00e9"}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"]
    assert post(f"{url}/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "Hello, caf\u00e9"}
    assert post(f"{url}/detokenize", {"tokens": [10**9]}).status_code == 400
    assert json.loads(post(f"{url}/tokenize", {}).text)["error"]["param"] == "prompt"
    assert json.loads(post(f"{url}/tokenize", {"prompt": 5}).text)["error"]["param"] == "prompt"
