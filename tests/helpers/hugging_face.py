"""A tiny model twice, of mlx-lm and of transformers, for beam searches of both; and what transformers found once.

The recording needs no torch to be compared with. With it, `python -m helpers.hugging_face` in tests/ records anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from mlx.utils import tree_flatten

from helpers.beam_oracle import OracleResult, dense_beam_search, unpaged_logprobs
from helpers.tiny_models import COMMON, TINY_CONFIGS, VOCAB_SIZE, make_model
from mlx_paged.sampling_params import BeamSearchParams

RECORDING = Path(__file__).with_name("beams_of_transformers.json")
FAMILIES = ("llama", "qwen2")
SIZE = {"num_hidden_layers": 2, "rope_theta": 10000.0}
RECORDED_PARAMS = [
    BeamSearchParams(width, 9, length_penalty, early_stopping, num_return_sequences)
    for width, length_penalty, early_stopping, num_return_sequences in [
        (2, 1.0, False, None), (3, 0.0, True, 2), (5, 2.0, "never", None),
        (8, -0.5, False, 3), (4, 0.8, True, None), (6, 1.0, "never", 1),
    ]
]  # fmt: skip


class Recorded(NamedTuple):
    """A search that transformers has made: which end tokens there were, and what it found for each prompt."""

    params: BeamSearchParams
    eos: list[int]
    results: list[OracleResult]


def recorded(family: str) -> Iterator[Recorded]:
    """The searches of `RECORDED_PARAMS` over the prompts of `Searched`."""
    for params, search in zip(RECORDED_PARAMS, json.loads(RECORDING.read_text())[family], strict=True):
        found = [OracleResult([(ids, logprob, score) for ids, logprob, score in one]) for one in search["results"]]
        yield Recorded(params, search["eos"], found)


class Searched:
    """A tiny random model of mlx-lm, and prompts to search the continuations of."""

    def __init__(self, family: str) -> None:
        self.model = make_model(family, seed=1, **SIZE)
        self.model.model.norm.weight *= 2.0  # sure of itself, so that later hypotheses can overtake finished ones
        rng = np.random.default_rng(7)
        self.prompts = [rng.integers(1, VOCAB_SIZE, length).tolist() for length in (4, 11, 7)]
        self.tables = [unpaged_logprobs(self.model, prompt) for prompt in self.prompts]

    def end_tokens(self, num_tokens: int) -> list[int]:
        """Tokens that beams of every prompt come across, so that searches end in all manners."""
        outputs = [dense_beam_search(tables, BeamSearchParams(4, 8), []).sequences for tables in self.tables]
        counts = np.bincount([t for sequences in outputs for s in sequences for t in s[0][1:]], minlength=VOCAB_SIZE)
        return np.argsort(-counts, kind="stable")[:num_tokens].tolist()


class HuggingFace(Searched):
    """The same with a model of transformers that has the same weights. Needs torch."""

    def __init__(self, family: str) -> None:
        self.torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        self.torch.set_num_threads(1)
        super().__init__(family)
        name = {"llama": "Llama", "qwen2": "Qwen2"}[family]
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = getattr(transformers, f"{name}Config")(**COMMON | TINY_CONFIGS[family] | SIZE, rope_parameters=rope)
        self.twin = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        weights = {path: self.torch.tensor(np.array(weight)) for path, weight in tree_flatten(self.model.parameters())}
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.twin.load_state_dict(weights)

    def generate(self, prompts: list[list[int]], params: BeamSearchParams, eos: list[int]) -> list[OracleResult]:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        count = params.num_return_sequences or params.beam_width
        with self.torch.inference_mode():
            result = self.twin.generate(
                self.torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]),
                attention_mask=self.torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
                do_sample=False,
                num_beams=params.beam_width,
                num_return_sequences=count,
                max_new_tokens=params.max_tokens,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                eos_token_id=eos or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
        lengths = (result.beam_indices >= 0).sum(dim=-1).tolist()
        rows = [
            (row[longest : longest + length], score * length**params.length_penalty, score)
            for row, length, score in zip(
                result.sequences.tolist(), lengths, result.sequences_scores.tolist(), strict=True
            )
        ]
        return [OracleResult(rows[i : i + count]) for i in range(0, len(rows), count)]

    def record(self) -> Iterator[dict[str, Any]]:
        """Make the searches of `RECORDED_PARAMS`, as they are kept."""
        for i, params in enumerate(RECORDED_PARAMS):
            eos = self.end_tokens((1, 2, 8)[i % 3])
            results = [found.sequences for found in self.generate(self.prompts, params, eos)]
            yield {
                "eos": eos,
                "results": [[(ids, round(a, 4), round(b, 4)) for ids, a, b in sequences] for sequences in results],
            }


if __name__ == "__main__":
    RECORDING.write_text(json.dumps({family: list(HuggingFace(family).record()) for family in FAMILIES}) + "\n")
