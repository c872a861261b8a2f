"""Run the parts of a benchmark that has a process for each in this process, where stubs are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def run_here(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], script: str, *arguments: object) -> str:
    """Call `main` as a script with these arguments. Returns how it ended, in words: nothing if all was well."""
    report, limited = (importlib.import_module(name) for name in ("report", "limited"))

    def called_with(words: Sequence[object]) -> Any:
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        try:
            main()
        except SystemExit as end:
            return end.code
        return 0

    def run_part(command: Sequence[object], limit_s: float) -> Any:
        code = called_with(command[1:])
        return limited.Ended(None if code == 130 else 1 if code else 0, 0.5, f"what it says: {code}")

    monkeypatch.setattr(report, "run_limited", run_part)
    return str(called_with([script, *arguments]) or "")
