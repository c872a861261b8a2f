"""What the pages name exists: files, headings, flags, settings, and the code by its names."""

from __future__ import annotations

import builtins
import inspect
import json
import re
from pathlib import Path

import pytest
from helpers.names import NAME, look_up, names_in
from helpers.pages import PAGES, ROOT, prose_of

RESULTS = ROOT / "benchmarks" / "results" / "README.md"
README = ROOT / "README.md"
DESIGN, NAMES = ROOT / "docs" / "design.md", ROOT / "docs" / "names.md"
OF_OTHERS = {
    "ArraysCache",
    "BatchGenerator",
    "Klear",
    "PageBlock",
    "PageAllocator",
    "PageTable",
    "PagedBatchManager",
    *vars(builtins),
}


def test_links_lead_to_files_and_headings_that_exist() -> None:
    num_links = 0
    for page in [*PAGES, ROOT / "CHANGELOG.md", RESULTS]:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
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


def test_every_page_is_reached_from_another_one() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
        if "://" not in target and target.partition("#")[0]
    }
    assert {page for page in [*PAGES, RESULTS] if page.resolve() not in linked} <= {README}


def test_the_first_page_is_short_and_the_index_has_each_page_in_a_line() -> None:
    assert len(README.read_text().splitlines()) <= 200
    index = ROOT / "docs" / "README.md"
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\) \| .+ \|$", index.read_text(), flags=re.MULTILINE)
    assert sorted([*listed, index.name]) == sorted(page.name for page in PAGES if page.parent == index.parent)


def test_flags_that_the_pages_name_are_options_of_the_command_line_or_of_a_script() -> None:
    from mlx_paged.cli.main import cli

    known = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in cli.params for option in parameter.opts}
    known |= set(re.findall(r'"(--[a-z-]+)"', "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))))
    for page in PAGES:
        spans = re.findall(r"`([^`\n]+)`", prose_of(page))
        prose = " ".join(span for span in spans if not span.startswith(("systemctl", "journalctl")))
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose):
            assert flag in known, f"{page.name} names {flag}"


def test_files_and_folders_that_the_pages_name_exist() -> None:
    num_names = 0
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+/(?:[\w.-]+\.(?:py|md|json|sh|svg|metal|h|cu|cuh))?)`", prose_of(page)):
            num_names += 1
            assert name == "build/" or (ROOT / name).exists(), f"{page.name} names {name}"
    assert num_names > 60


def test_the_table_of_the_readme_has_the_folders_in_the_order_in_which_imports_run() -> None:
    from test_layering import ROOMS

    section = README.read_text().split("## The code")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \|", section, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    rooms = [Path(name).stem for name in named if name.startswith("mlx_paged/") or name == "models/"]
    assert rooms == [room for room in ROOMS if room in rooms]
    folders = [path.name for path in (ROOT / "mlx_paged").iterdir() if (path / "__init__.py").exists()]
    assert set(folders) <= set(rooms) | {"models"}


def test_code_that_the_pages_name_exists() -> None:
    num_names = 0
    for page in PAGES:
        for name in names_in(prose_of(page)):
            first = name.split(".")[0]
            if first not in OF_OTHERS and not first.isupper():
                num_names += 1
                look_up(name)
    assert num_names > 120


def test_every_name_of_another_text_has_one_here_that_exists() -> None:
    rows = re.findall(r"^\| (?!there|---)(.*) \|$", prose_of(NAMES), flags=re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        there, *_, last = row.split(" | ")
        names = re.findall(r"`([^`]+)`", last)
        ours = [name for name in names if re.fullmatch(NAME, name)]
        assert ours or there == "page, `PageBlock`", row
        for name in ours:
            look_up(name)


def test_the_parts_of_a_step_come_in_the_order_of_the_design_page(tmp_path: Path) -> None:
    from mlx_paged import LLM, SamplingParams
    from mlx_paged.engine.profile import PARTS

    section = DESIGN.read_text().split("## What overlaps")[1].split("| `pipelining` |")[0]
    parts = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert {*parts, "detokenise", "rest"} == set(PARTS)
    llm = LLM(num_kv_blocks=64, pipelining="submit", profile=True)
    llm.generate("Tell me a story.", SamplingParams(max_tokens=9))
    assert llm.profile is not None
    llm.profile.write(tmp_path / "trace.json")
    events = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    steps = " ".join(events).split("step ")
    assert " ".join(parts) == steps[5].strip()


@pytest.mark.parametrize("name", ["pipelining", "allocator"])
def test_the_choices_that_a_page_lists_are_those_of_the_setting(name: str) -> None:
    from mlx_paged import EngineConfig

    page = DESIGN if name == "pipelining" else ROOT / "docs" / "memory.md"
    heading = "| `pipelining` |" if name == "pipelining" else "| policy |"
    table = page.read_text().split(heading)[1].split("\n\n")[0]
    choices = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
    assert len(choices) > 2
    for choice in choices:
        EngineConfig(**{name: choice})


def test_settings_that_the_pages_give_engines_exist() -> None:
    from mlx_paged import EngineConfig

    settings = inspect.signature(EngineConfig).parameters
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`(\w+)=", text)) & {"swap_space", "prefix_cache_dir", "allocator", "profile"}
    assert named <= set(settings) and len(named) >= 3
