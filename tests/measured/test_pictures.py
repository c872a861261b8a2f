"""The pictures of the docs: what they show is what was measured, or counted."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from helpers.run_benchmark import RESULTS, ROOT, run_benchmark

from mlx_paged.tools.cache_cost import typical_lengths

IMAGES = ROOT / "docs" / "images"


def points(svg: Path, line: str) -> np.ndarray:
    """The corners of a line in a picture, [n, 2], each axis from 0 to 1."""
    groups = [element for element in ElementTree.parse(svg).iter() if element.get("id") == f"line-{line}"]
    path = next(groups[0].iter("{http://www.w3.org/2000/svg}path")).get("d", "")
    corners = np.array([pair.split() for pair in re.findall(r"[ML] (\S+ \S+)", path)], float)
    corners[:, 1] *= -1  # down is positive
    return (corners - corners.min(axis=0)) / np.ptp(corners, axis=0)


def words(svg: Path) -> list[str]:
    return [text for element in ElementTree.parse(svg).iter() if (text := (element.text or "").strip())]


MACHINE = {"platform": "Darwin arm64", "device": "Device(gpu, 0)", "cpu_count": 11, "mlx": "0.99.1"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of results that were made up."""
    results, images = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("images")
    shares = {"64 tokens reserved": 0.8125, "mlx-lm": 0.5, "mlx-paged": 0.0371}
    waste = [{"system": system, "kv_waste": share} for system, share in (shares | {"llama.cpp": None}).items()]
    speeds = {"mlx-lm": [10, 19, 30], "mlx-paged": [9, 20, 41]}
    throughput = [
        {"most": most, "system": system, "tokens_per_s": speed}
        for system, of_system in speeds.items()
        for most, speed in zip((1, 4, 16), of_system, strict=True)
    ]
    taken = {"pool": 8192, "padded": 768, "requests": 3, "reserved": 3 * 2048}
    memory = [taken | {"step": i, "used": 50 + i * i, "blocks": 70 + i * i} for i in range(1, 14)]
    concurrency = {"throughput": throughput, "memory_over_time": memory}
    held = {"mlx-lm": [30, 90, 60], "mlx-paged": [16, 16, 17]}
    load = [
        {"system": system, "minute": i, "held_mb": mb, "running_mb": mb / 2, "answered": 9 * i}
        for system, of_system in held.items()
        for i, mb in enumerate(of_system)
    ]
    results_of = {"workloads": {"W2": [], "W3": waste}, "concurrency": concurrency, "mixed-load": {"mixed_load": load}}
    for name, content in results_of.items():
        (results / f"{name}-m9.json").write_text(json.dumps({"machine": MACHINE, "results": content}))
    run_benchmark(results, images, script="plots.py")
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    run_benchmark(results, images, script="plots.py")
    assert before == {path.name: path.read_bytes() for path in images.iterdir()}, "not the same bytes each time"
    return images


def test_pictures_name_the_machine_and_stay_small(pictures: Path) -> None:
    names = {"waste-m9.svg", "throughput-m9.svg", "memory-over-time-m9.svg", "mixed-load-m9.svg"}
    assert {path.name for path in pictures.iterdir()} == names | {"reserved_and_used.svg"}
    for path in (pictures / name for name in names):
        assert "Darwin arm64, 11 cores, MLX 0.99.1 on the GPU" in words(path), "text has to be text"
        assert path.stat().st_size < 60_000


def test_a_picture_of_waste_says_each_share(pictures: Path) -> None:
    told = words(pictures / "waste-m9.svg")
    assert {"64 tokens reserved", "mlx-lm", "mlx-paged", "81.2%", "50.0%", "3.7%"} <= set(told)
    assert [word for word in told if word.endswith((".7%", ".0%"))] == ["3.7%", "50.0%"]  # from below


def test_lines_of_pictures_go_through_the_numbers(pictures: Path) -> None:
    assert points(pictures / "throughput-m9.svg", "mlx-paged") == pytest.approx(
        np.array([[0, 0], [0.5, 11 / 32], [1, 1]]), abs=1e-4
    )
    steps = np.arange(1, 14)
    expected = np.stack([(steps - 1) / 12, (steps**2 - 1) / 168], axis=1)
    assert points(pictures / "memory-over-time-m9.svg", "blocks") == pytest.approx(expected, abs=1e-4)
    assert {"2,048 tokens reserved for each", "the pool: 8,192"} <= set(words(pictures / "memory-over-time-m9.svg"))
    mixed = points(pictures / "mixed-load-m9.svg", "mlx-lm")
    assert mixed == pytest.approx(np.array([[0, 0], [0.5, 1], [1, 0.5]]), abs=1e-4)
    assert "mlx-paged, 18 requests answered" in words(pictures / "mixed-load-m9.svg")


def test_the_committed_pictures_are_those_of_the_committed_results(tmp_path: Path) -> None:
    run_benchmark(RESULTS, tmp_path, script="plots.py")
    arithmetic = "reserved_and_used.svg"
    assert (tmp_path / arithmetic).read_bytes() == (IMAGES / arithmetic).read_bytes()
    drawn = sorted(path.name for path in tmp_path.iterdir() if path.name != arithmetic)
    assert drawn == sorted(path.name for path in IMAGES.glob("*-*.svg")), "python benchmarks/plots.py draws them"
    both = ("mlx-lm", "mlx-paged")
    lines = {"throughput": both, "mixed-load": both, "memory-over-time": ("reserved", "padded", "blocks")}
    lines["growth"] = ("sequences", "context", "pool", "prefixes", "queue")
    for name in drawn:  # not their bytes, which depend on the version of matplotlib
        assert words(tmp_path / name) == words(IMAGES / name)
        for line in next((lines[kind] for kind in lines if name.startswith(kind)), ()):
            assert points(tmp_path / name, line) == pytest.approx(points(IMAGES / name, line), abs=1e-3)


def test_rows_of_the_picture_are_as_wide_as_what_requests_take_and_use() -> None:
    elements = list(ElementTree.parse(IMAGES / "reserved_and_used.svg").getroot())
    rows = [element for element in elements if element.get("height") == "11"]
    texts = [element.text or "" for element in elements if element.tag.endswith("text")]
    lengths = typical_lengths(8, 2048)
    assert len(set(lengths)) == 8 and max(lengths) < 2048
    in_a_row = {  # tokens; an engine without blocks has as many in each row
        "2,048 tokens reserved for each": [2048] * 8,
        "padded, as in mlx-lm's batch": [(max(lengths) + 255) // 256 * 256] * 8,
        "blocks of 16": [length + (-length) % 16 for length in lengths],
    }
    assert len(rows) == 3 * 16 and len(texts) == 9
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
        assert texts[3 * panel : 3 * panel + 3] == [title, room, f"{sum(lengths):,} in use, {share}"]
