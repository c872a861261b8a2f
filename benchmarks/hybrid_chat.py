"""A conversation with a model whose layers keep states: how many tokens of each prompt are computed, and not found.

    python benchmarks/hybrid_chat.py [--quick] [--json FILE]     count, print the table, write the raw numbers
    python benchmarks/hybrid_chat.py --markdown FILE             the table of such a file

The model has Qwen3-Next's layers and random weights. What is counted depends on no machine.
"""

from __future__ import annotations

import random
from unittest.mock import patch

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import mlx.core as mx
import mlx.nn as nn
import report
from mlx_lm.models import qwen3_next
from report import Part, Row

from mlx_paged.runner import stretches

VOCAB_SIZE = 16384
NEVER = 1 << 30
INTERVALS = {"prompts": NEVER, "answers": stretches.DECODE_INTERVAL}
"""Which checkpoints there are -> how many tokens of an answer lie between its own."""


def make_model(quick: bool) -> nn.Module:
    """Three of four layers are recurrent, as in Qwen3-Next; 20 million parameters."""
    size = 64 if quick else 320
    config = {
        "model_type": "qwen3_next", "hidden_size": size, "num_hidden_layers": 4 if quick else 8, "head_dim": 32,
        "intermediate_size": 3 * size, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "num_experts": 0, "num_experts_per_tok": 0,
        "decoder_sparse_step": 1, "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32,
        "mlp_only_layers": [], "vocab_size": VOCAB_SIZE, "rope_theta": 1e6, "partial_rotary_factor": 0.25,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "norm_topk_prob": True,
    }  # fmt: skip
    mx.random.seed(0)
    model = qwen3_next.Model(qwen3_next.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model


def chat(quick: bool) -> list[Row]:
    """Ten turns: a system prompt of 400 tokens, questions of 60, answers of 300; each prompt has all before it."""
    num_turns, num_system, num_question, num_answer = (3, 40, 12, 8) if quick else (10, 400, 60, 300)
    model, rows = make_model(quick), [{"turn": turn} for turn in range(1, num_turns + 1)]
    params = SamplingParams(temperature=0, max_tokens=num_answer, ignore_eos=True)
    for way, interval in INTERVALS.items():
        rng = random.Random(0)
        llm = LLM.from_model(model, num_kv_blocks=512, max_num_seqs=2)
        prompt = rng.choices(range(VOCAB_SIZE), k=num_system)
        with patch.object(stretches, "DECODE_INTERVAL", interval):
            for row in rows:
                prompt = prompt + rng.choices(range(VOCAB_SIZE), k=num_question)
                (output,) = llm.generate([prompt], params)
                row["prompt"], row[way] = len(prompt), len(prompt) - output.num_cached_tokens
                prompt = prompt + output.outputs[0].token_ids
    return rows


PARTS = [
    Part(
        chat,
        "Tokens of each prompt that are computed in a conversation of ten turns",
        {
            "turn": ("turn", "d"),
            "prompt": ("prompt, all of it without checkpoints", ",d"),
            "prompts": ("checkpoints of prompts", ",d"),
            "answers": ("of prompts and answers", ",d"),
        },
    )
]

if __name__ == "__main__":
    report.main("hybrid_chat.py", __doc__ or "", PARTS)
