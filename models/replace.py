"""Methods of other people's classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Method = Callable[..., Any]


def replace_method(cls: type, name: str, make: Callable[[Method], Method]) -> None:
    """Put `make(method)` in the place of a method, once: the class may be that of several models."""
    original = getattr(cls, name)
    made_by = getattr(original, "made_by", ())
    if make not in made_by:
        method = functools.wraps(original)(make(original))
        method.made_by = (*made_by, make)  # type: ignore[attr-defined]
        setattr(cls, name, method)
