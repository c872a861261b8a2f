"""The code that the pages name: `Name`, `Name.attribute` or `function`, in whatever module of the package it is."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAME = r"[A-Z]\w*(?:\.\w+)*|[a-z]+(?:_[a-z]+)+"
"""A class, something of it, or a function with two words in its name."""


@cache
def definitions() -> dict[str, list[Any]]:
    """The classes and functions of the package by name."""
    found: dict[str, list[Any]] = defaultdict(list)
    for file in [*(ROOT / "mlx_paged").rglob("*.py"), *(ROOT / "models").glob("*.py")]:
        relative = file.relative_to(ROOT).with_suffix("")
        parts = [part for part in relative.parts if part != "__init__"]
        if parts[-1] == "__main__":
            continue
        name = ".".join(parts if parts[0] == "mlx_paged" else ["mlx_paged", *parts])
        for key, value in vars(import_module(name)).items():
            if getattr(value, "__module__", None) == name and (inspect.isclass(value) or callable(value)):
                found[key].append(value)
    return found


def look_up(name: str) -> Any:
    """What a name stands for; None for a field of a class. Raises AssertionError if there is none."""
    first, *rest = name.split(".")
    candidates = definitions().get(first, [])
    assert candidates, f"{name}: there is no {first}"
    assert len(candidates) == 1 or not rest, f"{name}: {len(candidates)} definitions of {first}"
    value = candidates[0]
    for part in rest:
        fields = {field for each in getattr(value, "__mro__", ()) for field in inspect.get_annotations(each)}
        assert part in fields or hasattr(value, part), f"{name}: there is no {part}"
        value = getattr(value, part, None)
    return value


def file_of(name: str) -> str:
    """The file that defines what a name begins with, from the top of the repository."""
    assert len(definitions()[name.split(".")[0]]) == 1, name
    return str(Path(inspect.getfile(look_up(name.split(".")[0]))).resolve().relative_to(ROOT.resolve()))


def names_in(text: str) -> list[str]:
    """The names of classes, and of what is in them, in code spans; of functions only those that there are."""
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(NAME, span)]
    return [span for span in spans if span[0].isupper() or span in definitions()]
