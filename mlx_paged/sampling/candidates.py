"""The best next tokens of each beam, from the logits of a step."""

import mlx.core as mx

from mlx_paged.cpu.exponential import logsumexp


def beam_candidates(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k most likely tokens of each row, and their log-probabilities; of equal logits the lower token ids.

    logits: [num_rows, vocab_size], any float type. Returns token ids, int32 [num_rows, min(k, vocab_size)], best
    first, and their log-softmax, float32, not evaluated yet. A row with a NaN among its logits gives NaN.
    """
    vocab_size = logits.shape[-1]
    k = min(k, vocab_size)
    logits = logits.astype(mx.float32)
    keys = mx.partition(_keys(logits), k - 1, axis=-1)[:, :k] if k < vocab_size else _keys(logits)
    token_ids = mx.sort(keys, axis=-1).astype(mx.uint32).astype(mx.int32)  # the low half
    normaliser = logsumexp(logits)
    # Said outright, since the fast exponentials of a GPU need not pass a NaN on.
    normaliser = mx.where(mx.isnan(logits).any(axis=-1, keepdims=True), mx.nan, normaliser)
    return token_ids, mx.take_along_axis(logits, token_ids, axis=-1) - normaliser


def _keys(logits: mx.array) -> mx.array:
    """uint64 keys that sort as the logits from the highest, then as the token ids from the lowest.

    A partition leaves open which of equal values it keeps, and half types have many: so no two may be equal. The
    high half is the float's bits, made to fall as the float rises; the low half is the token id.
    """
    bits = mx.where(logits == 0, 0, logits).view(mx.uint32)  # one zero, not two
    falling = mx.where(bits >> 31, bits, ~bits & 0x7FFFFFFF)
    return (falling.astype(mx.uint64) << 32) | mx.arange(logits.shape[-1]).astype(mx.uint64)
