"""The examples that ask a server, and the settings of agents."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.scripted_model import make_scripted_model
from helpers.servers import serving

from mlx_paged.async_llm import AsyncLLM

FOLDER = Path(__file__).parents[2] / "examples"
SETTINGS = FOLDER / "agents"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    llm = AsyncLLM(make_scripted_model(tmp_path_factory.mktemp("scripted")), num_kv_blocks=500, block_size=16)
    with serving(llm) as address:
        yield address
    llm.close()


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / name), *arguments]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "ANTHROPIC_"))}
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment, check=False, timeout=120)


CLIENTS = [("openai_client.py", "OPENAI_BASE_URL", "/v1"), ("anthropic_client.py", "ANTHROPIC_BASE_URL", "")]


@pytest.mark.parametrize("name, variable, path", CLIENTS, ids=["openai", "anthropic"])
def test_a_client_streams_thinks_and_calls_its_tool_and_its_second_turn_is_in_the_cache(
    name: str, variable: str, path: str, url: str
) -> None:
    result = run(name, **{variable: url + path})
    assert (result.returncode, result.stderr) == (0, "")
    thought, tool, first, answer, second, *form = result.stdout.splitlines()
    assert thought == "It is the time that they want."
    assert re.fullmatch(r"get_time: \d\d:\d\d UTC", tool)
    assert answer == "All done: the tool said so."
    (_, prompt), (cached, _) = ([int(number) for number in re.findall(r"\d+", line)] for line in (first, second))
    assert cached >= prompt // 16 * 16 - 16 > 0
    assert form in ([], ["form: morning"], ["form: evening"], ["form: night"])
    assert bool(form) == (path == "/v1")


@pytest.mark.parametrize("name, variable, path", CLIENTS, ids=["openai", "anthropic"])
def test_a_client_without_a_server_says_so_in_a_line(name: str, variable: str, path: str) -> None:
    result = run(name, f"http://127.0.0.1:1{path}")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(rf"there is no server at http://127\.0\.0\.1:1{path}: start one with .*\n", result.stderr)


def test_settings_of_agents_name_the_same_model_at_the_address_where_a_server_listens() -> None:
    texts = {file.name: file.read_text() for file in SETTINGS.iterdir()}
    for name, text in texts.items():
        (address,) = re.findall(r"http://[^\s\"']+", text.replace("https://opencode.ai", ""))
        assert address == "http://127.0.0.1:8000" + ("" if name == "claude-code.sh" else "/v1"), name
        assert "qwen3" in text, name
    for name in ("pi.json", "opencode.json"):
        json.loads(texts[name])
    provider = tomllib.loads(texts["codex.toml"])["model_providers"]["mlx-paged"]
    assert provider["wire_api"] == "responses"


def test_settings_of_agents_are_on_the_page_of_the_server() -> None:
    page = (FOLDER.parent / "docs" / "server.md").read_text()
    assert {file.name for file in SETTINGS.iterdir()} <= set(re.findall(r"examples/agents/([\w.-]+)\)", page))
