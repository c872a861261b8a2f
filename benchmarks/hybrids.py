"""Models whose layers keep states: what a conversation computes again, and short prompts of unequal lengths at once.

    python benchmarks/hybrids.py [--quick] [--json FILE]     measure, print tables, write the raw numbers
    python benchmarks/hybrids.py --markdown FILE             the tables of such a file

`chat` asks this server and mlx-lm's, each a process of its own with its own defaults, the same over the loopback: ten
turns of one conversation, then the last question in other words, and conversations more with the same system message.
The model has LFM2's layers, of which two of three keep a state, random weights, and a tokenizer whose tokens are
letters, so that an answer in the next prompt is the tokens that were generated. How many tokens are computed is what
the servers' usage says; it depends neither on the weights nor on the machine.

`short_prompts` gives 16 prompts of 24 to 63 tokens at once to this engine, which pads nothing, and to mlx-lm's
BatchGenerator, which pads all to the longest. Rows are right that have the tokens of mlx-lm with that prompt alone.
"""

from __future__ import annotations

import importlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mlx_paged import LLM, SamplingParams  # isort: skip  (before mlx, so that it finds OpenBLAS)
import httpx
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import report
from fair_steps import PAGED, serving
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, generate_step
from report import Part, Row
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SYSTEMS = {"mlx-paged": PAGED, "mlx_lm.server": [sys.executable, "-m", "mlx_lm", "server", "--log-level", "ERROR"]}
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
SPECIAL = ("<s>", "</s>", "<user>", "<system>", "<assistant>")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SHAPES: dict[str, dict[str, Any]] = {
    "lfm2": {
        "hidden_size": 512, "num_hidden_layers": 9, "intermediate_size": 1536, "num_attention_heads": 8,
        "num_key_value_heads": 2, "layer_types": ["conv", "conv", "full_attention"] * 3, "conv_bias": False,
        "conv_L_cache": 3, "norm_eps": 1e-5, "block_dim": 512, "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "max_position_embeddings": 32768,
    },
    "mamba2": {
        "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1024, "num_heads": 16, "head_dim": 64,
        "state_size": 64, "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1, "use_bias": False,
        "use_conv_bias": True, "tie_word_embeddings": True, "time_step_limit": (0.0, 1e30), "time_step_rank": "auto",
    },
    "qwen3_next": {
        "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6, "linear_num_value_heads": 8,
        "linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "num_experts": 0, "num_experts_per_tok": 0,
        "decoder_sparse_step": 1, "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32,
        "mlp_only_layers": [], "rope_theta": 1e6, "partial_rotary_factor": 0.25, "max_position_embeddings": 32768,
        "tie_word_embeddings": False, "norm_topk_prob": True,
    },
    "jamba": {
        "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 768, "num_attention_heads": 8,
        "num_key_value_heads": 2, "attn_layer_offset": 3, "attn_layer_period": 4, "expert_layer_offset": 1,
        "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "num_experts": 1,
        "num_experts_per_tok": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
    },
}  # fmt: skip
"""Model type -> what its family's ModelArgs want, but for the size of the vocabulary."""


def make_model(model_type: str, vocab_size: int = 512) -> nn.Module:
    """Make a model of mlx-lm's with one of SHAPES and random weights, always the same."""
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(_config(model_type, vocab_size)))
    mx.eval(model.parameters())
    return model


def _config(model_type: str, vocab_size: int) -> dict[str, Any]:
    return SHAPES[model_type] | {"model_type": model_type, "vocab_size": vocab_size}


def write_random_model(folder: Path) -> None:
    """Write a model of LFM2's form whose tokens are letters. Only letters are ever its next token."""
    tokens = {text: number for number, text in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    of_tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    of_tokenizer |= {"clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(of_tokenizer))
    config = _config("lfm2", len(tokens)) | {"eos_token_id": 1, "bos_token_id": 0, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(make_model("lfm2", len(tokens)).parameters()))
    weights["model.embed_tokens.weight"][: len(SPECIAL)] = 0  # it is the output head too
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


class Client:
    """One side of a server's conversations."""

    def __init__(self, url: str, num_answer: int) -> None:
        self.url, self.num_answer = url, num_answer

    def ask(self, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
        """Ask for the next answer. Returns its text, and what it cost."""
        body = {"messages": messages, "max_tokens": self.num_answer, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        start, first_s, text, usage = time.perf_counter(), 0.0, "", {}
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=600) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                    first_s = first_s or (time.perf_counter() - start if text else 0.0)
                usage = event.get("usage") or usage
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return text, {
            "prompt": usage["prompt_tokens"],
            "computed": usage["prompt_tokens"] - cached,
            "first_ms": 1e3 * first_s,
        }


def chat(quick: bool) -> list[Row]:
    """Ask each server for the same turns, one server after the other in each."""
    num_turns, num_system, num_question, num_answer = (3, 150, 20, 12) if quick else (10, 400, 60, 300)
    words = random.Random(0)

    def said(role: str, count: int) -> dict[str, str]:
        return {"role": role, "content": "".join(words.choices(LETTERS[:26], k=count))}

    rows = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_random_model(folder)
        clients = {
            system: Client(stack.enter_context(serving(command, folder)), num_answer)
            for system, command in SYSTEMS.items()
        }
        for client in clients.values():
            client.ask([said("user", 40)])
        system = said("system", num_system)
        histories = {name: [system] for name in clients}

        def turn(title: str, question: dict[str, str]) -> None:
            row: Row = {"turn": title}
            for name, client in clients.items():
                histories[name].append(question)
                text, cost = client.ask(histories[name])
                histories[name].append({"role": "assistant", "content": text})
                row["prompt"] = cost["prompt"]
                row[f"{name} computed"], row[f"{name} first_ms"] = cost["computed"], cost["first_ms"]
            rows.append(row)

        for number in range(1, num_turns + 1):
            turn(f"turn {number}", said("user", num_question))
        for name in clients:
            histories[name] = histories[name][:-2]
        turn("the last question in other words", said("user", num_question))
        for title in ("another conversation", "and another"):
            histories = {name: [system] for name in clients}
            turn(title, said("user", num_question))
    return rows


def short_prompts(quick: bool) -> Iterator[Row]:
    """Serve the same prompts in turns, all there from the start. Seconds are medians."""
    count, repetitions = (2, 1) if quick else (16, 5)
    rng = random.Random(0)
    prompts = [rng.choices(range(512), k=rng.randint(24, 63)) for _ in range(count)]
    for model_type in ("lfm2", "jamba") if quick else SHAPES:
        model = make_model(model_type)
        llm = LLM.from_model(model, num_kv_blocks=16 * count, max_num_seqs=count, prefix_caching=False)
        for num_tokens in (1, 4 if quick else 32):
            alone = [_alone(model, prompt, num_tokens) for prompt in prompts]
            times: dict[str, list[float]] = {}
            row: Row = {"family": model_type, "tokens": num_tokens}
            ways: dict[str, Callable[[], list[list[int]]]] = {
                "mlx-paged": partial(_paged, llm, prompts, num_tokens),
                "mlx_lm": partial(_batched, model, prompts, num_tokens),
            }
            for _ in range(repetitions):
                for name, serve in ways.items():
                    start = time.perf_counter()
                    outputs = serve()
                    times.setdefault(name, []).append(time.perf_counter() - start)
                    right = sum(map(list.__eq__, outputs, alone))
                    row[f"{name} right"] = f"{right} of {count}"
            row |= {f"{name} s": statistics.median(each) for name, each in times.items()}
            row["ratio"] = statistics.median(map(float.__truediv__, *times.values()))
            yield row


def _alone(model: nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=num_tokens)]


def _paged(llm: LLM, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def _batched(model: nn.Module, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    generator = BatchGenerator(model, completion_batch_size=len(prompts), prefill_batch_size=len(prompts))
    tokens: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts, [num_tokens] * len(prompts))}
    num_left = len(prompts)
    while num_left:
        for response in generator.next()[1]:
            tokens[response.uid].append(int(response.token))
            num_left -= response.finish_reason is not None
    generator.close()
    return list(tokens.values())


PARTS = [
    Part(
        chat,
        "Tokens of each prompt that are computed; without what earlier requests left, it would be the whole prompt",
        {
            "turn": ("", ""),
            "prompt": ("tokens of the prompt", ",d"),
            "mlx-paged computed": ("computed by mlx-paged", ",d"),
            "mlx_lm.server computed": ("by mlx_lm.server", ",d"),
            "mlx-paged first_ms": ("first text, ms, mlx-paged", ",.0f"),
            "mlx_lm.server first_ms": ("mlx_lm.server", ",.0f"),
        },
    ),
    Part(
        short_prompts,
        "Short prompts of unequal lengths at once",
        {
            "family": ("model", ""),
            "tokens": ("tokens each", "d"),
            "mlx-paged s": ("mlx-paged, s", ".2f"),
            "mlx_lm s": ("BatchGenerator, s", ".2f"),
            "ratio": ("ratio", ".2f"),
            "mlx-paged right": ("right rows, mlx-paged", ""),
            "mlx_lm right": ("BatchGenerator", ""),
        },
    ),
]

if __name__ == "__main__":
    report.main("hybrids.py", __doc__ or "", PARTS, mlx_lm=mlx_lm.__version__)
