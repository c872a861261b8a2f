"""The pictures that docs/pictures.py draws from runs of the bundled model: what they show adds up."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
NAMES = ("beam_tables", "prefix_tree", "step_timeline")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ElementTree.Element]:
    folder = tmp_path_factory.mktemp("images")
    done = subprocess.run([sys.executable, ROOT / "docs" / "pictures.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / f"{name}.svg") for name in NAMES]
    return {name: ElementTree.parse(folder / f"{name}.svg").getroot() for name in NAMES}


def texts(picture: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def boxes(picture: ElementTree.Element, without: str = "") -> list[dict[str, float]]:
    """Places and sizes of the boxes, without the ground and those of a colour."""
    found = [each.attrib for each in picture.iter(f"{SVG}rect") if each.get("x") and each.get("fill") != without]
    return [{name: float(each[name]) for name in ("x", "y", "width", "height")} for each in found]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_picture_is_of_the_same_kind_and_keeps_within_its_frame(
    name: str, drawn: dict[str, ElementTree.Element]
) -> None:
    committed = ElementTree.parse(IMAGES / f"{name}.svg").getroot()
    old, new = (re.sub(r"[\d.]+", "N", texts(picture)[0]) for picture in (committed, drawn[name]))
    assert old == new
    for picture in (committed, drawn[name]):
        _, _, width, height = map(float, picture.get("viewBox", "").split())
        assert all(box["x"] >= 20 and box["x"] + box["width"] <= width - 15 for box in boxes(picture))
        assert all(box["y"] + box["height"] < height for box in boxes(picture))
        assert picture.find(f"{SVG}rect").get("fill") == "#191e25"  # type: ignore[union-attr]


def test_beams_have_as_many_blocks_as_are_said_and_shared_ones_are_drawn_once(
    drawn: dict[str, ElementTree.Element],
) -> None:
    numbers = [int(text) for text in texts(drawn["beam_tables"]) if text.isdigit()]
    held, unshared = re.findall(r"\d+", next(text for text in texts(drawn["beam_tables"]) if "without sharing" in text))
    assert len(numbers) == len(set(numbers)) == int(held) < int(unshared)
    rows = sum(round((box["height"] + 4) / 32) for box in boxes(drawn["beam_tables"], without="#2c333d"))
    assert rows == int(unshared)  # boxes cover the tables of all beams; what is empty in them is dark


def test_bars_of_the_tree_are_as_wide_as_their_blocks(drawn: dict[str, ElementTree.Element]) -> None:
    counts = [int(text.split()[0]) for text in texts(drawn["prefix_tree"]) if re.fullmatch(r"\d+ blocks?", text)]
    widths = [box["width"] + 2 for box in boxes(drawn["prefix_tree"])]
    assert len(counts) == len(widths) >= 4
    assert [width / widths[0] for width in widths] == pytest.approx([n / counts[0] for n in counts], rel=0.02)
    said = next(text for text in texts(drawn["prefix_tree"]) if "were found here" in text)
    _, num_prompt, num_cached = map(int, re.findall(r"\d+", said))
    assert num_prompt / 2 < num_cached < num_prompt


def test_the_device_works_on_one_thing_at_a_time_and_while_the_host_does(
    drawn: dict[str, ElementTree.Element],
) -> None:
    host, device = ([box for box in boxes(drawn["step_timeline"]) if box["y"] == y] for y in (58, 104))
    assert len(host) > 10 and 3 <= len(device) <= 6
    for before, after in pairwise(device):
        assert before["x"] + before["width"] <= after["x"] + 0.11
    assert {"model", "draw"} & set(texts(drawn["step_timeline"])) and "submit" in texts(drawn["step_timeline"])
