"""Parts of a script that have a process and a limit each: what becomes of one that takes too long, or fails."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.parts_here import run_here

Row = dict[str, Any]


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Any:
    return importlib.import_module("limited")


@pytest.mark.parametrize(("command", "word"), [("echo a; echo b >&2", "whole"), ("echo a; echo b; exit 3", "failed")])
def test_what_a_command_writes_is_kept_and_how_it_ends(command: str, word: str, limited: Any) -> None:
    ended = limited.run_limited(["sh", "-c", command], 60, echo=False)
    assert (ended.word, sorted(ended.output.split())) == (word, ["a", "b"])


def test_a_command_that_takes_too_long_is_interrupted_and_says_what_it_has(
    limited: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = limited.run_limited(["sh", "-c", 'trap "echo kept; exit 1" INT; sleep 60 & wait'], 1)
    assert (ended.word, ended.output) == ("cut off", "kept\n")
    assert capsys.readouterr().out == "kept\n"


def test_a_command_that_does_not_heed_the_interruption_is_ended_with_its_children(limited: Any) -> None:
    ended = limited.run_limited(["sh", "-c", 'trap "" INT; (sleep 60) & echo $!; wait'], 0.4, echo=False)
    assert ended.word == "cut off" and ended.seconds < 50
    assert is_over(int(ended.output))


def is_over(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return True
    return state in "ZX"


def parts(file: Path) -> list[Any]:
    """What parts do here."""

    def first(quick: bool) -> list[Row]:
        return [{"n": 1}]

    def breaks(quick: bool) -> Iterator[Row]:
        yield {"n": len(json.loads(file.read_text())["results"]["first"])}
        raise ValueError("no such luck")

    def too_long(quick: bool) -> Iterator[Row]:
        yield {"n": list(json.loads(file.read_text())["results"])}
        raise KeyboardInterrupt

    def nothing(quick: bool) -> list[Row]:
        return []

    def last(quick: bool) -> list[Row]:
        return [{"n": list(json.loads(file.read_text())["parts"])}]

    make = importlib.import_module("report").Part
    return [
        make(run, run.__name__, {"n": ("number", "")}, f"Does {run.__name__} run?", 60)
        for run in (first, breaks, too_long, nothing, last)
    ]


def test_rows_of_parts_that_fail_or_are_cut_off_are_in_the_file_as_far_as_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, file = importlib.import_module("report"), tmp_path / "out.json"
    said = run_here(
        monkeypatch, lambda: report.main("it.py", "What it is.", parts(file), apart=True), "it.py", "--json", file
    )
    assert said == "it.py: breaks failed; too_long cut off; why is said above and in the file"
    content = json.loads(file.read_text())
    numbers = {name: rows[0]["n"] for name, rows in content["results"].items()}
    assert numbers == {
        "first": 1,
        "breaks": 1,
        "too_long": ["first", "breaks"],
        "last": ["first", "breaks", "too_long", "nothing"],
    }, "each was written down when the next began"
    ended = {name: part["ended"] for name, part in content["parts"].items()}
    assert ended == {"first": "whole", "breaks": "failed", "too_long": "cut off", "nothing": "whole", "last": "whole"}
    assert content["parts"]["breaks"]["output"].startswith("what it says") and "output" not in content["parts"]["last"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"Please send back this file: {file}"
    assert [line.split()[0] for line in printed[-6:-1]] == ["whole", "failed", "cut", "whole", "whole"]


def test_parts_are_added_to_what_the_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, file = importlib.import_module("report"), tmp_path / "out.json"

    def main() -> None:
        report.main("it.py", "What it is.", parts(file), apart=True, file=file)

    assert run_here(monkeypatch, main, "it.py", "--only", "first") == ""
    assert run_here(monkeypatch, main, "it.py", "--only=last,nothing") == ""
    assert list(json.loads(file.read_text())["results"]) == ["first", "last"]


@pytest.mark.parametrize("apart", [False, True])
def test_a_part_that_there_is_not_is_refused_in_one_line(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, file = importlib.import_module("report"), tmp_path / "out.json"
    said = run_here(
        monkeypatch,
        lambda: report.main("it.py", "What it is.", parts(file), apart=apart, file=file),
        "it.py",
        "--only=first,fist",
    )
    assert said == "it.py: there is no part 'fist': they are first, breaks, too_long, nothing, last"
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, file = importlib.import_module("report"), tmp_path / "nowhere" / "out.json"
    said = run_here(monkeypatch, lambda: report.main("it.py", "It.", parts(file), apart=True, file=file), "it.py")
    assert said == f"it.py: {file} can't be written: No such file or directory"


@pytest.mark.parametrize("script", ["on_a_mac", "on_a_gpu"])
def test_the_parts_of_a_whole_run_keep_within_ten_minutes_and_each_asks_something(script: str) -> None:
    chosen = importlib.import_module(script).PARTS
    grace = importlib.import_module("limited").GRACE_S
    assert sum(part.limit_s for part in chosen) <= 600
    assert all(part.question.endswith("?") and "\n" not in part.question for part in chosen)
    assert len({part.run.__name__ for part in chosen}) == len(chosen)
    tests = importlib.import_module(script).SECONDS
    limits = {part.run.__name__: part.limit_s for part in chosen}
    room = {"correctness": sum(tests.values())} if script == "on_a_gpu" else tests
    assert all(seconds + grace + 8 < limits[name] for name, seconds in room.items()), "what tests came to is kept"


def test_the_page_says_what_each_part_asks_and_how_long_it_may_take() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    said = {name.strip("`"): limits for name, _, *limits in rows}
    asked = {question for _, question, *_ in rows}
    on_a_mac, on_a_gpu = (importlib.import_module(name).PARTS for name in ("on_a_mac", "on_a_gpu"))
    of_mac, of_card = ({part.run.__name__: f"{part.limit_s:.0f} s" for part in each} for each in (on_a_mac, on_a_gpu))
    assert said == {name: [of_mac.get(name, ""), of_card.get(name, "")] for name in of_mac | of_card}
    only_here = [part for part in on_a_gpu if part.run.__name__ not in of_mac]
    assert asked == {part.question for part in (*on_a_mac, *only_here)}
