"""A picture of a block pool: one cell per block, a letter and a colour per sequence, and every block table.

It only reads a BlockManager, so it draws the pool of a running engine, `draw_blocks(llm.engine.block_manager)`, as
well as one without a model. Letters tell sequences apart where there are no colours.
"""

import io
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from mlx_paged.blocks.block_manager import BlockManager

_CELL = 4  # columns of a block, the gap after it not counted
_SVG_COLUMNS = 90
_COLORS = ["#f2a65a", "#5fb8d6", "#8fce6b", "#d88fd8", "#f2d35a", "#e8766c", "#5fd0ae", "#9d9df2"]
_TIMES = "\N{MULTIPLICATION SIGN}"
_SHARED, _CACHED, _FREE, _INK = "#e8e8e8", "#5a6472", "#2c333d", "#14181d"

_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {terminal_width} {terminal_height}">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
{styles}
</style>
<defs>
{lines}
</defs>
<rect width="100%" height="100%" rx="10" fill="#191e25"/>
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</svg>
"""


class _Sequence(NamedTuple):
    """A sequence as it is drawn; the blocks that its window has left behind are only counted."""

    letter: str
    name: str
    color: str
    num_tokens: int
    num_released: int
    table: list[int]


class BlockPicture:
    """The state of a block manager at the moment this is made, for rich to print.

    names: what to call sequences, by id; an id that is not in it is its own name.
    """

    def __init__(self, manager: BlockManager, names: Mapping[Any, str] | None = None, *, num_swapped: int = 0) -> None:
        self.num_swapped = num_swapped
        self.num_blocks, self.block_size = manager.num_blocks, manager.block_size
        self.num_tokens = manager.num_kv_tokens()
        self.sequences: list[_Sequence] = []
        self._holders: dict[int, list[_Sequence]] = {}
        self._filled: dict[int, int] = {}
        sequences, _, tree = manager.parts
        for number, (seq_id, blocks) in enumerate(sequences.items()):
            held, num_tokens = blocks.held_blocks, blocks.num_tokens
            name = str((names or {}).get(seq_id, seq_id))
            color = _COLORS[number % len(_COLORS)]
            sequence = _Sequence(_letter(number), name, color, num_tokens, blocks.num_released, held)
            self.sequences.append(sequence)
            for index, block_id in enumerate(held, start=sequence.num_released):
                filled = min(self.block_size, num_tokens - index * self.block_size)
                self._holders.setdefault(block_id, []).append(sequence)
                self._filled[block_id] = max(filled, self._filled.get(block_id, 0))
        self._cached = set(tree.cached_blocks(set(range(self.num_blocks)) - set(self._holders)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"Block pool: {self.num_blocks} blocks of {self.block_size} tokens", Style(bold=True))
        yield Text()
        yield from self._pool(options.max_width)
        yield Text()
        if self.sequences:
            yield Text("Block tables", Style(bold=True))
            yield Text()
            yield from self._tables(options.max_width)
            yield Text()
        yield from self._legend(options.max_width)
        if self.num_swapped:
            yield Text("▒▒▒▒ " * min(self.num_swapped, 8) + ("..." if self.num_swapped > 8 else ""), _CACHED)
        yield Text(self.totals())

    def totals(self) -> str:
        """One line of numbers: blocks by what they are, and what sharing and paging come to."""
        used, cached = len(self._holders), len(self._cached)
        unshared = sum(len(sequence.table) for sequence in self.sequences)
        sharing = f" ({unshared:,} without sharing)" if unshared > used else ""
        line = f"used {used:,}{sharing}, cached {cached:,}, free {self.num_blocks - used - cached:,}"
        empty = 1 - self.num_tokens / (used * self.block_size) if used else 0
        line += f", swapped out {self.num_swapped:,}" if self.num_swapped else ""
        return f"{line}; {empty:.1%} of the used slots empty" if used else line

    # -- parts --------------------------------------------------------------------------------------------------

    def _pool(self, width: int) -> Iterator[Text]:
        """The pool in rows of a power of two; of several rows in which every block is alike one line is left."""
        margin = len(str(self.num_blocks - 1)) + 2
        columns = 1 << max(0, ((width - margin) // (_CELL + 1)).bit_length() - 1)
        rows = [range(start, min(start + columns, self.num_blocks)) for start in range(0, self.num_blocks, columns)]
        for kind, group in groupby(rows, self._kind):
            alike = list(group)
            if kind and len(alike) > 2:
                line = Text(" " * margin, no_wrap=True).append_text(self._cell(alike[0][0]))
                yield line.append(f" ... {sum(map(len, alike)):,} such blocks", Style(dim=True))
                continue
            for row in alike:
                line = Text(no_wrap=True).append(f"{row.start:>{margin - 2}}  ", Style(dim=True))
                for block_id in row:
                    line.append_text(self._cell(block_id)).append(" ")
                yield line

    def _kind(self, row: range) -> object:
        """What all blocks of a row are, if they are alike and none is partly filled."""
        are_full = all(self._filled.get(block_id, self.block_size) == self.block_size for block_id in row)
        letters = [tuple(holder.letter for holder in self._holders.get(block_id, [])) for block_id in row]
        kinds = set(zip(letters, (block_id in self._cached for block_id in row), strict=True))
        return kinds.pop() if are_full and len(kinds) == 1 else None

    def _cell(self, block_id: int, text: str | None = None) -> Text:
        """One block: the part that is filled has the full colour; `text` takes the place of letter or count."""
        holders = self._holders.get(block_id, [])
        if not holders:
            cached = block_id in self._cached
            return Text("░" * _CELL if cached else "·".center(_CELL), _CACHED if cached else Style(dim=True))
        filled = self._filled[block_id]
        if len(holders) == 1:
            label, color = holders[0].letter, holders[0].color
            label = label if filled == self.block_size else label.lower()
        else:
            label, color = f"{_TIMES}{len(holders)}", _SHARED
        split = max(1, filled * _CELL // self.block_size)
        cell = Text((text or label).center(_CELL)[:_CELL])
        cell.stylize(Style(color=_INK, bgcolor=color), 0, split)
        cell.stylize(Style(color=color, bgcolor=_FREE), split, _CELL)
        return cell

    def _tables(self, width: int) -> Iterator[Text]:
        """A line per sequence: its blocks in logical order, by id; the middle of a long table is left out."""
        letters = max(len(sequence.letter) for sequence in self.sequences)
        names = min(24, max(len(sequence.name) for sequence in self.sequences))
        tokens = max(len(f"{sequence.num_tokens:,}") for sequence in self.sequences)
        released = any(sequence.num_released for sequence in self.sequences)
        room = max(3, (width - letters - names - tokens - 14) // (_CELL + 1) - released)
        for sequence in self.sequences:
            line = Text(no_wrap=True, overflow="crop")
            line.append(f"{sequence.letter:<{letters}}", Style(color=sequence.color, bold=True))
            line.append(f"  {sequence.name[:names]:<{names}}  {sequence.num_tokens:>{tokens},} tokens   ")
            if sequence.num_released:
                line.append(f"-{sequence.num_released}".center(_CELL) + " ", Style(dim=True))
            last = len(sequence.table) - 1
            for index, block_id in enumerate(sequence.table):
                if last < room or index < room - 2 or index == last:
                    line.append_text(self._cell(block_id, str(block_id))).append(" ")
                elif index == room - 2:
                    line.append("...".center(_CELL) + " ", Style(dim=True))
            yield line

    def _legend(self, width: int) -> Iterator[Text]:
        """What the cells mean, of those that occur."""
        full = Style(color=_INK, bgcolor=_COLORS[0])
        alone = [block_id for block_id, holders in self._holders.items() if len(holders) == 1]
        part = any(self._filled[block_id] < self.block_size for block_id in alone)
        free = self.num_blocks - len(self._holders) - len(self._cached)
        released = any(sequence.num_released for sequence in self.sequences)
        entries = [
            (alone, Text(" A  ", full), "one sequence"),
            (part, Text.assemble((" a", full), ("  ", Style(bgcolor=_FREE))), "partly filled"),
            (len(alone) < len(self._holders), Text(f" {_TIMES}2 ", Style(color=_INK, bgcolor=_SHARED)), "shared by 2"),
            (self._cached, Text("░" * _CELL, _CACHED), "cached"),
            (free, Text(" ·  ", Style(dim=True)), "free"),
            (released, Text(" -1 ", Style(dim=True)), "left by the window"),
            (self.num_swapped, Text("▒" * _CELL, _CACHED), f"swapped out, {self.num_swapped:,}"),
        ]
        line = Text()
        for _, cell, meaning in filter(lambda entry: entry[0], entries):
            entry = Text.assemble(cell, " ", meaning)
            if line and len(line) + 2 + len(entry) > width:
                yield line
                line = Text()
            line.append("  " if line else "").append_text(entry)
        yield line


def draw_blocks(manager: BlockManager, names: Mapping[Any, str] | None = None, *, num_swapped: int = 0) -> None:
    """Print the pool to the terminal.

    Of a running engine: `draw_blocks(llm.engine.block_manager, num_swapped=llm.stats().num_swapped_blocks)`; of a model
    with windows, one picture for each of `llm.engine.cache_groups.managers`.
    """
    Console().print(BlockPicture(manager, names, num_swapped=num_swapped))


def save_svg(picture: BlockPicture, path: str | Path) -> None:
    """Write the picture as an SVG file, the same bytes for the same picture."""
    console = Console(record=True, file=io.StringIO(), width=_SVG_COLUMNS, color_system="truecolor", no_color=False)
    console.print(Padding(picture, (1, 2)))
    svg = console.export_svg(code_format=_SVG, unique_id="blocks")
    svg = svg.replace('height="24.65" shape-rendering="crispEdges"', 'height="21" rx="2"')  # a gap between rows
    Path(path).write_text(svg, encoding="utf-8")


def _letter(index: int) -> str:
    """A, B ... Z, AA, AB ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)
