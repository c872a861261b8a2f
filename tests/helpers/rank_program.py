"""A program that mlx.launch starts on several ranks: it asks models all kinds of things and writes down the answers.

`python rank_program.py FILE [COUNT] NAME...`: of these cases, to a file of JSON; with a number so many requests, some
of them given up. Tests ask the same of one process.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):  # ranks that wait for each other take a core each
        os.sched_setaffinity(0, {int(os.environ["MLX_RANK"]) % (os.cpu_count() or 1)})
    sys.path.insert(0, str(Path(__file__).parents[1]))

from mlx_paged import LLM  # isort: skip  (before mlx)
import mlx.nn as nn

from helpers.tiny_models import make_model
from mlx_paged import BeamSearchParams, SamplingParams

SHARED = list(range(20, 33))
PROMPTS = [[1, 2, 3], SHARED + [5], SHARED + [9, 8], [7, 8, 9] * 7]
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 16}
MOE |= {"moe_intermediate_size": 32, "norm_topk_prob": True, "rope_theta": 1e4, "tie_word_embeddings": False}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4}
CODES = {"quantised": True, "intermediate_size": 128, "num_key_value_heads": 1}
# Of each case the ranks, the family, what its shape is, and what the engine is told.
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "llama": (2, "llama", EIGHT, {"num_kv_blocks": 16}),
    "qwen3 in int8": (2, "qwen3", {"head_dim": 64}, {"kv_cache_dtype": "int8", "pipelining": "build"}),
    "qwen3_moe with drafts": (2, "qwen3_moe", MOE, {"speculative_config": {"adaptive": False}}),
    "one KV head, weights in 4 bits": (2, "llama", CODES, {}),
    "windows, a model's drafts": (2, "gpt_oss", {}, {"draft": "llama"}),
    "qwen2 by layers": (2, "qwen2", {}, {"pipeline_parallel_size": 2}),
    "SmolLM2's heads": (3, "llama", {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}, {}),
    "replicated KV heads": (4, "qwen3", {"num_attention_heads": 8, "head_dim": 16}, {"num_kv_blocks": 16}),
    "qwen3_moe": (4, "qwen3_moe", MOE | EIGHT, {}),
}


def make_llm(name: str, *, alone: bool) -> LLM:
    """The LLM of a case, on as many ranks as it says, or on one."""
    size, family, shape, config = CASES[name]
    shape, config = shape.copy(), {"block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 4} | config
    is_quantised, draft = shape.pop("quantised", False), config.pop("draft", None)
    if draft is not None:
        config["speculative_config"] = {"adaptive": False, "model": make_model(draft)}
    model = make_model(family, **shape)
    if is_quantised:
        nn.quantize(model, group_size=32, bits=4)
    config.setdefault("tensor_parallel_size", 1 if "pipeline_parallel_size" in config else size)
    if alone:
        config |= {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    return LLM.from_model(model, **config)


def answers(llm: LLM) -> dict[str, Any]:
    """Ask for greedy tokens, hits, samples, beams, scores of prompts; abort; and let one request fail."""

    def fail(*_: Any) -> Any:
        raise ValueError("no")

    greedy = SamplingParams(temperature=0, max_tokens=10, logprobs=1)
    found: dict[str, Any] = {"greedy": [_of(each) for each in llm.generate(PROMPTS, greedy)]}
    found["again"] = [_of(each) for each in llm.generate(PROMPTS[1:3], greedy)]
    found["drawn"] = [_of(each) for each in llm.generate(PROMPTS[:2], SamplingParams(n=3, seed=7, max_tokens=6))]
    beams = llm.beam_search(PROMPTS[:2], BeamSearchParams(beam_width=3, max_tokens=6))
    found["beams"] = [[(s.token_ids, s.cum_logprob) for s in each.sequences] for each in beams]
    scored = llm.generate(PROMPTS[3], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0))[0]
    found["scores"] = [next(iter(each.values())) for each in scored.prompt_logprobs[1:]]
    failed = llm.engine.add_request(PROMPTS[0], SamplingParams(max_tokens=4, logits_processors=[fail]))
    aborted = llm.engine.add_request(PROMPTS[3], greedy)
    for _ in range(4):
        llm.engine.step()
    llm.engine.abort(aborted)
    while llm.engine.has_unfinished():
        llm.engine.step()
    llm.engine.compact()
    found["after"] = [_of(each) for each in llm.generate(PROMPTS, greedy)]
    stats = llm.stats()
    found["counts"] = [stats.num_preemptions, stats.num_cow_copies, stats.num_draft_tokens, failed]
    return found


def soak(llm: LLM, count: int) -> dict[str, Any]:
    """Ask for so many answers, a few of which are given up. Returns the tokens of the others, by request."""
    rng, num_asked, found, given_up = random.Random(0), 0, dict[str, Any](), set[int]()
    while num_asked < count or llm.engine.has_unfinished():
        for _ in range(rng.randrange(3) if num_asked < count else 0):
            prompt = [rng.randrange(90) for _ in range(rng.choice([2, 9, 30]))]
            prompt = SHARED + prompt if rng.random() < 0.5 else prompt
            params = SamplingParams(
                temperature=rng.choice([0, 0, 1]), seed=3, top_k=4, max_tokens=rng.randrange(1, 20), ignore_eos=True
            )
            request_id = llm.engine.add_request(prompt, params)
            num_asked += 1
            if rng.random() < 0.3:
                given_up.add(request_id)
        if given_up and rng.random() < 0.2:
            llm.engine.abort(given_up.pop())
        for output in llm.engine.step():
            found[str(output.request_id)] = output.outputs[0].token_ids
            given_up.discard(output.request_id)
    stats = llm.stats()
    return {"tokens": found, "ends": [stats.num_preemptions > 0, stats.num_free_blocks == stats.num_blocks]}


def _of(output: Any) -> list[Any]:
    return [(sample.token_ids, sample.cumulative_logprob) for sample in output.outputs]


def main(file: str, *names: str) -> None:
    found: dict[str, Any] = {}
    num_soaked = int(names[0]) if names[0].isdigit() else None
    names = names if num_soaked is None else names[1:]
    for name in names:
        try:
            llm = make_llm(name, alone=False)
        except SystemExit:  # the end of this model, in a rank that follows
            continue
        found[name] = answers(llm) if num_soaked is None else soak(llm, num_soaked)
        found[name]["memory"] = llm.describe_memory()
        llm._runner._end()  # type: ignore[attr-defined]
    if os.environ["MLX_RANK"] == "0":
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
