"""A model folder whose answers are known: the real engine, tokenizer, template, parser and stream, but no luck.

A Qwen2 of one layer with its attention and MLP at zero: the next token depends on the last one alone (embedding ->
output head), so each generation prompt that the chat template can write starts one chain of tokens. The template picks
the chain: after a tool's result, or without tools, `answer`; with a tool of a chain's name the chain that calls it; a
system text "SCRIPT:name" picks a chain by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

#: Each chain's pieces are tokens of its own; a marker may stand in one chain only, elsewhere it is written in pieces
#: ("<tool" + "_call>"), as a tokenizer does that merges a marker with its neighbour.
CHAINS = {
    "answer": ["All ", "done", ": the tool ", "said so", "."],
    "exec_command": [
        "<think>",
        "I should ",
        "run it.",
        "</think>",
        "\n\n",
        "<tool_call>",
        '\n{"name": "exec_command", ',
        '"arguments": {"cmd": "echo mark',
        'er-7"}}\n',
        "</tool_call>",
    ],
    "Bash": [
        "Let me ",
        "look.\n",
        "<tool",
        "_call>\n",
        '{"name": "Bash", "argu',
        'ments": {"command": "echo marker-7", ',
        '"description": "say it"}}',
        "\n</tool",
        "_call>",
    ],
    "bash": [
        "<t",
        'ool_call>{"name": "ba',
        'sh", "arguments": {"command": "echo marker-7", "description": "say"}}',
        "</t",
        "ool_call>",
    ],
    "run_commands": [
        '<tool_call>\n{"name": "run',
        '_commands", "arguments": {"commands": ["echo marker-7',
        '"]}}\n</tool',
        "_call>\n\n",
    ],
    "get_weather": [
        "<tool_c",
        'all>\n{"name": "get_weather", "arg',
        'uments": {"city": "Pa',
        'ris \\u00e9\\n\\"x\\""}}\n</too',
        "l_call>",
    ],
    "get_time": [
        "<thin",
        "k>It is the time ",
        "that they want.</thi",
        "nk>\n\n<tool_call>\n",
        '{"name": "get_time", "arguments": {}}\n</t',
        "ool_call>\n",
    ],
    "two_calls": [
        "<tool_ca",
        'll>{"name": "get_weather", "arguments": {"city": "A"}}',
        "</tool_c",
        "all>\n<to",
        'ol_call>{"name": "get_weather", "arguments": {"city": "B"}}',
        "</tool_cal",
        "l>",
    ],
    "open_call": ["<tool_cal", 'l>\n{"name": "get_weather", "arguments": {"ci', 'ty": "Par'],
    "bad_json": ["Hm. ", "<tool_call", '>\n{"name": "get_weather", "arguments": {city: nope}}', "\n</tool_call", ">"],
    "not_a_tool": ["Write a < b, then <to", "ols> and <think", "ing>, never a call", " <tool_cal"],
    "unknown_tool": ["<tool_call>\n{", '"name": "no_such_tool", "arguments": {}}\n</tool_call>'],
    "is_so": ['{"is_so": ', "true}"],
    "whole_file": ["\nmark", "er.txt\n```\nmarker", "-7\n``", "`\n"],
    "emoji": ["\u00f0\u0178"],  # replaced below by the byte tokens of an emoji, split over four tokens
    "hostile": [
        "<img src=x onerror=\"document.title='taken'\">",
        "<script>document.title='taken'</script>\n",
        "```html\n<b>bold</b>\n```\n",
        "<a href='javascript:0'>link</a>",
    ],
    "endless": ["tick ", "tack "],
}
TEMPLATE = """
{%- set s = namespace(chain='answer') -%}
{%- if tools -%}
  {{- '<|im_start|>system\\nTools:' -}}
  {%- for t in tools -%}
    {{- '\\n' + (t | tojson) -}}
    {%- if t.function.name in CHAINS -%}{%- set s.chain = t.function.name -%}{%- endif -%}
  {%- endfor -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  STRICT
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {{- m.content if m.content is string else '' -}}
  {%- for call in m.tool_calls or [] -%}
    {%- set tool_call = call.function -%}
    {{- '<tool_call>' + tool_call.name + ' ' + (tool_call.arguments | tojson) + '</tool_call>' -}}
  {%- endfor -%}
  {{- '<|im_end|>\\n' -}}
  {%- if m.role == 'tool' -%}{%- set s.chain = 'answer' -%}{%- endif -%}
  {%- if m.role == 'system' and m.content.startswith('SCRIPT:') -%}
    {%- set s.chain = m.content.split(':')[1].split()[0] -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n<|run_' + s.chain + '|>' -}}
{%- endif -%}"""
STRICT = """
  {%- if m.role == 'system' and not loop.first -%}
    {{- raise_exception('System message must be at the beginning.') -}}
  {%- endif -%}"""


def make_scripted_model(
    folder: Path,
    *,
    context: int = 131072,
    strict: bool = False,
    texts: Sequence[str] = ((__doc__ or "") * 50,),
    vocab_size: int = 1200,
    pipe: str = "",
) -> Path:
    """Write the model into a folder.

    strict: its template refuses a system message that is not the first. texts: what tokens are made of, at most
    vocab_size; the more like a prompt they are, the fewer tokens it has. pipe: what the commands are followed by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chains = {name: [piece.replace("er-7", f"er-7{pipe}") for piece in chain] for name, chain in CHAINS.items()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    starts = [f"<|run_{name}|>" for name in CHAINS]
    pieces = [p for name, chain in chains.items() if name != "emoji" for p in chain if p not in MARKERS]
    assert len(set(pieces)) == len(pieces), [p for p in pieces if pieces.count(p) > 1]
    data = json.loads(tokenizer.to_str())
    byte_of = _bytes_to_unicode()
    vocab = data["model"]["vocab"]
    ids = {t["content"]: t["id"] for t in data["added_tokens"]}
    # A piece has an id but no merge leads to it, so no prompt ever contains it: only the model writes it.
    for piece in pieces:
        ids[piece] = vocab.setdefault("".join(byte_of[b] for b in piece.encode()), len(vocab))
    for content in [*starts, *MARKERS]:
        ids[content] = vocab.setdefault(content, len(vocab))
        data["added_tokens"].append(
            {
                "id": ids[content],
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": content in starts,
            }
        )
    next_id = len(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    emoji = [vocab[byte_of[b]] for b in "\U0001f600".encode()]

    size = -(-next_id // 64) * 64
    successor: dict[int, int] = {}

    def link(a: int, b: int) -> None:
        assert successor.setdefault(a, b) == b, f"token {a} has two successors: {b}, {successor[a]}"

    end = ids["<|im_end|>"]
    for name, chain in chains.items():
        steps = [ids[f"<|run_{name}|>"], *(emoji if name == "emoji" else [ids[p] for p in chain])]
        for a, b in itertools.pairwise(steps):
            link(a, b)
        link(steps[-1], steps[1] if name == "endless" else end)
    states = sorted(successor)
    hidden = 64 * -(-(len(states) + 1) // 64)
    embed, head = np.zeros((size, hidden), np.float32), np.zeros((size, hidden), np.float32)
    embed[:, 0] = 1.0  # every other token: what follows is the end
    for i, token in enumerate(states, start=1):
        embed[token] = 0.0
        embed[token, i] = 1.0
        head[successor[token], i] = 1.0
    head[end, 0] = 1.0
    scale = 30.0 / np.sqrt(hidden)  # a logit of 30 for the one that follows: sure at any temperature up to 2
    weights = {
        "model.embed_tokens.weight": embed,
        "lm_head.weight": (head * scale).astype(np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    p = "model.layers.0."
    heads, kv = hidden // 64, 1
    for name, (rows, cols) in {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (64 * kv, hidden),
        "self_attn.v_proj": (64 * kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (64, hidden),
        "mlp.up_proj": (64, hidden),
        "mlp.down_proj": (hidden, 64),
    }.items():
        weights[f"{p}{name}.weight"] = np.zeros((rows, cols), np.float32)
        if name.split(".")[1][0] in "qkv" and name.startswith("self_attn") and not name.endswith("o_proj"):
            weights[f"{p}{name}.bias"] = np.zeros(rows, np.float32)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{p}{name}.weight"] = np.ones(hidden, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "vocab_size": size,
                "hidden_size": hidden,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": heads,
                "num_key_value_heads": kv,
                "max_position_embeddings": context,
                "rope_theta": 1e6,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
                "torch_dtype": "float32",
                "eos_token_id": end,
                "bos_token_id": None,
            },
            indent=1,
        )
    )
    chain_list = "[" + ", ".join(f"'{n}'" for n in CHAINS) + "]"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": context,
                "clean_up_tokenization_spaces": False,
                "chat_template": TEMPLATE.replace("CHAINS", chain_list).replace("STRICT", STRICT if strict else ""),
            },
            indent=1,
        )
    )
    return folder


def _bytes_to_unicode() -> list[str]:
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, n = [], 0
    for b in range(256):
        if b in kept:
            table.append(chr(b))
        else:
            table.append(chr(256 + n))
            n += 1
    return table
