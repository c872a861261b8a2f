"""Compare an output with the unpaged model's, near ties allowed and counted."""

import mlx.core as mx
import pytest

from helpers.tiny_models import Unpaged
from mlx_paged.outputs import RequestOutput


def tolerance() -> float:
    """How far log-probabilities in float32 may differ on this device."""
    return 1e-4 if mx.default_device() == mx.cpu else 1e-3


def ends_in_near_tie(reference: Unpaged, output: RequestOutput) -> bool:
    """Fails unless the output is the reference up to its end (False) or up to a near tie (True)."""
    (sample,) = output.outputs
    assert sample.logprobs is not None
    assert len(sample.token_ids) == len(reference.token_ids)
    for i, (token, logprobs) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
        assert logprobs[token] == pytest.approx(reference.logprobs[i], abs=tolerance()), f"token {i}"
        if token != reference.token_ids[i]:
            assert reference.margins[i] < tolerance(), f"token {i}"
            return True
    return False
