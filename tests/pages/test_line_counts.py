"""The core path stays short: the rule of CONTRIBUTING.md, and the script that counts."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("count_lines", ROOT / "docs" / "count_lines.py")
assert SPEC is not None and SPEC.loader is not None
count_lines = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(count_lines)


def test_blank_lines_comments_and_docstrings_are_no_code() -> None:
    text = '"""A module."""\n\nX = """two\nlines"""  # a comment\n# another\n'
    text += '\n\nclass A:\n    y: int\n    """A field."""\n\n    @property\n    def z(self):\n        return 1\n'
    assert count_lines.count_code(text) == 7
    assert count_lines.count_code(text, ["A"]) == 2
    assert count_lines.count_code(text, ["z"]) == 4


def test_the_core_path_and_each_of_its_files_are_within_their_bounds() -> None:
    core = {file: count_lines.core_code(file) for file in count_lines.core_path()}
    assert len(core) > 40 and ROOT / "mlx_paged" / "scheduler" / "scheduler.py" in core
    assert sum(core.values()) <= count_lines.MAX_CORE_LINES, "python docs/count_lines.py"
    assert all(len(file.read_text().splitlines()) <= count_lines.MAX_FILE_LINES for file in count_lines.files())


def test_what_is_left_out_of_the_core_path_is_there() -> None:
    for name in count_lines.OPTIONAL:
        file, _, of_it = name.partition(":")
        assert (ROOT / file).exists(), name
        assert re.search(rf"(class|def) {of_it}\b", (ROOT / file).read_text()) if of_it else True, name


def test_contributing_states_the_bounds_that_are_held() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"at most {count_lines.MAX_CORE_LINES:,} lines of code" in page
    assert f"no file over {count_lines.MAX_FILE_LINES} lines" in page


def test_the_script_prints_the_folders_and_the_core_path() -> None:
    command = [sys.executable, ROOT / "docs" / "count_lines.py"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counts = {
        name.strip(): int(code.replace(",", "")) for name, code in re.findall(r"(.{32}) .* (\S+) of code", printed)
    }
    assert counts["the core path"] == sum(map(count_lines.core_code, count_lines.core_path()))
    assert counts["mlx_paged/scheduler/"] < counts["the core path"] < counts["all but the backend for CPUs"]
