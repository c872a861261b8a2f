"""Small tokenizers of other kinds than the demo model's."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["▁", "▁a", "▁the", "th", "at", "▁12", "12", '{"', '":', '"}', "x", "true", "▁true", "false", "é"]


def llama_style() -> TokenizerWrapper:
    """Pieces with ▁ for a space and a token for every byte."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += WORDS + [chr(c) for c in range(33, 127) if chr(c) != "x"]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(backend)


def unigram() -> TokenizerWrapper:
    """A sentencepiece model of whole pieces with scores, without tokens for bytes."""
    pieces = ["<unk>", "<s>", "</s>"] + WORDS + [chr(c) for c in range(33, 127) if chr(c) != "x"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(backend)


def byte_level() -> TokenizerWrapper:
    """GPT-2's alphabet of bytes, with few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ('"', ":"), ("{", '"'), ("Ġ", "a"), ("1", "2")]
    pieces = ["<unk>", "<s>", "</s>", *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> TokenizerWrapper:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return TokenizerWrapper(fast)
