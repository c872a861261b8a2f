"""The running sequences as arrays, a row for each, so that the host's work in a step hardly loops over them.

A row's tokens are counted before they are known: a draw in flight adds one to `num_tokens`, and the token itself comes
with the next step. Knows no mlx.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np

from mlx_paged.request import Sequence
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler.block_tables import BlockTables


class RunningBatch:
    """What a step needs of each running sequence. Arrays are [num_rows]; of a free row all is 0 or false."""

    sequences: list[Sequence | None]
    """The sequence in each row, None if the row is free."""
    tables: list[BlockTables]
    """Block tables of each cache group."""
    seq_id: np.ndarray
    num_prompt: np.ndarray
    """Tokens of the prompt."""
    num_tokens: np.ndarray
    """Tokens of each row, one per draw in flight included; of preempted beams in one row, those that they share."""
    num_computed: np.ndarray
    """Tokens whose K/V is in place, or will be by the steps in flight."""
    num_slots: np.ndarray
    """Tokens that its blocks can hold."""
    max_num_tokens: np.ndarray
    """The number of tokens at which it has to end."""
    last_token: np.ndarray
    """The last token that is known."""
    cumulative_logprob: np.ndarray
    """float64: the log-probabilities of its known output tokens, summed."""
    row_version: np.ndarray
    """The `version` at which the row got another sequence, or none, last."""
    version: int
    """Grows whenever a sequence joins or leaves."""
    is_prefilling: np.ndarray
    """Tokens that were known when it joined are still to be computed."""
    tail_is_shared: np.ndarray
    """Its last block may belong to others too."""
    is_streamed: np.ndarray
    """Somebody reads its tokens as they come."""
    is_beam: np.ndarray
    will_fork: np.ndarray
    """Other samples will be forked from it once its prompt is computed."""
    has_rules: np.ndarray
    """Its tokens so far say which ones may come next, or change their logits."""

    def __init__(self, num_rows: int, num_groups: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.sequences = [None] * num_rows
        self.tables = [BlockTables(num_rows, max_blocks) for _ in range(num_groups)]
        self.num_prompt, self.num_tokens, self.num_computed, self.num_slots = np.zeros((4, num_rows), np.int32)
        self.max_num_tokens, self.row_version, self.last_token, self._check_from = np.zeros((4, num_rows), np.int32)
        self.version = 0
        self.seq_id = np.zeros(num_rows, np.int64)
        self.cumulative_logprob = np.zeros(num_rows)
        self._flags = np.zeros((6, num_rows), bool)
        self.has_rules, self.is_beam, self.will_fork, self.is_streamed, *others = self._flags
        self.is_prefilling, self.tail_is_shared = others
        self._special = self._flags[:3]
        self._stop_ids: list[np.ndarray] = []  # the first one of each row, the second one, ...; -1: it has fewer
        self._free_rows = list(range(num_rows))[::-1]
        self._added: list[Sequence] = []
        self._append_to: list[Callable[[int], None]] = [_free_row] * num_rows  # to each row's tokens

    def add(self, sequence: Sequence, num_computed: int) -> None:
        """Let a sequence run. Its stop checks are to be set by who knows of them."""
        request = sequence.request
        row = sequence.row = self._free_rows.pop()
        self.sequences[row] = sequence
        self._append_to[row] = sequence.token_ids.append
        self.seq_id[row] = sequence.seq_id
        self.num_prompt[row] = len(request.prompt_token_ids)
        self.num_computed[row] = num_computed
        self.num_slots[row] = 0
        self.max_num_tokens[row] = len(request.prompt_token_ids) + request.max_tokens
        self.cumulative_logprob[row] = sequence.cumulative_logprob
        self._bump_version(row)
        self.is_beam[row] = request.search is not None
        self.is_streamed[row] = request.stream
        self.is_prefilling[row] = num_computed < sequence.num_target_tokens
        self.will_fork[row] = not request.is_forked
        self.has_rules[row] = isinstance(request.params, SamplingParams) and request.params.has_rules
        self.recount(sequence)
        self._added.append(sequence)

    def pop_added(self) -> list[Sequence]:
        """Return the sequences that have started to run since the last call, and still do."""
        added, self._added = self._added, []
        return [sequence for sequence in added if sequence.row >= 0]

    def remove(self, sequence: Sequence) -> None:
        """Free a sequence's row; a token that is being drawn for it is nobody's."""
        row, sequence.row = sequence.row, -1
        sequence.cumulative_logprob = float(self.cumulative_logprob[row])
        self.sequences[row] = None
        self._append_to[row] = _free_row
        self._bump_version(row)
        self.num_tokens[row] = self.num_computed[row] = 0
        self._flags[:, row] = False
        self._free_rows.append(row)

    def clear(self) -> None:
        """Free all rows."""
        for sequence in self.sequences:
            if sequence is not None:
                self.remove(sequence)
        self._added = []
        self._free_rows = list(range(len(self.sequences)))[::-1]

    def _bump_version(self, row: int) -> None:
        self.version += 1
        self.row_version[row] = self.version

    @property
    def has_special_rows(self) -> bool:
        """Whether any row is a beam's, has rules, or may still be forked."""
        return bool(np.count_nonzero(self._special))

    def set_stop_checks(self, row: int, every_token: bool, stop_ids: SequenceOf[int]) -> None:
        """Say which of a row's tokens have to be checked: every one, or its last and those in `stop_ids`."""
        while len(stop_ids) > len(self._stop_ids):
            self._stop_ids.append(np.full(len(self.sequences), -1, np.int32))
        self.check_every_token(row, every_token)
        for i, ids in enumerate(self._stop_ids):
            ids[row] = stop_ids[i] if i < len(stop_ids) else -1

    def check_every_token(self, row: int, every_token: bool) -> None:
        """Do as `set_stop_checks`, with the stop ids as they are."""
        self._check_from[row] = 0 if every_token else self.max_num_tokens[row]

    def append_tokens(self, rows: np.ndarray, token_ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Give rows the tokens that were being drawn for them. Returns, bool [len(rows)], which have to be checked."""
        append = self._append_to
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            append[row](token_id)
        self.last_token[rows] = token_ids
        is_nan = logprobs != logprobs
        self.cumulative_logprob[rows] += np.where(is_nan, 0, logprobs) if np.count_nonzero(is_nan) else logprobs
        check = (self.num_tokens >= self._check_from)[rows] | is_nan
        for stop_ids in self._stop_ids:
            check |= token_ids == stop_ids[rows]
        return check

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        """Give a beam its next token, which was chosen on the host."""
        sequence.token_ids.append(token_id)
        self.recount(sequence)

    def recount(self, sequence: Sequence) -> None:
        """Take a sequence's tokens as they are now: all are known."""
        row, num_tokens = sequence.row, sequence.num_target_tokens
        self.num_tokens[row] = num_tokens
        self.last_token[row] = sequence.token_ids[num_tokens - 1]


def _free_row(token_id: int) -> None:
    raise AssertionError(f"token {token_id} is for a row that is free")
