"""How much a test tries: little in every run, much with MLX_PAGED_LONG_TESTS=1."""

from __future__ import annotations

import os

LONG = bool(int(os.environ.get("MLX_PAGED_LONG_TESTS") or 0))


def budget(short: int, long: int) -> int:
    """Rounds, examples or requests to try: `short` takes seconds, `long` is for a run of hours."""
    return long if LONG else short
