"""Ways through a grammar with the demo model's tokens, and schemas to walk through."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from mlx_paged import SamplingParams
from mlx_paged.sampling.grammar import GrammarCompiler, GrammarMatcher
from mlx_paged.sampling.thinking import ThinkingMatcher

END, OTHER_END = 4, 0  # <|end|> and <|endoftext|> of the demo tokenizer
VOCAB_SIZE = 1600
PADDED = 1637  # logits of a model that has more of them than its tokenizer has tokens


def ids(mask: np.ndarray) -> list[int]:
    """The token ids that a mask allows."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def after(compiler: GrammarCompiler, tokenizer: Any, text: str, **grammar: Any) -> GrammarMatcher:
    """A matcher that has taken in `text`."""
    matcher = compiler.matcher(SamplingParams(**grammar))
    for token in tokenizer.encode(text, add_special_tokens=False) if text else []:
        matcher.advance(token)
    return matcher


def accepts(compiler: GrammarCompiler, tokenizer: Any, text: str, **grammar: Any) -> bool:
    """Whether `text` is complete in a grammar."""
    try:
        return bool(set(ids(after(compiler, tokenizer, text, **grammar).mask())) & {END, OTHER_END})
    except ValueError:
        return False


def walk(
    matcher: GrammarMatcher | ThinkingMatcher, seed: int, ends: Collection[int] = (END,), most_tokens: int = 3000
) -> list[int]:
    """A random way through a grammar: tokens chosen uniformly among those allowed, without the end token."""
    chance = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < most_tokens:
        if matcher.is_finished:
            assert set(ids(matcher.mask())) == set(ends)
            return tokens
        token = chance.choice(ids(matcher.mask()))
        matcher.advance(token)
        if token in ends:
            assert matcher.is_finished
            return tokens
        tokens.append(token)
    raise AssertionError("the grammar does not come to an end")


def texts(compiler: GrammarCompiler, tokenizer: Any, num: int = 25, **grammar: Any) -> list[str]:
    """The texts of random ways through a grammar."""
    params = SamplingParams(**grammar)
    return [tokenizer.decode(walk(compiler.matcher(params), seed)) for seed in range(num)]


def closed(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    """The schema of an object with these properties and no others, all required but the `optional` ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_text(value: object, shortest: int, longest: int) -> bool:
    return isinstance(value, str) and shortest <= len(value) <= longest


ENUM = ["red", "re", 7, None, [1, {"a": True}]]
POINT = closed({"x": {"type": "integer", "minimum": -12, "maximum": 305}, "y": {"type": "integer", "minimum": 7}})
TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": closed(
            {"leaf": {"enum": ["a", "b"]}, "sub": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}},
            "sub",
        )
    },
}


def is_point(value: Any) -> bool:
    return list(value) == ["x", "y"] and is_int(value["x"], -12, 305) and is_int(value["y"], 7, 10**400)


def is_tree(value: Any) -> bool:
    return (
        list(value) in (["leaf"], ["leaf", "sub"])
        and value["leaf"] in ("a", "b")
        and len(value.get("sub", [])) <= 1
        and all(map(is_tree, value.get("sub", [])))
    )


SCHEMAS: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "integers in ranges": (POINT, is_point),
    "enum of several types": ({"enum": ENUM}, lambda v: v in ENUM),
    "boolean or null": ({"type": ["boolean", "null"]}, lambda v: v is None or isinstance(v, bool)),
    "array of lengths": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
        lambda v: 2 <= len(v) <= 5 and all(isinstance(item, bool) for item in v),
    ),
    "tuple": (
        {"type": "array", "prefixItems": [{"const": "p"}, {"type": "integer"}], "items": False, "minItems": 2},
        lambda v: len(v) == 2 and v[0] == "p" and isinstance(v[1], int),
    ),
    "string of any characters": ({"type": "string", "minLength": 4, "maxLength": 30}, lambda v: is_text(v, 4, 30)),
    "string of a pattern": (
        {"type": "string", "pattern": '^["\\\\\\n/]{3,9}$'},
        lambda v: bool(re.fullmatch(r'["\\\n/]{3,9}', v)),
    ),
    "date": ({"type": "string", "format": "date"}, lambda v: bool(re.fullmatch(r"\d{4}-\d\d-\d\d", v))),
    "number": (
        {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
        lambda v: isinstance(v, int | float) and 0 < v <= 2.5,
    ),
    "nested": (
        closed({"name": {"type": "string", "maxLength": 8}, "at": POINT, "note": {"type": "null"}}, "note"),
        lambda v: (
            list(v) in (["name", "at"], ["name", "at", "note"])
            and is_text(v["name"], 0, 8)
            and is_point(v["at"])
            and v.get("note") is None
        ),
    ),
    "reference to itself": (TREE, is_tree),
    "any of": (
        {"anyOf": [closed({"a": {"const": 1}}), closed({"a": {"const": 2}, "b": {"const": 3}})]},
        lambda v: v in ({"a": 1}, {"a": 2, "b": 3}),
    ),
    "awkward names": (
        closed({'"\\\n': {"const": 1}, "é🙂": {"const": "\u0001 é🙂"}}),
        lambda v: v == {'"\\\n': 1, "é🙂": "\u0001 é🙂"},
    ),
}
