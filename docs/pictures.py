"""Pictures of what an engine does, drawn from runs of the bundled model: python docs/pictures.py [IMAGES]

beam_tables.svg: the block tables of a beam search while it runs. prefix_tree.svg: what conversations share.
step_timeline.svg: what the host and the device do in two steps. The first two are the same each time.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mlx_paged import LLM, BeamSearchParams, SamplingParams

PANEL, INK, DIM, FREE = "#191e25", "#e8e8e8", "#9aa4b1", "#2c333d"  # a ground of its own: a page may be light or dark
DARK = "#14181d"  # on the colours
COLORS = ["#5fb8d6", "#f2a65a", "#8fce6b", "#d88fd8", "#f2d35a", "#e8766c", "#5fd0ae", "#9d9df2"]
SHARED = "#e8e8e8"
FONT = "ui-sans-serif, system-ui, Helvetica, Arial, sans-serif"
MARGIN, WIDTH = 20, 860


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{fill}"/>'


def words(x: float, y: float, text: str, fill: str = INK, size: float = 13, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size:g}" text-anchor="{anchor}" '
        f'xml:space="preserve">{escape(text)}</text>'
    )


def picture(shapes: Sequence[str], height: float) -> str:
    """Put shapes on a ground of their own."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="{FONT}">'
    return "\n".join([head, f'<rect width="100%" height="100%" rx="10" fill="{PANEL}"/>', *shapes, "</svg>", ""])


def cut(text: str, width: float, size: float) -> str:
    """Cut a text to what fits into a width; a letter is taken for 0.58 of its size."""
    most = max(0, int(width / (0.58 * size)))
    text = text.replace("\n", " ").strip()
    return text if len(text) <= most else text[: max(0, most - 1)].rstrip() + "…" if most > 1 else ""


# -- the block tables of beams ------------------------------------------------------------------------------------

_BEAM_STEP = 24
_ROW = 32


def beam_tables() -> str:
    """Draw a row per beam and a column per block of its table; a block that neighbours share is one box."""
    llm = LLM(num_kv_blocks=64, block_size=4)
    prompt = "Once upon a time, there was a girl named Rosa."
    llm.engine.add_request(prompt, BeamSearchParams(beam_width=4, max_tokens=40))
    while llm.stats().num_steps < _BEAM_STEP:
        llm.engine.step()
    manager = llm.engine.block_manager
    beams = sorted(manager.parts[0].values(), key=lambda beam: beam.table)
    held = {block for beam in beams for block in beam.table}
    shapes = [words(MARGIN, 28, f"Four beams in step {_BEAM_STEP} of a search: the blocks of 4 tokens in their tables")]
    top, left, num_columns = 48, MARGIN + 58, max(len(beam.table) for beam in beams)
    cell = (WIDTH - MARGIN - left) / num_columns - 4
    for column in range(num_columns):
        row = 0
        while row < len(beams):
            block = beams[row].table[column]
            last = max(number for number, beam in enumerate(beams) if beam.table[column] == block)
            x, y = left + column * (cell + 4), top + row * _ROW
            height = (last - row) * _ROW + _ROW - 4
            shapes.append(box(x, y, cell, height, SHARED if last > row else COLORS[row]))
            num_filled = min(4, beams[row].num_tokens - 4 * column)
            if num_filled < 4:
                part = cell * num_filled / 4
                shapes.append(box(x + part, y, cell - part, height, FREE))
            tokens = beams[row].token_ids[4 * column : 4 * column + num_filled]
            text = cut(llm.tokenizer.decode(tokens), cell * num_filled / 4 - 6, 9.5)
            middle = y + height / 2
            shapes += [words(x + 4, middle - 2, str(block), DARK, 9.5), words(x + 4, middle + 10, text, DARK, 9.5)]
            row = last + 1
    for row in range(len(beams)):
        shapes.append(words(MARGIN, top + row * _ROW + 19, f"beam {row + 1}", DIM, 12))
    foot = top + len(beams) * _ROW + 22
    unshared = sum(len(beam.table) for beam in beams)
    line = f"{len(held)} blocks are held, {unshared} without sharing. A number is a block's id; "
    shapes.append(words(MARGIN, foot, line + "white: shared, copied before it is written to.", DIM, 12))
    return picture(shapes, foot + 18)


# -- the prefix tree of conversations -----------------------------------------------------------------------------

_STORY = (
    "The kite was red. The key was under the bench. The basket cost nine coins. The dog was called Biscuit. They "
    "walked along the river until the sun went down."
)
_SYSTEM = {"role": "system", "content": "You answer questions about stories."}
_CONVERSATIONS = [
    [f"{_STORY}\nWhat colour was the kite?", "Where was the key?", "What was the dog called?"],
    [f"{_STORY}\nWhat was the dog called?", "How much did the basket cost?"],
    ["Tell me a story.", "Write a story about Tom."],
]


def prefix_tree() -> str:
    """Draw what is cached after some conversations: a bar per part that does not branch, from where it goes on."""
    llm = LLM(num_kv_blocks=256, block_size=8)
    num_prompt = num_cached = 0
    for questions in _CONVERSATIONS:
        messages = [_SYSTEM]
        for question in questions:
            messages.append({"role": "user", "content": question})
            output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24))
            messages.append({"role": "assistant", "content": output.outputs[0].text})
            num_prompt, num_cached = num_prompt + len(output.prompt_token_ids), num_cached + output.num_cached_tokens
    bars = llm.engine.snapshot().prefixes
    begins, ends = list[int](), dict[int, int]()  # tokens before each bar; where the last bar of a depth ends
    for bar in bars:
        begins.append(ends[bar.depth - 1] if bar.depth else 0)
        ends[bar.depth] = begins[-1] + bar.num_tokens
    per_token = (WIDTH - 2 * MARGIN) / max(begin + bar.num_tokens for begin, bar in zip(begins, bars, strict=True))
    shapes = [words(MARGIN, 28, "What three conversations with one system prompt leave in the prefix tree")]
    row_height, top = 34, 46
    for row, (begin, bar) in enumerate(zip(begins, bars, strict=True)):
        x, y, width = MARGIN + begin * per_token, top + row * row_height, bar.num_tokens * per_token - 2
        if bar.depth:
            above = max(other for other in range(row) if bars[other].depth == bar.depth - 1)
            foot = top + above * row_height + row_height - 6
            shapes.insert(1, f'<path d="M{x + 3:.1f} {foot} V{y}" stroke="{DIM}" fill="none"/>')
        shapes.append(box(x, y, width, row_height - 6, COLORS[bar.depth % len(COLORS)]))
        text = llm.tokenizer.decode(bar.first_tokens)
        shapes.append(words(x + 6, y + 12, f"{bar.num_blocks} block{'s' * (bar.num_blocks > 1)}", DARK, 9.5))
        shapes.append(words(x + 6, y + 23, cut(text, width - 10, 9.5), DARK, 9.5))
    foot = top + len(bars) * row_height + 18
    line = (
        f"Blocks of 8 tokens. Of the {num_prompt} tokens of all prompts, {num_cached} were found here and not computed."
    )
    shapes.append(words(MARGIN, foot, line, DIM, 12))
    return picture(shapes, foot + 18)


# -- the timeline of a step ---------------------------------------------------------------------------------------

_SHOWN = 2  # steps
_PART_COLORS = dict(
    zip(("schedule", "move", "build", "submit", "wait", "tokens", "sample", "detokenise"), COLORS, strict=True)
)


class Work(NamedTuple):
    """What a device was given, in nanoseconds of the host's clock."""

    submitted: int
    ended: int


@contextmanager
def watched_device() -> Iterator[list[Work]]:
    """Note, from a thread that waits for it, when each piece of work was done that is submitted meanwhile."""
    import mlx.core as mx

    given: queue.SimpleQueue[tuple[int, Sequence[Any]] | None] = queue.SimpleQueue()
    done: list[Work] = []
    submit = mx.async_eval

    def watch() -> None:
        while (item := given.get()) is not None:
            mx.eval(*item[1])
            done.append(Work(item[0], time.perf_counter_ns()))

    def noted(*arrays: Any) -> None:
        now = time.perf_counter_ns()
        submit(*arrays)
        given.put((now, arrays))

    watcher = threading.Thread(target=watch)
    watcher.start()
    mx.async_eval = noted
    try:
        yield done
    finally:
        mx.async_eval = submit
        given.put(None)
        watcher.join()


def step_timeline() -> str:
    """Draw the host's parts of the shortest decoding steps in a row, and below when the device was at work."""
    llm = LLM(num_kv_blocks=256, pipelining="submit", profile=True)
    params = SamplingParams(temperature=0.8, max_tokens=200, ignore_eos=True, seed=0)
    with watched_device() as works:
        llm.generate([f"Tell me a story about number {number}." for number in range(8)], params)
    assert llm.profile is not None
    events = sorted(llm.profile._events, key=lambda event: event.started)
    steps = [event for event in events if event.name == "step" and event.about.get("num_decodes") == 8]
    spans = [steps[i + _SHOWN].started - steps[i].started for i in range(8, len(steps) - _SHOWN - 2)]
    first = 8 + spans.index(min(spans))
    begin, end = steps[first].started, steps[first + _SHOWN].started
    scale = (WIDTH - 2 * MARGIN - 60) / (end - begin)

    def x_of(moment: int) -> float:
        return MARGIN + 60 + (min(max(moment, begin), end) - begin) * scale

    title = f"Two steps of 8 sequences, {(end - begin) / 1e6:.1f} ms: where host and device overlap"
    shapes = [words(MARGIN, 28, title)]
    host, device, height = 58, 104, 30
    shown = [event for event in events if event.started < end and event.started + event.taken > begin]
    for event in shown:
        if event.name == "step":
            continue
        x, stop = x_of(event.started), x_of(event.started + event.taken)
        shapes.append(box(x, host, max(0.8, stop - x), height, _PART_COLORS[event.name]))
        inside = [x_of(other.started) for other in shown if other.name == "submit" and other.started > event.started]
        room = min([stop, *inside]) - x  # a part lies on top of the one that it is in
        if room > 36:
            shapes.append(words(x + 4, host + 19, cut(event.name, room - 4, 11), DARK, 11))
    draws = [event for event in events if event.name == "sample"]
    free_from, edge = 0, 0.0
    for work in works:
        started, free_from = max(work.submitted, free_from), work.ended
        if work.ended > begin and started < end:
            x = max(x_of(started), edge)  # after one that was too short to be drawn as wide as it is
            width = max(0.8, x_of(work.ended) - x - 1)
            edge = x + width
            drawn = any(event.started <= work.submitted < event.started + event.taken for event in draws)
            shapes.append(box(x, device, width, height, DIM if drawn else SHARED))
            shapes.append(words(x + 4, device + 19, cut("draw" if drawn else "model", width - 3, 11), DARK, 11))
    for label, y in (("host", host), ("device", device)):
        shapes.append(words(MARGIN, y + 20, label, DIM, 12))
    for step in steps[first : first + _SHOWN + 1]:
        x = x_of(step.started)
        shapes.append(f'<path d="M{x:.1f} {host - 12} V{device + height + 6}" stroke="{DIM}" stroke-dasharray="3 3"/>')
    names = [name for name in _PART_COLORS if any(event.name == name for event in shown)]
    x, y = MARGIN + 60.0, device + height + 26
    for name in names:
        shapes += [box(x, y - 9, 10, 10, _PART_COLORS[name]), words(x + 15, y, name, DIM, 11)]
        x += 15 + 8 * len(name) + 14
    line = "On a CPU submit returns when most of the work is done, on a GPU when it is handed over."
    shapes.append(words(MARGIN, y + 24, line, DIM, 12))
    return picture(shapes, y + 42)


PICTURES = {"beam_tables": beam_tables, "prefix_tree": prefix_tree, "step_timeline": step_timeline}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
