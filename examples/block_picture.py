"""Draws the blocks of a beam search over 4 beams, and saves them as the picture that the README shows."""

import sys
from pathlib import Path

from mlx_paged import BlockManager
from mlx_paged.block_picture import BlockPicture, draw_blocks, save_svg

manager = BlockManager(num_blocks=32, block_size=16)

# A request that has ended: nobody holds its blocks, and an equal prompt would find them.
manager.allocate("earlier", range(1000, 1064))
manager.mark_computed("earlier", 64)

# One prompt, four beams: the prompt's blocks are held by all, a partly filled last one until somebody writes to it.
manager.allocate(0, range(54))
manager.mark_computed(0, 54)
manager.free("earlier")
for beam in (1, 2, 3):
    manager.fork(0, beam)
for step in range(33):
    if step == 20:  # beam 3 falls out; beam 1 had the two best continuations
        manager.free(3)
        manager.fork(1, 3)
    for beam in range(4):
        manager.append(beam, [100 * beam + step])

names = {beam: f"beam {beam + 1}" for beam in range(4)}
draw_blocks(manager, names)
default = Path(__file__).parent.parent / "docs" / "images" / "beam_blocks.svg"
save_svg(BlockPicture(manager, names), sys.argv[1] if len(sys.argv) > 1 else default)
