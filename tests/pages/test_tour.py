"""The tour of the code: twelve stops whose files and names exist, and calls in the order in which a step makes them."""

from __future__ import annotations

import re
import sys
from types import FrameType

import pytest
from helpers.names import file_of, look_up, names_in
from helpers.pages import ROOT, blocks_of, prose_of

TOUR = ROOT / "docs" / "tour.md"
STOPS = re.split(r"^## (?=\d+\.)", prose_of(TOUR).split("## Not on the way")[0], flags=re.MULTILINE)[1:]


def test_the_tour_has_twelve_stops_and_is_an_evening_long() -> None:
    assert [int(stop.split(".")[0]) for stop in STOPS] == list(range(1, 13))
    assert len(TOUR.read_text().split()) <= 1500


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.split("\n")[0])
def test_a_stop_asks_one_question_of_names_that_are_in_the_files_it_shows(stop: str) -> None:
    assert len(re.findall(r"\*\*[^*]+\?\*\*", stop)) == 1
    shown = re.findall(r"`([\w/]+/[\w.]+\.(?:py|metal|cu))`", stop)
    assert shown and all((ROOT / file).exists() for file in shown)
    first, *_ = shown
    opening = stop.split("**")[0]
    for name in names_in(opening):
        assert file_of(name) in shown, f"{name} is in {file_of(name)}"
    for name in names_in(stop):
        look_up(name)
    assert first.endswith(".metal") or len((ROOT / first).read_text().splitlines()) <= 350


def test_names_on_the_tour_exist_and_no_stop_is_shown_twice() -> None:
    openings = [re.search(r"`([\w/.]+)`", stop) for stop in STOPS]
    files = [opening[1] for opening in openings if opening]
    assert len(set(files)) == 12
    assert len(names_in(prose_of(TOUR))) > 30


def calls_of_the_diagram() -> list[tuple[str, str | None]]:
    """The names in the diagram, top to bottom, each with the one that it is indented under."""
    (diagram,) = [text for _, _, text in blocks_of(TOUR) if text.startswith("any thread")]
    calls: list[tuple[str, str | None]] = []
    around: list[tuple[int, str | None]] = []
    for line in filter(None, diagram.splitlines()):
        match = re.match(r"( *)(?:.*each call of )?([A-Z]\w+\.\w+|\w+_\w+)(?:  |$)", line)
        indent, name = (len(match[1]), match[2]) if match else (0, None)
        while around and around[-1][0] >= indent:
            around.pop()
        if name is not None:
            calls.append((name, around[-1][1] if around else None))
        around.append((indent, name))
    return calls


def test_calls_come_in_the_order_of_the_diagram_and_inside_what_they_are_indented_under() -> None:
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
    assert set(diagram) <= happened, set(diagram) - happened
    for step in steps:
        first = {call: index for index, call in reversed(list(enumerate(step)))}
        places = [first[call] for call in diagram if call in first]
        assert places == sorted(places), step
