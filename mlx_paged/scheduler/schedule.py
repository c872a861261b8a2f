"""A schedule: which tokens one step computes."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mlx_paged.blocks.cache_groups import Published
from mlx_paged.request import Sequence

MAX_PROMPT_LOGITS = 256
"""Rows of logits that a step computes for log-probabilities of prompts, about: each is as long as the vocabulary."""


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a prompt, from position `start`, are computed in this step."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """The position after them."""
        return self.start + self.num_tokens

    @property
    def needs_logits(self) -> bool:
        """Whether the sequence's last token is among them, so that the next one can be chosen."""
        return self.end == len(self.sequence.token_ids)


class Drafts(NamedTuple):
    """Guesses at the next tokens of rows of the running batch."""

    tokens: dict[int, list[int]]
    """By row."""
    waiting: np.ndarray
    """Rows that can't have any before their last token is known, and are left out of the step. bool [num_rows]."""
    query_lens: np.ndarray
    """Tokens that each row would compute, its last one included. int32 [num_rows]."""


@dataclass
class Schedule:
    """What one step computes: the next tokens of the rows that decode, then chunks of prompts."""

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The rows of the running batch that decode, in the order in which they are served."""
    query_lens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """How many tokens each of these rows computes: its last one, and drafts after it."""
    drafts: dict[int, list[int]] = field(default_factory=dict)
    """By row."""
    chunks: list[Chunk] = field(default_factory=list)
    num_tokens: int = 0
    published: dict[Sequence, Published] = field(default_factory=dict)
    """Of each chunk's sequence, the prefixes that may be hit because this step writes them."""
    preempted: list[Sequence] = field(default_factory=list)
    """Sequences that have lost their blocks."""
    is_short_of_blocks: bool = False
    """A prompt could not go on for lack of blocks."""
    made_at: float = field(default_factory=time.monotonic)
    """The moment, by `time.monotonic`."""
    max_num_tokens: int = 0
    """Most tokens that it may have."""

    def next_chunk(self, sequence: Sequence, start: int, most: int) -> Chunk:
        """Return the tokens of a prompt, from `start` on, for which there is room, `most` at most: it may be none."""
        room = min(sequence.num_target_tokens - start, self.max_num_tokens - self.num_tokens, most)
        if sequence.request.prompt_logprobs is not None:
            others = sum(c.num_tokens for c in self.chunks if c.sequence.request.prompt_logprobs is not None)
            room = min(room, max(1, MAX_PROMPT_LOGITS - others))
        return Chunk(sequence, start, room)

    def drop(self, sequences: list[Sequence], rows_left: np.ndarray) -> None:
        """Take preempted sequences out. rows_left: of `rows`, bool, those that still run."""
        self.preempted += sequences
        self.chunks = [chunk for chunk in self.chunks if chunk.sequence not in sequences]
        self.rows, self.query_lens = self.rows[rows_left], self.query_lens[rows_left]
        self.drafts = {row: self.drafts[row] for row in self.rows.tolist() if row in self.drafts}
        self.num_tokens = int(self.query_lens.sum()) + sum(chunk.num_tokens for chunk in self.chunks)


def offsets_of(rows: np.ndarray) -> np.ndarray:
    """Count of each entry how many of the same row are right before it."""
    places = np.arange(len(rows))
    is_first = np.ones(len(rows), bool)
    is_first[1:] = rows[1:] != rows[:-1]
    return places - np.maximum.accumulate(np.where(is_first, places, 0))
