"""Draws the blocks of a beam search over 4 beams; `python examples/block_picture.py FILE.svg` saves the picture too."""

import sys

from mlx_paged import BlockManager
from mlx_paged.tools.block_picture import BlockPicture, draw_blocks, save_svg

manager = BlockManager(num_blocks=32, block_size=16)

# A request that has ended: nobody holds its blocks, and an equal prompt would find them.
manager.allocate("earlier", range(1000, 1064))
manager.mark_computed("earlier", 64)

# One prompt, four beams: all of them hold its blocks, and who writes to a shared block gets a copy first.
manager.allocate(1, range(54))
manager.mark_computed(1, 54)
manager.free("earlier")
for beam in (2, 3, 4):
    manager.fork(1, beam)
for step in range(33):
    if step == 20:  # beam 4 falls out: beam 2 had the two best continuations
        manager.free(4)
        manager.fork(2, 4)
    for beam in (1, 2, 3, 4):
        manager.append(beam, [100 * beam + step])

names = {beam: f"beam {beam}" for beam in (1, 2, 3, 4)}
draw_blocks(manager, names)
if len(sys.argv) > 1:
    save_svg(BlockPicture(manager, names), sys.argv[1])
