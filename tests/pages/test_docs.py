"""What the pages say can be done can be done: their commands and Python run as they stand, their links lead somewhere.

Commands run in a copy of the repository, with a hub on this machine that gives the demo model under every alias.
Nothing else is replaced.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from helpers.hub_stub import Hub, serve

from mlx_paged import BlockManager
from mlx_paged.models.aliases import ALIASES
from mlx_paged.models.hub import DEMO_FOLDER

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "python3", "mlx-paged", "pytest", "bash", "pip", "pre-commit", "ruff", "mypy", "git")

# Why a command is not run here: what its beginning stands for.
INSTALLS = "installs packages from an index; test_packaging.py installs, and .ci/run is the same"
MINUTES = "takes minutes; test_benchmarks.py runs it at a small size"
NOT_RUN = {
    "python3 -m venv": INSTALLS,
    "pip install": INSTALLS,
    "bash .ci/run": "runs these tests",
    "pre-commit install": "changes the repository's hooks",
    "pytest": "runs other tests",
    "python benchmarks/memory.py --json": MINUTES,
    "python benchmarks/host_overhead.py": MINUTES,
    "python benchmarks/kernel_traffic.py --json": MINUTES,
    "python benchmarks/cuda_registers.py": MINUTES,
    "python benchmarks/workloads.py --json": MINUTES,
    "python benchmarks/workloads.py --random-weights": MINUTES,
    "python benchmarks/concurrency.py --json": MINUTES,
    "python benchmarks/on_a_gpu.py": "needs an NVIDIA card",
    "mlx-paged bench": "takes minutes; tests/cli/test_bench.py runs it at a small size",
    "bash benchmarks/on_a_mac.sh": "needs a Mac, and takes minutes; test_on_a_mac.py tries its parts",
    "python docs/api.py": "needs the extra docs; test_api_reference.py runs it where that is installed",
    "mlx-paged generate --model qwen3-4b": "is for a Mac, whose memory it half fills",
}


class Snippet(NamedTuple):
    """Something on a page that can be run, and where."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def _blocks(page: Path) -> Iterator[tuple[str, int, str]]:
    """The fenced blocks of a page: language, line number, text."""
    language, first, lines = None, 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.lstrip().startswith("```"):
            if language is None:
                language, first, lines = line.strip().removeprefix("```"), number + 1, []
            else:
                yield language, first, "\n".join(lines)
                language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}: a block that does not end"


def _prose(page: Path) -> str:
    """A page with its blocks blanked, so that line numbers stay."""
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    return re.sub(r"^ *```.*?^ *```", blank, page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> list[Snippet]:
    """Every command of every page, in blocks and in running text, once."""
    found: dict[str, Snippet] = {}
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for language, first, text in _blocks(page):
            assert language in ("", "sh", "python", "mermaid", "json"), f"{name}:{first}: a block of {language!r}"
            if language == "sh":
                joined = text.replace("\\\n", "  ")
                for number, line in enumerate(joined.splitlines(), start=first):
                    command = line.split("  #")[0].strip()
                    if command and not command.startswith("#"):
                        found.setdefault(command, Snippet(name, number, command))
        prose = _prose(page)
        for match in re.finditer(r"`([^`\n]+)`", prose):
            words = [word for word in match[1].split() if not re.match(r"[A-Z_]+=", word)]
            if len(words) > 1 and Path(words[0]).name in PROGRAMS:
                found.setdefault(match[1], Snippet(name, prose.count("\n", 0, match.start()) + 1, match[1]))
    return list(found.values())


def reason_not_to_run(command: str) -> str | None:
    bare = re.sub(r"^([A-Z_]+=\S+ )*(\.venv/bin/)?", "", command)
    return next((reason for start, reason in NOT_RUN.items() if bare.startswith(start)), None)


RUN = [snippet for snippet in commands() if reason_not_to_run(snippet.text) is None]
PYTHON = [
    Snippet(str(page.relative_to(ROOT)), first, text)
    for page in PAGES
    for language, first, text in _blocks(page)
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
    return done.stdout


# -- what is run ---------------------------------------------------------------------------------------------------


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
def test_a_command_of_the_pages_runs(command: Snippet, checkout: tuple[Path, dict[str, str]]) -> None:
    printed = run(["bash", "-ec", command.text], checkout, stdin="Tell me a story.\n/exit\n")
    assert printed.strip()
    for page in PAGES:
        copy = checkout[0] / page.relative_to(ROOT)
        assert copy.read_text() == page.read_text(), f"{command} overwrites {page.name}"


@pytest.mark.parametrize("snippet", PYTHON, ids=lambda snippet: f"{snippet.page}:{snippet.line}")
def test_python_of_the_pages_runs(snippet: Snippet, checkout: tuple[Path, dict[str, str]]) -> None:
    program = (
        "import ast, asyncio, inspect, sys\n"
        "code = compile(sys.stdin.read(), 'page', 'exec', flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)\n"
        "result = eval(code, {'__name__': '__main__'})\n"
        "asyncio.run(result) if inspect.iscoroutine(result) else None\n"
    )
    run([sys.executable, "-c", program], checkout, stdin=snippet.text)


def test_the_life_of_a_sequence_in_the_memory_page_is_what_a_block_manager_does() -> None:
    (text,) = [text for _, _, text in _blocks(ROOT / "docs" / "memory.md") if "m = BlockManager" in text]
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


# -- what is only looked at ----------------------------------------------------------------------------------------


def test_links_lead_to_files_and_headings_that_exist() -> None:
    num_links = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
            if "://" in target:
                continue
            num_links += 1
            path, _, heading = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings}
                assert heading in anchors, f"{page.name}: {target}"
    assert num_links > 20


def test_flags_that_the_pages_name_are_options_of_the_command_line_or_of_a_script() -> None:
    from mlx_paged.cli.main import cli

    known = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in cli.params for option in parameter.opts}
    known |= set(re.findall(r'"(--[a-z-]+)"', "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))))
    for page in PAGES:
        prose = " ".join(re.findall(r"`([^`\n]+)`", _prose(page)))
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose):
            assert flag in known, f"{page.name} names {flag}"


def test_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|sh|svg|metal|h))`", _prose(page)):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_file_tree_of_the_readme_names_files_that_exist() -> None:
    (tree,) = [text for _, _, text in _blocks(ROOT / "README.md") if text.startswith("mlx_paged/\n")]
    names = re.findall(r"^  (\S+)", tree, flags=re.MULTILINE)
    assert len(names) > 20
    for name in names:
        assert list((ROOT / "mlx_paged").glob(name)), name
    for folders in re.findall(r"^(\S+/)(?:, (\S+/))?", tree, flags=re.MULTILINE):
        assert all((ROOT / folder).is_dir() for folder in folders if folder)


def test_the_table_of_parts_in_the_engine_page_is_that_of_the_profile() -> None:
    from mlx_paged.engine.profile import PARTS

    page = (ROOT / "docs" / "engine.md").read_text()
    section = page.split("## Where the time of a step goes")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == list(PARTS)


# -- the design page -----------------------------------------------------------------------------------------------

DESIGN = ROOT / "docs" / "design.md"
DOTTED = r"[a-z_]+(?:\.[A-Za-z_]\w*)+"


def look_up(name: str) -> Any:
    """What `module.Name.attribute` in the package is; None for a field of a dataclass without a value."""
    parts = name.split(".")
    depth = 2 if parts[0] == "models" else 1
    found: Any = import_module(".".join(["mlx_paged", *parts[:depth]]))
    for part in parts[depth:]:
        found = None if part in getattr(found, "__dataclass_fields__", ()) else getattr(found, part)
    return found


def calls_of_the_diagram() -> list[tuple[str, str | None]]:
    """The names in the diagram of the design page, top to bottom, each with the one that it is indented under."""
    (diagram,) = [text for _, _, text in _blocks(DESIGN) if text.startswith("any thread")]
    calls: list[tuple[str, str | None]] = []
    around: list[tuple[int, str | None]] = []
    for line in filter(None, diagram.splitlines()):
        match = re.match(rf"( *)(?:.*each call of )?({DOTTED})", line)
        indent, name = (len(match[1]), match[2]) if match else (0, None)
        while around and around[-1][0] >= indent:
            around.pop()
        if name is not None:
            calls.append((name, around[-1][1] if around else None))
        around.append((indent, name))
    return calls


def test_names_on_the_design_page_exist() -> None:
    names = [name for name in re.findall(r"`([^`\n]+)`", _prose(DESIGN)) if re.fullmatch(DOTTED, name)]
    assert len(names) > 70
    for name in [*names, *(name for name, _ in calls_of_the_diagram())]:
        look_up(name)
    tables = _prose(DESIGN).split("## Names in courses and papers")[1]
    rows = re.findall(r"^\| (?!there|---)(.*) \| (.*) \| ?(.*)\|$", tables, flags=re.MULTILINE)
    assert len(rows) > 50
    for there, here, where in rows:
        assert re.fullmatch(rf"`{DOTTED}`(, `{DOTTED}`)* ", where) or here == "not here", there


def test_calls_come_in_the_order_of_the_design_page_and_inside_what_they_are_indented_under() -> None:
    from mlx_paged import LLM, BeamSearchParams, SamplingParams

    diagram = calls_of_the_diagram()
    assert len(diagram) > 20
    name_of_code = {look_up(name).__code__: name for name, _ in diagram}
    inside: list[str | None] = [None]
    steps: list[list[tuple[str, str | None]]] = [[]]  # each from what is added before it

    def record(frame: FrameType, event: str, _: object) -> None:
        name = name_of_code.get(frame.f_code)
        if name is not None and event == "call":
            steps[-1].append((name, inside[-1]))
            inside.append(name)
        elif name is not None and event == "return":
            inside.pop()

    engine = LLM(num_kv_blocks=64, pipelining="off").engine
    later = [("Tom has a dog.", BeamSearchParams(beam_width=2, max_tokens=9)), ("Mia", SamplingParams(max_tokens=3))]
    sys.setprofile(record)
    try:
        engine.add_request("Tell me a story.", SamplingParams(max_tokens=40, stop=["no such word"]))
        while engine.has_unfinished():
            engine.step()
            steps.append([])
            if later:
                engine.add_request(*later.pop())
    finally:
        sys.setprofile(None)
    happened = {call for step in steps for call in step}
    assert set(diagram) <= happened
    for step in steps:
        first = {call: index for index, call in reversed(list(enumerate(step)))}
        places = [first[call] for call in diagram if call in first]
        assert places == sorted(places), step


def test_the_parts_of_a_step_come_in_the_order_of_the_design_page(tmp_path: Path) -> None:
    from mlx_paged import LLM, SamplingParams

    section = DESIGN.read_text().split("## The order of a step")[1].split("\n## ")[0]
    llm = LLM(num_kv_blocks=64, pipelining="submit", profile=True)
    llm.generate("Tell me a story.", SamplingParams(max_tokens=9))
    assert llm.profile is not None
    llm.profile.write(tmp_path / "trace.json")
    events = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    steps = " ".join(events).split("step ")
    assert " ".join(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == steps[5].strip()


def test_settings_that_the_pages_give_engines_exist() -> None:
    from mlx_paged import EngineConfig

    settings = inspect.signature(EngineConfig).parameters
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`(\w+)=", text)) & {"swap_space", "prefix_cache_dir", "allocator", "profile"}
    assert named <= set(settings) and len(named) >= 3
