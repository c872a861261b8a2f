"""A picture of a block pool: one cell per block, a letter and a colour per sequence, and every block table.

It only reads a BlockManager, so it draws the pool of a running engine, `draw_blocks(llm.engine.block_manager)`, as
well as one without a model. Letters tell sequences apart where there are no colours.
"""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from mlx_paged.block_manager import BlockManager

_CELL = 4  # columns of a block, the gap after it not counted
_SVG_COLUMNS = 88
_COLORS = ["#f2a65a", "#5fb8d6", "#8fce6b", "#d88fd8", "#f2d35a", "#e8766c", "#5fd0ae", "#9d9df2"]
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
    """A sequence as it is drawn."""

    letter: str
    name: str
    color: str
    num_tokens: int
    table: list[int]


class BlockPicture:
    """The state of a block manager at the moment this is made, for rich to print.

    names: what to call sequences, by id; an id that is not in it is its own name.
    """

    def __init__(self, manager: BlockManager, names: Mapping[Hashable, str] | None = None) -> None:
        self.num_blocks, self.block_size = manager.num_blocks, manager.block_size
        self.num_tokens = manager.num_kv_tokens()
        self.sequences = [
            _Sequence(
                _letter(index),
                str((names or {}).get(seq_id, seq_id)),
                _COLORS[index % len(_COLORS)],
                manager.num_tokens(seq_id),
                manager.block_table(seq_id),
            )
            for index, seq_id in enumerate(manager.seq_ids)
        ]
        self._holders: dict[int, list[_Sequence]] = {}
        self._filled: dict[int, int] = {}
        for sequence in self.sequences:
            for index, block_id in enumerate(sequence.table):
                filled = min(self.block_size, sequence.num_tokens - index * self.block_size)
                self._holders.setdefault(block_id, []).append(sequence)
                self._filled[block_id] = max(filled, self._filled.get(block_id, 0))
        self._cached = {
            block_id
            for block_id in range(self.num_blocks)
            if block_id not in self._holders and manager.is_cached(block_id)
        }

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
        yield self._legend()
        yield Text(self.totals())

    def totals(self) -> str:
        """One line of numbers: blocks by what they are, and what sharing and paging come to."""
        used = len(self._holders)
        parts = [f"{used} blocks used"]
        if shared := sum(len(holders) > 1 for holders in self._holders.values()):
            parts[0] += f", {shared} of them shared"
        if self._cached:
            parts.append(f"{len(self._cached)} cached")
        parts.append(f"{self.num_blocks - used - len(self._cached)} free")
        if used:
            parts.append(f"{1 - self.num_tokens / (used * self.block_size):.1%} of the used slots empty")
        if shared:
            unshared = sum(len(sequence.table) for sequence in self.sequences)
            parts.append(f"without sharing {unshared} blocks")
        return "; ".join(parts)

    # -- parts --------------------------------------------------------------------------------------------------

    def _pool(self, width: int) -> Iterator[Text]:
        """The pool in rows of a power of two; several rows in which every block is alike become one line."""
        margin = len(str(self.num_blocks - 1)) + 2
        columns = 1 << max(0, ((width - margin) // (_CELL + 1)).bit_length() - 1)
        rows = [range(start, min(start + columns, self.num_blocks)) for start in range(0, self.num_blocks, columns)]
        for kind, group in groupby(rows, self._uniform):
            alike = list(group)
            if kind and len(alike) > 2:
                yield Text(f"{' ' * margin}... {sum(map(len, alike)):,} blocks {kind}", Style(dim=True))
                continue
            for row in alike:
                line = Text(no_wrap=True)
                line.append(f"{row.start:>{margin - 2}}  ", Style(dim=True))
                for block_id in row:
                    line.append_text(self._cell(block_id)).append(" ")
                yield line

    def _uniform(self, row: range) -> str | None:
        """What all blocks of a row are, if nobody holds any of them."""
        if any(block_id in self._holders for block_id in row):
            return None
        cached = [block_id in self._cached for block_id in row]
        return "cached" if all(cached) else "free" if not any(cached) else None

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
            label, color = f"×{len(holders)}" if len(holders) < 1000 else "×999+"[:_CELL], _SHARED
        split = -(-filled * _CELL // self.block_size)
        cell = Text((text or label).center(_CELL)[:_CELL])
        cell.stylize(Style(color=_INK, bgcolor=color), 0, split)
        cell.stylize(Style(color=color, bgcolor=_FREE), split, _CELL)
        return cell

    def _tables(self, width: int) -> Iterator[Text]:
        """A line per sequence: its blocks in logical order, by id; the middle of a long table is left out."""
        letters = max(len(sequence.letter) for sequence in self.sequences)
        names = min(24, max(len(sequence.name) for sequence in self.sequences))
        tokens = max(len(f"{sequence.num_tokens:,}") for sequence in self.sequences)
        room = max(2, (width - letters - names - tokens - 16) // (_CELL + 1))
        for sequence in self.sequences:
            line = Text(no_wrap=True, overflow="crop")
            line.append(f"{sequence.letter:<{letters}}", Style(color=sequence.color, bold=True))
            line.append(f"  {sequence.name[:names]:<{names}}  {sequence.num_tokens:>{tokens},} tokens   ")
            table = sequence.table
            for index, block_id in enumerate(table):
                if len(table) <= room or index < room - 2 or index == len(table) - 1:
                    line.append_text(self._cell(block_id, str(block_id))).append(" ")
                elif index == room - 2:
                    line.append("...".center(_CELL) + " ", Style(dim=True))
            yield line

    def _legend(self) -> Text:
        """What the cells mean, of those that occur."""
        full = Style(color=_INK, bgcolor=_COLORS[0])
        alone = [block_id for block_id, holders in self._holders.items() if len(holders) == 1]
        entries: list[tuple[Text, str]] = []
        if alone:
            entries.append((Text(" A  ", full), "one sequence's"))
        if any(self._filled[block_id] < self.block_size for block_id in alone):
            entries.append((Text.assemble((" a", full), ("  ", Style(bgcolor=_FREE))), "partly filled"))
        if len(alone) < len(self._holders):
            entries.append((Text(" ×2 ", Style(color=_INK, bgcolor=_SHARED)), "shared by 2"))
        if self._cached:
            entries.append((Text("░" * _CELL, _CACHED), "cached, reusable"))
        if len(self._holders) + len(self._cached) < self.num_blocks:
            entries.append((Text(" ·  ", Style(dim=True)), "free"))
        return Text("   ").join(Text.assemble(cell, " ", meaning) for cell, meaning in entries)


def draw_blocks(manager: BlockManager, names: Mapping[Hashable, str] | None = None) -> None:
    """Print the pool to the terminal; on a running engine: `draw_blocks(llm.engine.block_manager)`."""
    Console().print(BlockPicture(manager, names))


def save_svg(picture: BlockPicture, path: str | Path) -> None:
    """Write the picture as an SVG file, the same bytes for the same picture."""
    console = Console(
        record=True, file=io.StringIO(), width=_SVG_COLUMNS, force_terminal=True, color_system="truecolor", no_color=False
    )
    console.print(Padding(picture, (1, 2)))
    svg = console.export_svg(code_format=_SVG, unique_id="blocks")
    svg = svg.replace('height="24.65" shape-rendering="crispEdges"', 'height="21" rx="2"')  # a gap between rows
    Path(path).write_text(svg, encoding="utf-8")


def _letter(index: int) -> str:
    """A, B ... Z, AA, AB ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)
