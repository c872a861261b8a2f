"""What takes long to compile holds up nobody but who waits for it, and what is deep does not end the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.grammars import END, PADDED

from mlx_paged import SamplingParams
from mlx_paged.sampling import compilations as module
from mlx_paged.sampling.compilations import Compilations
from mlx_paged.sampling.grammar import GrammarCompiler, check


def test_who_waits_too_long_is_told_and_who_asks_again_gets_what_has_come_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, calls = threading.Event(), []

    def slow(key: str) -> Callable[[], str]:
        def compile_() -> str:
            calls.append(key)
            assert go_on.wait(60)
            return key

        return compile_

    kept: Compilations[str] = Compilations(9)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, "TIMEOUT_S", 0.05)
            for key in ("a", "b", "a", "c"):  # c never begins: two are compiled already
                with pytest.raises(TimeoutError):
                    kept.get(key, slow(key))
            assert sorted(calls) == ["a", "b"]
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(kept.get, key, slow(key)) for key in ("a", "b", "c")]
            go_on.set()
            assert [each.result() for each in waiting] == ["a", "b", "c"]
    finally:
        go_on.set()
    assert sorted(calls) == ["a", "b", "c"]


def test_what_can_not_be_compiled_is_not_kept_and_its_place_is_free_again() -> None:
    def broken() -> None:
        raise ValueError("no")

    kept: Compilations[None] = Compilations(9)
    for _ in range(module.MAX_AT_ONCE + 1):
        with pytest.raises(ValueError, match="no"):
            kept.get("a", broken)
    assert len(kept) == 0


RULES = 8000


@pytest.mark.parametrize(
    "deep",
    [
        {"grammar": "start: T0\n" + "\n".join(f'T{i}: "a" T{i + 1}' for i in range(RULES)) + f'\nT{RULES}: "b"'},
        {
            "json_schema": {
                "$ref": "#/$defs/0",
                "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(RULES)} | {str(RULES): {"const": 1}},
            }
        },
    ],
    ids=["rules", "references"],
)
def test_rules_that_lead_on_and_on_do_not_end_the_process(deep: Any, tokenizer: Any) -> None:
    params = SamplingParams(**deep)
    check(params)
    matcher = GrammarCompiler(tokenizer, PADDED, [END]).matcher(params)
    assert matcher.mask().any()
    del matcher
