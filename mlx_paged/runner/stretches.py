"""How recurrent layers take a step's tokens: all decodes at once, then the chunks, cut where checkpoints are made."""

from collections.abc import Iterator

import numpy as np

from mlx_paged.blocks.checkpoints import Checkpoints
from mlx_paged.cache.states import Stretch
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Schedule

MAX_DECODE_INTERVAL = 256  # tokens of an answer between its checkpoints; rounded up to whole blocks


def make_stretches(schedule: Schedule, batch: RunningBatch, checkpoints: Checkpoints) -> list[Stretch]:
    """Cut a step's tokens into what one call of a recurrent layer computes."""
    stretches = [*_decodes(schedule, batch, checkpoints), *_chunks(schedule, checkpoints)]
    checkpoints.step_built()
    return stretches


def _decodes(schedule: Schedule, batch: RunningBatch, checkpoints: Checkpoints) -> Iterator[Stretch]:
    """One stretch, if there are any. So many states are copied in a step: one per block, however many decodes."""
    rows = schedule.rows
    if len(rows):
        num_blocks = min(len(rows), -(-MAX_DECODE_INTERVAL // batch.block_size))
        num_tokens, seq_ids = batch.num_computed[rows], batch.seq_id[rows].tolist()
        due = np.flatnonzero(num_tokens % (num_blocks * batch.block_size) == 0).tolist()
        latest = [(place, int(num_tokens[place])) for place in due if checkpoints.may_keep_latest(seq_ids[place])]
        yield Stretch(slice(0, len(rows)), seq_ids, latest=latest)


def _chunks(schedule: Schedule, checkpoints: Checkpoints) -> Iterator[Stretch]:
    first = len(schedule.rows)
    for sequence, start, num_tokens in schedule.chunks:
        for end, load, keep in checkpoints.cut(sequence.seq_id, start, start + num_tokens):
            tokens = slice(first, first + end - start)
            yield Stretch(tokens, [sequence.seq_id], start == 0, load, keep)
            first, start = tokens.stop, end
