"""Draws what eight requests take and use, held in three ways, as the picture that the README shows.

    python docs/reserved_and_used.py [FILE]     by default docs/images/reserved_and_used.svg

One row per request, as wide as the tokens that it takes room for; the filled part holds its tokens. Lengths and rules
are those of `mlx-paged inspect`. Nothing is measured: this is arithmetic, and it is the same everywhere.
"""

import sys
from pathlib import Path

from mlx_paged.tools.cache_cost import LayerGroup, compare, typical_lengths

CONTEXT, BLOCK_SIZE, NUM_REQUESTS = 2048, 16, 8
ONE_BYTE = LayerGroup(num_layers=1, num_kv_heads=1, key_dim=1, value_dim=0, element_bytes=1, window=None)  # per token
ROW, STEP, TOP, PANEL, LEFT = 11, 15, 46, 272, 20  # pixels; a panel for each way, a step from row to row
PER_TOKEN = 240 / CONTEXT  # pixels
GROUND, INK, USED, EMPTY = "#191e25", "#e8e8e8", "#56b4e9", "#e69f00"
TITLES = {
    "reserved": f"{CONTEXT:,} tokens reserved for each",
    "padded": "padded, as in mlx-lm's batch",
    "blocks": f"blocks of {BLOCK_SIZE}",
}


def row_of(x: int, y: int, num_tokens: int, style: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{num_tokens * PER_TOKEN:.2f}" height="{ROW}" {style}/>'


def text(x: int, y: int, words: str) -> str:
    return f'<text x="{x}" y="{y}">{words}</text>'


def draw() -> tuple[str, list[str]]:
    """The picture as SVG, and what it says under each way, a line each."""
    lengths = typical_lengths(NUM_REQUESTS, CONTEXT)
    foot = TOP + NUM_REQUESTS * STEP + 16
    shapes, captions = [], []
    for number, way in enumerate(compare([ONE_BYTE], lengths, CONTEXT, BLOCK_SIZE)):
        x = LEFT + number * PANEL
        shapes.append(text(x, TOP - 18, TITLES[way.name]))
        for row, length in enumerate(lengths):
            # Blocks are a request's own; a row that is reserved or padded is like all others.
            taken = -(-length // BLOCK_SIZE) * BLOCK_SIZE if way.name == "blocks" else way.taken // NUM_REQUESTS
            y = TOP + row * STEP
            shapes.append(row_of(x, y, taken, f'fill="{EMPTY}" fill-opacity="0.25" stroke="{EMPTY}"'))
            shapes.append(row_of(x, y, length, f'fill="{USED}"'))
        shapes.append(text(x, foot, f"room for {way.taken:,} tokens"))
        shapes.append(text(x, foot + 18, f"{way.needed:,} in use, {way.waste:.1%} empty"))
        captions.append(f"{TITLES[way.name]}: room for {way.taken:,} tokens, {way.waste:.1%} empty")
    font = 'font-size="13" font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif"'
    size = f"0 0 {LEFT + 3 * PANEL} {foot + 36}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" fill="{INK}" {font}>'
    ground = f'<rect width="100%" height="100%" rx="10" fill="{GROUND}"/>'
    return "\n".join([head, ground, *shapes, "</svg>", ""]), captions


if __name__ == "__main__":
    svg, captions = draw()
    default = Path(__file__).parent / "images" / "reserved_and_used.svg"
    Path(sys.argv[1] if len(sys.argv) > 1 else default).write_text(svg, encoding="utf-8")
    print("\n".join(captions))
