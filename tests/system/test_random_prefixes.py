"""Random requests that go on from one another, in random engines: hybrids, latent attention, chunks of a context."""

from __future__ import annotations

import random

import pytest
from helpers.budget import LONG, budget
from helpers.families import family_model
from helpers.near_ties import tolerance
from helpers.tiny_models import VOCAB_SIZE, unpaged_greedy

from mlx_paged import LLM, SamplingParams
from mlx_paged.runner import stretches

FUZZED = ("qwen3_next", "rwkv7", "deepseek_v3", "llama4")
RARELY = (
    "kimi_linear",
    "falcon_h1",
    "mamba2",
    "recurrent_gemma",
    "lfm2_moe",
    "nemotron_h",
    "jamba",
    "gear",
    "plamo2",
    "baichuan_m1",
)


def greedy(max_tokens: int, **values: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **values)


def prompt_of(length: int, seed: float) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


@pytest.mark.parametrize("seed", range(budget(1, 40)))
@pytest.mark.parametrize("family", (*FUZZED, *RARELY) if LONG else FUZZED)
def test_random_requests_that_share_prefixes_give_the_unpaged_tokens(
    family: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "MAX_DECODE_INTERVAL", 16)
    rng, model = random.Random(seed), family_model(family)
    options = {
        "block_size": rng.choice([4, 8]),
        "num_kv_blocks": rng.choice([40, 60, 200]),
        "max_num_batched_tokens": rng.choice([5, 16, 64]),
        "max_num_seqs": rng.choice([2, 5, 8]),
        "pipelining": rng.choice(["submit", "off", "build"]),
    }
    llm = LLM.from_model(model, check_invariants=True, **options)
    known = [prompt_of(rng.randrange(5, 60), rng.random()) for _ in range(3)]
    num_found = 0
    for _ in range(budget(3, 6)):
        prompts = [rng.choice(known) + prompt_of(rng.randrange(1, 9), rng.random()) for _ in range(rng.randrange(1, 5))]
        params = [greedy(rng.choice([1, 4, 20]), n=rng.choice([1, 1, 3])) for _ in prompts]
        for prompt, asked, output in zip(prompts, params, llm.generate(prompts, params), strict=True):
            expected = unpaged_greedy(model, prompt, asked.max_tokens or 0)
            num_found += output.num_cached_tokens
            for sample in output.outputs:
                differs = [found != due for found, due in zip(sample.token_ids, expected.token_ids, strict=True)]
                assert not any(differs) or expected.margins[differs.index(True)] < tolerance()
            known.append(prompt + output.outputs[0].token_ids)
    assert num_found
