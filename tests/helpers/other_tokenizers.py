"""Small tokenizers of other kinds than the demo model's."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
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


def metaspace() -> TokenizerWrapper:
    """As `unigram`, with the decoder that leaves every ▁ out of a text's first token."""
    return with_decoder(unigram(), decoders.Metaspace())


def wordpiece(cleans_up: bool) -> TokenizerWrapper:
    """Words and their ends, as BERT has them. cleans_up: transformers takes spaces before punctuation away."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "do",
        "rest",
        "the",
        "##s",
        "##ing",
        "n",
        "##t",
        "##'",
        "m",
        "s",
        "##ve",
        "r",
        "'",
    ]
    pieces += [".", ",", "!", "n't", "'s", "é", "##\ufffd", "日", " ", "x '", "##  "]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=cleans_up)
    return wrapped(backend, clean_up_tokenization_spaces=cleans_up)


def misread_byte_level() -> TokenizerWrapper:
    """`byte_level`, loaded by a class that decodes as `llama_style` does: a space comes as Ġ."""
    return with_decoder(byte_level(), llama_style().backend_tokenizer.decoder)


def with_decoder(tokenizer: TokenizerWrapper, decoder: decoders.Decoder) -> TokenizerWrapper:
    tokenizer.backend_tokenizer.decoder = decoder
    return tokenizer


def wrapped(backend: Tokenizer, **settings: bool) -> TokenizerWrapper:
    """With a special token and a plain one added, as models have them."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names, **settings)
    fast.add_tokens([AddedToken("São Paulo", special=False)])
    return TokenizerWrapper(fast)
