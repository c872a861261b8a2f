"""What the pages say can be done can be done: their commands and Python run as they stand.

Commands run in a copy of the repository, with a hub on this machine that gives the demo model under every alias.
Nothing else is replaced.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_stub import Hub, serve
from helpers.pages import PAGES, ROOT, Snippet, blocks_of, commands

from mlx_paged import BlockManager
from mlx_paged.models.aliases import ALIASES
from mlx_paged.models.hub import DEMO_FOLDER

# Why a command is not run here: what its beginning stands for.
INSTALLS = "installs packages from an index; test_packaging.py installs, and .ci/run is the same"
MINUTES = "takes minutes; test_benchmarks.py runs it at a small size"
NOT_RUN = {
    "python3 -m venv": INSTALLS,
    "pip install": INSTALLS,
    "python -m build": "needs an index; test_packaging.py makes both files",
    "bare/bin/mlx-paged": "runs what is installed in such an environment",
    "bash .ci/run": "runs these tests",
    "pre-commit install": "changes the repository's hooks",
    "pytest": "runs other tests",
    "python benchmarks/memory.py --json": MINUTES,
    "python benchmarks/host_overhead.py": MINUTES,
    "python benchmarks/kernel_traffic.py --json": MINUTES,
    "python benchmarks/cuda_registers.py": MINUTES,
    "python benchmarks/command_buffers.py": MINUTES,
    "python benchmarks/attention.py": MINUTES,
    "python docs/pictures.py": "test_pictures_of_runs.py runs it",
    "python benchmarks/results_page.py": "test_results_page.py compares what it writes",
    "python benchmarks/workloads.py": MINUTES,
    "pip download": INSTALLS,
    "cmake": "builds llama.cpp, which takes minutes",
    "python benchmarks/concurrency.py --json": MINUTES,
    "python benchmarks/mixed_load.py": MINUTES,
    "python benchmarks/fair_steps.py": MINUTES,
    "python benchmarks/hybrids.py": MINUTES,
    "python benchmarks/quantised_cache.py": MINUTES,
    "python benchmarks/speculation.py": MINUTES,
    "python benchmarks/parallel.py": MINUTES,
    "mlx-paged generate --tensor-parallel-size": "starts several processes; tests/distributed runs it",
    "python benchmarks/draws.py": MINUTES,
    "python benchmarks/growth.py": "takes minutes; test_growth.py runs it at a small size",
    "python benchmarks/accuracy.py": "needs lm-evaluation-harness, and takes minutes",
    "python examples/lm_eval_model.py": "needs lm-evaluation-harness; test_lm_eval_model.py tries its class",
    "python benchmarks/server.py": MINUTES,
    "python benchmarks/on_a_gpu.py": "needs an NVIDIA card",
    "mlx-paged bench": "takes minutes; tests/cli/test_bench.py runs it at a small size",
    "bash benchmarks/on_a_mac.sh": "needs a Mac, and takes minutes; test_on_a_mac.py tries its parts",
    "python docs/api.py": "needs the extra docs; test_api_reference.py runs it where that is installed",
    "mlx-paged serve": "serves until a signal ends it; tests/server asks what it serves",
    "mlx-paged generate --model qwen3-4b": "is for a Mac, whose memory it half fills",
}


def reason_not_to_run(command: str) -> str | None:
    bare = re.sub(r"^([A-Z_]+=\S+ )*(\.venv/bin/)?", "", command)
    return next((reason for start, reason in NOT_RUN.items() if bare.startswith(start)), None)


RUN = [snippet for snippet in commands() if reason_not_to_run(snippet.text) is None]
PYTHON = [
    Snippet(str(page.relative_to(ROOT)), first, text)
    for page in PAGES
    for language, first, text in blocks_of(page)
    if language == "python"
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """All aliases are the demo model, with the context of a larger one."""
    folder = tmp_path_factory.mktemp("hub") / "demo"
    shutil.copytree(DEMO_FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    with serve(Hub(dict.fromkeys(ALIASES.values(), folder))) as served:
        yield served


@pytest.fixture(scope="module")
def checkout(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A copy of the repository, and an environment with `python` and `mlx-paged` on its path."""
    folder, programs = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("bin")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "build", "dist")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
    schema = {"type": "object", "properties": {"name": {"enum": ["Mia", "Tom"]}}, "required": ["name"]}
    (folder / "person.json").write_text(json.dumps(schema | {"additionalProperties": False}))
    (folder / "requests.jsonl").write_text('{"id": "a", "prompt": "Why is the sky blue?", "max_tokens": 4}\n')
    (folder / "folder").mkdir()  # of saved prompts
    for name, arguments in {"python": "", "mlx-paged": "-m mlx_paged"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    changes = {
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    return folder, os.environ | changes


def run(command: list[str], checkout: tuple[Path, dict[str, str]], stdin: str = "") -> str:
    folder, environment = checkout
    done = subprocess.run(command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"Traceback|\b\w*(Error|Warning)\b", done.stderr), done.stderr
    return done.stdout


def test_the_pages_have_commands_and_python_to_run() -> None:
    assert {"mlx-paged chat --model qwen3", "python examples/block_picture.py"} <= {one.text for one in RUN}
    assert len(RUN) >= 10 and len(PYTHON) >= 3


def test_every_reason_not_to_run_a_command_is_used() -> None:
    unused = set(NOT_RUN)
    for command in commands():
        bare = re.sub(r"^([A-Z_]+=\S+ )*(\.venv/bin/)?", "", command.text)
        unused -= {start for start in NOT_RUN if bare.startswith(start)}
    assert unused == set()


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.text)
@pytest.mark.slow
def test_a_command_of_the_pages_runs(command: Snippet, checkout: tuple[Path, dict[str, str]]) -> None:
    printed = run(["bash", "-ec", command.text], checkout, stdin="Tell me a story.\n/exit\n")
    outputs = re.findall(r"--output (\S+)", command.text)
    assert "".join([printed, *((checkout[0] / output).read_text() for output in outputs)]).strip()
    for page in PAGES:
        copy = checkout[0] / page.relative_to(ROOT)
        assert copy.read_text() == page.read_text(), f"{command} overwrites {page.name}"


@pytest.mark.parametrize("snippet", PYTHON, ids=lambda snippet: f"{snippet.page}:{snippet.line}")
def test_python_of_the_pages_runs(snippet: Snippet, checkout: tuple[Path, dict[str, str]]) -> None:
    program = (
        "import ast, asyncio, inspect, sys\n"
        "printed = []\n"
        "code = compile(sys.stdin.read(), 'page', 'exec', flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)\n"
        "result = eval(code, {'__name__': '__main__', 'print': lambda *values, **_: printed.append(values)})\n"
        "asyncio.run(result) if inspect.iscoroutine(result) else None\n"
        "print(len(printed))\n"
    )
    num_printed = run([sys.executable, "-c", program], checkout, stdin=snippet.text)
    assert (int(num_printed.split()[-1]) > 0) == ("print(" in snippet.text)


def test_the_life_of_a_sequence_in_the_memory_page_is_what_a_block_manager_does() -> None:
    (text,) = [text for _, _, text in blocks_of(ROOT / "docs" / "memory.md") if "m = BlockManager" in text]
    names = {"BlockManager": BlockManager}
    num_results = num_tables = 0
    for line in text.splitlines():
        match = re.match(r"(m[ .].*?)(?: +-> ((?:\S|, )+))?(?:  +|$)(.*)", line)
        assert match is not None, line
        *first, last = re.split(r"; ", match[1])
        for statement in first if match[2] else match[1].split("; "):
            exec(statement, names)
        if match[2]:
            assert eval(last, names) == ast.literal_eval(match[2]), line
            num_results += 1
        for name, table in re.findall(r"\b([A-Z]): (\d(?: \d)*)", match[3]):
            assert names["m"].block_table(name) == [int(block) for block in table.split()], line  # type: ignore[attr-defined]
            num_tables += 1
    assert num_results >= 6 and num_tables >= 10
