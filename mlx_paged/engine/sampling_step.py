"""The draw of a step: which rows get a next token, from which logits, under which rules."""

import time

import mlx.core as mx
import numpy as np

from mlx_paged.engine.forking import Forking
from mlx_paged.engine.logits_rules import Rules, apply_rules
from mlx_paged.engine.output_processor import OutputProcessor
from mlx_paged.engine.profile import Profile
from mlx_paged.request import Request, Sequence
from mlx_paged.runner.in_flight import StepInFlight, StepRunner
from mlx_paged.sampling.sampler import Sampler, best_tokens, sample_seed
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch


class SamplingStep:
    """Draws next tokens on the device; they stay there until the step is waited for."""

    def __init__(
        self,
        batch: RunningBatch,
        vocab_size: int,
        forking: Forking,
        outputs: OutputProcessor,
        steps: StepRunner,
        profile: Profile,
    ) -> None:
        self._batch = batch
        self._vocab_size = vocab_size
        self._forking = forking
        self._outputs = outputs
        self._steps = steps
        self._profile = profile
        self._failed: list[tuple[Request, Exception]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the parameters of all rows."""
        self._sampler = Sampler(len(self._batch.sequences), self._vocab_size)

    def register_rows(self) -> None:
        """Set the parameters of the rows that sequences have got since the last call.

        A request whose parameters can't be set ends in the next `draw`: the step that is being made has its row.
        """
        for sequence in self._batch.pop_added():
            try:
                self._register_row(sequence)
            except Exception as error:
                self._failed.append((sequence.request, error))

    def _register_row(self, sequence: Sequence) -> None:
        request, params = sequence.request, sequence.request.params
        if isinstance(params, SamplingParams):
            seed = sample_seed(request.seed, sequence.index)
            prompt, output = request.prompt_token_ids, sequence.output_token_ids
            self._sampler.set_row(sequence.row, params, seed, prompt, output)
        stop_ids = self._outputs.stop_ids(request)
        self._batch.set_stop_checks(sequence.row, self._outputs.needs_every_token(sequence), stop_ids)

    def count(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """Count another token of each of these rows for penalties: drafts that were right came before it."""
        self._sampler.count(rows, token_ids)

    def draw(self, step: StepInFlight | None) -> StepInFlight | None:
        """Have the next tokens drawn of the rows of a step that still run. Returns the step."""
        failed, self._failed = self._failed, []
        for request, error in failed:
            if not request.finished and request.request_id in self._outputs.requests:
                self._outputs.fail_request(request, error)
        if step is None:
            return None
        with self._profile.part("sample"):
            batch, rows = self._batch, step.rows
            assert step.logits is not None
            sources = beams = None  # sources: the logits of `rows`; None: all
            ahead, rules = step.drafts_ahead, Rules()
            if batch.version != step.version or batch.has_special_rows:
                is_current = batch.row_version[step.rows] <= step.version
                is_beam = batch.is_beam[step.rows]
                sources = np.nonzero(is_current & ~is_beam)[0]
                beams = np.nonzero(is_current & is_beam)[0]
                rows = step.rows[sources]
                if batch.will_fork[rows].any():
                    sources, rows = self._forking.fork_samples(sources, rows)
                    self.register_rows()
                if batch.has_rules[rows].any():
                    sources, rows, rules = apply_rules(step.logits, sources, rows, batch, self._outputs, ahead)
            started = time.perf_counter()
            if len(rows):
                self._draw_tokens(step, sources, rows, rules, ahead)
            if beams is not None and len(beams):
                self._choose_candidates(step, beams)
            self._steps.model_time_s += time.perf_counter() - started
            self._steps.submit_results(step)
        return step

    def _draw_tokens(
        self, step: StepInFlight, sources: np.ndarray | None, rows: np.ndarray, rules: Rules, ahead: list[list[int]]
    ) -> None:
        """Have tokens drawn from these rows of the logits; ahead: the drafts before each of them, if there are any."""
        logits, num_tokens = step.logits, self._batch.num_tokens[rows]
        assert logits is not None
        if sources is not None and not np.array_equal(sources, np.arange(len(logits))):
            logits, ahead = logits[mx.array(sources)], [ahead[i] for i in sources] if ahead else ahead
        positions = num_tokens - self._batch.num_prompt[rows] + ([len(each) for each in ahead] if ahead else 0)
        step.sampled_tokens = self._sampler.sample(logits, rows, positions, *rules, ahead)
        self._batch.num_tokens[rows] = num_tokens + 1
        step.sampled_rows, step.sampled_version = rows, self._batch.version

    def _choose_candidates(self, step: StepInFlight, sources: np.ndarray) -> None:
        """Have the best continuations found of the beams at these rows of the logits."""
        rows = step.rows[sources].tolist()
        step.beams = [beam for row in rows if (beam := self._batch.sequences[row]) is not None]
        searches = {beam.request.search for beam in step.beams}
        count = max(search.num_candidates for search in searches if search is not None)
        assert step.logits is not None
        step.beam_candidates = best_tokens(step.logits[mx.array(sources)], count)
