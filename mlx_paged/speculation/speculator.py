"""Which drafts a step verifies, and which of them turn out to be right.

A draft is right where it is the token that is drawn there from the model's own distribution, with the random numbers
of that place: so what is put out is what would be without drafts (Leviathan et al. 2023 verify by chance, this does by
being equal). Proposals cost the more the less often they are right and the more other sequences a step has, so it is
estimated, by the time that steps take and by how often each sequence was foretold lately, what puts out most tokens
per second.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mlx_paged.config import EngineConfig, SpeculativeConfig
from mlx_paged.errors import EngineWarning
from mlx_paged.request import Request, Sequence
from mlx_paged.runner.in_flight import StepInFlight
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.scheduler.schedule import Drafts, offsets_of
from mlx_paged.speculation.ngram import NgramLookup
from mlx_paged.speculation.step_costs import MEASURED, StepCosts

_MEMORY = 16  # tokens by which what was foretold is judged, about
_LEAST_SHARE = 1 / _MEMORY  # foretold, for a sequence to have drafts at all
_GAIN = 1.03  # tokens per second with drafts over those without: less is not worth being wrong about
_FREE_BLOCKS = 2  # per running sequence: with fewer nothing is proposed, which might cost a sequence its blocks


@dataclass(eq=False)
class _Followed:
    """What is known of a sequence that may have drafts."""

    lookup: NgramLookup
    share: float = 0.0
    """Of its last tokens, those that were foretold."""


@dataclass(eq=False)
class Speculator:
    """Proposes drafts and takes what came of them."""

    config: SpeculativeConfig | None
    """None: it proposes none."""
    batch: RunningBatch
    costs: StepCosts
    max_num_batched_tokens: int
    max_decode_queries: int = 1
    """Of the model: with more, a sequence's blocks are read more than once."""
    num_draft_tokens: int = 0
    """Drafts that were verified."""
    num_accepted_tokens: int = 0
    """Those that were right."""
    _followed: dict[int, _Followed] = field(default_factory=dict)

    def propose(self, num_free_blocks: int) -> Drafts | None:
        """Return drafts for the next step, None if it has none. The rows that wait for their last token are left out.

        num_free_blocks: of the pool.
        """
        if self.config is None:
            return None
        running = [each for each in self.batch.sequences if each is not None]
        self._followed = {s.seq_id: self._followed[s.seq_id] for s in running if s.seq_id in self._followed}
        if num_free_blocks < _FREE_BLOCKS * len(running):
            return None
        rows = [s for s in running if not self.batch.is_prefilling[s.row] and _may_have_drafts(s.request)]
        followed = {sequence: self._follow(sequence, self.config) for sequence in rows}
        most = self._most_drafts(followed, len(running) - len(rows), self.config)
        if not most:
            return None
        drafts = Drafts({}, np.zeros(len(self.batch.sequences), bool), np.ones(len(self.batch.sequences), np.int32))
        left = self.max_num_batched_tokens - len(running)
        for sequence, state in followed.items():
            row, num_known = sequence.row, len(sequence.token_ids)
            if state.share <= _LEAST_SHARE:
                continue
            if self.batch.num_tokens[row] > num_known:
                drafts.waiting[row] = True
                continue
            room = min(most, left, int(self.batch.max_num_tokens[row]) - num_known - 1)
            tokens = state.lookup.propose(sequence.token_ids, room)
            if tokens:
                drafts.tokens[row] = tokens
                drafts.query_lens[row] += len(tokens)
                left -= len(tokens)
        return drafts if drafts.tokens or drafts.waiting.any() else None

    def _follow(self, sequence: Sequence, config: SpeculativeConfig) -> _Followed:
        """Take in the tokens that a sequence has come to."""
        state = self._followed.get(sequence.seq_id)
        if state is None:
            state = _Followed(
                NgramLookup(config.prompt_lookup_max, config.prompt_lookup_min), 0.0 if config.adaptive else 1.0
            )
            state.lookup.update(sequence.token_ids)
            self._followed[sequence.seq_id] = state
            return state
        num_foretold, num_new = state.lookup.update(sequence.token_ids)
        if num_new and config.adaptive:
            state.share += (num_foretold / num_new - state.share) * (1 - (1 - 1 / _MEMORY) ** num_new)
        return state

    def _most_drafts(self, followed: dict[Sequence, _Followed], num_others: int, config: SpeculativeConfig) -> int:
        """Choose how many drafts a sequence may have, so that most tokens are put out per second. Returns 0 for none.

        num_others: running sequences that have no drafts.
        """
        if not config.adaptive:
            return config.num_speculative_tokens
        shares = [state.share for state in followed.values() if state.share > _LEAST_SHARE]
        num_others += len(followed) - len(shares)
        num_rows = len(shares) + num_others
        best, best_rate = 0, _GAIN * num_rows / self.costs.of(max(1, num_rows))
        limit = (
            self.max_decode_queries - 1 or config.num_speculative_tokens
        )  # where one is all there is, it is the same
        for most in range(1, min(limit, config.num_speculative_tokens) + 1) if shares else ():
            num_out = num_rows + sum(share**i for share in shares for i in range(1, most + 1))
            seconds = self.costs.of(num_rows + most * len(shares))
            if num_others:  # while those with drafts wait for their last token, the others go on
                num_out, seconds = num_out + num_others, seconds + self.costs.of(num_others)
            if num_out / seconds > best_rate:
                best, best_rate = most, num_out / seconds
        return best

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
        if not step.schedule.chunks and self.config is not None:
            self.costs.add(step.schedule.num_tokens, step.seconds)
        if not drafts:
            take(rows, version, results)
            return
        offsets, token_ids = offsets_of(rows), results[0]
        is_right = np.ones(len(rows), bool)
        for i in np.flatnonzero(offsets).tolist():
            draft = drafts[int(rows[i])][offsets[i] - 1]
            is_right[i] = is_right[i - 1] and token_ids[i - 1] == draft
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
    """Return what proposes drafts, if any are asked for. Measures how long steps take.

    An EngineWarning says where a model can't have any: recurrent layers have no states to go back to.
    """
    asked = None if config.speculative_config is None else SpeculativeConfig.of(config.speculative_config)
    if asked is not None and runner.states is not None:
        text = "this model has recurrent layers, which can't go back: it runs without drafts (speculative_config)"
        warnings.warn(text, EngineWarning, stacklevel=4)
        asked = None
    if asked is None:
        return Speculator(None, batch, StepCosts({1: 1.0}), config.max_num_batched_tokens)
    costs = StepCosts(runner.measure_steps(MEASURED) if asked.adaptive else {1: 1.0})
    return Speculator(asked, batch, costs, config.max_num_batched_tokens, runner.max_decode_queries)
