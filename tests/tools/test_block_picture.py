"""The picture of a block pool: what it says about every block and table, in letters as well as in colours."""

import io
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlx_paged.blocks.block_manager import BlockManager
from mlx_paged.tools import block_picture
from mlx_paged.tools.block_picture import BlockPicture, draw_blocks, save_svg

ROOT = Path(__file__).parents[2]
TIMES = "\N{MULTIPLICATION SIGN}"
EXAMPLE = ROOT / "examples" / "block_picture.py"


def render(picture: BlockPicture, width: int = 80, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, color_system="truecolor" if color else None, no_color=not color)
    console.print(picture)
    return console.file.getvalue()  # type: ignore[attr-defined]


def pool_cells(text: str) -> list[str]:
    """The cells of the pool in order of block ids."""
    rows = re.findall(r"^ *\d+  (.*)$", text.split("\n\n")[1], re.MULTILINE)
    return [cell for row in rows for cell in row.split()]


def tables(text: str) -> dict[str, list[str]]:
    """Letter -> what its line shows after the number of tokens."""
    found = re.findall(r"^([A-Z]+)  .* tokens   (.*)$", text, re.MULTILINE)
    return {letter: cells.split() for letter, cells in found}


def forked() -> BlockManager:
    """Blocks of 4: sequence "x" has 10 tokens; "y" was forked from it and goes on alone; 2 blocks are only cached."""
    manager = BlockManager(12, 4)
    manager.allocate("old", range(100, 108))
    manager.mark_computed("old", 8)
    manager.allocate("x", range(10))
    manager.free("old")
    manager.fork("x", "y")
    manager.append("y", [1, 2, 3])
    return manager


def test_every_block_is_one_cell_that_tells_whose_it_is() -> None:
    # x holds 2, 3 and 4 with 2 of 4 tokens; y shares 2 and 3, has copied the third and begun a fourth.
    text = render(BlockPicture(forked()))
    assert pool_cells(text) == ["░░░░", "░░░░", *[f"{TIMES}2"] * 2, "a", "B", "b", "·", "·", "·", "·", "·"]


def test_block_tables_are_listed_in_logical_order() -> None:
    text = render(BlockPicture(forked(), {"x": "first", "y": "second"}))
    assert tables(text) == {"A": ["2", "3", "4"], "B": ["2", "3", "5", "6"]}
    assert re.search(r"^A  first   10 tokens", text, re.MULTILINE)
    assert re.search(r"^B  second  13 tokens", text, re.MULTILINE)


def test_the_totals_add_up() -> None:
    picture = BlockPicture(forked())
    # 5 blocks hold 8 shared tokens, 2 of x and 5 of y; x and y have 3 and 4 blocks in their tables.
    assert picture.totals() == "used 5 (7 without sharing), cached 2, free 5; 25.0% of the used slots empty"
    assert picture.totals() in render(picture)
    assert BlockPicture(BlockManager(3, 2)).totals() == "used 0, cached 0, free 3"


def test_the_legend_explains_what_occurs_and_nothing_else() -> None:
    assert [word in render(BlockPicture(forked())) for word in ("partly filled", "shared by", "cached", "free")] == [
        True
    ] * 4
    manager = BlockManager(2, 2)
    manager.allocate("x", [1, 2, 3, 4])
    legend = render(BlockPicture(manager)).rstrip().split("\n")[-2]
    assert legend.split() == ["A", "one", "sequence"]


def test_a_picture_keeps_the_moment_it_was_made_at() -> None:
    manager = forked()
    picture = BlockPicture(manager)
    before = render(picture)
    manager.free("x")
    manager.append("y", range(9))
    assert render(picture) == before


def test_letters_go_on_after_z_and_stay_apart() -> None:
    manager = BlockManager(60, 1)
    for seq_id in range(54):
        manager.allocate(seq_id, [seq_id])
    cells = pool_cells(render(BlockPicture(manager)))
    assert cells[:3] == ["A", "B", "C"]
    assert cells[25:28] + cells[51:54] == ["Z", "AA", "AB", "AZ", "BA", "BB"]
    assert len(set(cells[:54])) == 54


def test_a_terminal_gets_colors_and_a_pipe_plain_text() -> None:
    assert "\x1b[38;2" in render(BlockPicture(forked()), color=True)
    assert "\x1b" not in render(BlockPicture(forked()))


def test_a_shared_block_is_as_full_as_its_fullest_holder_sees_it() -> None:
    manager = BlockManager(1, 4)
    manager.allocate("y", range(3))
    manager.fork("y", "x")
    manager._sequences["x"].num_tokens = 4
    empty_part = "48;2;44;51;61"
    assert empty_part not in render(BlockPicture(manager), color=True)
    manager.free("x")
    assert empty_part in render(BlockPicture(manager), color=True)


def test_blocks_left_by_a_window_are_counted_and_not_drawn() -> None:
    manager = BlockManager(40, 4, window=10)
    manager.allocate("x", range(30))
    manager.mark_computed("x", 30)
    text = render(BlockPicture(manager))
    assert tables(text) == {"A": ["-5", "5", "6", "7"]}
    assert pool_cells(text)[5:8] == ["A", "A", "a"]
    assert "left by the window" in text
    assert "25.0%" not in text
    assert "16.7% of the used slots empty" in text  # 10 of the 12 slots


@settings(max_examples=50)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.booleans()), max_size=12),
    block_size=st.integers(1, 17),
    width=st.integers(40, 200),
)
def test_the_cells_agree_with_the_block_manager(
    prompts: list[tuple[int, bool, bool]], block_size: int, width: int
) -> None:
    manager = BlockManager(1500, block_size)
    for seq_id, (length, forks, ends) in enumerate(prompts):
        manager.allocate(seq_id, range(length))
        manager.mark_computed(seq_id, length)
        if forks:
            manager.fork(seq_id, f"fork of {seq_id}")
            manager.append(f"fork of {seq_id}", [7])
        if ends:
            manager.free(seq_id)
    picture = BlockPicture(manager)
    text = render(picture, width)
    counts = {"used": 0, "cached": 0, "free": 0}
    for line in text.split("\n\n")[1].splitlines():
        cells = re.sub(r"^ *\d+  |\.\.\. .*", "", line).split()
        repeats = re.search(r"([\d,]+) such blocks", line)
        for cell in cells:
            kind = {"·": "free", "░░░░": "cached"}.get(cell, "used")
            counts[kind] += int(repeats[1].replace(",", "")) if repeats else 1
    ids = range(manager.num_blocks)
    used = sum(manager.ref_count(block_id) > 0 for block_id in ids)
    cached = sum(manager.ref_count(block_id) == 0 and manager.is_cached(block_id) for block_id in ids)
    assert counts == {"used": used, "cached": cached, "free": manager.num_blocks - used - cached}
    if width >= 60:  # names and numbers of tokens take that much
        assert max(map(len, text.splitlines())) <= width


def test_a_huge_pool_is_a_short_picture() -> None:
    manager = BlockManager(200_000, 16)
    manager.allocate("x", range(16 * 5_000))
    manager.fork("x", "y")
    text = render(BlockPicture(manager))
    assert len(text.splitlines()) < 20
    assert "5,000 such blocks" in text
    assert "195,000 such blocks" in text
    table = tables(text)["A"]
    assert table[:2] == ["0", "1"]
    assert table[-2:] == ["...", "4999"]


@pytest.mark.parametrize("width", [1, 7, 10, 33])
def test_a_narrow_terminal_is_no_error(width: int) -> None:
    assert render(BlockPicture(forked()), width)


def test_draw_blocks_prints_the_picture(capsys: pytest.CaptureFixture[str]) -> None:
    draw_blocks(forked(), {"x": "first"})
    assert tables(capsys.readouterr().out)["A"] == ["2", "3", "4"]


def test_the_pool_of_a_running_engine_can_be_drawn(tiny_model) -> None:  # type: ignore[no-untyped-def]
    from mlx_paged import LLM, SamplingParams

    llm = LLM.from_model(tiny_model("llama"), num_kv_blocks=16, block_size=4, prefix_caching=False)
    llm.engine.add_request(list(range(1, 10)), SamplingParams(max_tokens=4, n=2, temperature=1.0, seed=0))
    llm.engine.step()
    llm.engine.step()
    shown = tables(render(BlockPicture(llm.engine.block_manager)))
    assert shown["A"][:2] == shown["B"][:2]
    assert shown["A"][2] != shown["B"][2]


def test_svg_is_the_same_bytes_each_time_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    save_svg(BlockPicture(forked()), first)
    save_svg(BlockPicture(forked()), second)
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text(encoding="utf-8")
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    words = "".join(ElementTree.fromstring(text).itertext()).replace("\xa0", " ")
    assert "Block pool: 12 blocks of 4 tokens" in words
    assert "25.0% of the used slots empty" in words
    assert all(color in text for color in ("#f2a65a", "#5fb8d6", "#e8e8e8"))  # A, B, shared


def test_svg_has_its_colors_where_the_terminal_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    save_svg(BlockPicture(forked()), tmp_path / "plain.svg")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    save_svg(BlockPicture(forked()), tmp_path / "color.svg")
    assert (tmp_path / "plain.svg").read_bytes() == (tmp_path / "color.svg").read_bytes()


def test_the_readme_picture_is_what_the_example_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "beam.svg")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert list(tables(capsys.readouterr().out)) == ["A", "B", "C", "D"]
    texts = [
        ElementTree.fromstring(path.read_text(encoding="utf-8")).itertext()
        for path in (tmp_path / "beam.svg", ROOT / "docs" / "images" / "beam_blocks.svg")
    ]
    drawn, committed = (re.sub(r"(?s)^.*?Block pool", "", "".join(text)) for text in texts)
    assert drawn == committed  # the words; other versions of rich may draw them otherwise
    assert len(EXAMPLE.read_text().splitlines()) < 40


def test_the_example_writes_no_file_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise AssertionError("a picture is saved")

    monkeypatch.setattr(block_picture, "save_svg", save)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_drawing_does_not_load_mlx() -> None:
    code = "import sys, mlx_paged.tools.block_picture; sys.exit(any(name.startswith('mlx.') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_blocks_in_the_second_tier_are_shown_beside_the_pool() -> None:
    manager = BlockManager(8, 4)
    manager.allocate("a", [1, 2, 3, 4, 5])
    console = Console(record=True, file=io.StringIO(), width=80)
    console.print(BlockPicture(manager, num_swapped=3))
    text = console.export_text()
    assert "swapped out 3" in text
    assert text.count("▒▒▒▒") == 3 + 1
    console.print(BlockPicture(manager))
    assert "swapped" not in console.export_text()
