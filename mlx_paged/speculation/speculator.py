"""Which drafts a step verifies, and which of them turn out to be right.

A draft is right where it is the token that is drawn there from the model's own distribution, with the random numbers
of that place: so what is put out is what would be without drafts (Leviathan et al. 2023 verify by chance, this does by
being equal). Proposals cost the more the less often they are right and the more other sequences a step has, so it is
estimated, by the time that steps take and by how often each sequence was foretold lately, what puts out most tokens
per second.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mlx_paged.config import EngineConfig, SpeculativeConfig
from mlx_paged.errors import EngineWarning, one_line
from mlx_paged.request import Request, Sequence
from mlx_paged.runner.in_flight import StepInFlight
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Drafts, offsets_of
from mlx_paged.speculation.draft_model import DraftModel
from mlx_paged.speculation.ngram import NgramProposer
from mlx_paged.speculation.step_costs import MEASURED, StepCosts

_MEMORY = 16  # tokens by which what was foretold is judged, about
_LEAST_SHARE = 1 / _MEMORY  # foretold, for a sequence to have drafts at all
_GAIN = 1.03  # tokens per second with drafts over those without: less is not worth being wrong about
_FREE_BLOCKS = 2  # per running sequence: with fewer nothing is proposed, which might cost a sequence its blocks


class Proposer(Protocol):
    """Where drafts come from. Sequences are known by the first `update`, and until `keep` leaves them out."""

    first_share: float
    """Of its drafts, those that are expected to be right before anything is known of a sequence."""

    def keep(self, seq_ids: set[int]) -> None:
        """Forget all sequences but these."""

    def update(self, sequence: Sequence) -> tuple[float, float]:
        """Take in the tokens a sequence has come to. Returns how many of them were foretold, and of how many."""

    def seconds(self, num_sequences: int, num_drafts: int) -> float:
        """Return what it takes to propose so many tokens for each of some sequences."""

    def skip(self) -> None:
        """Know that a step has no drafts, since they are taken to cost more than they save."""

    def seconds_to_catch_up(self, sequence: Sequence) -> float:
        """Return what it takes before the first tokens can be proposed for a sequence; infinity: it can have none."""

    def catch_up(self, sequences: list[Sequence]) -> list[Sequence]:
        """Go on with what has to be done before. Returns the sequences for which nothing has to."""

    def propose(self, rooms: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Return up to so many tokens that may come next in each sequence, all of whose tokens are known."""


@dataclass(eq=False)
class Speculator:
    """Proposes drafts and takes what came of them."""

    config: SpeculativeConfig
    proposer: Proposer | None
    """None: there are no drafts."""
    batch: RunningBatch
    costs: StepCosts
    max_num_batched_tokens: int
    max_decode_queries: int = 1
    """Of the model: with more, a sequence's blocks are read more than once."""
    num_drafts: int = 0
    """How often a sequence had drafts that were verified."""
    num_draft_tokens: int = 0
    """Drafts that were verified."""
    num_accepted_tokens: int = 0
    """Those that were right."""
    _shares: dict[int, float] = field(default_factory=dict)
    """Of the last tokens of each sequence, those that were foretold."""

    @property
    def counts(self) -> dict[str, int]:
        """What `EngineStats` has of it."""
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        return {name: getattr(self, name) for name in names}

    def propose(self, num_free_blocks: int) -> Drafts | None:
        """Return drafts for the next step, None if it has none. The rows that wait for their last token are left out.

        num_free_blocks: of the pool. If the proposer fails, an EngineWarning says so, and there are no more drafts.
        """
        if self.proposer is None:
            return None
        try:
            return self._propose(self.proposer, num_free_blocks)
        except Exception as error:
            text = f"guessing next tokens failed, and goes on no more: {type(error).__name__}: {one_line(error)}"
            warnings.warn(text, EngineWarning, stacklevel=2)
            self.proposer = None
            return None

    def _propose(self, proposer: Proposer, num_free_blocks: int) -> Drafts | None:
        running = [each for each in self.batch.sequences if each is not None]
        seq_ids = {sequence.seq_id for sequence in running}
        proposer.keep(seq_ids)
        self._shares = {seq_id: self._shares[seq_id] for seq_id in seq_ids & self._shares.keys()}
        if num_free_blocks < _FREE_BLOCKS * len(running):
            return None
        rows = [s for s in running if not self.batch.is_prefilling[s.row] and _may_have_drafts(s.request)]
        shares = {sequence: self._follow(sequence, proposer) for sequence in rows}
        most, saved_s = self._most_drafts(list(shares.values()), len(running) - len(rows), proposer)
        if not most:
            if any(share > _LEAST_SHARE for share in shares.values()):
                proposer.skip()
            return None
        drafts = Drafts({}, np.zeros(len(self.batch.sequences), bool), np.ones(len(self.batch.sequences), np.int32))
        left, rooms = self.max_num_batched_tokens - len(running), dict[Sequence, int]()
        block_size, blocks_left = self.batch.block_size, num_free_blocks - len(running)
        chosen = [s for s, share in shares.items() if share > _LEAST_SHARE and self._is_worth_it(s, saved_s, proposer)]
        for sequence in proposer.catch_up(chosen):
            row, num_known = sequence.row, len(sequence.token_ids)
            if self.batch.num_tokens[row] > num_known:
                drafts.waiting[row] = True
                continue
            to_come = int(self.batch.max_num_tokens[row]) - num_known - 1
            rooms[sequence] = room = max(0, min(most, left, blocks_left * block_size, to_come))
            left, blocks_left = left - room, blocks_left - -(-room // block_size)
        for sequence, tokens in proposer.propose(rooms).items():
            drafts.tokens[sequence.row] = tokens
            drafts.query_lens[sequence.row] += len(tokens)
        return drafts if drafts.tokens or drafts.waiting.any() else None

    def _follow(self, sequence: Sequence, proposer: Proposer) -> float:
        """Take in the tokens that a sequence has come to. Returns its share."""
        num_foretold, num_new = proposer.update(sequence)
        share = self._shares.get(sequence.seq_id)
        if share is None:
            share = proposer.first_share if self.config.adaptive else 1.0
        elif num_new and self.config.adaptive:
            share += (num_foretold / num_new - share) * (1 - (1 - 1 / _MEMORY) ** num_new)
        self._shares[sequence.seq_id] = share
        return share

    def _is_worth_it(self, sequence: Sequence, saved_s: float, proposer: Proposer) -> bool:
        """Say whether a sequence can have drafts, and saves more by them than what has to be done before the first."""
        num_left = int(self.batch.max_num_tokens[sequence.row]) - len(sequence.token_ids)
        seconds = proposer.seconds_to_catch_up(sequence)
        return seconds < math.inf and seconds <= num_left * saved_s

    def _most_drafts(self, shares: list[float], num_others: int, proposer: Proposer) -> tuple[int, float]:
        """Choose how many drafts a sequence may have, so that most tokens are put out per second; 0 for none.

        Returns that, and the seconds that it saves of each token. num_others: running sequences that have no drafts.
        """
        most_of_all = self.config.num_speculative_tokens
        if not self.config.adaptive:
            return most_of_all, math.inf
        num_rows = len(shares) + num_others
        shares = [share for share in shares if share > _LEAST_SHARE]
        if not shares:
            return 0, 0.0
        num_others = num_rows - len(shares)
        plain_rate = num_rows / self.costs.of(num_rows)
        best, best_rate = 0, _GAIN * plain_rate
        limit = self.max_decode_queries - 1 or most_of_all  # where one query is all there is, more cost the same
        for most in range(1, min(limit, most_of_all) + 1):
            num_out = num_rows + sum(share**i for share in shares for i in range(1, most + 1))
            seconds = self.costs.of(num_rows + most * len(shares)) + proposer.seconds(len(shares), most)
            if num_others:  # while those with drafts wait for their last token, the others go on
                num_out, seconds = num_out + num_others, seconds + self.costs.of(num_others)
            if num_out / seconds > best_rate:
                best, best_rate = most, num_out / seconds
        return best, 1 / plain_rate - 1 / best_rate

    def process(
        self,
        step: StepInFlight,
        results: list[np.ndarray],
        take: Callable[[np.ndarray, int, list[np.ndarray]], None],
        count: Callable[[np.ndarray, np.ndarray], None],
    ) -> None:
        """Hand on the tokens that a step has drawn, up to the first draft of a row that was wrong, one after another.

        take: has a token of each of some rows checked, as `OutputProcessor.process_tokens` does. count: has penalties
        know of those that come after drafts.
        """
        batch, rows, version, drafts = self.batch, step.sampled_rows, step.sampled_version, step.schedule.drafts
        assert rows is not None
        if not step.schedule.chunks and self.proposer is not None:
            self.costs.add(step.schedule.num_tokens, step.seconds)
        if not drafts:
            take(rows, version, results)
            return
        offsets, token_ids = offsets_of(rows), results[0]
        is_right = np.ones(len(rows), bool)
        for i in np.flatnonzero(offsets).tolist():
            draft = drafts[int(rows[i])][offsets[i] - 1]
            is_right[i] = is_right[i - 1] and token_ids[i - 1] == draft
        self.num_drafts += int(np.count_nonzero(offsets == 1))  # a form may have dropped all drafts of a sequence
        self.num_draft_tokens += int(np.count_nonzero(offsets))
        self.num_accepted_tokens += int(np.count_nonzero(is_right & (offsets > 0)))
        for offset in range(int(offsets.max(initial=0)) + 1):
            chosen = np.flatnonzero(is_right & (offsets == offset) & (batch.row_version[rows] <= version))
            if offset:
                batch.num_tokens[rows[chosen]] += 1
                count(rows[chosen], token_ids[chosen])
            take(rows[chosen], version, [array[chosen] for array in results])
        verified = np.array([row for row in drafts if batch.row_version[row] <= version], np.int64)
        batch.num_computed[verified] = batch.num_tokens[verified] - 1


def _may_have_drafts(request: Request) -> bool:
    """Beams go on together; a logits processor may be told of no token that does not come."""
    return isinstance(request.params, SamplingParams) and not request.params.logits_processors


def make_speculator(runner: ModelRunner, config: EngineConfig, batch: RunningBatch) -> Speculator:
    """Return what proposes drafts, if any are asked for and the model can have some. Measures how long steps take."""
    asked = None if config.speculative_config is None else SpeculativeConfig.of(config.speculative_config)
    if asked is None or runner.states is not None:
        return Speculator(SpeculativeConfig(), None, batch, StepCosts({1: 1.0}), config.max_num_batched_tokens)

    def costs_of(measured: ModelRunner) -> StepCosts:
        return StepCosts(measured.measure_steps(MEASURED) if asked.adaptive else {1: 1.0})

    proposer: Proposer = NgramProposer(asked.prompt_lookup_max, asked.prompt_lookup_min)
    if runner.draft is not None:
        sizes = batch, runner.vocab_size
        proposer = DraftModel(runner.draft, *sizes, costs_of(runner.draft), asked.num_speculative_tokens)
    return Speculator(
        asked, proposer, batch, costs_of(runner), config.max_num_batched_tokens, runner.max_decode_queries
    )
