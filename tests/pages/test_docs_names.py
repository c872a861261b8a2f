"""What the pages name exists: files, headings, flags, settings, and the code of the design page in its order."""

from __future__ import annotations

import inspect
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from helpers.pages import PAGES, ROOT, blocks_of, prose_of


def test_links_lead_to_files_and_headings_that_exist() -> None:
    num_links = 0
    for page in PAGES:
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


def test_flags_that_the_pages_name_are_options_of_the_command_line_or_of_a_script() -> None:
    from mlx_paged.cli.main import cli

    known = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in cli.params for option in parameter.opts}
    known |= set(re.findall(r'"(--[a-z-]+)"', "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))))
    for page in PAGES:
        prose = " ".join(re.findall(r"`([^`\n]+)`", prose_of(page)))
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose):
            assert flag in known, f"{page.name} names {flag}"


def test_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|sh|svg|metal|h))`", prose_of(page)):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_file_tree_of_the_readme_names_files_that_exist() -> None:
    (tree,) = [text for _, _, text in blocks_of(ROOT / "README.md") if text.startswith("mlx_paged/\n")]
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
    (diagram,) = [text for _, _, text in blocks_of(DESIGN) if text.startswith("any thread")]
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
    names = [name for name in re.findall(r"`([^`\n]+)`", prose_of(DESIGN)) if re.fullmatch(DOTTED, name)]
    assert len(names) > 70
    for name in [*names, *(name for name, _ in calls_of_the_diagram())]:
        look_up(name)
    tables = prose_of(DESIGN).split("## Names in courses and papers")[1]
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
