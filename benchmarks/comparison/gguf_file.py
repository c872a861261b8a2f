"""Write a model's weights as a GGUF file, so that llama.cpp runs the same ones. Takes the package `gguf`."""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

ARCHITECTURES = {"llama": "LLAMA", "gemma3_text": "GEMMA3"}
_WINDOW_EVERY = 6  # of Gemma 3's layers the sixth has no window


@cache
def gguf_in(folder: str, model: Path, script: str, server: str) -> Path:
    """Write a model's file into a folder, once, for a script. Ends it with a line where that, or a server, can't be."""
    try:
        write_gguf(model, file := Path(folder) / "model.gguf")
    except (ImportError, ValueError) as error:
        sys.exit(f"{script}: --llama-server: {error}")
    if shutil.which(server) is None:
        sys.exit(f"{script}: --llama-server {server} is no program: docs/benchmarks.md has how to build it")
    return file


def write_gguf(model: Path, file: Path) -> None:
    """Write a folder's float32 model. Raises ValueError for one of another family.

    Its tokens are in it by name and order; prompts are token ids, so that nothing depends on how llama.cpp splits text.
    """
    import gguf

    config = json.loads((model / "config.json").read_text())
    family = config["model_type"]
    if family not in ARCHITECTURES or config.get("quantization") or config.get("rope_scaling"):
        raise ValueError(f"a GGUF file is written of plain {' and '.join(ARCHITECTURES)} models, not of {model}")
    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[family])
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[architecture])
    _add_shape(writer, config)
    _add_tokens(writer, model, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for part in sorted(model.glob("*.safetensors")):
        for name, weights in mx.load(str(part)).items():
            array = np.array(weights.astype(mx.float32))
            layer = name.split(".")[-2]
            if family == "llama" and layer in heads:  # llama.cpp turns neighbours, the others halves
                rows, columns = array.shape
                array = array.reshape(heads[layer], 2, -1, columns).swapaxes(1, 2).reshape(rows, columns)
            elif family == "gemma3_text" and layer.endswith("norm"):
                array = array + 1  # which the others add when they run
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if window := config.get("sliding_window"):
        assert config["sliding_window_pattern"] == _WINDOW_EVERY
        writer.add_sliding_window(window)
    writer.add_vocab_size(config["vocab_size"])


def _add_tokens(writer: Any, model: Path, config: dict[str, Any]) -> None:
    import gguf

    tokenizer = json.loads((model / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    by_id = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = [by_id.get(number, f"<unused {number}>") for number in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if config["model_type"] == "llama" else "default")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([kinds[number in special] for number in range(len(tokens))])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    if (template := model / "chat_template.jinja").exists():
        writer.add_chat_template(template.read_text())
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
