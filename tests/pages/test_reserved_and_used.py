"""The picture of reserved and used memory is what its script draws, and true to scale."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from helpers.pages import ROOT

from mlx_paged.tools.cache_cost import typical_lengths


@pytest.fixture(scope="module")
def reserved_and_used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The picture that its script draws, and what it prints."""
    file = tmp_path_factory.mktemp("picture") / "reserved_and_used.svg"
    script = ROOT / "docs" / "reserved_and_used.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, script, file]
    return file, subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_picture_of_reserved_and_used_memory_is_what_its_script_draws(reserved_and_used: tuple[Path, str]) -> None:
    assert reserved_and_used[0].read_bytes() == (ROOT / "docs" / "images" / "reserved_and_used.svg").read_bytes()


def test_rows_of_the_picture_are_as_wide_as_what_requests_take_and_use(reserved_and_used: tuple[Path, str]) -> None:
    file, printed = reserved_and_used
    elements = list(ElementTree.parse(file).getroot())
    rows = [element for element in elements if element.get("height") == "11"]
    words = [element.text or "" for element in elements if element.tag.endswith("text")]
    lengths = typical_lengths(8, 2048)
    assert len(set(lengths)) == 8 and max(lengths) < 2048
    in_a_row = {  # tokens; an engine without blocks has as many in each row
        "2,048 tokens reserved for each": [2048] * 8,
        "padded, as in mlx-lm's batch": [(max(lengths) + 255) // 256 * 256] * 8,
        "blocks of 16": [length + (-length) % 16 for length in lengths],
    }
    assert len(rows) == 3 * 16 and len(words) == 9 and len(printed.splitlines()) == 3
    for panel, (title, taken) in enumerate(in_a_row.items()):
        outlines, filled = rows[16 * panel :: 2][:8], rows[16 * panel + 1 :: 2][:8]
        for rectangles, tokens in ((outlines, taken), (filled, lengths)):
            assert [float(row.get("width", 0)) for row in rectangles] == pytest.approx(
                [240 * count / 2048 for count in tokens], abs=0.01
            )
            assert [row.get("y") for row in rectangles] == [row.get("y") for row in outlines]
            assert {row.get("x") for row in rectangles} == {outlines[0].get("x")}
        share = f"{1 - sum(lengths) / sum(taken):.1%} empty"
        room = f"room for {sum(taken):,} tokens"
        assert words[3 * panel : 3 * panel + 3] == [title, room, f"{sum(lengths):,} in use, {share}"]
        assert printed.splitlines()[panel] == f"{title}: {room}, {share}"
