"""Rules of single outputs, applied to the logits of a step: processors, grammars, bad words, fewest tokens.

A step's logits are changed once the tokens of the step before are known, while the device computes them; a processor
has to wait for them. What a rule raises ends its request, or for a grammar its sample, and nobody else's.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_paged.engine.output_processor import OutputProcessor
from mlx_paged.errors import DeadEnd
from mlx_paged.request import Sequence
from mlx_paged.sampling_params import SamplingParams
from mlx_paged.scheduler.running_batch import RunningBatch

_ALL = 0xFFFFFFFF


class Rules(NamedTuple):
    """What rules make of a step's logits, as the sampler takes it; None where there is nothing to do."""

    masks: np.ndarray | None = None
    """uint32 [num_rows, vocab_size / 32], a bit for each token that may come."""
    scores: mx.array | None = None
    """float32 [num_rows, vocab_size], of which processors have made some rows."""


def apply_rules(
    logits: mx.array,
    sources: np.ndarray,
    rows: np.ndarray,
    batch: RunningBatch,
    outputs: OutputProcessor,
    ahead: list[list[int]],
) -> tuple[np.ndarray, np.ndarray, Rules]:
    """Apply the rules of rows of the batch that have some.

    sources: the row of the logits of each row. ahead: of each row of the logits, the drafts before it, if there are
    any. Returns both without the rows whose sequences end here, and without drafts that would end them.
    """
    sequences = [batch.sequences[row] for row in rows.tolist()]
    vocab_size = logits.shape[-1]
    masks = np.full((len(rows), -(-vocab_size // 32)), _ALL, np.uint32)
    masks[:, -1] >>= np.uint32(-vocab_size % 32)
    everything = masks[0].copy()
    processed: dict[int, mx.array] = {}
    is_dropped = np.zeros(len(rows), bool)
    for i in np.flatnonzero(batch.has_rules[rows]).tolist():
        sequence = sequences[i]
        assert sequence is not None
        if sequence.finished:  # with another sample of its request
            continue
        if ahead and (drafts := ahead[sources[i]]):
            is_after_dropped = len(drafts) > 1 and is_dropped[i - 1]
            is_dropped[i] = is_after_dropped or not _forbid_after(drafts, sequence, masks[i], outputs)
            continue
        params = sequence.request.params
        assert isinstance(params, SamplingParams)
        if params.logits_processors:
            try:
                processed[i] = _process(sequence, logits[int(sources[i])].astype(mx.float32), params)
            except Exception as error:
                outputs.fail_request(sequence.request, error)
                continue
        try:
            _forbid(sequence, params, masks[i], outputs)
        except Exception as error:  # DeadEnd, or of the grammar's code
            outputs.fail_sequence(sequence, error)
        if not (sequence.matcher is not None or params.bad_words or params.logits_processors):
            batch.has_rules[rows[i]] = sequence.row >= 0 and sequence.num_output_tokens < params.min_tokens
    kept = np.array([sequence is not None and not sequence.finished for sequence in sequences], bool) & ~is_dropped
    sources, rows, masks = sources[kept], rows[kept], masks[kept]
    scores = None
    if len(rows) and any(kept[i] for i in processed):
        scores = logits[mx.array(sources)].astype(mx.float32)
        places = np.cumsum(kept) - 1
        for i, row in processed.items():
            if kept[i]:
                scores[int(places[i])] = row
    return sources, rows, Rules(None if (masks == everything).all() else masks, scores)


def _process(sequence: Sequence, row: mx.array, params: SamplingParams) -> mx.array:
    """Let the request's processors make a row of logits of this one. It is computed here, so that errors are theirs."""
    shape = row.shape
    for process in params.logits_processors or ():
        made = process(sequence.output_token_ids, row)
        row = made if isinstance(made, mx.array) else mx.array(made)
        if row.shape != shape:
            raise ValueError(f"a logits processor must return a row of {shape[0]} logits, got shape {row.shape}")
    row = row.astype(mx.float32)
    if bool(mx.isnan(row).any().item()) or not bool((row > -mx.inf).any().item()):
        raise ValueError("the logits processors leave no token that could be drawn: all are -inf, or one is NaN")
    return row


def _forbid_after(drafts: list[int], sequence: Sequence, allowed: np.ndarray, outputs: OutputProcessor) -> bool:
    """Do as `_forbid`, as if a sequence had drafts for its next tokens. Returns whether there is a token after them.

    Where there is none, which may be an error of the sequence, that is found once the drafts are known to be right.
    """
    matcher, params = sequence.matcher, sequence.request.params
    assert isinstance(params, SamplingParams)
    sequence.token_ids += drafts
    try:
        if matcher is not None:
            sequence.matcher = matcher.copy()
            for token_id in drafts:
                sequence.matcher.advance(token_id)
                if sequence.matcher.is_finished:
                    return False
        _forbid(sequence, params, allowed, outputs)
    except Exception:
        return False
    finally:
        del sequence.token_ids[-len(drafts) :]
        sequence.matcher = matcher
    return True


def _forbid(sequence: Sequence, params: SamplingParams, allowed: np.ndarray, outputs: OutputProcessor) -> None:
    """Clear the bits of tokens that may not come. Raises DeadEnd if none is left."""
    if sequence.matcher is not None:
        allowed[:] = sequence.matcher.mask()
    if sequence.request.bad_words is not None:
        sequence.request.bad_words.forbid(sequence.token_ids, len(sequence.request.prompt_token_ids), allowed)
    if sequence.num_output_tokens < params.min_tokens:
        for token_id in (*outputs.stop_ids(sequence.request), *(params.stop_token_ids or ())):
            allowed[token_id // 32] &= np.uint32(_ALL ^ 1 << token_id % 32)
    if not allowed.any():
        raise DeadEnd("bad_words, min_tokens and the form of this output leave no token that could come here")
