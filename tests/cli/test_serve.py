"""The command `serve`: what it refuses, and real processes of the scripted model from their ready line to their end."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from helpers.scripted_model import make_scripted_model
from helpers.servers import wait_for
from helpers.stub_llm import assert_one_line, invoke, start

from mlx_paged.cli.serve import _log_abilities

ENDLESS = {
    "messages": [{"role": "system", "content": "SCRIPT:endless"}, {"role": "user", "content": "hi"}],
    "stream": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted_model(tmp_path_factory.mktemp("models") / "scripted")


@contextmanager
def served(*args: str) -> Iterator[tuple[subprocess.Popen[bytes], str, list[str]]]:
    """A process that serves. Yields it, its address and its two ready lines."""
    process = start(
        "serve", "--port", "0", "--num-kv-blocks", "2000", *args, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline().decode().strip() for _ in range(2)]
        address = re.search(r"http://[\d.]+:\d+", lines[0])
        assert address is not None, lines
        yield process, address[0], lines
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Stream:
    """A chat that is read in a thread."""

    def __init__(self, url: str, body: dict[str, Any], **more: Any) -> None:
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(url, body), kwargs=more, daemon=True)
        self._thread.start()
        wait_for(lambda: len(self.lines) > 5)

    def _read(self, url: str, body: dict[str, Any], **more: Any) -> None:
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60, **more) as response:
                for line in response.iter_lines():
                    self.lines.append(line)
        except httpx.HTTPError:
            self.lines.append("cut")

    def end(self) -> list[str]:
        """Wait for the end. Returns all that came."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        return list(filter(None, self.lines))


def test_a_server_of_a_toml_file_says_when_it_is_ready_and_drains_at_a_signal(model: Path, tmp_path: Path) -> None:
    keys, config = tmp_path / "keys", tmp_path / "serve.toml"
    keys.write_text("first\n\nsecond\n")
    settings = {
        "model": str(model),
        "served-model-name": ["one", "two"],
        "api_key_file": str(keys),
        "allowed-host": ["My-Mac.local"],
        "default-max-tokens": 3,
    }
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    with served("--config", str(config), "--default-max-tokens", "4") as (process, url, lines):
        assert lines[0].startswith(f"one is served at {url}/v1; KV cache: 2000 blocks")
        assert lines[1] == f"OPENAI_BASE_URL={url}/v1 ANTHROPIC_BASE_URL={url} model=one key=the key"
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer second", "Host": "my-mac.local:80"}
        names = [card["id"] for card in httpx.get(f"{url}/v1/models", headers=headers).json()["data"]]
        assert names == ["one", "two"]
        body = ENDLESS | {"stream": False, "model": "two"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-api-key": "first"}, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 4

        stream = Stream(url, ENDLESS | {"max_tokens": 1000}, headers=headers)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: _status(f"{url}/health") != 200)
        received = stream.end()  # it is given the time that it needs
        assert received[-1] == "data: [DONE]" and '"finish_reason":"length"' in received[-2]
        assert process.wait(30) == 0


def _status(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_end_in_time_is_told_so_or_cut_by_a_second_signal(number: int, model: Path) -> None:
    is_cut = number == signal.SIGINT
    timeout = "600" if is_cut else "0.2"
    with served("--model", str(model), "--drain-timeout", timeout) as (process, url, lines):
        assert lines[0].startswith("scripted is served at") and lines[1].endswith("model=scripted key=any")
        stream = Stream(url, ENDLESS)
        process.send_signal(number)
        if is_cut:
            wait_for(lambda: _status(f"{url}/health") == 503)
            assert _status(f"{url}/v1/models") == 200
            refused = httpx.post(f"{url}/v1/chat/completions", json=ENDLESS, timeout=10)
            assert refused.status_code == 503 and refused.headers["Retry-After"]
            assert process.poll() is None
            process.send_signal(number)
        assert process.wait(30) == (130 if is_cut else 0)
        last = stream.end()[-1]
        assert is_cut or "shutting down" in last


@pytest.mark.slow
def test_ranks_drain_when_each_of_their_processes_gets_the_signal_as_from_a_service_manager() -> None:
    with served("--tensor-parallel-size", "2") as (process, url, _):
        story = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 40, "ignore_eos": True}
        stream = Stream(url, story | {"stream": True})
        os.killpg(process.pid, signal.SIGTERM)
        received = stream.end()
        assert received[-1] == "data: [DONE]" and '"finish_reason":"length"' in received[-2]
        assert process.wait(30) == 0


BREAKING = """
import sys
from mlx_paged.cli.main import main
from mlx_paged.runner.model_runner import ModelRunner

def run(self, *arguments):
    raise SystemExit("the device is gone")

ModelRunner.run = run
sys.argv = ["mlx-paged", "serve", "--port", "0", "--num-kv-blocks", "100", "--model", sys.argv[1]]
main()
"""


def test_a_server_whose_engine_breaks_says_so_and_ends_with_an_error(model: Path) -> None:
    command = [sys.executable, "-c", BREAKING, str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
            assert address is not None
            body = {"messages": [{"role": "user", "content": "hi"}]}
            answer = httpx.post(f"{address[0]}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 503 and "the engine has ended" in answer.text
            assert "device" not in answer.text
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1 and "mlx-paged: the engine broke: see the log" in errors
    assert "the device is gone" in errors


REFUSED = [
    (["--host", "0.0.0.0"], 2, ["--host 0.0.0.0", "--api-key-file", "MLX_PAGED_API_KEY"]),
    (["--host", "example.org"], 2, ["--host example.org", "--api-key-file"]),
    (["--max-body", "much"], 2, ["--max-body", "much"]),
    (["--port", "70000"], 2, ["--port", "70000"]),
    (["--max-thinking-tokens", "-1"], 2, ["--max-thinking-tokens"]),
    (["--drain-timeout", "-1"], 2, ["--drain-timeout"]),
    (["--api-key-file", "EMPTY"], 2, ["--api-key-file", "no key"]),
    (["--api-key-file", "nowhere"], 2, ["--api-key-file", "nowhere"]),
    (["--api-key-file", "NO_TEXT"], 2, ["--api-key-file", "NO_TEXT", "can't be read"]),
    (["--idle-unload", "nan"], 2, ["--idle-unload", "nan"]),
    (["--drain-timeout", "nan"], 2, ["--drain-timeout", "nan"]),
    (["--served-model-name", ""], 2, ["--served-model-name", "empty"]),
    (["--allowed-host", ""], 2, ["--allowed-host ''", "my-mac.local"]),
    (["--allowed-host", "http://mac"], 2, ["--allowed-host 'http://mac'", "without a port"]),
    (["--allowed-host", "mac:8000"], 2, ["--allowed-host 'mac:8000'", "without a port"]),
    *((["--cors-origin", origin], 2, ["--cors-origin", origin]) for origin in ("nonsense", "https://a.example/", "")),
    (["--config", "EMPTY", "--block-size", "0"], 2, ["--block-size"]),
    (["--config", "UNKNOWN"], 2, ["--config", "'prot'", "--prot"]),
    (["--config", "BROKEN"], 2, ["--config", "can't be read"]),
    (["--config", "WRONG"], 2, ["--port", "many"]),
]


@pytest.mark.parametrize("args, code, words", REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_what_can_not_be_served_so_is_one_line(
    args: list[str], code: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_PAGED_API_KEY", raising=False)
    files = {"EMPTY": "\n", "UNKNOWN": "prot = 1\n", "BROKEN": "= 1", "WRONG": 'port = "many"\n'}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "NO_TEXT").write_bytes(b"\xff\xfe\xfd")
    assert_one_line(invoke("serve", *(str(tmp_path / arg) if arg.isupper() else arg for arg in args)), code, *words)


def test_a_port_that_is_taken_is_one_line_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_line(invoke("serve", "--port", port), 1, f"--port {port}", "in use")


def test_another_address_needs_a_key_which_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_PAGED_API_KEY", "secret")
    result = invoke("serve", "--host", "0.0.0.0", "--port", "0", "--model", "no-such-model")
    assert result.exit_code == 1 and "--api-key-file" not in result.stderr and "secret" not in result.output


def test_a_model_that_writes_in_channels_is_refused_before_its_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_scripted_model(tmp_path / "harmony")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    for content in ("<|channel|>", "<|message|>"):
        token_id = data["model"]["vocab"].setdefault(content, len(data["model"]["vocab"]))
        data["added_tokens"].append({**data["added_tokens"][0], "id": token_id, "content": content})
    path.write_text(json.dumps(data))
    monkeypatch.setattr("mlx_paged.llm.ModelRunner", lambda *_: pytest.fail("its weights are loaded"))
    result = invoke("serve", "--model", str(folder), "--port", "0", "--num-kv-blocks", "20")
    assert_one_line(result, 1, "harmony", "gpt-oss", "generate")


def _llm(*, knows_tools: bool = True, **abilities: bool) -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(**abilities), knows_tools=knows_tools)


def test_what_a_model_can_not_do_is_logged_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _log_abilities(_llm(has_tool_calling=True, has_thinking=True), 5)
        _log_abilities(_llm(has_tool_calling=True, has_thinking=False), None)
        assert not caplog.messages
        _log_abilities(_llm(has_tool_calling=False, has_thinking=False), 0)
        _log_abilities(_llm(has_tool_calling=False, knows_tools=False), None)
    calls_are_text, no_thinking, not_told = caplog.messages
    assert "calls are text" in calls_are_text and "--max-thinking-tokens" in no_thinking
    assert "not told of them unless tool_choice" in not_told
