"""Drafts by a second, smaller model of the same vocabulary, which has a paged KV cache of its own.

It draws each draft as the model will draw the token there: with the parameters of the request and the random numbers of
that place, so that it is right wherever both models think alike (after Leviathan et al. 2023). What it knows of a
sequence may lag: blocks of its pool come from a block manager like the model's, prefixes are shared in it, and only
those who are to have drafts catch up, a chunk of tokens per step. What it computes can't change an answer.
"""

import math
import time
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_paged.blocks.cache_groups import CacheGroups
from mlx_paged.errors import OutOfBlocks
from mlx_paged.request import Sequence
from mlx_paged.runner.input_builder import InputBuilder
from mlx_paged.runner.model_runner import ModelRunner
from mlx_paged.sampling.sampler import Sampler, sample_seed
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch
from mlx_paged.speculation.step_costs import StepCosts

_CHUNK = 512  # tokens that are caught up with in a step, at most
_FEW = 16  # tokens that need no step of their own before the first draft
_FIRST_SHARE = 0.7  # of drafts that are right, as long as nothing is known
_MEMORY = 256  # drafts by which new sequences are judged, about
_UNTRIED = 1 / 64  # of a draft that was right: what a token counts for which was not guessed, so that it is tried again


@dataclass(eq=False)
class _Known:
    """What the draft model knows of a sequence."""

    sequence: Sequence
    row: int
    """Of the running batch, for which its parameters are set and its block tables are written."""
    num_tokens: int
    """Its tokens when it was looked at last."""
    num_computed: int | None = None
    """Tokens whose K and V are in the draft model's blocks; None: it has no blocks."""
    drafts: list[int] = field(default_factory=list)
    """What was proposed to come after `num_tokens`."""


class DraftModel:
    """Proposes what a second model draws."""

    def __init__(self, runner: ModelRunner, batch: RunningBatch, vocab_size: int, costs: StepCosts, most: int) -> None:
        """batch, vocab_size: of the model whose tokens are guessed. costs: of the draft model's steps.

        most: drafts of a sequence in a step. There are none where they would not fit the draft model's context.
        """
        self.first_share = _FIRST_SHARE
        """Of its drafts, those that were right lately: what is expected of a new sequence."""
        self._runner, self._costs = runner, costs
        plan, config = runner.plan, runner.config
        self._groups = CacheGroups.make(
            plan.num_blocks,
            plan.windows,
            config.block_size,
            chunked=plan.chunked,
            allocator=config.allocator,
            prefix_caching=config.prefix_caching,
        )
        self._chunk = min(_CHUNK, config.max_num_batched_tokens)
        self._vocab_size = min(vocab_size, runner.vocab_size)
        self._max_num_tokens = math.inf if runner.context is None else runner.context + 1 - most
        num_rows, max_blocks = batch.tables[0].matrix.shape
        max_blocks = min(plan.num_blocks[0], max_blocks + -(-most // config.block_size))
        own = RunningBatch(num_rows, len(plan.windows), max_blocks, config.block_size)
        self._tables, self._builder = own.tables, InputBuilder(own)  # with the rows of the model's batch
        self._sampler = Sampler(num_rows, self._vocab_size)
        self._known: dict[int, _Known] = {}

    def keep(self, seq_ids: set[int]) -> None:
        """Free the blocks of all sequences but these; what is published of them may be hit until it is evicted."""
        for seq_id in self._known.keys() - seq_ids:
            self._free(self._known.pop(seq_id))

    def update(self, sequence: Sequence) -> tuple[float, float]:
        """Take in the tokens that a sequence has come to.

        Returns how many of its drafts were right, and how many were put to the test; of what was not guessed a small
        part counts as right.
        """
        known, tokens = self._known.get(sequence.seq_id), sequence.token_ids
        if known is None:
            self._known[sequence.seq_id] = _Known(sequence, -1, len(tokens))
            return 0, 0
        came, drafts, known.drafts = tokens[known.num_tokens :], known.drafts, []
        if not came:
            known.drafts = drafts
            return 0, 0
        compared = [draft == token for draft, token in zip(drafts, came, strict=False)]
        right = compared.index(False) if False in compared else len(compared)
        if known.num_computed is not None and drafts:
            known.num_computed = known.num_tokens + min(right, len(drafts) - 1)
        known.num_tokens = len(tokens)
        tried = min(right + 1, len(compared))
        if tried:
            self.first_share += (right / tried - self.first_share) * (1 - (1 - 1 / _MEMORY) ** tried)
            return right, tried
        return len(came) * _UNTRIED, len(came) * _UNTRIED

    def seconds(self, num_sequences: int, num_drafts: int) -> float:
        """Return what so many drafts of so many sequences take."""
        return num_drafts * self._costs.of(num_sequences)

    def skip(self) -> None:
        """Let what its steps are taken to cost fade, so that one bad measurement does not silence it for ever."""
        self._costs.fade()

    def seconds_to_catch_up(self, sequence: Sequence) -> float:
        """Return what has to be computed before the first draft of a sequence takes; infinity without blocks for it."""
        known = self._known[sequence.seq_id]
        if not self._attach(known):
            return math.inf
        behind = self._num_behind(known)
        return self._costs.of(behind) if behind > _FEW else 0.0

    def catch_up(self, sequences: list[Sequence]) -> list[Sequence]:
        """Compute some of the tokens that were not. Returns the sequences that lacked a few at most, for `propose`.

        sequences: which have blocks, as `seconds_to_catch_up` says.
        """
        left, ready, chosen, ends = self._chunk, list[Sequence](), list[_Known](), list[int]()
        for sequence in sequences:
            known = self._known[sequence.seq_id]
            start, behind = known.num_computed or 0, self._num_behind(known)
            if behind <= _FEW:
                ready.append(sequence)
            elif left and self._reserve(known, end := start + min(left, behind - 1)):
                left -= end - start
                chosen.append(known)
                ends.append(end)
        if chosen:
            mx.eval(self._run(chosen, np.array(ends, np.int32)))
            for known, end in zip(chosen, ends, strict=True):
                known.num_computed = end
        return ready

    def propose(self, rooms: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Return drafts for sequences that `catch_up` found ready, as many as there is room for, or fewer sequences."""
        chosen = [self._known[sequence.seq_id] for sequence, room in rooms.items() if room > 0]
        most = max((rooms[known.sequence] for known in chosen), default=0)  # of all, so that a step has one of each
        chosen = [known for known in chosen if self._reserve(known, len(known.sequence.token_ids) + most - 1)]
        if not chosen:
            return {}
        started = time.perf_counter()
        tokens = self._draw(chosen, most)
        self._costs.add(len(chosen), (time.perf_counter() - started) / most)
        for known, drafts in zip(chosen, tokens, strict=True):
            known.drafts = drafts[: rooms[known.sequence]]
            known.num_computed = len(known.sequence.token_ids)
        return {known.sequence: known.drafts for known in chosen}

    def _draw(self, chosen: list[_Known], most: int) -> list[list[int]]:
        """Have the draft model draw tokens of each sequence, one after another, without waiting for them between."""
        rows = np.array([known.sequence.row for known in chosen])
        ends = np.array([len(known.sequence.token_ids) for known in chosen], np.int32)
        places = ends - np.array([len(known.sequence.request.prompt_token_ids) for known in chosen])
        drawn: list[mx.array] = []
        for i in range(most):
            logits = self._run(chosen, ends + i, drawn[-1] if drawn else None)
            drawn.append(self._sampler.sample(logits[:, : self._vocab_size], rows, places + i).token_ids)
            if self._runner.overlap_is_safe:
                mx.async_eval(drawn[-1])
            else:
                mx.eval(drawn[-1])
                mx.synchronize()
        return np.array(mx.stack(drawn, axis=1)).tolist()

    def _run(self, chosen: list[_Known], ends: np.ndarray, drawn: mx.array | None = None) -> mx.array:
        """Compute the tokens of sequences up to `ends`, or the last of them, which was drawn. Returns its logits."""
        starts = ends - 1 if drawn is not None else np.array([known.num_computed for known in chosen], np.int32)
        if drawn is None:
            parts = [k.sequence.token_ids[start:end] for k, start, end in zip(chosen, starts, ends, strict=True)]
            # A token that this model does not know costs no more than a wrong draft.
            drawn = mx.array(np.minimum(np.concatenate(parts), self._runner.vocab_size - 1))
        rows = np.array([known.row for known in chosen])
        inputs, _ = self._builder.arrange(drawn.astype(mx.int32), rows, starts, ends - starts, drawn.size)
        lasts = inputs.groups[0].cu_seqlens_q[1:] - 1
        return self._runner.run(inputs._replace(logits_indices=mx.array(lasts)))

    def _attach(self, known: _Known) -> bool:
        """Give a sequence blocks, some of them shared with equal prefixes.

        Returns whether there are enough, and the sequence is not too long for the draft model.
        """
        sequence = known.sequence
        if len(sequence.token_ids) > self._max_num_tokens:
            self._free(known)
            return False
        if known.num_computed is None:
            salt, tokens = sequence.request.params.cache_salt, sequence.token_ids
            try:
                known.num_computed = self._groups.attach(sequence.seq_id, tokens, len(tokens), salt=salt)
            except OutOfBlocks:
                return False
        return True

    def _reserve(self, known: _Known, num_tokens: int) -> bool:
        """Publish what is computed of a sequence, and give it slots for more. Without room it loses its blocks."""
        assert known.num_computed is not None
        seq_id, first = known.sequence.seq_id, known.num_computed // self._groups.block_size
        try:
            self._groups.sync(seq_id, known.num_computed)
            self._groups.reserve(seq_id, num_tokens)
        except OutOfBlocks:
            self._free(known)
            return False
        if known.row != known.sequence.row:
            self._set_row(known)
            first = 0
        for tables, manager in zip(self._tables, self._groups.managers, strict=True):
            block_ids = np.maximum(manager.block_table(seq_id, first), 0)  # none where a window is past it
            tables.rewrite(known.row, first, block_ids.tolist())
        return True

    def _free(self, known: _Known) -> None:
        if known.num_computed is not None:
            self._groups.sync(known.sequence.seq_id, min(known.num_computed, len(known.sequence.token_ids)))
            self._groups.free(known.sequence.seq_id)
        known.num_computed, known.drafts, known.row = None, [], -1

    def _num_behind(self, known: _Known) -> int:
        return len(known.sequence.token_ids) - (known.num_computed or 0)

    def _set_row(self, known: _Known) -> None:
        """Have drafts drawn as the request's parameters say, as far as these do not look at the tokens before."""
        sequence = known.sequence
        known.row, params = sequence.row, sequence.request.params
        assert isinstance(params, SamplingParams)
        bias = {token: value for token, value in (params.logit_bias or {}).items() if token < self._vocab_size}
        asked = SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            logit_bias=bias or None,
        )
        self._sampler.set_row(sequence.row, asked, sample_seed(sequence.request.seed, sequence.index), [], [])
